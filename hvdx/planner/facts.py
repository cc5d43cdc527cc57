"""What the planner knows of a model, a network and the ranks of a job: plain data."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from hvdx.comm import sent_share
from hvdx.errors import PlanError
from hvdx.link import Line
from hvdx.pipeline.ir import Graph, Unit
from hvdx.pipeline.plan import Link

INFINITY = float("inf")


class Codec(NamedTuple):
    """What a compressor takes for the gradients of each unit, by unit.

    Attributes:
        seconds: of computing, on one rank, for a step.
        reduced: bytes that are added up.
        gathered: bytes that each rank sends to every other, or its share of them.
        rounds: that wait for each other.
        held: bytes that are kept from step to step.
    """

    seconds: tuple[float, ...]
    reduced: tuple[float, ...]
    gathered: tuple[float, ...]
    rounds: int
    held: tuple[float, ...]

    def sent(self, start: int, stop: int, ranks: int) -> float:
        """Return the bytes that each of ``ranks`` replicas of these units sends."""
        added = sent_share("allreduce", ranks) * sum(self.reduced[start:stop])
        return added + sent_share("allgather", ranks) * sum(self.gathered[start:stop])


class Profile(NamedTuple):
    """What a model takes on one rank.

    Attributes:
        rows: of a batch.
        lines: (rows of a micro-batch, the units with what one takes), the fewest rows first.
        update: seconds in which the optimizer treats a byte of parameters.
        slots: bytes of its state for each byte of parameters; Adam has 2.
        codecs: of compressors, by name.
    """

    rows: int
    lines: tuple[tuple[int, Graph], ...]
    update: float = 0.0
    slots: float = 2.0
    codecs: Mapping[str, Codec] = {}

    @property
    def units(self) -> tuple[Unit, ...]:
        """Return the units, whose times are those of the fewest rows."""
        return self.lines[0][1].units

    def at(self, micro_batches: int) -> Graph:
        """Return the units with what a micro-batch takes, if a batch is cut into so many.

        Between measured numbers of rows, and beyond them, costs follow straight lines.

        Raises:
            PlanError: a batch has fewer rows.
        """
        if not 0 < micro_batches <= self.rows:
            raise PlanError(f"{micro_batches} micro-batches of a batch of {self.rows} rows")
        rows = -(-self.rows // micro_batches)
        measured = [each for each, _ in self.lines]
        place = bisect.bisect_left(measured, rows)
        if place < len(measured) and measured[place] == rows:
            return self.lines[place][1]
        if len(measured) == 1:  # nothing but proportion is known
            ((known, line),) = self.lines
            return _between(line, line, lambda low, _: low * rows / known)
        place = min(max(place, 1), len(measured) - 1)
        (low, first), (high, second) = self.lines[place - 1 : place + 1]
        share = (rows - low) / (high - low)
        return _between(first, second, lambda a, b: max(0.0, a + share * (b - a)))


def faster(line: Graph, factor: float) -> Graph:
    """Return the units with their times divided by ``factor``."""
    units = tuple(
        replace(
            unit,
            forward=unit.forward / factor,
            inputs=unit.inputs / factor,
            weights=unit.weights / factor,
            apart=unit.apart / factor,
        )
        for unit in line.units
    )
    return replace(line, units=units)


def seconds_of(line: Graph) -> float:
    """Return how long a micro-batch takes in all units."""
    return sum(unit.forward + unit.inputs + unit.weights for unit in line.units)


def _between(first: Graph, second: Graph, mix: Callable[[float, float], float]) -> Graph:
    """Mix the costs of two measurements of the same units."""

    def sizes(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
        return {name: round(mix(size, other[name])) for name, size in one.items()}

    units = tuple(
        replace(
            a,
            makes=sizes(a.makes, b.makes),
            kept_bytes=round(mix(a.kept_bytes, b.kept_bytes)),
            forward=mix(a.forward, b.forward),
            inputs=mix(a.inputs, b.inputs),
            weights=mix(a.weights, b.weights),
            apart=mix(a.apart, b.apart),
        )
        for a, b in zip(first.units, second.units, strict=True)
    )
    return replace(first, units=units, inputs=sizes(first.inputs, second.inputs))


class Network(NamedTuple):
    """What ranks need to tell each other something.

    Attributes:
        link: a hop from one rank to another, tensors in and out.
        sums: by number of replicas, an operation in which they add up gradients, and each byte
            that one of them sends for it; what is not there follows from ``link``.
    """

    link: Link = Link()
    sums: Mapping[int, Line] = {}

    def sum_seconds(self, ranks: int, sent: float, rounds: int = 1) -> float:
        """Return in how many seconds each of ``ranks`` replicas has sent so many bytes."""
        if ranks == 1:
            return 0.0
        # Two send each other all they have; more send pieces, then sums of pieces.
        hops = rounds if ranks == 2 else 2 * rounds
        known = self.sums.get(ranks)
        if known is None:
            return hops * self.link.latency + sent / self.link.bandwidth
        return rounds * known.alpha + sent * known.beta


class Trim(NamedTuple):
    """What steps take beside the sum of their units, from steps that were run.

    Attributes:
        forward: factor.
        backward: factor.
        action: seconds more for each action.
        loss: seconds for each row of a micro-batch, in the last stage's forward.
        back_loss: in its backward.
        step: seconds more for a step.
    """

    forward: float = 1.0
    backward: float = 1.0
    action: float = 0.0
    loss: float = 0.0
    back_loss: float = 0.0
    step: float = 0.0


class Job(NamedTuple):
    """The ranks there are.

    Attributes:
        ranks: of the job.
        network: between them.
        memory: by rank, bytes; empty: enough.
        speeds: by rank, relative; empty: all the same.
        lanes: how many ranks of a host compute at full speed at the same time; more share. It
            need not be whole: two ranks that slow each other down by a quarter have 1.6.
        hosts: by rank, which host it is on; empty: all on one.
        trim: what steps take beside their units.
    """

    ranks: int
    network: Network = Network()
    memory: tuple[float, ...] = ()
    speeds: tuple[float, ...] = ()
    lanes: float = INFINITY
    hosts: tuple[int, ...] = ()
    trim: Trim = Trim()
