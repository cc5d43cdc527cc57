"""When units should change stages while a model trains: times in, decision out.

What the units cost is known from when they were measured, in relation to each other. What training
shows is how long each rank takes for its share of them: if it takes longer than that, all of its
units do, for the device is slower than the one that measured. Units that are frozen cost no
gradients of weights, and what lies below the lowest trained unit no gradients at all.

With these costs the cuts are found anew, exactly (:mod:`hvdx.pipeline.partition`), and the step is
simulated with the old cuts and with the new ones. Units move only if that gains much, several
times in a row, and more than moving costs: noise moves nothing.

All of this is deterministic: ranks that know the same times decide the same.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.ir import Graph, Unit
from hvdx.pipeline.plan import Means, Plan, make, stage_times
from hvdx.pipeline.rebalance import Rebalance
from hvdx.pipeline.schedule import Schedule
from hvdx.pipeline.simulator import simulate

#: Bytes that move per byte of parameters: the weight, and Adam's two moments.
_COPIES = 3.0


class Proposal(NamedTuple):
    """Cuts that suit what was observed.

    Attributes:
        plan: with the best cuts.
        now: seconds that a step takes with the cuts there are.
        then: with these.
    """

    plan: Plan
    now: float
    then: float

    @property
    def gain(self) -> float:
        """Return what share of a step they save."""
        return 1.0 - self.then / self.now if self.now > 0 else 0.0


def whole(line: Graph, trained: Sequence[float]) -> Graph:
    """Return ``line`` with what its units would cost if all of them were trained.

    Where that was not measured a backward takes as long as the forward, for each of its halves.
    Where both halves were measured as one (TensorFlow finds them together), each is half of it.

    Args:
        line: as it was measured.
        trained: by unit, the share of its parameters that were trained then.
    """
    units = []
    for unit, share, reached in zip(line.units, trained, _reached(line, trained), strict=True):
        inputs, weights = unit.inputs, unit.weights
        if share and reached and not weights:
            inputs = weights = inputs / 2
        elif share and not reached:
            inputs, weights = unit.forward, inputs + weights
        elif not share:
            inputs = inputs if reached else unit.forward
            weights = unit.forward if unit.parameters else 0.0
        units.append(replace(unit, inputs=inputs, weights=weights))
    return replace(line, units=tuple(units))


def partly(line: Graph, trained: Sequence[float]) -> Graph:
    """Return what units cost where some are frozen.

    Args:
        line: with the costs if none is, from :func:`whole`.
        trained: by unit, the share of its parameters that are trained.
    """

    def costs(unit: Unit, share: float, reached: bool) -> Unit:
        return replace(unit, inputs=unit.inputs if reached else 0.0, weights=share * unit.weights)

    parts = zip(line.units, trained, _reached(line, trained), strict=True)
    return replace(line, units=tuple(costs(*each) for each in parts))


def _reached(line: Graph, trained: Sequence[float]) -> list[bool]:
    """Tell by unit whether what it reads depends on trained parameters."""
    moving: set[str] = set()
    found = []
    for unit, share in zip(line.units, trained, strict=True):
        found.append(not moving.isdisjoint(unit.reads))
        if share or found[-1]:
            moving.update(unit.makes)
    return found


def observed(line: Graph, means: Means, plan: Plan, seconds: Mapping[int, float]) -> Means:
    """Return ``means`` with the speeds that ranks have shown.

    Args:
        line: what the units cost while that was seen, from :func:`partly`.
        means: ranks, link and memory.
        plan: that was followed.
        seconds: by rank, what a micro-batch took in all its stages together. Ranks that are not
            there are as fast as the one in the middle.
    """
    plain = replace(means, speeds=None)
    expected = stage_times(line, plain, _order(plan), plan.edges(line))
    rows = [0.0] * len(plan.rows)
    for stage, row in enumerate(plan.place):
        rows[row] += sum(part[stage] for part in expected[:3])
    speeds = {
        rank: rows[row] / seconds[rank]
        for row, ranks in enumerate(plan.rows) for rank in ranks
        if rows[row] > 0 and seconds.get(rank, 0.0) > 0
    }  # fmt: skip
    middle = statistics.median(speeds.values()) if speeds else 1.0
    return replace(means, speeds=[speeds.get(rank, middle) for rank in range(means.ranks)])


@functools.lru_cache(maxsize=8)
def _order(plan: Plan) -> Schedule:
    return plan.order()


def propose(line: Graph, means: Means, plan: Plan) -> Proposal:
    """Find the best cuts.

    Args:
        line: what the units cost now, from :func:`partly`.
        means: from :func:`observed`.
        plan: that is followed.

    Raises:
        PlanError: nothing fits into memory.
    """
    times = stage_times(line, means, _order(plan), plan.edges(line))
    now = simulate(plan.order(times), times).step
    schedule, stages = plan.schedule, len(plan.place)
    best = make(line, means, plan.micro_batches, schedule=schedule, stages=stages, by="time")
    return Proposal(best, now, best.step)


def rows_of_units(line: Graph, plan: Plan) -> list[tuple[int, ...]]:
    """Return by unit the ranks that have it."""
    edges = enumerate(plan.edges(line))
    return [plan.row(stage) for stage, (first, stop) in edges for _ in range(first, stop)]


class Balancer:
    """Watches the ranks' times, and says when which units should move.

    Args:
        line: what its units cost, as measured.
        means: ranks, link and memory.
        options: how much must be gained, and how surely.
        trained: by unit, the share of its parameters that were trained when it was measured.
    """

    def __init__(
        self, line: Graph, means: Means, options: Rebalance, trained: Sequence[float]
    ) -> None:
        self._line, self._means, self._options = whole(line, trained), means, options
        self._trained = tuple(trained)
        self._window: list[Mapping[int, float]] = []
        self._streak = 0  # of looks that found enough to gain
        self._doubt = 1.0  # factor of the gain that is asked for
        self._promise: Proposal | None = None  # whose move has not been seen yet
        self._cost = 0.0  # seconds that the last move took, besides its bytes

    def observe(
        self, seconds: Mapping[int, float], trained: Sequence[float]
    ) -> dict[int, float] | None:
        """Take in a step; return what ranks take, the median of some steps, if it is time to look.

        Args:
            seconds: by rank that is known here, what a micro-batch took in all its stages.
            trained: by unit, the share of its parameters that are trained; equal on all ranks.
        """
        if tuple(trained) != self._trained:  # what was seen before says nothing, but why is known
            self._trained = tuple(trained)
            self._window, self._streak, self._promise = [], self._options.checks - 1, None
        self._window.append(seconds)
        if len(self._window) < self._options.every:
            return None
        seen, self._window = typical(self._window), []
        return seen

    def decide(self, plan: Plan, seconds: Mapping[int, float]) -> Plan | None:
        """Return the plan to follow from now on, or None.

        Args:
            plan: that is followed.
            seconds: of all ranks, as :meth:`observe` returned them.
        """
        try:
            line = partly(self._line, self._trained)
            found = propose(line, observed(line, self._means, plan, seconds), plan)
        except PlanError:  # nothing else fits into memory
            return None
        self._judge(found.now)
        if found.plan.cuts == plan.cuts or found.gain < self._options.gain * self._doubt:
            self._streak = 0
            return None
        self._streak += 1
        saved = (found.now - found.then) * self._options.horizon
        if self._streak < self._options.checks or saved <= self._price(plan, found.plan):
            return None
        self._promise = found
        return found.plan

    def moved(self, seconds: float) -> None:
        """Begin anew after a move, which took that long on the slowest rank."""
        self._window, self._streak, self._cost = [], 0, seconds

    def _judge(self, now: float) -> None:
        """Ask for twice the gain after a move that brought less than half of what it promised.

        The slowness has moved with the units, then, or has gone by itself: else the same units
        might go to and fro for ever.
        """
        if self._promise is not None:
            kept = now <= (self._promise.now + self._promise.then) / 2
            self._doubt = 1.0 if kept else 2.0 * self._doubt
            self._promise = None

    def _price(self, before: Plan, after: Plan) -> float:
        """Return the seconds that a move takes: as the last one, or what its bytes do."""
        rows = zip(*(rows_of_units(self._line, plan) for plan in (before, after)), strict=True)
        size = sum(
            sum(unit.parameters.values())
            for unit, (old, new) in zip(self._line.units, rows, strict=True)
            if old != new
        )
        return max(self._cost, self._means.link.seconds(_COPIES * size))


def typical(window: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return by rank the median of its seconds over some steps."""
    ranks = sorted({rank for step in window for rank in step})
    return {
        rank: statistics.median(step[rank] for step in window if rank in step) for rank in ranks
    }


def busy(spans: Sequence[Any]) -> float | None:
    """Return the seconds that a rank computes for a micro-batch, in all its stages.

    Args:
        spans: of a rank in one step; None is returned for none.
    """
    own = {span.action.micro_batch for span in spans}
    return sum(span.end - span.start for span in spans) / len(own) if own else None
