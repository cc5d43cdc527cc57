"""What a step takes and what ranks keep under one candidate, from what is known.

A step is made of tasks, as the engine runs them:

    rank 0   F0 F1 B0 B1  (coding)  wait: sums, loss   update
    rank 1   F0 B0 F1 B1  (coding)  wait: sums, loss   update

Actions wait for what other ranks send; a stage's gradients leave as soon as its last backward is
over, while the rank goes on; at the end it waits for its replicas' gradients, and for the loss,
and steps its optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.partition import size_text
from hvdx.pipeline.plan import Means, Plan, make, stage_times
from hvdx.pipeline.schedule import Action, Schedule, needs, recomputed
from hvdx.pipeline.simulator import Times
from hvdx.planner.clock import Need, Taken, Task, clock
from hvdx.planner.facts import Codec, Job, Profile


class Candidate(NamedTuple):
    """A way to train that may be tried.

    Attributes:
        mesh: by stage, or by the row that has two, the ranks that are replicas of each other.
        micro_batches: that a batch is cut into.
        schedule: of :data:`hvdx.pipeline.plan.SCHEDULES`.
        checkpoint: of :data:`hvdx.pipeline.schedule.CHECKPOINTS`.
        compression: of the gradients that replicas add up, by name; ``"none"``.
    """

    mesh: tuple[tuple[int, ...], ...]
    micro_batches: int
    schedule: str = "1f1b"
    checkpoint: str = "never"
    compression: str = "none"

    @property
    def shape(self) -> str:
        """Name the mesh: replicas x rows, or the replicas of each row."""
        lengths = [len(row) for row in self.mesh]
        if len(set(lengths)) == 1:
            return f"{lengths[0]}x{len(lengths)}"
        return "+".join(map(str, lengths))


class Prediction(NamedTuple):
    """What a candidate comes to.

    Attributes:
        candidate: this.
        plan: cuts and places, with seconds of a step, share of idle time and bytes by rank.
        times: of the stages, for which ``zbv`` orders its actions.
        sums: seconds in which ranks wait for their replicas' gradients alone, at most.
        update: seconds in which a rank steps its optimizer, at most.
    """

    candidate: Candidate
    plan: Plan
    times: Times
    sums: float
    update: float

    @property
    def step(self) -> float:
        """Return the seconds of a step."""
        return self.plan.step


def predict(candidate: Candidate, profile: Profile, job: Job) -> Prediction:
    """Cut the model for ``candidate`` and predict what comes of it.

    Raises:
        PlanError: it cannot be done, or does not fit into the ranks' memory.
    """
    graph = profile.at(candidate.micro_batches)
    problem: PlanError | None = None
    for by, bounded in (("time", False), ("time", True), ("memory", False)):
        try:
            plan = _cut(candidate, graph, profile, job, by, bounded)
        except PlanError as error:
            problem = problem or error
            continue
        found = priced(candidate, plan, graph, profile, job)
        if fits(found.plan.memory, job):
            return found
        need = [size_text(each) for each in found.plan.memory]
        problem = PlanError(f"{described(candidate)} needs {', '.join(need)} on ranks 0 and on")
        if not job.memory:
            break
    assert problem is not None
    raise problem


def leanest(candidate: Candidate, profile: Profile, job: Job) -> Prediction:
    """Predict for the cuts that need least memory, whether or not they fit."""
    graph = profile.at(candidate.micro_batches)
    tries = [
        priced(candidate, _cut(candidate, graph, profile, job, by, False), graph, profile, job)
        for by in ("time", "memory")
    ]
    return min(tries, key=lambda each: overfull(each.plan.memory, job))


def fits(memory: Sequence[float], job: Job) -> bool:
    """Tell whether every rank has the bytes that it needs."""
    return overfull(memory, job) <= 1.0


def overfull(memory: Sequence[float], job: Job) -> float:
    """Return how full the fullest rank would be; where there is no limit, compare bytes."""
    if not job.memory:
        return max(memory) / float(1 << 62)
    return max(need / have for need, have in zip(memory, job.memory, strict=True))


def described(candidate: Candidate) -> str:
    """Name a candidate in a message."""
    told = [f"place={[list(row) for row in candidate.mesh]}",
            f"{candidate.micro_batches} micro-batches", candidate.schedule]  # fmt: skip
    told += [f"checkpoint={candidate.checkpoint!r}"] * (candidate.checkpoint != "never")
    told += [f"compression {candidate.compression}"] * (candidate.compression != "none")
    return ", ".join(told)


def _means(candidate: Candidate, profile: Profile, job: Job, bounded: bool) -> Means:
    rows = tuple(tuple(row) for row in candidate.mesh)
    plain = rows == tuple((rank,) for rank in range(job.ranks))
    return Means(
        job.ranks,
        job.network.link,
        speeds=job.speeds or None,
        memory=job.memory if bounded else None,
        copies=2.0 + profile.slots,
        recompute=bounded and candidate.checkpoint != "never",
        mesh=() if plain else rows,
    )


def _cut(
    candidate: Candidate, graph: Graph, profile: Profile, job: Job, by: str, bounded: bool
) -> Plan:
    means = _means(candidate, profile, job, bounded)
    return make(graph, means, candidate.micro_batches, schedule=candidate.schedule, by=by)


def priced(
    candidate: Candidate, plan: Plan, graph: Graph, profile: Profile, job: Job
) -> Prediction:
    """Predict a step and memory for a plan whose cuts are given."""
    means = _means(candidate, profile, job, False)
    edges = plan.edges(graph)
    times = _trimmed(stage_times(graph, means, plan.order(), edges), job)
    order = plan.order(times)
    costs = _Costs(candidate, order, times, edges, graph, profile, job)
    rows = costs.rows()
    ran = clock([row.tasks for row in rows], job.lanes, job.hosts)
    step = max(taken[-1].end for taken in ran)
    busy = sum(taken.end - taken.start for row in ran for taken in row)
    found = replace(
        plan,
        step=step,
        bubble=max(0.0, 1.0 - busy / (step * len(rows))) if step else 0.0,
        memory=costs.memory(),
        checkpoint=candidate.checkpoint,
        compression=candidate.compression,
    )
    waits = [_waited(row, taken) for row, taken in zip(rows, ran, strict=True)]
    return Prediction(
        candidate, found, times, max(waits), max(t[-1].end - t[-1].start for t in ran)
    )


def tasks_of(found: Prediction, profile: Profile, job: Job) -> list[list[Task]]:
    """Return by rank the tasks of a step that was predicted, as ``job`` trims them."""
    graph = profile.at(found.candidate.micro_batches)
    edges = found.plan.edges(graph)
    means = _means(found.candidate, profile, job, False)
    times = _trimmed(stage_times(graph, means, found.plan.order(), edges), job)
    order = found.plan.order(found.times)
    costs = _Costs(found.candidate, order, times, edges, graph, profile, job)
    return [row.tasks for row in costs.rows()]


def _trimmed(times: Times, job: Job) -> Times:
    """Return the times that steps were found to take, without sums, which are priced here."""
    ahead, back = job.trim.forward, job.trim.backward
    return Times(
        tuple(ahead * each for each in times.forward),
        tuple(back * each for each in times.inputs),
        tuple(back * each for each in times.weights),
        times.hops,
    )


class _Row(NamedTuple):
    """A rank's tasks, and where among them it begins to wait for its replicas."""

    tasks: list[Task]
    waits: int


def _waited(row: _Row, taken: Sequence[Taken]) -> float:
    """Return how long a rank waits for its replicas after its own work."""
    return taken[row.waits].start - taken[row.waits - 1].end


class _Costs:
    """A schedule's tasks, and what its ranks keep."""

    def __init__(
        self,
        candidate: Candidate,
        order: Schedule,
        times: Times,
        edges: Sequence[tuple[int, int]],
        graph: Graph,
        profile: Profile,
        job: Job,
    ) -> None:
        self._order, self._times, self._edges, self._graph = order, times, edges, graph
        self._profile, self._job = profile, job
        self._mesh = candidate.mesh
        self._again = recomputed(order, candidate.checkpoint)
        self._codec = _codec(candidate, profile, len(graph.units))
        self._coded = candidate.compression != "none"
        self._rows = -(-profile.rows // candidate.micro_batches)

    # --- time

    def rows(self) -> list[_Row]:
        """Return what each rank does."""
        order = self._order
        rows: list[list[Task]] = [[] for _ in order.rows]
        where: dict[Action, Need] = {}
        ends: dict[tuple[int, int], Need] = {}  # (stage, rank): when its gradients leave
        lost: dict[int, Need] = {}  # rank of the last stage: when it has its last loss
        for rank, actions in enumerate(order.rows):
            last = {action.stage: place for place, action in enumerate(actions)}
            for place, action in enumerate(actions):
                where[action.gives] = Need(rank, len(rows[rank]))
                if action.stage == order.stages - 1 and action.kind != "W":
                    lost[rank] = where[action.gives]
                rows[rank].append(Task(self._seconds(action), action=action))
                if last[action.stage] == place:
                    rows[rank] += self._coding(action.stage)
                    ends[action.stage, rank] = Need(rank, len(rows[rank]) - 1)
        for rank, actions in enumerate(order.rows):
            for action in actions:
                own = where[action.gives]
                met = tuple(self._met(rank, action, where[need])
                            for need in needs(action, order.stages))  # fmt: skip
                rows[rank][own.place] = rows[rank][own.place]._replace(needs=met)
        return [self._ended(rank, row, ends, lost) for rank, row in enumerate(rows)]

    def _seconds(self, action: Action) -> float:
        """Return how long an action takes: what it computes again, and the loss, included."""
        kind, stage, micro_batch = action
        last, trim = stage == self._order.stages - 1, self._job.trim
        seconds, ahead = self._times.of(action), 0.0
        if kind in "BI" and last:
            seconds += trim.back_loss * self._rows
        if kind == "F" or micro_batch in self._again[stage]:
            ahead = self._times.forward[stage] + (trim.loss * self._rows if last else 0.0)
        if kind == "F":  # what is computed again anyway, and nobody waits for, is left to backward
            seconds = 0.0 if last and micro_batch in self._again[stage] else ahead
        elif kind in "BI":
            seconds += ahead
        return seconds + trim.action

    def _met(self, rank: int, action: Action, need: Need) -> Need:
        """Add what the message takes, if it comes from another rank."""
        if need.rank == rank:
            return need
        cut = action.stage - (action.kind == "F")
        return need._replace(seconds=self._times.hops[cut])

    def _coding(self, stage: int) -> list[Task]:
        """Return the task of compressing a stage's gradients, if that is asked for."""
        start, stop = self._edges[stage]
        return [Task(sum(self._codec.seconds[start:stop]))] if self._coded else []

    def _ended(
        self,
        rank: int,
        row: list[Task],
        ends: dict[tuple[int, int], Need],
        lost: dict[int, Need],
    ) -> _Row:
        """Let a rank wait for its replicas, then for the loss, and step its optimizer."""
        own = [stage for stage, owner in ends if owner == rank]
        met = []
        for stage in own:
            mates = self._row(stage)
            start, stop = self._edges[stage]
            sent = self._codec.sent(start, stop, len(mates))
            seconds = self._job.network.sum_seconds(len(mates), sent, self._codec.rounds)
            met += [ends[stage, mate]._replace(seconds=seconds) for mate in mates
                    if mate != rank and (stage, mate) in ends]  # fmt: skip
        hop = self._job.network.link.latency
        told = [need._replace(seconds=hop) for mate, need in lost.items() if mate != rank]
        size = sum(self._owned(own).values())
        speed = self._job.speeds[rank] if self._job.speeds else 1.0
        update = self._profile.update * size / speed + self._job.trim.step
        tasks = [*row, Task(0.0, tuple(met)), Task(0.0, tuple(told)), Task(update)]
        return _Row(tasks, len(row))

    def _row(self, stage: int) -> tuple[int, ...]:
        return self._mesh[self._order.place[stage]]

    # --- memory

    def memory(self) -> tuple[float, ...]:
        """Return by rank the bytes of parameters, gradients, optimizer and micro-batches."""
        return tuple(map(self._of_rank, range(self._order.ranks)))

    def _of_rank(self, rank: int) -> float:
        own = sorted({action.stage for action in self._order.rows[rank]})
        weights, trained = sum(self._owned(own).values()), sum(self._trained(own).values())
        mates = max(len(self._row(stage)) for stage in own)
        held = 0.0
        if self._coded:
            held = sum(sum(self._codec.held[slice(*self._edges[stage])]) for stage in own)
        step = max(self._worked(rank), _summed(trained, mates, self._coded))
        return weights + self._profile.slots * trained + held + step

    def _worked(self, rank: int) -> float:
        """Return what gradients and micro-batches take while the schedule runs, at most."""
        graph, edges = self._graph, self._edges
        entering = graph.live_bytes()
        kept = [sum(unit.kept_bytes for unit in graph.units[slice(*edge)]) for edge in edges]
        fresh = [sum(self._trained([stage]).values()) for stage in range(len(edges))]
        now = peak = gradients = 0.0
        summed: set[int] = set()
        for kind, stage, micro_batch in self._order.rows[rank]:
            less = entering[edges[stage][0]] if micro_batch in self._again[stage] else kept[stage]
            if kind == "F":
                now += less
                peak = max(peak, now + gradients)
                continue
            # A backward sets free what it has used while it makes gradients, all at once.
            most = max(now - less + kept[stage], now - less + fresh[stage] * (kind != "I"))
            peak = max(peak, most + gradients)
            if kind == "I":
                now += kept[stage] - less
                continue
            now -= kept[stage] if kind == "W" else less
            if stage not in summed:
                summed.add(stage)
                gradients += fresh[stage]
        return peak

    def _owned(self, stages: Sequence[int]) -> dict[str, int]:
        """Return the parameters of some stages and their bytes; tied ones once."""
        units = [unit for stage in stages for unit in self._graph.units[slice(*self._edges[stage])]]
        return {name: size for unit in units for name, size in unit.parameters.items()}

    def _trained(self, stages: Sequence[int]) -> dict[str, int]:
        """Return those that get gradients."""
        timed = any(unit.weights or unit.inputs for unit in self._graph.units)
        frozen = {
            name
            for stage in stages
            for unit in self._graph.units[slice(*self._edges[stage])]
            if timed and not unit.weights and not unit.inputs
            for name in unit.parameters
        }
        return {name: size for name, size in self._owned(stages).items() if name not in frozen}


def _summed(size: float, replicas: int, coded: bool) -> float:
    """Return the bytes of gradients while replicas add them up: own ones, others' and the sums."""
    if replicas == 1 and not coded:
        return size
    return 3.0 * size


def _codec(candidate: Candidate, profile: Profile, count: int) -> Codec:
    """Return what a candidate's compressor takes; none sends each parameter as it is."""
    if candidate.compression != "none":
        try:
            return profile.codecs[candidate.compression]
        except KeyError:
            raise PlanError(f"compression {candidate.compression!r} was not measured") from None
    nothing = (0.0,) * count
    sizes = tuple(float(sum(unit.parameters.values())) for unit in profile.units)
    return Codec(nothing, sizes, nothing, 1, nothing)
