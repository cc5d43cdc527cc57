"""What the pipelines of all frameworks do alike: plan, agree, connect, run a step, sum gradients.

A framework's own class adds how a model becomes units and what they cost, how batches are cut, how
optimizers step and what a checkpoint looks like.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import math
import os
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hvdx import watchdog, world
from hvdx.agreement import check_same, next_name
from hvdx.compression import CompressionError, Compressor, Spec, as_compressor, none
from hvdx.compression.base import refuse_momentum
from hvdx.errors import CheckpointError, MismatchError, PipelineError, PlanError
from hvdx.frameworks import Adapter
from hvdx.ops import ops_for
from hvdx.pipeline.abreast import Abreast
from hvdx.pipeline.channel import Failure, Key
from hvdx.pipeline.connect import over_horovod, over_zmq
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.options import CHANNELS, Told, checked_mesh, devices_for, is_mesh, placed
from hvdx.pipeline.plan import Link, Means, Plan, make, stage_times
from hvdx.pipeline.post import Codec, PostChannel
from hvdx.pipeline.probe import THREADS, measure_link
from hvdx.pipeline.replicas import Row, Sums, Weight
from hvdx.pipeline.run import LocalRanks, run
from hvdx.pipeline.schedule import Schedule, recomputed
from hvdx.pipeline.simulator import Times
from hvdx.pipeline.tied import exchange_tied
from hvdx.pipeline.timeline import write as write_timeline
from hvdx.pipeline.zmq_channel import ZmqChannel

_LAST_STEPS = 8  # that a timeline can show
_PROFILING_SECONDS = 600.0  # for which the other ranks wait for rank 0
_DISK_SECONDS = 3600.0  # likewise, while it reads or writes


class BasePipeline(abc.ABC):
    """A model whose units are spread over the threads of this process, or over the job's ranks.

    Args:
        framework: whose Horovod core serves the job.
        codec: of its tensors.
        place: devices of this process, rows of ranks, ``"auto"`` or None.
        seed: of random units, rank 0's.
        clip_norm: that gradients are scaled down to; None: not at all.
        checkpoint: which micro-batches are computed again for backward.
        compression: of the gradients that replicas of a stage add up.
        batchnorm: how batch normalization treats micro-batches: one of ``options.BATCHNORMS``.
        channel: how tensors travel between ranks.

    Attributes:
        plan: cuts, places and schedule.
        steps: batches that the model has been trained on, before a :meth:`load`, too.
        gradient_norm: of the last step, before clipping, with ``clip_norm``; else None.
        skipped: whether the last step changed no parameter, since a scaled gradient was not
            finite.
        compared: what ``place="auto"`` has chosen from, see :class:`hvdx.planner.auto.Compared`.
        busy_seconds: for which this process' stages have computed in training steps; of several
            threads, in mean.
        schedule_seconds: that the schedules of these steps took; the rest of them is bubble.
    """

    channels: tuple[str, ...] = CHANNELS  # that its tensors can travel by
    plan: Plan
    gradient_norm: float | None = None
    skipped: bool = False
    compared: Sequence[Any] = ()
    _graph: Any  # of the framework; its ``line`` is what the planner sees
    _stages: dict[int, Any]
    _again: Any = None  # makes such a pipeline, of another plan

    def __init__(
        self,
        framework: str,
        codec: Codec,
        place: Sequence[Any] | None,
        seed: int,
        *,
        clip_norm: float | None,
        checkpoint: str | None,
        batchnorm: str,
        channel: str,
        compression: Any = None,
    ) -> None:
        self._framework, self._codec = framework, codec
        self._clip_norm, self._checkpoint = clip_norm, checkpoint or "never"
        self._batchnorm, self._carrier = batchnorm, channel
        self._asked, self._compressor = compression, as_compressor(none)
        self._auto = isinstance(place, str) and place == "auto"
        self._mesh: Sequence[Any] = place if place is not None and is_mesh(place) else ()
        self._devices = None if self._mesh or self._auto else place
        job = self._devices is None and world.is_initialized(framework)
        self._across = job and world.size() > 1
        self._rank = world.rank() if self._across else 0
        self.steps = 0
        self.busy_seconds = self.schedule_seconds = 0.0
        self._step, self._failed = 0, ""  # calls for inference count as steps here
        self._working = 1  # replicas of this rank's row that have micro-batches in this step
        self._channel: PostChannel | None = None
        self._threads: LocalRanks | None = None
        self._sums: Sums | None = None
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

    @property
    def communication_seconds(self) -> float:
        """Seconds this rank has waited for other ranks' messages, whatever kept these."""
        return self._channel.seconds_waited if self._channel is not None else 0.0

    @property
    def bytes_sent(self) -> int:
        """Bytes of tensors that this rank has sent to others."""
        return self._channel.bytes_sent if self._channel is not None else 0

    def close(self) -> None:
        """Give back threads and sockets; the pipeline is of no more use."""
        self._failed = self._failed or "it has been closed"
        self._finalizer()

    # --- what a framework adds

    @abc.abstractmethod
    def _profile(
        self,
        sample: Any,
        micro_batches: int,
        runs: int = 5,
        of: Callable[[Iterable[float]], float] = min,
    ) -> Graph:
        """Return the line with what its units cost here; ``of`` takes one of the runs' times."""

    @abc.abstractmethod
    def _tensor(self, numbers: Sequence[float]) -> Any:
        """Return them as a tensor of float64 in host memory."""

    @abc.abstractmethod
    def _norms(self, gradients: Sequence[Any]) -> Sequence[float]:
        """Return the 2-norm of each."""

    @abc.abstractmethod
    def _joined(self, pieces: Sequence[Sequence[Any]], compared: bool) -> list[Any]:
        """Put together what the last stage found, by micro-batch: add losses, append outputs."""

    def _beside(self, tensor: Any, like: Any) -> Any:
        """Put another rank's tensor on the device where ``like`` is."""
        return tensor

    @abc.abstractmethod
    def _finite(self, gradients: Sequence[Any]) -> bool:
        """Tell whether all numbers in them are finite."""

    def _weights(self, unit: int) -> Mapping[str, Any]:
        """Return by name the parameters of a unit, frozen or not."""
        return self._graph.units[unit].params  # type: ignore[no-any-return]  # of Any

    def _arrived(self, gradient: Any, unit: int, name: str) -> Any:
        """Put another rank's gradient of a weight on the device where this rank's is."""
        return gradient

    # --- what it adds for place="auto"; see hvdx.planner.auto

    @abc.abstractmethod
    def _trains_with(self) -> bool:
        """Tell whether there are loss and optimizer."""

    @abc.abstractmethod
    def _rows(self, batch: Any) -> int:
        """Count the rows of a batch."""

    @abc.abstractmethod
    def _measured_update(self) -> tuple[float, float]:
        """Return the optimizer's seconds and bytes of state per byte of parameters."""

    @abc.abstractmethod
    def _preserved(self) -> contextlib.AbstractContextManager[Any]:
        """Put back afterwards, to the bit, what training changes of the model and of generators."""

    @abc.abstractmethod
    def _twin(self, plan: Plan, compression: Any) -> Any:
        """Return a pipeline of the same model, loss and options, but of this plan."""

    def _shapes(self, unit: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of a unit's parameters, by name."""
        return {
            name: (tuple(p.shape), str(p.dtype).removeprefix("torch."))
            for name, p in self._graph.units[unit].params.items()
        }

    # --- making one

    @property
    def _line(self) -> Graph:
        return self._graph.line  # type: ignore[no-any-return]  # of Any

    @property
    def _core(self) -> Adapter:
        return world.core(self._framework)

    @property
    def _size(self) -> int:
        """Count the ranks, if they have stages of one model."""
        return world.size() if self._across else 1

    def _everyones(self, value: Any) -> list[Any]:
        """Return what all ranks have, by rank, on each of them."""
        if not self._across:
            return [value]
        return list(self._core.allgather_object(value, next_name("pipeline"), None))

    @contextlib.contextmanager
    def _alike(self, what: str = "make the pipeline") -> Iterator[None]:
        """Raise on every rank what one of them raises inside, where it does ``what``."""
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
                raise PlanError(f"rank {rank} cannot {what}: {each}")

    def _agree_on(self, **options: Any) -> None:
        """Compare what the ranks ask for, before they do by it what takes all of them.

        Raises:
            MismatchError: they differ; raised on every rank.
        """
        if self._across:
            options |= {"clip_norm": self._clip_norm, "checkpoint": self._checkpoint}
            options |= {"batchnorm": self._batchnorm, "place": "auto" if self._auto else "given"}
            entries = {name: f"= {value!r}" for name, value in options.items()}
            entries["channel"] = f"= {self._carrier!r}"
            check_same(self._core, "pipeline", entries, next_name("pipeline"))

    def _planned(
        self,
        sample: Any,
        stages: Any,
        given: Told,
        by: str | None,
        memory: float | Sequence[float] | None,
        target: Any = None,
    ) -> Plan:
        """Take the plan, or make one; measure the units first if that needs their costs."""
        if self._auto and not isinstance(stages, Plan):
            return self._automatic(sample, stages, given, by, memory, target)
        if isinstance(stages, Plan) and stages.compression and self._asked is None:
            from hvdx.planner.auto import compressor_named

            self._asked = compressor_named(stages.compression)
        micro_batches, schedule = given.micro_batches, given.schedule
        assert micro_batches is not None and schedule is not None  # see settled
        ranks = world.size() if self._across else len(self._devices or ())
        mesh = checked_mesh(self._mesh, world.size() if self._across else 1)
        if isinstance(stages, Plan):
            plan = placed(stages, mesh, ranks, "ranks" if self._across else "devices")
            plan.edges(self._line)
            return plan
        ranks = ranks or devices_for(stages, schedule)
        by, link = by or ("time" if schedule == "auto" else "params"), Link()
        if schedule == "auto" or by != "params" or memory is not None:
            self._graph.line, link = self._profiled(sample, micro_batches)
        limits = [memory] * ranks if isinstance(memory, (int, float)) else memory
        recompute = self._checkpoint != "never"
        means = Means(ranks, link, memory=limits, recompute=recompute, mesh=mesh)
        plan = make(self._line, means, micro_batches, schedule=schedule, stages=stages, by=by)
        if plan.step:
            self._times = stage_times(self._line, means, plan.order(), plan.edges(self._line))
        return plan

    def _automatic(
        self,
        sample: Any,
        stages: Any,
        given: Told,
        by: str | None,
        memory: float | Sequence[float] | None,
        target: Any,
    ) -> Plan:
        """Let the planner choose all that is left open."""
        from hvdx.planner.auto import Asked, choose

        if stages is not None and stages != "auto":
            raise PlanError(f"stages={stages!r}: place='auto' chooses them; leave one of both out")
        if by not in (None, "time"):
            raise PlanError(f"by={by!r}: place='auto' plans by time; leave by= out")
        if not self._trains_with():
            raise PlanError("place='auto' tries steps of training: give loss= and optimizer=")
        found = choose(self, Asked(sample, target, *given, memory, self._asked))
        self._again = None  # it has the sample
        plan, self.compared = found.prediction.plan, found.compared
        self._graph.line, self._times = found.line, found.prediction.times
        self._checkpoint, self._asked = plan.checkpoint, found.compression
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
        channel = self._connected(range(world.size()))
        with contextlib.closing(channel), channel.session():
            link = measure_link(channel, self._rank, lambda size: self._tensor([0.0] * (size // 8)))
        return told, self._from_first(link)

    def _own_stages(self, plan: Plan | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield the number, the first unit and the one after the last of this process' stages."""
        plan = plan or self.plan
        for number, (first, stop) in enumerate(plan.edges(self._line)):
            if not self._across or self._rank in plan.row(number):
                yield number, first, stop

    def _check_agreed(self, units: dict[str, str]) -> None:
        """Compare the ranks' pipelines: ``units`` describes each unit."""
        entries = dict(units)
        for name in ("cuts", "place", "mesh", "schedule", "micro_batches"):
            entries[name] = f"= {getattr(self.plan, name)}"
        entries["compression"] = f"= {self._compressor}"
        check_same(self._core, "pipeline", entries, next_name("pipeline"))

    def _check_optimizers(self, told: str) -> None:
        """Compare the ranks' optimizers; a rank without parameters has nothing to tell.

        Raises:
            MismatchError: they differ; raised on every rank.
        """
        everyone = self._core.allgather_object(told, next_name("pipeline"), None)
        if len({each for each in everyone if each}) > 1:
            each = ", ".join(f"rank {rank}: {made}" for rank, made in enumerate(everyone) if made)
            raise MismatchError(
                f"ranks disagree about the optimizer: {each}. All must make the same one; to treat "
                "parameters differently, decide by the parameters, not by the rank"
            )

    def _connect(self) -> None:
        """Open the channel to the other ranks, or start the threads of this process."""
        if self._across:
            self._channel = self._connected([*map(self.plan.row, range(len(self.plan.place)))])
            self._finalizer = weakref.finalize(self, self._channel.close)
        else:
            self._threads = LocalRanks(self._stages, max(self.plan.place) + 1, None)
            self._finalizer = weakref.finalize(self, self._threads.close)
        ops = ops_for(type(self._tensor([0.0])))
        self._row = Row(self._own_row(), self._rank, self._channel, ops, self._beside)
        if len(self._row.ranks) > 1 or self._compressor is not none:
            self._sums = self._make_sums()

    def _own_row(self) -> tuple[int, ...]:
        """Return the ranks that have the same stages as this one, which is one of them."""
        if not self._across:
            return (self._rank,)
        return next(row for row in self.plan.rows if self._rank in row)

    def _checked_compression(self, optimizers: Mapping[str, Mapping[str, Any]]) -> Compressor:
        """Return the compressor that the user has asked for.

        Args:
            optimizers: options by name, by what to call the optimizer.

        Raises:
            CompressionError: it is none, or does what cannot be done here.
        """
        compressor = as_compressor(self._asked)
        if compressor.prepare is not None:
            raise CompressionError(
                f"compression={compressor} looks at Horovod's network, but replicas of a stage use "
                "the pipeline's own: name a method, such as hvd.Compression.int8"
            )
        for name, options in optimizers.items():
            refuse_momentum(compressor, name, options)
        return compressor

    @property
    def _leads(self) -> list[int]:
        """The first rank of each row, which speaks for the others where they all have the same."""
        return [row[0] for row in self.plan.rows] if self._across else [self._rank]

    def _make_sums(self) -> Sums:
        """Prepare to add up gradients over the replicas of this rank's stages."""
        tied, uses, names = self._line.tied(), {}, {}
        for stage, first, stop in self._own_stages():
            uses[stage] = {
                (index, name): Spec(
                    name, tuple(p.shape), str(p.dtype).removeprefix("torch."), len(self._row.ranks)
                )
                for index in range(first, stop)
                for name, p in self._weights(index).items()
            }
            for index, name in uses[stage]:
                first_use = index == tied.get(name, (index,))[0]
                unit = self._graph.units[index].name
                names[index, name] = name if first_use else f"{name} in {unit}"

        def blank(weight: Weight) -> Any:
            spec = next(own[weight] for own in uses.values() if weight in own)
            return self._arrived(self._row.ops.zeros(spec.shape, spec.dtype), *weight)

        return Sums(self._row, self._compressor, uses, names, blank)

    def _connected(self, place: Sequence[int | Sequence[int]]) -> PostChannel:
        """Open a channel between ``place``'s ranks; all ranks of the job call it."""
        if self._carrier == "horovod":
            return over_horovod(self._core, self._codec, self._rank, place)
        return over_zmq(ZmqChannel, self._core, self._codec, self._rank, place)

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
            with self._failing(f"end of {what}"), self._channel.session(), self._failing(what):
                yield
        except BaseException as error:
            self._failed = str(error).partition("\n")[0] or type(error).__name__
            raise

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Make a failure of any error, and tell it to the other ranks."""
        assert self._channel is not None
        try:
            yield
        except PipelineError:
            raise
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
            where = f"{what} {self._step}"
            failure = Failure(self._rank, told, where, "", traceback.format_exc())
            self._channel.fail(failure)
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
            self._orders[most, train] = (
                _largest(self.plan, most, self._times) if train else self.plan.inference(most)
            )
        return self._orders[most, train]

    def _perform(
        self, batch: Any, rows: int, train: bool, under: str = "", compared: bool | None = None
    ) -> list[Any]:
        """Run the schedule on ``batch``; return what the last stage found, on every rank.

        ``under`` says what else must be the same on all ranks, ``compared`` whether there is a
        loss; None: in training.
        """
        order = self._order(rows, train)
        again = recomputed(order, self._checkpoint)
        for number, stage in self._stages.items():
            stage.begin(batch, again[number], self._abreast(number, order))
        start = time.perf_counter()
        if self._channel is None:
            assert self._threads is not None
            spans = self._threads.run(order, self._step)
        else:
            verb, count = "step" if train else "call", order.micro_batches
            self._channel.note = (
                f"{verb} {self._step} with {rows} rows in {count} micro-batches{under}"
            )
            self._working = min(count, len(self._row.ranks))
            early = self._sum_stage if train and self._sums is not None else None
            spans = [run(order, self._rank, self._stages, self._channel, self._step, early)]
        if train:
            self._measured.append((self._step, order, spans))
            self.schedule_seconds += time.perf_counter() - start
            self.busy_seconds += sum(s.end - s.start for row in spans for s in row) / len(spans)
        found = self._spread(order)
        compared = train if compared is None else compared
        return self._joined([found[k] for k in sorted(found)], compared)

    def _abreast(self, stage: int, order: Schedule) -> Abreast | None:
        """Return the replicas of a stage, if their micro-batches are normalized together."""
        if not (order.trains and self._syncs([self._row.ranks])):
            return None
        return Abreast(self._row, self._step, stage, order.micro_batches)

    def _syncs(self, rows: Sequence[Sequence[int]]) -> bool:
        """Tell whether replicas in such rows normalize micro-batches together."""
        return self._batchnorm == "sync" and max(map(len, rows)) > 1

    def _spread(self, order: Schedule) -> dict[int, Sequence[Any]]:
        """Return what the last stage found, by micro-batch, on every rank."""
        last = order.stages - 1
        own = self._stages[last].found() if last in self._stages else {}
        if self._channel is None:
            return dict(own)
        key, found = Key("L", self._step, 0, 0), dict(own)
        if own:
            told = [tensor for k in sorted(own) for tensor in own[k]]
            for rank in sorted({rank for row in self.plan.rows for rank in row} - {self._rank}):
                self._channel.send(rank, key, told)
        for rank in self.plan.row(last):
            theirs = [k for k in range(order.micro_batches) if order.owner(last, k) == rank]
            if rank != self._rank and theirs:
                told = list(self._channel.receive(rank, key))
                each = len(told) // len(theirs)
                found.update((k, told[i * each : (i + 1) * each]) for i, k in enumerate(theirs))
        return found

    def _sum_stage(self, stage: int) -> None:
        """Begin to add up a stage's gradients over its replicas, while others are at work."""
        assert self._sums is not None
        self._sums.start(stage, self._stages[stage].gradients, self._step, self._working)

    def _totals(self, scale: float | None = None) -> dict[str, Any]:
        """Add up the uses of each parameter of this process, in the order of units, and clip.

        Gradients that were multiplied by ``scale`` are divided by it; :attr:`skipped` tells then
        whether one of them, on any rank, is not finite.
        """
        found = {key: g for stage in self._stages.values() for key, g in stage.gradients.items()}
        if self._sums is not None:
            for stage in sorted(self._stages.keys() - self._sums.started):
                self._sum_stage(stage)
            found = self._sums.finish()
        if self._channel is not None:
            exchange_tied(
                self._channel, self._row, self.plan, self._line, self._step, found, self._arrived
            )
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
            others = sorted({rank for row in self.plan.rows for rank in row} - {self._rank})
            for rank in others:
                self._channel.send(rank, key, told)
            for rank in others:
                found.append([each.numpy().tolist() for each in self._channel.receive(rank, key)])
        return found

    def _compression_state(self) -> dict[str, Any]:
        """Return by parameter and path what this row's compressors keep, for any mesh.

        All ranks of the row call it.
        """
        if self._sums is None or self._compressor is none:
            return {}
        return self._sums.saved(self._step)

    def _common_state(self) -> dict[str, Any]:
        """Return rank 0's part of a checkpoint that is not of its stages; nothing elsewhere."""
        if self._rank:
            return {}
        told = {"step": self.steps, "seed": self._seed, "plan": self.plan.to_json()}
        if self._sums is not None and self._compressor is not none:
            told["compression"] = {
                "compressor": self._compressor.name, "steps": self._sums.steps, "parameters": {}
            }  # fmt: skip
        return told

    def _go_on(self, told: Mapping[str, Any]) -> None:
        """Take step and seed from a checkpoint."""
        self.steps, self._seed = told.get("step", 0), told.get("seed", self._seed)
        for stage in self._stages.values():
            stage.seed = self._seed

    def _told_by_first(
        self, what: str, path: str | os.PathLike[str], work: Callable[[], Any]
    ) -> Any:
        """Return on every rank what ``work`` does on rank 0.

        Raises:
            CheckpointError: it has failed; ``what`` and ``path`` say at what.
        """
        result, problem = None, ""
        if self._rank == 0:
            with watchdog.patience(_DISK_SECONDS):
                try:
                    result = work()
                except (OSError, ValueError, TypeError) as error:
                    problem = str(error) or type(error).__name__
        result, problem = self._from_first((result, problem))
        if problem:
            told = f"the pipeline cannot be {what} {os.fspath(path)!r}: {problem}"
            raise CheckpointError(told)
        return result

    @abc.abstractmethod
    def misfits(self, told: dict[str, Any]) -> list[str]:
        """Say what of a checkpoint does not fit this pipeline; nothing is changed."""

    @abc.abstractmethod
    def take_state(self, told: dict[str, Any]) -> None:
        """Go on from a checkpoint that fits."""

    def _take_fitting(self, path: str | os.PathLike[str], told: dict[str, Any]) -> None:
        """Go on from what has been read from ``path``, if it is of this model."""
        problems = self.misfits(told)
        if problems:
            raise CheckpointError(
                f"{os.fspath(path)!r} does not fit this pipeline: {'; '.join(problems)}"
            )
        self.take_state(told)

    def _compression_misfits(self, told: Mapping[str, Any]) -> list[str]:
        """Say whether a checkpoint has another compressor's state."""
        then = (told.get("compression") or {}).get("compressor")
        if then is None or self._compressor is none or then == self._compressor.name:
            return []
        return [
            f"the checkpoint has the state of compression={then}, but the pipeline has "
            f"compression={self._compressor.name}: give it the former"
        ]

    def _load_compression(self, told: Mapping[str, Any] | None) -> None:
        """Go on from the compressors' part of a checkpoint; None: it has none.

        It is that of this compressor: see :meth:`_compression_misfits`.
        """
        if self._sums is None or self._compressor is none:
            if told and self._rank == 0:
                warnings.warn(
                    f"the checkpoint has what compression={told['compressor']} held back; without "
                    "compression= it is lost",
                    stacklevel=4,
                )
            return
        told = told or {"steps": 0, "parameters": {}}
        self._sums.load(told["parameters"], told["steps"])

    def _stage_of(self) -> list[int]:
        """Return by unit its stage."""
        edges = self.plan.edges(self._line)
        return [number for number, (first, stop) in enumerate(edges) for _ in range(first, stop)]

    def _from_first(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""
        if not self._across:
            return value
        return self._core.broadcast_object(value, 0, next_name("pipeline"), None)


def _largest(plan: Plan, most: int, times: Times | None) -> Schedule:
    """Return the schedule with the most micro-batches, up to ``most``, that there is."""
    problem: PlanError | None = None
    for count in range(most, 0, -1):
        try:
            return plan.order(times, count)
        except PlanError as error:
            problem = problem or error
    assert problem is not None
    raise PlanError(f"a batch of {most} rows: {problem}")
