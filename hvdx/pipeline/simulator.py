"""How long a schedule takes, where it waits and how much it keeps: planner, test and picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvdx.pipeline.schedule import Action, Schedule, Span, needs, peak_live_of_ranks, walk


class Times(NamedTuple):
    """Seconds per stage and micro-batch, and per hop.

    Attributes:
        forward: by stage.
        inputs: by stage, for the gradients of its inputs.
        weights: by stage, for the gradients of its weights. A whole backward takes both.
        hops: by cut, from one rank to another; cut k lies between stages k and k+1.
        sums: by stage, for adding up its gradients over its replicas; empty: none has any.
    """

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    hops: tuple[float, ...]
    sums: tuple[float, ...] = ()

    @classmethod
    def equal(
        cls,
        stages: int,
        forward: float = 1.0,
        inputs: float = 1.0,
        weights: float = 1.0,
        hop: float = 0.0,
    ) -> Times:
        """Return times that are the same for all stages."""
        return cls(
            (forward,) * stages, (inputs,) * stages, (weights,) * stages, (hop,) * (stages - 1)
        )

    def of(self, action: Action) -> float:
        """Return how long ``action`` takes."""
        kind, stage, _ = action
        if kind == "F":
            return self.forward[stage]
        return (self.inputs[stage] if kind in "BI" else 0.0) + (
            self.weights[stage] if kind in "BW" else 0.0
        )

    def between(self, source: int, target: int, place: Sequence[int]) -> float:
        """Return how long tensors travel between two stages that are neighbours, or the same."""
        return 0.0 if place[source] == place[target] else self.hops[min(source, target)]


class Simulation(NamedTuple):
    """What :func:`simulate` predicts.

    Attributes:
        spans: by rank.
        step: seconds from the first start to the last end, that of sums over replicas included.
        bubble: share of the ranks' time in which they wait.
        live: by rank, micro-batches of its stages kept at once, at most.
    """

    spans: tuple[tuple[Span, ...], ...]
    step: float
    bubble: float
    live: tuple[int, ...]


def simulate(schedule: Schedule, times: Times) -> Simulation:
    """Run ``schedule`` with the clock of ``times``.

    Sending takes a rank no time of its own; the receiver waits for the hop.

    Raises:
        PlanError: the schedule deadlocks; the message names the actions that are stuck.
    """
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.rows]
    for rank, action in walk(schedule):
        start = spans[rank][-1].end if spans[rank] else 0.0
        for need in needs(action, schedule.stages):
            remote = schedule.owner(need.stage, need.micro_batch) != rank
            hop = times.hops[min(need.stage, action.stage)] if remote else 0.0
            start = max(start, ends[need] + hop)
        end = start + times.of(action)
        ends[action.gives] = end
        spans[rank].append(Span(action, start, end))
    step = max((row[-1].end + _sums(row, times) for row in spans if row), default=0.0)
    busy = sum(span.end - span.start for row in spans for span in row)
    bubble = 1.0 - busy / (step * schedule.ranks) if step else 0.0
    return Simulation(tuple(map(tuple, spans)), step, bubble, tuple(peak_live_of_ranks(schedule)))


def _sums(row: Sequence[Span], times: Times) -> float:
    """Return how long a rank, at the end of its row, adds up gradients over its replicas."""
    return sum(times.sums[stage] for stage in {span.action.stage for span in row if times.sums})
