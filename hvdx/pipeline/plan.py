"""Which stage has which units, on which rank, in which order: made once, kept as plain data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hvdx.errors import PlanError
from hvdx.pipeline.greedy import zbv
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.partition import Problem, partition, size_text
from hvdx.pipeline.schedule import (
    Schedule,
    dealt,
    forward_only,
    gpipe,
    groups,
    interleaved,
    one_f_one_b,
    parse,
    peak_kept,
    peak_live,
    vee,
    zb1p,
)
from hvdx.pipeline.simulator import Times, simulate

Mesh: TypeAlias = Sequence[Sequence[int]]

_VERSION = 1
_MOST_ACTIONS = 100_000  # of one kind, in a schedule
_ONE_STAGE: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "1f1b-slack": lambda ranks, count: one_f_one_b(ranks, count, slack=True),
    "zb1p": zb1p,
    "gpipe": gpipe,
}
_VEES = "zbv", "zbv-slack"
#: Names, of which "auto" takes the quickest -> stages per rank.
SCHEDULES = {**dict.fromkeys(_ONE_STAGE, 1), "interleaved": 2, **dict.fromkeys(_VEES, 2)}


def schedule_of(
    told: str,
    ranks: int,
    micro_batches: int,
    stages: int | None = None,
    times: Times | None = None,
    mesh: Mesh = (),
) -> Schedule:
    """Make a schedule by name, or read one.

    Args:
        told: one of :data:`SCHEDULES`, or a text that :func:`hvdx.pipeline.schedule.parse` reads.
            With replicas the text has a line per row of the mesh, and a micro-batch per group of
            :func:`hvdx.pipeline.schedule.dealt`.
        ranks: of the pipeline; replicas of each other count once.
        micro_batches: per step.
        stages: how many; None: as the schedule has it, two per rank for ``interleaved``.
        times: for which ``zbv`` is made.
        mesh: rows of replicas; empty: none.

    Raises:
        PlanError: there is no such schedule, or it does not suit these numbers.
    """
    if mesh:
        if times is not None and told in _VEES:
            times = _of_groups(times, mesh)
        order = schedule_of(told, ranks, groups(mesh, micro_batches), stages, times)
        return dealt(order, mesh, micro_batches)
    if re.match(r"\s*\d+[FBIW]\d", told):
        made = parse(told)
        if (made.ranks, made.micro_batches) != (ranks, micro_batches):
            raise PlanError(
                f"the schedule is for {made.ranks} ranks and {made.micro_batches} micro-batches, "
                f"not for {ranks} and {micro_batches}"
            )
    elif told in _ONE_STAGE:
        made = _ONE_STAGE[told](ranks, micro_batches)
    elif told == "interleaved":
        made = interleaved(ranks, micro_batches, max(1, (stages or 2 * ranks) // ranks))
    elif told in _VEES:
        made = zbv(ranks, micro_batches, times, slack=told == "zbv-slack")
    else:
        names = ", ".join((*SCHEDULES, "auto"))
        raise PlanError(f"schedule={told!r}: use one of {names}, or write one as text")
    if stages is not None and made.stages != stages:
        raise PlanError(
            f"{stages} stages on {ranks} ranks, but schedule {made.name!r} takes {made.stages}"
        )
    return made


def _of_groups(times: Times, mesh: Mesh) -> Times:
    """Return what a group of micro-batches takes on ranks of a V, each of which has its share."""
    size = math.lcm(*map(len, mesh))
    shares = [size // len(mesh[row]) for row in vee(len(mesh))]
    parts = (times.forward, times.inputs, times.weights)
    forward, inputs, weights = (
        tuple(share * each for share, each in zip(shares, part, strict=True)) for part in parts
    )
    return Times(forward, inputs, weights, times.hops)


def check_mesh(mesh: Mesh, ranks: int | None = None) -> None:
    """Check that each rank has one place in a mesh.

    Args:
        mesh: rows of ranks.
        ranks: how many the job has; None: as many as the mesh has.

    Raises:
        PlanError: it is not so; the message names the row or rank.
    """
    told = f"place={[list(row) for row in mesh]}"
    if not mesh or not all(mesh):
        empty = next((number for number, row in enumerate(mesh) if not row), 0)
        raise PlanError(f"{told}: row {empty} has no rank; each stage needs one, at least")
    count = sum(map(len, mesh)) if ranks is None else ranks
    rows: dict[int, int] = {}
    for number, row in enumerate(mesh):
        for rank in row:
            if not 0 <= rank < count:
                raise PlanError(
                    f"{told}: row {number} has rank {rank}, but the job has ranks 0 to "
                    f"{count - 1}: give these, or start more (hvdx run -np ...)"
                )
            if rank in rows:
                where = f"rows {rows[rank]} and {number}" if rows[rank] != number else (
                    f"row {number} twice")  # fmt: skip
                raise PlanError(f"{told}: rank {rank} is in {where}; each rank has one place")
            rows[rank] = number
    if missing := sorted(set(range(count)) - set(rows)):
        raise PlanError(
            f"{told} has {len(rows)} of {count} ranks: add rank {missing[0]} to a row, as a "
            "replica of its stage, or start fewer"
        )


@dataclass(frozen=True)
class Plan:
    """How a model is cut, placed and scheduled; JSON keeps it.

    Attributes:
        cuts: by stage but the first, the unit, or the module, that it begins with.
        place: by stage, the rank of the pipeline that has it, or the row of ``mesh``.
        schedule: name or text.
        micro_batches: per step.
        step: predicted seconds per step, 0 if unknown.
        bubble: predicted share of idle time.
        memory: predicted bytes by rank.
        mesh: rows of ranks that are replicas of each other; empty: rank r is row r.
        checkpoint: which micro-batches are computed again for backward; empty: not planned.
        compression: of the gradients that replicas add up, by name; empty: not planned.
    """

    cuts: tuple[str, ...]
    place: tuple[int, ...]
    schedule: str
    micro_batches: int
    step: float = 0.0
    bubble: float = 0.0
    memory: tuple[float, ...] = ()
    mesh: tuple[tuple[int, ...], ...] = ()
    checkpoint: str = ""
    compression: str = ""

    def __post_init__(self) -> None:
        if len(self.place) != len(self.cuts) + 1:
            raise PlanError(
                f"a plan with {len(self.cuts)} cuts places {len(self.place)} stages; it must "
                f"place {len(self.cuts) + 1}"
            )
        for rank in self.place:  # a file may say anything; none shall make a huge schedule
            if not 0 <= rank < len(self.place):
                raise PlanError(
                    f"place={list(self.place)} has rank {rank}, but numbers ranks "
                    f"from 0 to at most {len(self.place) - 1}"
                )
        if not 1 <= self.micro_batches * len(self.place) <= _MOST_ACTIONS:
            raise PlanError(
                f"micro_batches={self.micro_batches} in {len(self.place)} stages: give "
                f"at least 1, and at most {_MOST_ACTIONS} in all stages"
            )
        if self.mesh:
            check_mesh(self.mesh)
            if len(self.mesh) != max(self.place, default=0) + 1:
                raise PlanError(
                    f"place has {len(self.mesh)} rows, but the stages of schedule "
                    f"{self.schedule!r} are on {max(self.place, default=0) + 1}"
                )
        made = self.order()
        if made.place != self.place:
            raise PlanError(
                f"place={list(self.place)}, but schedule {made.name!r} has {list(made.place)}"
            )

    def order(self, times: Times | None = None, micro_batches: int | None = None) -> Schedule:
        """Return the schedule, as planned or for fewer micro-batches.

        That of ``zbv`` is made for ``times``, which all ranks must share.
        """
        count = micro_batches or self.micro_batches
        ranks, stages = max(self.place, default=0) + 1, len(self.place)
        return schedule_of(self.schedule, ranks, count, stages, times, self.mesh)

    def inference(self, micro_batches: int) -> Schedule:
        """Return the schedule of forwards alone."""
        if not self.mesh:
            return forward_only(self.place, micro_batches)
        order = forward_only(self.place, groups(self.mesh, micro_batches))
        return dealt(order, self.mesh, micro_batches)

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Return the rows of ranks that are replicas of each other; most plans have one in each."""
        return self.mesh or tuple((rank,) for rank in range(max(self.place, default=0) + 1))

    @property
    def ranks(self) -> int:
        """Count the ranks."""
        return sum(map(len, self.rows))

    def row(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that have ``stage``."""
        return self.rows[self.place[stage]]

    def edges(self, graph: Graph) -> list[tuple[int, int]]:
        """Return by stage its first unit in ``graph`` and the one after its last.

        Raises:
            PlanError: the model has no such unit, or it cannot be cut there.
        """
        return edges(graph, [graph.find(name) for name in self.cuts])

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """Return JSON, with the keys of the attributes."""
        return json.dumps({"hvdx_plan": _VERSION, **asdict(self)}, indent=2)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: it is no plan, or of a version that this hvdx does not know.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` returned; raises as :meth:`load` does."""
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"no JSON: {error}") from None
        if not isinstance(told, dict) or "hvdx_plan" not in told:
            raise PlanError("no plan: it has no key 'hvdx_plan'")
        if told.pop("hvdx_plan") != _VERSION:
            raise PlanError(f"a plan of another version than {_VERSION}: make it anew")
        if lacking := sorted(_REQUIRED - set(told)):
            raise PlanError(f"no plan: it has no {lacking[0]!r}")
        return cls(**{name: _read(name, value) for name, value in told.items()})


_REQUIRED = {"cuts", "place", "schedule", "micro_batches"}
_LISTS = {"cuts": str, "place": int, "memory": float, "mesh": list}
_SINGLE = {"schedule": str, "micro_batches": int, "step": float, "bubble": float,
           "checkpoint": str, "compression": str}  # fmt: skip


def _read(name: str, value: Any) -> Any:
    """Check a value of a plan's JSON; a whole number is a fraction, too."""
    single = _SINGLE.get(name)
    if single is not None:
        if _is(single, value):
            return value
    elif name not in _LISTS:
        raise PlanError(f"a plan has no {name!r}; it has {', '.join((*_LISTS, *_SINGLE))}")
    elif isinstance(value, list) and all(_is(_LISTS[name], each) for each in value):
        if name != "mesh":
            return tuple(value)
        if all(_is(int, rank) for row in value for rank in row):
            return tuple(map(tuple, value))
    kind = single.__name__ if single else f"list of {_LISTS[name].__name__}"
    raise PlanError(f"{name}={value!r} is no {kind}")


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def edges(graph: Graph, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Turn cuts into intervals of units.

    Raises:
        PlanError: they do not ascend, or the model cannot be cut there.
    """
    names = [unit.name for unit in graph.units]
    for before, cut in pairwise([0, *cuts]):
        if cut <= before:
            raise PlanError(
                f"cuts must ascend and leave each stage a unit, but {names[cut]!r} follows "
                f"{names[before]!r}"
            )
        if cut in graph.solid:
            why = graph.inside.get(names[cut], "whose values it changes in place")
            raise PlanError(
                f"no stage can begin at {names[cut]!r}: it must be in that of {names[cut - 1]!r}, "
                f"{why}"
            )
    return list(pairwise([0, *cuts, len(names)]))


class Link(NamedTuple):
    """What a hop between two ranks costs."""

    latency: float = 0.0  #: seconds
    bandwidth: float = float("inf")  #: bytes per second

    def seconds(self, size: float) -> float:
        """Return how long ``size`` bytes travel."""
        return self.latency + size / self.bandwidth

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read ``100mbit,200us``: bandwidth in kbit, mbit or gbit, or kB, MB or GB, a second.

        Raises:
            PlanError: it is no such text.
        """
        found = re.fullmatch(
            r"(\d+\.?\d*)([kmg])(bit|b),(\d+\.?\d*)(us|ms|s)", text.lower().replace(" ", "")
        )
        if found is None or not float(found[1]):
            raise PlanError(f"link {text!r}: give bandwidth and latency, such as 100mbit,200us")
        rate, scale, unit, latency, times = found.groups()
        bits = 8 if unit == "bit" else 1
        bandwidth = float(rate) * {"k": 1e3, "m": 1e6, "g": 1e9}[scale] / bits
        return cls(float(latency) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[times], bandwidth)


@dataclass(frozen=True)
class Means:
    """What there is to run on.

    Attributes:
        ranks: of the job.
        link: between neighbours, and between replicas.
        speeds: by rank, relative; None: all the same.
        memory: by rank, bytes; None: enough. Several stages of a rank are cut to equal shares.
        copies: bytes per byte of parameters: weight, gradient and Adam's two moments make 4.
        recompute: whether stages keep their inputs alone, and backward begins with forward.
        mesh: rows of ranks that are replicas of each other; empty: rank r is row r.
    """

    ranks: int
    link: Link = field(default_factory=Link)
    speeds: Sequence[float] | None = None
    memory: Sequence[float] | None = None
    copies: float = 4.0
    recompute: bool = False
    mesh: Mesh = ()

    def __post_init__(self) -> None:
        if self.mesh:
            check_mesh(self.mesh, self.ranks)
        for name in ("speeds", "memory"):
            given = getattr(self, name)
            if given is not None and len(given) != self.ranks:
                raise PlanError(f"{name} has {len(given)} entries for {self.ranks} ranks")
            if given is not None and not all(each > 0 for each in given):
                raise PlanError(f"{name}={list(given)}: give numbers above 0")

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """Return the rows of ranks that are replicas of each other."""
        return self.mesh or [(rank,) for rank in range(self.ranks)]

    def speed(self, row: int) -> float:
        """Return how fast the slowest rank of a row is."""
        return min(self.speeds[rank] for rank in self.rows[row]) if self.speeds else 1.0

    def limit(self, row: int) -> float:
        """Return the bytes that each rank of a row has."""
        return min(self.memory[rank] for rank in self.rows[row]) if self.memory else float("inf")

    def sum_seconds(self, row: int, size: float) -> float:
        """Return how long the ranks of a row add up ``size`` bytes each."""
        count = len(self.rows[row])
        if count == 1:
            return 0.0
        rounds = 1 if count == 2 else 2  # see hvdx.pipeline.replicas
        return rounds * self.link.latency + 2 * (count - 1) / count * size / self.link.bandwidth


def make(
    graph: Graph,
    means: Means,
    micro_batches: int,
    *,
    schedule: str = "auto",
    stages: int | str | Sequence[str] | Sequence[int] | None = None,
    by: str = "time",
) -> Plan:
    """Cut ``graph``, place and schedule the stages.

    Args:
        graph: with the costs that ``by`` names.
        means: ranks, and what they can do.
        micro_batches: per step.
        schedule: name or text; ``"auto"``: the one with the shortest predicted step.
        stages: how many; the units, or modules, that all but the first begin with; how many
            units each has; None or ``"auto"``: as many as the schedule takes.
        by: what the largest stage shall have least of: ``"time"``, ``"params"`` or ``"memory"``.

    Raises:
        PlanError: it cannot be done; the message says why, and what can be.
    """
    if by not in ("time", "params", "memory"):
        raise PlanError(f"by={by!r}: use 'time', 'params' or 'memory'")
    if isinstance(stages, str):
        stages = None if stages == "auto" else [stages]
    timed = any(unit.forward for unit in graph.units)
    if not timed and (schedule == "auto" or (by == "time" and not _manual(stages))):
        raise PlanError("no unit has a time: profile the model, or use by='params' and a schedule")
    cuts = _manual_cuts(graph, stages)
    count = stages if isinstance(stages, int) else None if cuts is None else len(cuts) + 1
    plans, problems = [], []
    for told in SCHEDULES if schedule == "auto" else (schedule,):
        try:
            rows = len(means.rows)
            order = schedule_of(told, rows, micro_batches, count, mesh=means.mesh)
            found = cuts if cuts is not None else _cut(graph, means, order, by)
            plans.append(_predicted(graph, means, told, order, edges(graph, found)))
        except PlanError as error:
            problems.append(error)
    if not plans:
        raise problems[0]
    return min(plans, key=lambda plan: (plan.step, max(plan.memory)))


def _manual(stages: Any) -> bool:
    return not (stages is None or isinstance(stages, int))


def _manual_cuts(graph: Graph, stages: Any) -> list[int] | None:
    """Turn names, or numbers of units, into cuts; None: find them."""
    if not _manual(stages):
        return None
    if all(isinstance(each, str) for each in stages):
        return [graph.find(name) for name in stages]
    if not all(isinstance(each, int) and each > 0 for each in stages):
        raise PlanError(f"stages={stages!r}: give names of units, or how many units each has")
    if sum(stages) != len(graph.units):
        raise PlanError(f"stages={list(stages)} are {sum(stages)} units; it has {len(graph.units)}")
    return list(accumulate(stages))[:-1]


def _cut(graph: Graph, means: Means, order: Schedule, by: str) -> list[int]:
    """Cut for ``order``; where ranks have several stages, even out what they have in sum."""
    memory = _Memory(graph, means, order)
    sizes = graph.live_bytes()
    costs: Sequence[float] = {
        "time": [unit.forward + unit.inputs + unit.weights for unit in graph.units],
        "params": [float(sum(unit.parameters.values())) for unit in graph.units],
        "memory": [
            means.copies * sum(unit.parameters.values()) + order.micro_batches * unit.kept_bytes
            for unit in graph.units
        ],
    }[by]
    shares = [len(means.rows[row]) for row in order.place]  # of micro-batches
    speeds = [share / min(shares) for share in shares]
    if by == "time":
        speeds = [speed * means.speed(row) for speed, row in zip(speeds, order.place, strict=True)]
    problem = Problem(
        costs,
        order.stages,
        hops=[means.link.seconds(size) for size in sizes] if by == "time" else None,
        sizes=sizes,
        speeds=speeds if by != "memory" else None,
        memory=memory.of_stage if means.memory else None,
        limits=memory.limits,
        solid=graph.solid,
    )
    cuts = partition(problem)
    several = order.stages > len(means.rows)
    return _leveled(cuts, problem, order.place) if several else cuts


def _leveled(cuts: list[int], problem: Problem, place: Sequence[int]) -> list[int]:
    """Shift cuts while that lowers the largest sum of a rank's stages."""

    def load(trial: Sequence[int]) -> tuple[float, float]:
        sums = [0.0] * (max(place) + 1)
        for stage, (start, stop) in enumerate(pairwise([0, *trial, len(problem.costs)])):
            if start >= stop or stop in problem.solid:
                return float("inf"), 0.0
            if problem.memory and problem.memory(start, stop, stage) > problem.limits[stage]:
                return float("inf"), 0.0
            speed = problem.speeds[stage] if problem.speeds else 1.0
            sums[place[stage]] += sum(problem.costs[start:stop]) / speed
        return max(sums), sum(problem.sizes[cut] for cut in trial) if problem.sizes else 0.0

    best = load(cuts)
    while True:
        trials = [
            [*cuts[:i], cut + shift, *cuts[i + 1 :]]
            for i, cut in enumerate(cuts)
            for shift in (-1, 1)
        ]
        least = min(trials, key=load)
        if load(least) >= best:
            return cuts
        cuts, best = least, load(least)


class _Memory:
    """What stages need under a schedule: copies of parameters, and what micro-batches keep."""

    def __init__(self, graph: Graph, means: Means, order: Schedule) -> None:
        self._graph, self._means, self._order = graph, means, order
        self._live = peak_live(order)
        sizes = [sum(unit.parameters.values()) for unit in graph.units]
        self._parameters = [0, *accumulate(sizes)]
        self._kept = [0, *accumulate(unit.kept_bytes for unit in graph.units)]
        self._entering = graph.live_bytes() if means.recompute else None
        bytes_of = {k: v for unit in graph.units for k, v in unit.parameters.items()}
        self._tied = [(bytes_of[name], units) for name, units in graph.tied().items()]
        self.limits = [means.limit(row) / order.place.count(row) for row in order.place]

    def of_stage(self, start: int, stop: int, stage: int) -> float:
        """Return the bytes that units ``start`` to before ``stop`` need as ``stage``."""
        size = self._parameters[stop] - self._parameters[start]
        for each, units in self._tied:  # there once in a stage, however often it is used
            size -= each * max(0, sum(start <= unit < stop for unit in units) - 1)
        kept = self._kept[stop] - self._kept[start]
        if self._entering is not None:  # all of one micro-batch at a time, inputs of the others
            return self._means.copies * size + self._live[stage] * self._entering[start] + kept
        return self._means.copies * size + self._live[stage] * kept

    def of_ranks(self, found: Sequence[tuple[int, int]]) -> tuple[float, ...]:
        """Return the bytes that each rank needs: what its stages share or keep together, once."""
        owned: list[dict[str, int]] = [{} for _ in range(self._means.ranks)]
        most = [0] * self._means.ranks  # of what a micro-batch keeps in one stage
        whole = [self._kept[stop] - self._kept[start] for start, stop in found]
        for row, (start, stop), size in zip(self._order.place, found, whole, strict=True):
            for rank in self._means.rows[row]:
                most[rank] = max(most[rank], size)
                for unit in self._graph.units[start:stop]:
                    owned[rank].update(unit.parameters)
        if self._entering is None:
            kept = peak_kept(self._order, whole)
        else:
            entering = peak_kept(self._order, [self._entering[start] for start, _ in found])
            kept = [each + more for each, more in zip(entering, most, strict=True)]
        return tuple(
            self._means.copies * sum(parameters.values()) + live
            for parameters, live in zip(owned, kept, strict=True)
        )


def stage_times(
    graph: Graph, means: Means, order: Schedule, found: Sequence[tuple[int, int]]
) -> Times:
    """Add up the times of the units of each stage, on the rank that has it."""
    speeds = [means.speed(row) for row in order.place]

    def total(part: str) -> list[float]:
        return [sum(getattr(unit, part) for unit in graph.units[start:stop]) / speed
                for speed, (start, stop) in zip(speeds, found, strict=True)]  # fmt: skip

    weights = total("weights")
    if order.splits:
        weights = [each + more for each, more in zip(weights, total("apart"), strict=True)]
    forward, inputs = total("forward"), total("inputs")
    if means.recompute:
        inputs = [each + more for each, more in zip(inputs, forward, strict=True)]
        forward[-1] = 0.0  # nobody waits for its results, so backward does it all
    sizes = graph.live_bytes()
    hops = tuple(means.link.seconds(sizes[start]) for start, _ in found[1:])
    sums = tuple(
        means.sum_seconds(row, graph.parameter_bytes(*interval))
        for row, interval in zip(order.place, found, strict=True)
    )
    return Times(tuple(forward), tuple(inputs), tuple(weights), hops, sums)


def _predicted(
    graph: Graph, means: Means, told: str, order: Schedule, found: list[tuple[int, int]]
) -> Plan:
    """Simulate a plan and check that it fits."""
    if len(found) != order.stages:
        raise PlanError(f"{len(found)} stages, but schedule {told!r} takes {order.stages}")
    times = stage_times(graph, means, order, found)
    if told in _VEES and any(times.forward):
        count = order.micro_batches
        order = schedule_of(told, len(means.rows), count, order.stages, times, means.mesh)
    memory = _Memory(graph, means, order).of_ranks(found)
    for rank, need in enumerate(memory):
        if means.memory and need > means.memory[rank]:
            raise PlanError(
                f"rank {rank} needs {size_text(need)} of {size_text(means.memory[rank])} under "
                f"{told!r}: use more ranks, smaller micro-batches or checkpoint='always'"
            )
    seen = simulate(order, times)
    return Plan(
        cuts=tuple(graph.units[start].name for start, _ in found[1:]),
        place=order.place,
        schedule=told,
        micro_batches=order.micro_batches,
        step=seen.step,
        bubble=seen.bubble,
        memory=memory,
        mesh=tuple(map(tuple, means.mesh)),
    )


def table(plan: Plan, graph: Graph, means: Means) -> str:
    """Draw the plan: a line per stage."""
    found = plan.edges(graph)
    times = stage_times(graph, means, plan.order(), found)
    sizes = graph.live_bytes()
    ranks = [",".join(map(str, plan.row(stage))) for stage in range(len(found))]
    wide = max(4, *map(len, ranks))
    lines = [
        f"{'stage':>5} {'rank':>{wide}} {'units':>5} {'ms':>8} {'parameters':>10} {'sends':>9}  "
        "first"
    ]
    for stage, (start, stop) in enumerate(found):
        spent = 1e3 * (times.forward[stage] + times.inputs[stage] + times.weights[stage])
        owned = size_text(graph.parameter_bytes(start, stop))
        sent = size_text(sizes[stop])
        lines.append(
            f"{stage:>5} {ranks[stage]:>{wide}} {stop - start:>5} {spent:>8.2f} {owned:>10} "
            f"{sent:>9}  {graph.units[start].name}"
        )
    return "\n".join(lines)
