"""Cut a line of units so that the slowest stage is as fast as it can be.

Exact, by dynamic programming, in two passes. The first finds the lowest bottleneck. The second
takes, of all cuts that reach it, those over which the fewest bytes travel, and of these the
earliest; it cannot be part of the first, since a prefix with the lower bottleneck may be the one
with more bytes. Heuristics lose up to 60 % on embedding + blocks + large head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from hvdx.errors import PlanError

_INFINITY = float("inf")


@dataclass(frozen=True)
class Problem:
    """What is cut, and what it costs.

    Attributes:
        costs: of the units, none negative.
        stages: how many to make.
        hops: by cut 0..n, cost of sending over it, added to the stages on both sides; None: 0.
        sizes: by cut, bytes that travel over it; they break ties. None: 0.
        speeds: by stage; None: all 1.
        memory: (start, stop, stage) -> bytes that those units need as that stage; it does not
            fall as the interval grows. None: no constraint.
        limits: by stage, bytes that there are.
        solid: cuts that must not be made.
    """

    costs: Sequence[float]
    stages: int
    hops: Sequence[float] | None = None
    sizes: Sequence[int] | None = None
    speeds: Sequence[float] | None = None
    memory: Callable[[int, int, int], float] | None = None
    limits: Sequence[float] = ()
    solid: frozenset[int] = frozenset()


def partition(problem: Problem) -> list[int]:
    """Return the cuts: by stage but the first, its first unit.

    Raises:
        PlanError: there are more stages than units, or no cuts keep within memory; the message
            says what each stage would need.

    References:
        The recurrence is that of PipeDream (Narayanan et al., SOSP 2019), with hops, memory
        and unequal speeds.
    """
    _check_stages(problem)
    solver = _Solver(problem)
    best = solver.bottleneck()
    if best == _INFINITY:
        raise PlanError(_shortage(problem))
    return solver.lightest(best)


def _check_stages(problem: Problem) -> None:
    units, stages = len(problem.costs), problem.stages
    if stages < 1:
        raise PlanError(f"stages={stages}: give at least 1")
    if stages > units - len(problem.solid):
        bound = f", {len(problem.solid)} of them bound to the one before" if problem.solid else ""
        raise PlanError(
            f"{stages} stages, but the model has {units} units{bound}: "
            f"use at most {units - len(problem.solid)} stages"
        )


class _Solver:
    """Both passes over one problem; O(stages * units^2), mostly less."""

    def __init__(self, problem: Problem) -> None:
        count = len(problem.costs)
        self._problem, self._end = problem, count
        self._cuts = [cut for cut in range(count + 1) if cut not in problem.solid]
        self._sums = [0.0, *accumulate(problem.costs)]
        self._speeds = problem.speeds or [1.0] * problem.stages
        self._hops = [0.0, *list(problem.hops or [0.0] * (count + 1))[1:count], 0.0]
        self._sizes = problem.sizes or [0] * (count + 1)

    def _body(self, start: int, stop: int, stage: int) -> float:
        """Return the cost without hops, which no larger interval undercuts."""
        problem = self._problem
        needs = problem.memory(start, stop, stage) if problem.memory is not None else 0.0
        if needs and needs > problem.limits[stage]:
            return _INFINITY
        return (self._sums[stop] - self._sums[start]) / self._speeds[stage]

    def bottleneck(self) -> float:
        """Return the lowest cost of the slowest stage."""
        before = {0: 0.0}  # where the stages so far end -> their bottleneck
        for stage in range(self._problem.stages):
            before = {stop: self._best(stop, stage, before) for stop in self._cuts}
        return before[self._end]

    def _best(self, stop: int, stage: int, before: dict[int, float]) -> float:
        best = _INFINITY
        for start in reversed(self._cuts):
            if start >= stop:
                continue
            body = self._body(start, stop, stage)
            if body >= best:
                break
            hops = self._hops[start] + self._hops[stop]
            best = min(best, max(before.get(start, _INFINITY), body + hops))
        return best

    def lightest(self, bottleneck: float) -> list[int]:
        """Return the cuts that reach ``bottleneck`` with the fewest bytes, the earliest of them."""
        after: dict[int, tuple[int, list[int]]] = {self._end: (0, [])}  # start -> bytes, cuts
        for stage in reversed(range(self._problem.stages)):
            found = {start: self._lightest(start, stage, after, bottleneck) for start in self._cuts}
            after = {start: best for start, best in found.items() if best is not None}
        return after[0][1]

    def _lightest(
        self, start: int, stage: int, after: dict[int, tuple[int, list[int]]], limit: float
    ) -> tuple[int, list[int]] | None:
        best: tuple[int, list[int]] | None = None
        for stop in self._cuts:
            if stop <= start:
                continue
            body = self._body(start, stop, stage)
            if body > limit:
                break
            if stop in after and body + (self._hops[start] + self._hops[stop]) <= limit:
                size, cuts = after[stop]
                size += self._sizes[stop] if stop < self._end else 0
                if best is None or size < best[0]:
                    best = size, ([stop, *cuts] if stop < self._end else [])
        return best


def _shortage(problem: Problem) -> str:
    """Say what each stage needs at the cuts that spread memory most evenly."""
    memory, limits = problem.memory, problem.limits
    assert memory is not None
    solver = _Evenly(replace(problem, hops=None))
    cuts = solver.lightest(solver.bottleneck())
    edges = [0, *cuts, len(problem.costs)]
    needs = [
        f"stage {stage} (units {start}..{stop - 1}) needs {size_text(memory(start, stop, stage))} "
        f"of {size_text(limits[stage])}"
        for stage, (start, stop) in enumerate(pairwise(edges))
    ]
    return (
        f"not enough memory for {problem.stages} stages, however they are cut. At best "
        f"{'; '.join(needs)}. Use more stages, smaller micro-batches, a schedule that keeps fewer "
        "of them or checkpoint='always'"
    )


class _Evenly(_Solver):
    """The same with the share of memory in place of time."""

    def _body(self, start: int, stop: int, stage: int) -> float:
        memory = self._problem.memory
        assert memory is not None
        return memory(start, stop, stage) / max(1.0, self._problem.limits[stage])


def size_of(text: str) -> float:
    """Read a number of bytes: ``500M``, ``2G``, or GiB without a letter.

    Raises:
        PlanError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d*\.?\d+)\s*([kmgt]?)(i?b)?", text.strip().lower())
    size = float(found[1]) * 1024 ** "_kmgt".index(found[2] or "g") if found else 0.0
    if not size:
        raise PlanError(f"memory {text!r}: give a size such as 500M or 2G")
    return size


def size_text(count: float) -> str:
    """Write a number of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
