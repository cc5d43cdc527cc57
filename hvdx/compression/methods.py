"""``hvd.Compression``: every method by its name, with the wrappers it needs."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdx.compression import codecs
from hvdx.compression.base import (
    CompressionError,
    Compressor,
    fp16,
    from_horovod,
    none,
    remembered,
)
from hvdx.compression.exchange import exchange
from hvdx.compression.feedback import check_momentum, error_feedback, min_size, only_floats
from hvdx.compression.feedback import momentum as with_momentum
from hvdx.compression.hierarchy import hierarchical
from hvdx.compression.local import Local, diloco, local_sgd
from hvdx.compression.policy import by_layer
from hvdx.compression.powersgd import alternating_power_sgd, power_sgd
from hvdx.compression.sparse import deep_gradient_compression, random_k, top_k
from hvdx.compression.updates import coded

_SMALL = 1024  # parameters of fewer elements travel raw where each is compressed alone


class Compression:
    """The compressors of hvdx, by name: ``compression=hvd.Compression.powersgd(rank=4)``.

    A method that takes options may be given without calling it, for its defaults. Gradients
    are compressed in float32; those that are no floats, as complex ones, travel raw. Infinities
    and NaN reach all ranks, and leave error feedback as it was.

    Of sparse gradients the rows are gathered, under ``fp16`` and ``bf16`` with 2 bytes a number,
    under the other methods, but ``none``, with 8 bits.

    - ``none``: the gradient as it is.
    - ``fp16``: float16 on the wire. Divides before it sums and saturates at ±60000, where
      Horovod's sums first and turns one large value into inf.
    - ``bf16``: bfloat16 on the wire, summed in float32.
    """

    none = none
    fp16 = fp16
    bf16 = only_floats(exchange(codecs.bfloat16()))._replace(
        rows=lambda columns: codecs.bfloat16(), updates=coded(codecs.bfloat16())
    )

    @staticmethod
    def int8(feedback: bool = False, rounding: str = "nearest", seed: int = 0) -> Compressor:
        """8 bits an element and a power-of-two scale for every 256.

        Args:
            feedback: send later what rounding lost; seldom needed with 8 bits, but may be where
                an optimizer, as Adam, makes much of small elements.
            rounding: ``"nearest"``, or ``"stochastic"``: up or down at random, so that the mean
                of many steps, or ranks, has no bias. It errs twice as much in a single step.
            seed: of stochastic rounding, equal on all ranks.
        """
        return _integers("int8", 8, 256, feedback, rounding, seed)

    @staticmethod
    def int4(feedback: bool = True, rounding: str = "nearest", seed: int = 0) -> Compressor:
        """4 bits an element and a power-of-two scale for every 128, with error feedback.

        Args:
            feedback: send later what rounding lost.
            rounding: as in :meth:`int8`; ``"stochastic"`` with or without feedback.
            seed: of stochastic rounding, equal on all ranks.
        """
        return _integers("int4", 4, 128, feedback, rounding, seed)

    @staticmethod
    def onebit(
        feedback: bool = True, min_elements: int = _SMALL, scales: str = "blocks"
    ) -> Compressor:
        """Signs, and the mean magnitude of every 1024 elements, with error feedback.

        Args:
            feedback: without it SGD stalls; docs/compression.md shows what Adam makes of it.
            min_elements: smaller parameters, and vectors, travel raw.
            scales: ``"matrix"`` tells also a power of two for each row and column of a
                parameter's matrix: closer by far where these differ, as in transformers, for a
                few percent more bytes and one more operation a step. ``"blocks"``: none.
        """
        _check_whole("onebit", "min_elements", min_elements)
        if scales not in ("blocks", "matrix"):
            raise CompressionError(
                f"Compression.onebit(scales={scales!r}): use 'blocks' or 'matrix'"
            )
        sized = codecs.sized_signs(1024) if scales == "matrix" else None
        compressor = _quantised(codecs.signs(1024), feedback, sized=sized)
        return _finished(
            min_size(min_elements, compressor),
            min_elements=(min_elements, _SMALL),
            scales=(scales, "blocks"),
        )

    @staticmethod
    def topk(density: float = 0.01, min_elements: int = _SMALL) -> Compressor:
        """The largest ``density`` of each parameter's elements, with error feedback.

        Args:
            density: share of the elements, above 0 and at most 1.
            min_elements: smaller parameters, and vectors, travel raw.
        """
        _check_density("topk", density)
        _check_whole("topk", "min_elements", min_elements)
        compressor = min_size(min_elements, top_k(density))
        return _finished(compressor, min_elements=(min_elements, _SMALL))

    @staticmethod
    def dgc(
        density: float = 0.001,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        min_elements: int = _SMALL,
    ) -> Compressor:
        """Deep gradient compression: top-k of momentum. The optimizer's momentum must be off.

        Args:
            density: share of the elements sent, above 0 and at most 1.
            momentum: applied before the choice, from 0 to below 1; for parameters that travel
                raw, to their means.
            warmup_steps: steps over which the density falls from 25 % to ``density``.
            min_elements: smaller parameters, and vectors, travel raw.
        """
        _check_density("dgc", density)
        check_momentum("Compression.dgc", momentum)
        _check_whole("dgc", "warmup_steps", warmup_steps)
        _check_whole("dgc", "min_elements", min_elements)
        small = with_momentum(momentum) if momentum else none
        compressor = deep_gradient_compression(density, momentum, warmup_steps)
        return _finished(
            min_size(min_elements, compressor, small),
            warmup_steps=(warmup_steps, 0),
            min_elements=(min_elements, _SMALL),
        )

    @staticmethod
    def randomk(density: float = 0.01, min_elements: int = _SMALL, seed: int = 0) -> Compressor:
        """A comb of ``density`` of the elements, at another place each step, with error feedback.

        Every element travels once in 1/density steps, the same ones on all ranks.

        Args:
            density: share of the elements, above 0 and at most 1.
            min_elements: smaller parameters, and vectors, travel raw.
            seed: of where the comb begins, equal on all ranks.
        """
        _check_density("randomk", density)
        _check_whole("randomk", "min_elements", min_elements)
        compressor = min_size(min_elements, random_k(density, seed))
        return _finished(compressor, min_elements=(min_elements, _SMALL), seed=(seed, 0))

    @staticmethod
    def powersgd(
        rank: int = 4, min_elements: int = _SMALL, seed: int = 0, alternating: bool = False
    ) -> Compressor:
        """Two factors of ``rank`` columns of each parameter's matrix, with error feedback.

        Args:
            rank: at least 1. Parameters that it would not halve travel raw.
            min_elements: smaller parameters, and vectors, travel raw.
            seed: of the first factors, equal on all ranks.
            alternating: send one factor a step, in turns: half the latency and fewer bytes, for
                an approximation that follows the gradient half as quickly.
        """
        _check_whole("powersgd", "rank", rank, 1)
        _check_whole("powersgd", "min_elements", min_elements)
        method = alternating_power_sgd if alternating else power_sgd
        compressor = min_size(min_elements, method(rank, seed))
        return _finished(compressor, min_elements=(min_elements, _SMALL), seed=(seed, 0))

    @staticmethod
    def by_layer(
        rules: Mapping[str, Any] | Callable[[str, tuple[int, ...], str], Any], default: Any = none
    ) -> Compressor:
        """A method for each parameter, by its name: ``{"*.bias": none, "head.*": int8(), ...}``.

        Args:
            rules: compressors by pattern of names (``*``, ``?``, ``[...]``); the first that
                matches counts. Or a function ``(name, shape, dtype) -> compressor``, the same on
                all ranks.
            default: for parameters that no pattern matches.
        """
        return by_layer(rules, default, as_compressor)

    @staticmethod
    def hierarchical(compression: Any, local_size: int | None = None) -> Compressor:
        """Raw within a host, where the network is fast; ``compression`` between hosts.

        What is applied is what that method makes of the hosts' means, as if each host were one
        rank. Needs ``hvd.init(process_sets="dynamic")``, and hosts with equal numbers of ranks.

        Args:
            compression: any method but ``auto``.
            local_size: how many ranks, which follow each other, are near each other; by default
                those of a host, as the launcher says.
        """
        return hierarchical(as_compressor(compression), local_size)

    @staticmethod
    def auto(
        budget: str = "balanced",
        methods: Sequence[str | Compressor] | None = None,
        seconds: float = 1.0,
        verbose: bool = True,
        every: int = 500,
    ) -> Compressor:
        """What is quickest on this network, for each parameter; none where nothing pays.

        Measures the network and the methods when the optimizer's ranks first meet, and prints
        on rank 0 what it found. In training it tries some steps without, and goes on raw where
        they are no slower; and it measures the network again every so many steps, which takes
        at most a hundredth of the time. All ranks use what they have agreed on, and what error
        feedback owes is delivered before a method goes.

        Args:
            budget: how much error is allowed. ``"safe"``: fp16, bf16, int8; ``"balanced"``:
                also int4, powersgd and onebit; ``"bold"``: also topk and randomk.
            methods: names, or compressors, to choose from instead; those that err least first:
                of methods that are equally quick the first is taken.
            seconds: what measuring the network may take, roughly.
            verbose: print.
            every: steps after which to measure again; 0: never.
        """
        from hvdx.compression.auto import BUDGETS, automatic
        from hvdx.compression.review import Pace

        if methods is None:
            if budget not in BUDGETS:
                raise CompressionError(
                    f"Compression.auto(budget={budget!r}): use one of {', '.join(BUDGETS)}"
                )
            methods = BUDGETS[budget]
        if not seconds > 0:
            raise CompressionError(f"Compression.auto(seconds={seconds!r}): must be above 0")
        _check_whole("auto", "every", every)
        return automatic(candidates(methods), Pace(every, seconds, verbose))

    @staticmethod
    def local_sgd(steps: int = 8) -> Local:
        """Each rank trains alone for ``steps`` steps; then parameters are averaged.

        Args:
            steps: from 1, where plain SGD does as if gradients were averaged.
        """
        return local_sgd(steps)

    @staticmethod
    def diloco(
        steps: int = 32,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        compression: Any = None,
    ) -> Local:
        """Each rank trains alone for ``steps`` steps; an outer optimizer applies the changes.

        Their mean over the ranks is the gradient of SGD with Nesterov momentum. Inner
        optimizers, usually AdamW, keep their state to themselves.

        Args:
            steps: from 1.
            outer_lr: above 0; 1 without momentum averages parameters.
            outer_momentum: 0 or more and below 1.
            compression: of the changes: any method but ``dgc``; ``int8`` by default.
        """
        inner = as_compressor(Compression.int8 if compression is None else compression)
        return diloco(steps, outer_lr, outer_momentum, inner)


def candidates(methods: Sequence[str | Compressor]) -> dict[str, Compressor]:
    """Return what ``Compression.auto`` may choose from, by name.

    Raises:
        CompressionError: something in ``methods`` cannot be chosen.
    """
    if isinstance(methods, (str, Compressor)) or not methods:
        raise CompressionError(
            f"Compression.auto(methods={methods!r}): give a list of methods, such as "
            "['fp16', 'powersgd']"
        )
    found: dict[str, Compressor] = {}
    for method in methods:
        known = isinstance(method, str) and method in _names() and method != "auto"
        made = as_compressor(getattr(Compression, str(method)) if known else method)
        if made.prepare or made.policy or made.owns_momentum or made.phases:
            raise CompressionError(
                f"Compression.auto(methods=...): it cannot choose {made}, which changes more "
                "than how a gradient travels"
            )
        if made is not none:
            found[method if isinstance(method, str) else made.name] = made
    return found


def _names() -> list[str]:
    return [name for name in vars(Compression) if not name.startswith("_")]


def _quantised(
    codec: codecs.Codec, feedback: bool, seed: int = 0, sized: codecs.Codec | None = None
) -> Compressor:
    compressor = exchange(codec, owner_feedback=feedback, seed=seed, sized=sized)
    if feedback:
        compressor = error_feedback(compressor)
    updates = None if codec.noisy else coded(codec)
    name = f"{codec.name}(feedback={feedback})"
    return _finished(compressor._replace(name=name, updates=updates))


def _integers(
    method: str, bits: int, block: int, feedback: bool, rounding: str, seed: int
) -> Compressor:
    if rounding not in ("nearest", "stochastic"):
        raise CompressionError(
            f"Compression.{method}(rounding={rounding!r}): use 'nearest' or 'stochastic'"
        )
    codec = codecs.integers(bits, block, stochastic=rounding == "stochastic")
    nearest = coded(codecs.integers(bits, block))
    compressor = _quantised(codec, feedback, seed)._replace(updates=nearest)
    return _finished(compressor, rounding=(rounding, "nearest"), seed=(seed, 0))


def _finished(compressor: Compressor, **options: tuple[Any, Any]) -> Compressor:
    """Leave what is no float out, and add options to the name by which ranks compare compressors.

    Options are given as (value, default).
    """
    more = "".join(f", {k}={value!r}" for k, (value, usual) in options.items() if value != usual)
    return only_floats(compressor)._replace(
        name=f"{compressor.name[:-1]}{more})",
        rows=lambda columns: codecs.integers(8, min(columns, 256)),
        updates=compressor.updates or coded(codecs.integers(8, 256)),
    )


def _check_whole(method: str, option: str, value: int, least: int = 0) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise CompressionError(
            f"Compression.{method}({option}={value!r}): {option} must be an integer from {least}"
        )


def _check_density(method: str, density: float) -> None:
    if not isinstance(density, numbers.Real) or not 0 < density <= 1:
        raise CompressionError(
            f"Compression.{method}(density={density!r}): density must be above 0 and at most 1"
        )


for _name, _kind in list(vars(Compression).items()):
    if isinstance(_kind, staticmethod):
        setattr(Compression, _name, staticmethod(remembered(_kind.__func__)))

_METHODS: list[Callable[..., Any]] = [
    getattr(Compression, name)
    for name, kind in vars(Compression).items()
    if isinstance(kind, staticmethod)
]


def as_local(value: Any) -> Local | None:
    """Return the way of training alone that is meant by ``value``, None if it means another."""
    if value in (Compression.local_sgd, Compression.diloco):
        value = value()
    return value if isinstance(value, Local) else None


def as_compressor(value: Any) -> Compressor:
    """Return the compressor meant by ``value``: one of ours, or a Horovod ``Compressor`` class.

    Raises:
        CompressionError: it is neither; the message lists what there is.
    """
    if isinstance(value, Compressor):
        return value
    if (local := as_local(value)) is not None:
        raise CompressionError(
            f"compression={local} is a way of training, and no way to average one tensor: give it "
            "to hvd.DistributedOptimizer alone, not to an operation, a tape or another method"
        )
    if value == Compression.by_layer:
        raise CompressionError(
            "compression=hvd.Compression.by_layer: call it, with a compressor by pattern of "
            "parameters' names"
        )
    if value == Compression.hierarchical:
        raise CompressionError(
            "compression=hvd.Compression.hierarchical: call it, with the method that serves "
            "between hosts"
        )
    if value in _METHODS:
        return value()  # type: ignore[no-any-return]
    if value is None or getattr(value, "__name__", "") == "NoneCompressor":
        return none
    if callable(getattr(value, "compress", None)) and callable(getattr(value, "decompress", None)):
        return from_horovod(value)
    known = ", ".join(f"hvd.Compression.{name}" for name in _names())
    raise CompressionError(
        f"unknown compression={value!r}; use one of {known}, or a class with static "
        "compress(tensor) -> (tensor, context) and decompress(tensor, context)"
    )
