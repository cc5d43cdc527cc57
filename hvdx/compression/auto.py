"""``Compression.auto``: measure the network and the methods, then take what is quickest.

How long each way would take is predicted (:mod:`hvdx.compression.plans`). Gradients may travel
while backward goes on, and no method is free of error. So a method is taken only where it saves a
good part of the time, and, where trying is cheap, only if it also does so when tried. Networks
and what shares them change: all this is looked at again in training
(:mod:`hvdx.compression.review`), and methods take turns (:mod:`hvdx.compression.turns`).
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hvdx import buckets, link
from hvdx.agreement import next_name
from hvdx.comm import Allreduce, Work, together
from hvdx.compression.base import CompressionError, Compressor, Reduced, Spec, none
from hvdx.compression.plans import SAVES, Form, Model, Plan, laid_out
from hvdx.compression.review import EVERY, Pace, Review, spoken
from hvdx.compression.turns import taking_turns
from hvdx.frameworks import Adapter
from hvdx.link import Footprint, Link
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

#: What each budget allows. From left to right methods save more and err more: the first three
#: lose nothing that training notices, the next three little, the last two need patience.
BUDGETS = {
    "safe": ("fp16", "bf16", "int8"),
    "balanced": ("fp16", "bf16", "int8", "int4", "powersgd", "onebit"),
    "bold": ("fp16", "bf16", "int8", "int4", "powersgd", "onebit", "topk", "randomk"),
}
_UNPREPARED = "Compression.auto chooses when the ranks of an optimizer meet, for its parameters"


def automatic(methods: Mapping[str, Compressor], pace: Pace) -> Compressor:
    """Return the compressor that measures first; see ``Compression.auto``."""
    often = "" if pace.every == EVERY else f", every={pace.every}"  # ranks compare names
    name = f"auto({', '.join(methods)}{often})"
    return Compressor(name, _init, _reduce, stateful=True, prepare=Chooser(name, methods, pace))


@dataclass(frozen=True, eq=False)  # compressors are keys, and methods have no hash
class Chooser:
    """Chooses from ``methods``: see :attr:`Compressor.prepare`; a planner may read them."""

    name: str
    methods: Mapping[str, Compressor]
    pace: Pace

    def __call__(self, adapter: Adapter, specs: list[Spec], process_set: Any) -> Compressor:
        """Measure, and return what to use instead."""
        with adapter.at_once():
            return _prepared(self.name, adapter, specs, process_set, self.methods, self.pace)


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
    pace: Pace,
) -> Compressor:
    if adapter.ranks(process_set) == 1 or not specs:
        return none
    start = time.perf_counter()
    network = link.measure(adapter, process_set, pace.seconds)
    footprints = survey(adapter, methods, specs, process_set)
    model = Model(network, specs, footprints, methods, buckets.limit_bytes())
    plans = model.alternatives()
    if len(plans) == 1:  # nothing may be compressed
        return none
    used = [plans[model.best(plans, bucket)] for bucket in model.buckets]
    tried: dict[bool, float] = {}
    if any(plan.choice for plan in used) and plans[0].seconds < pace.seconds:
        for raw in (True, False):
            each = [none if raw else _carrying_out(plan, methods) for plan in used]
            tried[raw] = try_out(adapter, each, specs, process_set)
    pays = not tried or tried[False] <= (1 - SAVES) * tried[True]
    clock = Review(
        adapter,
        process_set,
        next_name("auto", process_set),
        model,
        plans,
        pace,
        raw=not pays,
        stateful=any(methods[each].stateful for plan in plans for each in plan.choice.values()),
    )
    if pace.verbose and adapter.place(process_set) == 0:
        found = Found(network, model, clock, specs, tried, time.perf_counter() - start)
        print(describe(found), file=sys.stderr)
    return _choosing(name, plans, methods, clock)


def _choosing(
    name: str, plans: Sequence[Plan], methods: Mapping[str, Compressor], clock: Review
) -> Compressor:
    """Return what has the plans take turns, as ``clock`` says."""

    @functools.cache  # one for all of a form, so that buckets of them may travel as one tensor
    def of(form: Form) -> Compressor:
        turns = [plan.choice.get(form, "none") for plan in plans]
        told = f"{name}: {', '.join(dict.fromkeys(turns))}"
        return taking_turns(told, methods, turns, clock)._replace(rows=rows)

    used = dict.fromkeys(each for plan in plans for each in plan.choice.values())
    leading = next(iter(clock.leading().choice.values()), None)
    rows = methods[leading].rows if leading else None  # of sparse gradients, for good
    return Compressor(
        f"{name[:-1]}: {', '.join(used)})",
        _init,
        _reduce,
        stateful=any(methods[each].stateful for each in used),
        policy=lambda spec: of(Form.of(spec)),
    )


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


def _carrying_out(plan: Plan, methods: Mapping[str, Compressor]) -> Compressor:
    """Return what does with a bucket as ``plan`` says, without turns."""
    chosen = {form: methods[each] for form, each in plan.choice.items()}
    alike = next(iter(chosen.values()), none)
    if alike.elementwise:
        return alike
    return Compressor(
        plan.name, _init, _reduce, policy=lambda spec: chosen.get(Form.of(spec), none)
    )


def try_out(
    adapter: Adapter, compressors: Sequence[Compressor], specs: Sequence[Spec], process_set: Any
) -> float:
    """Return the seconds in which gradients like ``specs`` are exchanged; equal on all ranks.

    ``compressors`` are those of the buckets.
    """
    name = next_name("trial", process_set)
    layout = zip(laid_out(specs, buckets.limit_bytes()), compressors, strict=True)
    runs = [
        _exchange(adapter, compressor, bucket, f"{name}.{index}", process_set)
        for index, (bucket, compressor) in enumerate(layout)
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


class Found(NamedTuple):
    """What was measured before training, and what it led to."""

    network: Link
    model: Model
    clock: Review
    specs: Sequence[Spec]
    tried: Mapping[bool, float]  # seconds of an exchange, raw or as planned
    took: float  # seconds


def describe(found: Found) -> str:
    """Return the plan in words, and why."""
    return "\n".join(f"hvdx: {line}" for line in _lines(found))


def _lines(found: Found) -> Iterator[str]:
    model, clock = found.model, found.clock
    size = sum(Form.of(spec).bytes for spec in found.specs)
    yield f"Compression.auto measured for {found.took:.1f} s: {spoken(found.network)}"
    yield f"exchanging {size / 1e6:.1f} MB of gradients takes"
    for plan in model.plans():
        sent = model.sent(plan.choice)
        line = f"  {plan.name:<10}{plan.seconds * 1e3:>10.1f} ms, sending {sent / 1e6:.3g} MB"
        if not plan.choice and True in found.tried:
            line += f" ({found.tried[True] * 1e3:.1f} ms when tried)"
        yield line
    if False in found.tried:
        yield f"as chosen by bucket {found.tried[False] * 1e3:.1f} ms when tried"
    count = clock.compressed()
    if count:
        yield (
            f"{clock.named()}: predicted {clock.predicted() * 1e3:.1f} ms; serves {count} of "
            f"{len(found.specs)} parameters; the rest travel raw"
        )
    else:
        yield f"no method saves {SAVES:.0%} of that: gradients travel as they are"
