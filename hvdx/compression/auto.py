"""``Compression.auto``: measure the network and the methods, then take what is quickest.

The time in which a step's gradients are exchanged is predicted as

    alpha * operations + beta * bytes sent + seconds of computing

where alpha and beta are measured for each kind of collective, and bytes and seconds by running
each method on gradients of the model's own shapes (:mod:`hvdx.link`). An operation serves a whole
bucket, so that alpha counts once for each round of each bucket, however many parameters it has.

Gradients may travel while backward goes on, and no method is free of error. So a method is taken
only where it saves a good part of the time, and, where trying is cheap, only if it also does so
when tried.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hvdx import buckets, link, world
from hvdx.agreement import next_name
from hvdx.comm import Allreduce, Work, together
from hvdx.compression.base import CompressionError, Compressor, Reduced, Spec, none
from hvdx.frameworks import Adapter
from hvdx.link import Footprint, Link, Message
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

#: What each budget allows. From left to right methods save more and err more: the first three
#: lose nothing that training notices, the next three little, the last two need patience.
BUDGETS = {
    "safe": ("fp16", "bf16", "int8"),
    "balanced": ("fp16", "bf16", "int8", "int4", "powersgd", "onebit"),
    "bold": ("fp16", "bf16", "int8", "int4", "powersgd", "onebit", "topk", "randomk"),
}
_SAVES = 0.2  # the share of the time that compressing must save
_ALIKE = 1.03  # within this factor of the best, the method that errs less is taken
_SMALL = 4096  # parameters of fewer elements travel raw, and so do vectors
_UNPREPARED = "Compression.auto chooses when the ranks of an optimizer meet, for its parameters"
_FLOATS = ("float32", "float64", "float16", "bfloat16")


class Form(NamedTuple):
    """What decides about a parameter: those of equal form are treated alike."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, spec: Spec) -> Form:
        """Return the form of a parameter."""
        return cls(tuple(spec.shape), spec.dtype)

    @property
    def compressible(self) -> bool:
        """Tell whether it is a matrix, large enough, of floats."""
        large = len(self.shape) > 1 and math.prod(self.shape) >= _SMALL
        return large and self.dtype in _FLOATS

    @property
    def bytes(self) -> int:
        """Return the bytes of a gradient."""
        return math.prod(self.shape) * buckets.width(self.dtype)


Choice = Mapping[Form, str]  # method by form; what is not in it travels raw


class Plan(NamedTuple):
    """A choice, and the seconds that a step's exchange takes with it, as predicted."""

    name: str
    choice: Choice
    seconds: float


class Model:
    """Predicts how long the exchange of all gradients takes.

    Args:
        link: the network.
        specs: the parameters, in the order in which gradients become ready.
        footprints: what a method takes for a form, by both.
        methods: those allowed, by name; the first errs least.
        limit: bytes of a bucket.
    """

    def __init__(
        self,
        link: Link,
        specs: Sequence[Spec],
        footprints: Mapping[tuple[str, Form], Footprint],
        methods: Mapping[str, Compressor],
        limit: int,
    ) -> None:
        self._link = link
        self._footprints = footprints
        self._methods = methods
        self._buckets = [[Form.of(spec) for spec in bucket] for bucket in laid_out(specs, limit)]
        self._forms = list(dict.fromkeys(form for bucket in self._buckets for form in bucket))

    def plans(self) -> list[Plan]:
        """Return the plans worth thinking of; no compression first, then as methods err."""
        made = [self._plan("none", {})]
        for name, method in self._methods.items():
            if method.elementwise:  # takes buckets as a whole
                made.append(self._plan(name, dict.fromkeys(self._forms, name)))
            else:
                best = {form: name for form in self._compressible() if self._gains(name, form)}
                if best:
                    made.append(self._plan(name, best))
        mixed = {form: self._quickest(form) for form in self._compressible()}
        mixed = {form: name for form, name in mixed.items() if name != "none"}
        if len(set(mixed.values())) > 1:
            made.append(self._plan("mixed", mixed))
        return made

    def predict(self, choice: Choice) -> float:
        """Return the seconds of a step's exchange."""
        whole = self._whole(choice)
        seconds = 0.0
        for bucket in self._buckets:
            operations = set()
            if not whole:  # beside the gradients, ranks tell each other which they have
                operations.add(_raw(bucket[0]).messages[0]._replace(payload=0))
            for form in bucket:
                footprint = self._footprint(choice.get(form, "none"), form)
                seconds += self._alone(footprint)
                operations.update(each._replace(payload=0) for each in footprint.messages)
            seconds += sum(self._link.alpha(each.kind) for each in operations)
        return seconds

    def sent(self, choice: Choice) -> float:
        """Return the bytes that a rank sends in a step."""
        return sum(
            self._link.sent(message.kind, message.payload)
            for bucket in self._buckets
            for form in bucket
            for message in self._footprint(choice.get(form, "none"), form).messages
        )

    def _plan(self, name: str, choice: Choice) -> Plan:
        return Plan(name, choice, self.predict(choice))

    def _whole(self, choice: Choice) -> bool:
        """Tell whether buckets travel as one flat tensor each."""
        chosen = {choice.get(form, "none") for form in self._forms}
        name = next(iter(chosen))
        return len(chosen) == 1 and (name == "none" or self._methods[name].elementwise)

    def _compressible(self) -> list[Form]:
        return [form for form in self._forms if form.compressible]

    def _footprint(self, name: str, form: Form) -> Footprint:
        if name == "none":
            return _raw(form)
        known = self._footprints.get((name, form))
        if known is not None:
            return known
        # An elementwise method is measured on large forms only; small ones are like them.
        return self._scaled(name, form)

    def _scaled(self, name: str, form: Form) -> Footprint:
        alike = [(f, made) for (n, f), made in self._footprints.items() if n == name]
        other, made = next((each for each in alike if each[0].dtype == form.dtype), (form, None))
        if made is None:
            return _raw(form)
        share = math.prod(form.shape) / math.prod(other.shape)
        messages = [each._replace(payload=int(each.payload * share)) for each in made.messages]
        return Footprint(made.seconds * share, tuple(messages))

    def _alone(self, footprint: Footprint) -> float:
        """Return the seconds of computing and sending, without what a whole bucket shares."""
        return footprint.seconds + sum(
            self._link.beta(message.kind) * self._link.sent(message.kind, message.payload)
            for message in footprint.messages
        )

    def _gains(self, name: str, form: Form) -> bool:
        return self._alone(self._footprint(name, form)) < self._alone(_raw(form))

    def _quickest(self, form: Form) -> str:
        names = ["none", *(n for n, method in self._methods.items() if not method.elementwise)]
        return min(names, key=lambda name: self._alone(self._footprint(name, form)))


def _raw(form: Form) -> Footprint:
    size, dtype = form.bytes, form.dtype
    if dtype == "bfloat16":
        size, dtype = 2 * size, "float32"
    return Footprint(0.0, (Message(0, f"allreduce {dtype}", "Average", size),))


def choose(plans: Sequence[Plan]) -> Plan:
    """Return the plan to follow: the first is none, the others come as they err."""
    raw = plans[0]
    best = min(plan.seconds for plan in plans)
    if best > (1 - _SAVES) * raw.seconds:
        return raw
    return next(plan for plan in plans if plan.seconds <= _ALIKE * best)


def laid_out(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    """Return the parameters by bucket, as engines lay them out."""
    entries = [buckets.Entry(spec.name, math.prod(spec.shape), spec.dtype, "") for spec in specs]
    return [[specs[place] for place in members] for members in buckets.plan(entries, limit)]


def automatic(methods: Mapping[str, Compressor], seconds: float, verbose: bool) -> Compressor:
    """Return the compressor that measures first; see ``Compression.auto``."""
    name = f"auto({', '.join(methods)})"

    def prepare(adapter: Adapter, specs: list[Spec], process_set: Any) -> Compressor:
        with adapter.at_once():
            return _prepared(name, adapter, specs, process_set, methods, seconds, verbose)

    return Compressor(name, _init, _reduce, stateful=True, prepare=prepare)


def _init(ops: Ops, spec: Spec) -> Any:
    raise CompressionError(_UNPREPARED)


def _reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
    raise CompressionError(_UNPREPARED)


def _prepared(
    name: str,
    adapter: Adapter,
    specs: list[Spec],
    process_set: Any,
    methods: Mapping[str, Compressor],
    seconds: float,
    verbose: bool,
) -> Compressor:
    if adapter.ranks(process_set) == 1 or not specs:
        return none
    start = time.perf_counter()
    network = link.measure(adapter, process_set, seconds)
    footprints = survey(adapter, methods, specs, process_set)
    model = Model(network, specs, footprints, methods, buckets.limit_bytes())
    plans = model.plans()
    chosen = choose(plans)
    tried: dict[str, float] = {}
    if chosen is not plans[0] and plans[0].seconds < seconds:
        for plan in (plans[0], chosen):
            use = _compressor(name, plan, methods)
            tried[plan.name] = try_out(adapter, use, specs, process_set)
        if tried[chosen.name] > (1 - _SAVES) * tried["none"]:
            chosen = plans[0]
    if verbose and world.rank() == 0:
        took = time.perf_counter() - start
        print(describe(network, model, plans, chosen, specs, tried, took), file=sys.stderr)
    return _compressor(name, chosen, methods)


def survey(
    adapter: Adapter,
    methods: Mapping[str, Compressor],
    specs: Sequence[Spec],
    process_set: Any = None,
) -> dict[tuple[str, Form], Footprint]:
    """Watch every method on every form worth compressing; equal on all ranks.

    Ranks of one machine compute at the same time, as they do in training.
    """
    forms = {Form.of(spec): spec for spec in specs if Form.of(spec).compressible}
    found = {
        (name, form): link.watch(adapter, method, spec)
        for form, spec in forms.items()
        for name, method in methods.items()
    }
    told = [made.seconds for made in found.values()]
    everyone = adapter.allgather_object(told, next_name("survey", process_set), process_set)
    slowest = map(max, zip(*everyone, strict=True))
    return {
        key: made._replace(seconds=seconds)
        for (key, made), seconds in zip(found.items(), slowest, strict=True)
    }


def _compressor(name: str, plan: Plan, methods: Mapping[str, Compressor]) -> Compressor:
    """Return what carries ``plan`` out."""
    used = dict.fromkeys(plan.choice.values())
    if not used:
        return none
    first = methods[next(iter(used))]
    if first.elementwise:
        return first
    table = {form: methods[method] for form, method in plan.choice.items()}
    return Compressor(
        f"{name[:-1]}: {', '.join(used)})",
        _init,
        _reduce,
        stateful=any(method.stateful for method in table.values()),
        policy=lambda spec: table.get(Form.of(spec), none),
    )


def try_out(
    adapter: Adapter, compressor: Compressor, specs: Sequence[Spec], process_set: Any
) -> float:
    """Return the seconds in which gradients like ``specs`` are exchanged; equal on all ranks."""
    name = next_name("trial", process_set)
    runs = [
        _exchange(adapter, compressor, bucket, f"{name}.{index}", process_set)
        for index, bucket in enumerate(laid_out(specs, buckets.limit_bytes()))
    ]
    taken = []
    for _ in range(4):  # the first negotiates names
        start = time.perf_counter()
        for run in runs:
            run()
        taken.append(time.perf_counter() - start)
    everyone = adapter.allgather_object(min(taken[1:]), f"{name}.agree", process_set)
    return float(max(everyone))


def _exchange(
    adapter: Adapter, compressor: Compressor, bucket: list[Spec], name: str, process_set: Any
) -> Callable[[], Any]:
    """Return the exchange of a bucket, done as engines do."""
    pairs = [link.gradient(adapter, spec) for spec in bucket]
    ops = pairs[0][0]
    grads = [grad for _, grad in pairs]
    each = [compressor.of(spec) for spec in bucket]
    states = [method.init(ops, spec) for method, spec in zip(each, bucket, strict=True)]
    flat = ops.concat([ops.reshape(grad, (-1,)) for grad in grads])

    def work() -> Work[Any]:
        if compressor is none:
            return (yield Allreduce(flat, op=ReduceOp.Sum, in_place=True))
        if compressor.elementwise:
            return (yield from compressor.reduce(ops, flat, None))
        works = [m.reduce(ops, g, s) for m, g, s in zip(each, grads, states, strict=True)]
        return (yield from together(works, ops))

    return lambda: adapter.carry_out(work(), name, process_set)


def describe(
    network: Link,
    model: Model,
    plans: Sequence[Plan],
    chosen: Plan,
    specs: Sequence[Spec],
    tried: Mapping[str, float],
    took: float,
) -> str:
    """Return the plan in words, and why."""
    return "\n".join(f"hvdx: {line}" for line in _lines(network, model, plans, chosen, specs,
                                                       tried, took))  # fmt: skip


def _lines(
    network: Link,
    model: Model,
    plans: Sequence[Plan],
    chosen: Plan,
    specs: Sequence[Spec],
    tried: Mapping[str, float],
    took: float,
) -> Iterator[str]:
    size = sum(Form.of(spec).bytes for spec in specs)
    line = network.lines["allreduce float32"]
    speed = f"{1 / line.beta / 1e6:.4g} MB/s" if line.beta else "no measurable cost by size"
    yield (
        f"Compression.auto measured for {took:.1f} s: allreduce takes {line.alpha * 1e3:.2g} ms "
        f"and {speed} on {network.ranks} ranks"
    )
    yield f"exchanging {size / 1e6:.1f} MB of gradients takes"
    for plan in plans:
        sent = model.sent(plan.choice)
        told = f"  {plan.name:<10}{plan.seconds * 1e3:>10.1f} ms, sending {sent / 1e6:.3g} MB"
        if plan.name in tried:
            told += f" ({tried[plan.name] * 1e3:.1f} ms when tried)"
        yield told + (" <- chosen" if plan is chosen else "")
    if chosen.choice:
        count = sum(Form.of(spec) in chosen.choice for spec in specs)
        yield f"{chosen.name} serves {count} of {len(specs)} parameters; the rest travel raw"
    else:
        yield f"no method saves {_SAVES:.0%} of that: gradients travel as they are"
