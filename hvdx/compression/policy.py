"""Choose a method for each parameter."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from hvdx.comm import Work
from hvdx.compression.base import CompressionError, Compressor, Reduced, Spec
from hvdx.ops import Ops

Choice: TypeAlias = Callable[[str, tuple[int, ...], str], Any]
"""``(name, shape, dtype) -> compressor``, as a function that a user writes."""

Meant: TypeAlias = Callable[[Any], Compressor]
"""What makes a compressor of all that users may give as one."""


def by_layer(rules: Mapping[str, Any] | Choice, default: Any, meant: Meant) -> Compressor:
    """Return the compressor that leaves each parameter to what ``rules`` say.

    Args:
        rules: a compressor by pattern (``*``, ``?``, ``[...]``) of parameters' names, the first
            that matches counts; or a function.
        default: for names that no pattern matches.
        meant: what makes a compressor of such values.

    Raises:
        CompressionError: a pattern is no string; something is no compressor; or only some of
            those named apply momentum themselves.
    """
    if callable(rules):
        return _by_function(rules, meant)
    if not isinstance(rules, Mapping):
        raise CompressionError(
            f"Compression.by_layer({rules!r}): give a compressor by pattern, such as "
            "{'*.bias': hvd.Compression.none}, or a function (name, shape, dtype) -> compressor"
        )
    wrong = [pattern for pattern in rules if not isinstance(pattern, str)]
    if wrong:
        raise CompressionError(
            f"Compression.by_layer({{{wrong[0]!r}: ...}}): a pattern of names must be a string"
        )
    chosen = {pattern: _made(meant, value, repr(pattern)) for pattern, value in rules.items()}
    rest = _made(meant, default, "default")

    def policy(spec: Spec) -> Compressor:
        for pattern, compressor in chosen.items():
            if fnmatch.fnmatchcase(spec.name, pattern):
                return compressor.of(spec)
        return rest.of(spec)

    told = ", ".join(f"{pattern!r}: {each.name}" for pattern, each in chosen.items())
    name = f"by_layer({{{told}}}, default={rest.name})"
    everyone = [*chosen.values(), rest]
    owns = _agreed_on_momentum(everyone)
    stateful = any(each.stateful for each in everyone)
    compressor = _choosing(name, policy, stateful=stateful)._replace(owns_momentum=owns)
    if all(each.prepare is None for each in everyone):
        return compressor

    def prepare(adapter: Any, specs: list[Spec], process_set: Any) -> Compressor:
        """Prepare each with the parameters that will be its own."""
        own: dict[str, list[Spec]] = {pattern: [] for pattern in chosen}
        others: list[Spec] = []
        for spec in specs:
            fitting = (p for p in chosen if fnmatch.fnmatchcase(spec.name, p))
            own.get(next(fitting, ""), others).append(spec)
        ready = {p: _prepared(each, adapter, own[p], process_set) for p, each in chosen.items()}
        return by_layer(ready, _prepared(rest, adapter, others, process_set), meant)

    return compressor._replace(prepare=prepare)


def _by_function(function: Choice, meant: Meant) -> Compressor:
    title = getattr(function, "__qualname__", type(function).__qualname__)

    def policy(spec: Spec) -> Compressor:
        value = function(spec.name, spec.shape, spec.dtype)
        compressor = _made(meant, value, f"{title} for {spec.name!r}").of(spec)
        told = f"Compression.by_layer({title}): the function chose {compressor} for {spec.name!r}"
        if compressor.owns_momentum:
            raise CompressionError(
                f"{told}, which applies momentum itself. Give a dictionary of patterns, so that "
                "the optimizer's momentum can be checked before training"
            )
        if compressor.prepare is not None:
            raise CompressionError(
                f"{told}, which measures before training and must know its parameters by then: "
                "give a dictionary of patterns"
            )
        return compressor

    return _choosing(f"by_layer({title})", policy, stateful=True)


def _choosing(name: str, policy: Callable[[Spec], Compressor], *, stateful: bool) -> Compressor:
    def init(ops: Ops, spec: Spec) -> Any:
        return policy(spec).init(ops, spec)

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        yield from ()
        raise CompressionError(
            f"compression={name} chooses by a parameter's name, which is not known here: give it "
            "to an optimizer"
        )

    return Compressor(name, init, reduce, stateful=stateful, policy=policy)


def _made(meant: Meant, value: Any, place: str) -> Compressor:
    try:
        made = meant(value)
    except CompressionError as error:
        raise CompressionError(f"Compression.by_layer, {place}: {error}") from None
    if made.sharers != 1:
        raise CompressionError(
            f"Compression.by_layer, {place}: {made} goes around the whole: "
            "hierarchical(by_layer(...))"
        )
    return made


def _prepared(
    compressor: Compressor, adapter: Any, specs: list[Spec], process_set: Any
) -> Compressor:
    if compressor.prepare is None or not specs:
        return compressor
    return compressor.prepare(adapter, specs, process_set)


def _agreed_on_momentum(compressors: Iterable[Compressor]) -> bool:
    """Tell whether the optimizer's momentum must be off, which then is so for all parameters."""
    owning = [each for each in compressors if each.owns_momentum]
    others = [each for each in compressors if not each.owns_momentum]
    if owning and others:
        raise CompressionError(
            f"Compression.by_layer: {owning[0]} applies momentum itself, so that the optimizer "
            f"must not, and parameters of {others[0]} would get none. Give them theirs: "
            "hvd.compression.momentum(0.9, hvd.Compression.none)"
        )
    return bool(owning)
