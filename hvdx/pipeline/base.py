"""What the pipelines of all frameworks do alike: plan, agree, connect, run a step, sum gradients.

A framework's own class adds how a model becomes units and what they cost, how batches are cut, how
optimizers step and what a checkpoint looks like.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvdx import watchdog, world
from hvdx.agreement import check_same, next_name
from hvdx.errors import PipelineError, PlanError
from hvdx.frameworks import Adapter
from hvdx.pipeline.channel import Failure, Key
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.plan import SCHEDULES, Link, Means, Plan, make, schedule_of, stage_times
from hvdx.pipeline.probe import THREADS, measure_link
from hvdx.pipeline.run import LocalRanks, run
from hvdx.pipeline.schedule import CHECKPOINTS, Schedule, forward_only, recomputed
from hvdx.pipeline.simulator import Times
from hvdx.pipeline.timeline import write as write_timeline
from hvdx.pipeline.zmq_channel import Codec, ZmqChannel, own_address

#: Running statistics of batch normalization move once per batch, or with each micro-batch.
BATCHNORMS = ("deferred", "micro")
_LAST_STEPS = 8  # that a timeline can show
_PROFILING_SECONDS = 600.0  # for which the other ranks wait for rank 0


class BasePipeline:
    """A model whose units are spread over the threads of this process, or over the job's ranks.

    Args:
        framework: whose Horovod core serves the job.
        codec: of its tensors.
        place: devices of this process, or None.
        seed: of random units, rank 0's.
        clip_norm: that gradients are scaled down to; None: not at all.
        checkpoint: which micro-batches are computed again for backward.
        batchnorm: when running statistics of batch normalization move.

    Attributes:
        plan: cuts, places and schedule.
        steps: batches that the model has been trained on, before a :meth:`load`, too.
        gradient_norm: of the last step, before clipping, with ``clip_norm``; else None.
        skipped: whether the last step changed no parameter, since a scaled gradient was not
            finite.
    """

    plan: Plan
    gradient_norm: float | None = None
    skipped: bool = False
    _graph: Any  # of the framework; its ``line`` is what the planner sees
    _stages: Mapping[int, Any]

    def __init__(
        self,
        framework: str,
        codec: Codec,
        place: Sequence[Any] | None,
        seed: int,
        *,
        clip_norm: float | None,
        checkpoint: str,
        batchnorm: str,
    ) -> None:
        self._framework, self._codec = framework, codec
        self._clip_norm, self._checkpoint = clip_norm, checkpoint
        self._batchnorm = batchnorm
        self._across = place is None and world.is_initialized(framework) and world.size() > 1
        self._rank = world.rank() if self._across else 0
        self.steps = 0
        self._step, self._failed = 0, ""  # calls for inference count as steps here
        self._channel: ZmqChannel | None = None
        self._threads: LocalRanks | None = None
        self._times: Times | None = None
        self._measured: collections.deque[Any] = collections.deque(maxlen=_LAST_STEPS)
        self._orders: dict[tuple[int, bool], Schedule] = {}
        self._seed = self._from_first(seed)

    def timeline(self, path: str | os.PathLike[str], steps: int = 3) -> None:
        """Draw the last steps of training below what is predicted, and why ranks wait.

        Rank 0 writes; every rank calls it. The prediction is the plan's where units were measured
        (``by="time"``, ``schedule="auto"``), else made of these steps' own times.

        Args:
            path: ``.json``: a trace for Chrome or Perfetto; ``.png``: a picture, which needs
                matplotlib; else one HTML page.
            steps: how many, of the last 8; of these, those with as many micro-batches as the last.
        """
        if not self._measured:
            raise PlanError("there is no step to draw yet: call step() before timeline()")
        with self._telling("timeline"):
            last = self._measured[-1][1]
            own = {step: spans for step, order, spans in self._measured if order is last}
            own = dict(list(own.items())[-max(1, steps) :])
            everyone = [own]
            if self._across:
                everyone = self._core.allgather_object(own, next_name("pipeline"), None)
            problem = ""
            if self._rank == 0:
                lanes = {step: [row for each in everyone for row in each[step]] for step in own}
                try:
                    write_timeline(path, last, self._times, lanes)
                except (OSError, PlanError) as error:
                    problem = str(error)
            problem = self._from_first(problem)
        if problem:
            raise OSError(f"the timeline cannot be written to {os.fspath(path)!r}: {problem}")

    def close(self) -> None:
        """Give back threads and sockets; the pipeline is of no more use."""
        self._failed = self._failed or "it has been closed"
        self._finalizer()

    # --- what a framework adds

    def _profile(self, sample: Any, micro_batches: int) -> Graph:
        """Return the line with what its units cost here."""
        raise NotImplementedError

    def _tensor(self, numbers: Sequence[float]) -> Any:
        """Return them as a tensor of float64 in host memory."""
        raise NotImplementedError

    def _norms(self, gradients: Sequence[Any]) -> Sequence[float]:
        """Return the 2-norm of each."""
        raise NotImplementedError

    def _finite(self, gradients: Sequence[Any]) -> bool:
        """Tell whether all numbers in them are finite."""
        raise NotImplementedError

    def _arrived(self, gradient: Any, unit: int, name: str) -> Any:
        """Put another rank's gradient of a weight on the device where this rank's is."""
        return gradient

    # --- making one

    @property
    def _line(self) -> Graph:
        return self._graph.line  # type: ignore[no-any-return]  # of Any

    @property
    def _core(self) -> Adapter:
        return world.core(self._framework)

    @contextlib.contextmanager
    def _alike(self) -> Iterator[None]:
        """Raise on every rank what one of them raises inside."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            if not self._across:
                raise
            problem = error
        if not self._across:
            return
        told = f"{type(problem).__name__}: {problem}" if problem else ""
        everyone = self._core.allgather_object(told, next_name("pipeline"), None)
        if problem is not None:
            raise problem
        for rank, each in enumerate(everyone):
            if each:
                raise PlanError(f"rank {rank} cannot make the pipeline: {each}")

    def _planned(
        self,
        sample: Any,
        stages: Any,
        place: Sequence[Any] | None,
        schedule: str,
        micro_batches: int,
        by: str | None,
        memory: float | Sequence[float] | None,
    ) -> Plan:
        """Take the plan, or make one; measure the units first if that needs their costs."""
        ranks = world.size() if self._across else place and len(place)
        if isinstance(stages, Plan):
            needed = max(stages.place) + 1
            if ranks and needed != ranks:
                what = "ranks" if self._across else "devices"
                raise PlanError(f"the plan is for {needed} {what}, but there are {ranks}")
            stages.edges(self._line)
            return stages
        if not ranks:
            count = 1 if stages is None else stages if isinstance(stages, int) else (
                len(stages) + isinstance(next(iter(stages), ""), str))  # fmt: skip
            ranks = max(1, count // SCHEDULES.get(schedule, 1))
        by, link = by or ("time" if schedule == "auto" else "params"), Link()
        if schedule == "auto" or by != "params" or memory is not None:
            self._graph.line, link = self._profiled(sample, micro_batches)
        limits = [memory] * ranks if isinstance(memory, (int, float)) else memory
        recompute = self._checkpoint != "never"
        means = Means(ranks, link, memory=limits, recompute=recompute)
        plan = make(self._line, means, micro_batches, schedule=schedule, stages=stages, by=by)
        if plan.step:
            self._times = stage_times(self._line, means, plan.order(), plan.edges(self._line))
        return plan

    def _profiled(self, sample: Any, micro_batches: int) -> tuple[Graph, Link]:
        """Return what rank 0 measures, on every rank: the units and a hop."""
        told: Any = None
        if self._rank == 0:
            with watchdog.patience(_PROFILING_SECONDS):
                try:
                    told = self._profile(sample, micro_batches)
                except Exception as error:
                    told = f"the model cannot be profiled: {type(error).__name__}: {error}"
        told = self._from_first(told)
        if isinstance(told, str):
            raise PlanError(told)
        if not self._across:
            return told, THREADS
        with contextlib.closing(self._connected(range(world.size()))) as channel:
            link = measure_link(channel, self._rank, lambda size: self._tensor([0.0] * (size // 8)))
            return told, self._from_first(link)

    def _own_stages(self) -> Iterator[tuple[int, int, int]]:
        """Yield the number, the first unit and the one after the last of this process' stages."""
        for number, (first, stop) in enumerate(self.plan.edges(self._line)):
            if not self._across or self.plan.place[number] == self._rank:
                yield number, first, stop

    def _check_agreed(self, units: dict[str, str]) -> None:
        """Compare the ranks' pipelines: ``units`` describes each unit."""
        entries = dict(units)
        for name in ("cuts", "place", "schedule", "micro_batches"):
            entries[name] = f"= {getattr(self.plan, name)}"
        entries["clip_norm"] = f"= {self._clip_norm}"
        entries["checkpoint"] = f"= {self._checkpoint}"
        entries["batchnorm"] = f"= {self._batchnorm}"
        check_same(self._core, "pipeline", entries, next_name("pipeline"))

    def _connect(self) -> None:
        """Open the channel to the other ranks, or start the threads of this process."""
        if self._across:
            self._channel = self._connected(self.plan.place)
            self._finalizer = weakref.finalize(self, self._channel.close)
        else:
            self._threads = LocalRanks(self._stages, max(self.plan.place) + 1, None)
            self._finalizer = weakref.finalize(self, self._threads.close)

    def _connected(self, place: Sequence[int]) -> ZmqChannel:
        core = self._core
        return ZmqChannel(
            place,
            self._rank,
            lambda each: core.allgather_object(each, next_name("pipeline"), None),
            self._codec,
            address=own_address(one_machine=core.horovod.local_size() == core.horovod.size()),
            seconds=watchdog.timeout_seconds(),
        )

    # --- a step

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Tell the other ranks what fails here outside of stages."""
        if self._failed:
            raise PipelineError(f"this pipeline is of no more use, since {self._failed}")
        if self._channel is None:
            yield
            return
        try:
            yield
        except PipelineError as error:
            self._failed = str(error).partition("\n")[0]
            raise
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
            where = f"{what} {self._step}"
            failure = Failure(self._rank, told, where, "", traceback.format_exc())
            self._channel.fail(failure)
            self._failed = told
            if not isinstance(error, Exception):
                raise
            raise failure.exception() from error

    def _sizes(self, rows: int, train: bool) -> list[int]:
        """Return how many rows each micro-batch of a batch has."""
        count = self._order(rows, train).micro_batches
        return [rows // count + (k < rows % count) for k in range(count)]

    def _order(self, rows: int, train: bool) -> Schedule:
        """Return the schedule for a batch: of as many micro-batches as it has rows for."""
        most = min(rows, self.plan.micro_batches)
        if (most, train) not in self._orders:
            place = self.plan.place
            self._orders[most, train] = (
                _largest(self.plan, most, self._times) if train else forward_only(place, most)
            )
        return self._orders[most, train]

    def _perform(self, batch: Any, rows: int, train: bool, under: str = "") -> list[Any]:
        """Run the schedule on ``batch``; return what the last stage found, on every rank.

        ``under`` says what else must be the same on all ranks.
        """
        order = self._order(rows, train)
        again = recomputed(order, self._checkpoint)
        for number, stage in self._stages.items():
            stage.begin(batch, again[number])
        if self._channel is None:
            assert self._threads is not None
            spans = self._threads.run(order, self._step)
        else:
            verb, count = "step" if train else "call", order.micro_batches
            self._channel.note = (
                f"{verb} {self._step} with {rows} rows in {count} micro-batches{under}"
            )
            spans = [run(order, self._rank, self._stages, self._channel, self._step)]
        if train:
            self._measured.append((self._step, order, spans))
        return self._spread(order.place[-1])

    def _spread(self, owner: int) -> list[Any]:
        """Return what the last stage found on every rank."""
        last = self._stages.get(len(self.plan.place) - 1)
        found = [] if last is None else last.found()
        if self._channel is None:
            return list(found)
        key = Key("L", self._step, 0, 0)
        if last is None:
            return list(self._channel.receive(owner, key))
        for rank in set(self.plan.place) - {self._rank}:
            self._channel.send(rank, key, found)
        return list(found)

    def _totals(self, scale: float | None = None) -> dict[str, Any]:
        """Add up the uses of each parameter of this process, in the order of units, and clip.

        Gradients that were multiplied by ``scale`` are divided by it; :attr:`skipped` tells then
        whether one of them, on any rank, is not finite.
        """
        found = {key: g for stage in self._stages.values() for key, g in stage.gradients.items()}
        if self._channel is not None:
            self._exchange(self._channel, found)
        totals: dict[str, Any] = {}
        for (_, name), gradient in sorted(found.items(), key=lambda entry: entry[0][0]):
            totals[name] = totals[name] + gradient if name in totals else gradient
        if scale is not None:
            totals = {name: gradient * (1.0 / scale) for name, gradient in totals.items()}
            own = float(self._finite(list(totals.values())))
            self.skipped = not all(finite for ((finite,),) in self._everyone("O", [[own]]))
        if self._clip_norm is not None:
            self._clip(totals, self._clip_norm)
        return totals

    def _clip(self, totals: dict[str, Any], limit: float) -> None:
        """Scale gradients by their norm over all stages: summed in the order of units."""
        names = [name for unit in self._line.units for name in unit.parameters]
        order = {name: number for number, name in enumerate(dict.fromkeys(names))}
        own = [float(order[name]) for name in totals], list(self._norms(list(totals.values())))
        every: dict[float, float] = {}
        for told in self._everyone("N", own):
            every.update(zip(*told, strict=True))
        self.gradient_norm = math.sqrt(sum(every[i] * every[i] for i in sorted(every)))
        scale = limit / (self.gradient_norm + 1e-6)
        if not scale >= 1.0:
            totals.update({name: gradient * scale for name, gradient in totals.items()})

    def _everyone(self, kind: str, own: Sequence[Sequence[float]]) -> list[list[list[float]]]:
        """Return such lists of numbers of all ranks, this one's first."""
        found = [[list(each) for each in own]]
        if self._channel is not None:
            key, told = Key(kind, self._step, 0, 0), [self._tensor(each) for each in own]
            others = set(self.plan.place) - {self._rank}
            for rank in others:
                self._channel.send(rank, key, told)
            for rank in others:
                found.append([each.numpy().tolist() for each in self._channel.receive(rank, key)])
        return found

    def _exchange(self, channel: ZmqChannel, found: dict[tuple[int, str], Any]) -> None:
        """Give and get the gradients of parameters that several ranks have."""
        ranks = [self.plan.place[number] for number in self._stage_of()]
        shared = []
        for index, (name, units) in enumerate(sorted(self._line.tied().items())):
            owners: dict[int, list[int]] = {}
            for unit in units:
                owners.setdefault(ranks[unit], []).append(unit)
            if self._rank in owners and len(owners) > 1:
                shared.append((name, owners, Key("T", self._step, index, 0)))
        for name, owners, key in shared:
            mine = [found.get((unit, name)) for unit in owners[self._rank]]
            for rank in set(owners) - {self._rank}:
                channel.send(rank, key, mine)
        for name, owners, key in shared:
            for rank in set(owners) - {self._rank}:
                theirs = channel.receive(rank, key)
                for unit, gradient in zip(owners[rank], theirs, strict=True):
                    if gradient is not None:
                        found[unit, name] = self._arrived(gradient, unit, name)

    def _stage_of(self) -> list[int]:
        """Return by unit its stage."""
        edges = self.plan.edges(self._line)
        return [number for number, (first, stop) in enumerate(edges) for _ in range(first, stop)]

    def _from_first(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""
        if not self._across:
            return value
        return self._core.broadcast_object(value, 0, next_name("pipeline"), None)


def check_options(
    micro_batches: Any,
    place: Any,
    clip_norm: Any = None,
    checkpoint: Any = "never",
    batchnorm: Any = "deferred",
) -> None:
    """Refuse options that mean nothing for any framework.

    Raises:
        PlanError: one does; the message names it and what there is.
    """
    if not isinstance(micro_batches, int) or micro_batches < 1:
        raise PlanError(f"micro_batches={micro_batches!r}: give a whole number from 1")
    if place is not None and (isinstance(place, str) or not len(place)):
        raise PlanError(f"place={place!r}: give a list of devices, such as ['cpu', 'cpu']")
    if clip_norm is not None and not clip_norm > 0:
        raise PlanError(f"clip_norm={clip_norm!r}: give a number above 0, or None")
    if checkpoint not in CHECKPOINTS:
        raise PlanError(f"checkpoint={checkpoint!r}: use one of {', '.join(CHECKPOINTS)}")
    if batchnorm == "sync":
        raise PlanError(
            "batchnorm='sync' takes statistics of all replicas of a stage together, but here each "
            "stage has one: use 'deferred', whose running statistics are those of whole batches"
        )
    if batchnorm not in BATCHNORMS:
        raise PlanError(f"batchnorm={batchnorm!r}: use one of {', '.join(BATCHNORMS)}")


def rows_of(shapes: Sequence[Sequence[int]]) -> int:
    """Count the rows of a batch from its tensors' shapes; those of scalars do not matter.

    Raises:
        ValueError: they differ in that, or there is none.
    """
    counts = {shape[0] for shape in shapes if len(shape)}
    if len(counts) != 1 or counts == {0}:
        told = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"the batch has tensors of shapes {told or 'none'}: all need the same first dimension, "
            "of at least 1, along which micro-batches are cut"
        )
    return counts.pop()


def _largest(plan: Plan, most: int, times: Times | None) -> Schedule:
    """Return the schedule with the most micro-batches, up to ``most``, that there is."""
    ranks, stages = max(plan.place) + 1, len(plan.place)
    problem: PlanError | None = None
    for count in range(most, 0, -1):
        try:
            return schedule_of(plan.schedule, ranks, count, stages, times)
        except PlanError as error:
            problem = problem or error
    assert problem is not None
    raise PlanError(f"a batch of {most} rows: {problem}")
