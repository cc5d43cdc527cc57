"""Schedules from measured times: a rank that falls idle takes what is best to do next.

A list scheduler. It needs no formula, so it serves unequal stages, costly hops and placements
such as the V of zbv (Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024).
On very unequal times it can lose to a fixed order, so let the simulator judge.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence

from hvdx.errors import PlanError
from hvdx.pipeline.schedule import Action, Schedule, looped, needs, vee
from hvdx.pipeline.simulator import Times, simulate


class _Rank:
    """What one rank can do now; it prefers I or B to F, and F to W."""

    def __init__(self, stages: Sequence[int], cap: int, round_size: int | None) -> None:
        self.row: list[Action] = []
        self.ready: dict[Action, int] = {}  # in the order of arrival
        self.free_at = 0.0
        self._live = 0
        # One slot stays free for each stage that comes later on this rank. Were all of them
        # taken by the first, none of these micro-batches could get on to its backward.
        self._room = {stage: cap - later for later, stage in enumerate(reversed(stages))}
        self._round_size = round_size

    def take(self) -> Action | None:
        """Choose the next action and count what it keeps or sets free."""
        able = [a for a in self.ready if a.kind != "F" or self._live < self._room[a.stage]]
        chosen = min(able, key=self._order, default=None)
        if chosen is not None:
            del self.ready[chosen]
            self.row.append(chosen)
            self._live += {"F": 1, "I": 0}.get(chosen.kind, -1)
        return chosen

    def _order(self, action: Action) -> tuple[int, ...]:
        kind, stage, micro_batch = action
        if kind == "F":
            turn = micro_batch // self._round_size if self._round_size else 0
            return 1, turn, -stage, micro_batch
        return (2, self.ready[action]) if kind == "W" else (0, micro_batch, -stage)


class _Clock:
    """Events in the order of their times; those that differ by rounding alone come together."""

    def __init__(self, instant: float) -> None:
        self._heap: list[tuple[float, int, Action | None]] = []
        self._numbers = itertools.count()
        self._instant = instant
        self.now = 0.0

    def at(self, when: float, action: Action | None) -> None:
        """Note that a need of ``action`` comes then; None: that a rank falls idle."""
        heapq.heappush(self._heap, (when, next(self._numbers), action))

    def advance(self) -> Iterator[Action]:
        """Go on to the next time and yield whose needs come then."""
        self.now = self._heap[0][0]
        while self._heap and self.reached(self._heap[0][0]):
            action = heapq.heappop(self._heap)[2]
            if action is not None:
                yield action

    def reached(self, when: float) -> bool:
        """Tell whether ``when`` is now or past."""
        return when <= self.now + self._instant

    def __bool__(self) -> bool:
        return bool(self._heap)


def greedy(
    place: Sequence[int],
    micro_batches: int,
    times: Times,
    *,
    cap: int | Sequence[int],
    split: bool = True,
    name: str = "greedy",
) -> Schedule:
    """Let each idle rank take a backward, else a forward, else a weight gradient.

    Args:
        place: rank by stage.
        micro_batches: per step.
        times: of the stages and hops.
        cap: micro-batches of its stages that a rank may keep, for all or by rank.
        split: whether I and W are separate.
        name: of the schedule.

    Raises:
        PlanError: a rank has more stages than it may keep micro-batches.
    """
    stages, count = len(place), max(place) + 1
    caps = [cap] * count if isinstance(cap, int) else list(cap)
    ranks = [_rank(rank, place, caps[rank]) for rank in range(count)]
    clock = _Clock(1e-9 * max(times.of(Action(k, s, 0)) for k in "FB" for s in range(stages)))
    lacks: dict[Action, int] = {}  # how many of its needs are still to come
    for k in range(micro_batches):
        clock.at(0.0, Action("F", 0, k))
    while clock:
        for action in clock.advance():
            lacks[action] = lacks.get(action, len(needs(action, stages)) or 1) - 1
            if not lacks[action]:
                ranks[place[action.stage]].ready[action] = len(lacks)
        for rank in ranks:
            if clock.reached(rank.free_at) and (taken := rank.take()):
                rank.free_at = clock.now + times.of(taken)
                clock.at(rank.free_at, None)
                for follower in _followers(taken, stages, split):
                    hop = times.between(taken.stage, follower.stage, place)
                    clock.at(rank.free_at + hop, follower)
    return Schedule(tuple(tuple(rank.row) for rank in ranks), tuple(place), micro_batches, name)


def zbv(
    ranks: int, micro_batches: int, times: Times | None = None, *, slack: bool = False
) -> Schedule:
    """Split backwards on a V: the first and the last stage share rank 0.

    Bubble (p-1)/(6m+p-1) for p ranks, m >= p micro-batches and equal F, I and W, nearly always;
    at most 2(p+1) micro-batches of its half as large stages are live on a rank.

    Args:
        ranks: each with two stages.
        micro_batches: per step.
        times: for which the order is made; None: all equal, hops free.
        slack: keep up to 4p, and lose far less to hops.
    """
    place = vee(ranks)
    cap, name = (4 * ranks, "zbv-slack") if slack else (2 * (ranks + 1), "zbv")
    if times is None:
        return greedy(place, micro_batches, Times.equal(len(place)), cap=cap, name=name)
    # What is best next is not best in the end: orders for somewhat wrong times are often quicker.
    orders = [greedy(place, micro_batches, each, cap=cap, name=name) for each in _like(times)]
    return min(orders, key=lambda order: simulate(order, times).step)


def _like(times: Times) -> Iterator[Times]:
    """Yield ``times``, and others where stages are equal or hops take more or less."""
    parts = (times.forward, times.inputs, times.weights)
    means = (sum(part) / len(part) for part in parts)
    for each in (times, Times.equal(len(times.forward), *means)):
        for factor in (1.0, 0.0, 0.5, 2.0):
            yield each._replace(hops=tuple(factor * hop for hop in times.hops))


def _rank(rank: int, place: Sequence[int], cap: int) -> _Rank:
    own = [stage for stage, owner in enumerate(place) if owner == rank]
    if cap < len(own):
        raise PlanError(f"cap={cap}: rank {rank} has {len(own)} stages and must keep as many")
    count = max(place) + 1
    return _Rank(own, cap, count if tuple(place) == looped(count, len(place) // count) else None)


def _followers(action: Action, stages: int, split: bool) -> Iterator[Action]:
    """Yield what needs ``action``."""
    kind, stage, micro_batch = action
    back = "I" if split else "B"
    if kind == "F":
        yield Action(back, stage, micro_batch)
        if stage < stages - 1:
            yield Action("F", stage + 1, micro_batch)
    elif kind != "W":
        if stage:
            yield Action(back, stage - 1, micro_batch)
        if split:
            yield Action("W", stage, micro_batch)
