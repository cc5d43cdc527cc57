"""What the pipelines of all frameworks do alike: agree, connect, run a step, add up gradients.

A framework's own class adds how a model becomes units, how batches are cut, how optimizers step
and what a checkpoint looks like.
"""

from __future__ import annotations

import contextlib
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
from hvdx.pipeline.plan import Means, Plan, make, schedule_of
from hvdx.pipeline.run import LocalRanks, run
from hvdx.pipeline.schedule import Schedule, forward_only
from hvdx.pipeline.zmq_channel import Codec, ZmqChannel, own_address


class BasePipeline:
    """A model whose units are spread over the threads of this process, or over the job's ranks.

    Args:
        framework: whose Horovod core serves the job.
        place: devices of this process, or None.
        seed: of random units, rank 0's.

    Attributes:
        plan: cuts, places and schedule.
    """

    plan: Plan
    _line: Graph
    _stages: Mapping[int, Any]

    def __init__(self, framework: str, place: Sequence[Any] | None, seed: int) -> None:
        self._framework = framework
        self._across = place is None and world.is_initialized(framework) and world.size() > 1
        self._rank = world.rank() if self._across else 0
        self._step, self._failed = 0, ""
        self._channel: ZmqChannel | None = None
        self._threads: LocalRanks | None = None
        self._orders: dict[tuple[int, bool], Schedule] = {}
        self._seed = self._from_first(seed)

    def close(self) -> None:
        """Give back threads and sockets; the pipeline is of no more use."""
        self._failed = self._failed or "it has been closed"
        self._finalizer()

    # --- making one

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
        self, stages: Any, place: Sequence[Any] | None, schedule: str, micro_batches: int
    ) -> Plan:
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
            ranks = max(1, count // 2 if schedule in ("interleaved", "zbv") else count)
        return make(
            self._line, Means(ranks), micro_batches, schedule=schedule, stages=stages, by="params"
        )

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
        check_same(self._core, "pipeline", entries, next_name("pipeline"))

    def _connect(self, codec: Codec) -> None:
        """Open the channel to the other ranks, or start the threads of this process."""
        if self._across:
            core = self._core
            self._channel = ZmqChannel(
                self.plan.place,
                self._rank,
                lambda each: core.allgather_object(each, next_name("pipeline"), None),
                codec,
                address=own_address(one_machine=core.horovod.local_size() == core.horovod.size()),
                seconds=watchdog.timeout_seconds(),
            )
            self._finalizer = weakref.finalize(self, self._channel.close)
        else:
            self._threads = LocalRanks(self._stages, max(self.plan.place) + 1, None)
            self._finalizer = weakref.finalize(self, self._threads.close)

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
                largest(self.plan, most) if train else forward_only(place, most)
            )
        return self._orders[most, train]

    def _perform(self, batch: Any, rows: int, train: bool) -> list[Any]:
        """Run the schedule on ``batch``; return what the last stage found, on every rank."""
        order = self._order(rows, train)
        for stage in self._stages.values():
            stage.begin(batch)
        if self._channel is None:
            assert self._threads is not None
            self._threads.run(order, self._step)
        else:
            verb, count = "step" if train else "call", order.micro_batches
            self._channel.note = f"{verb} {self._step} with {rows} rows in {count} micro-batches"
            run(order, self._rank, self._stages, self._channel, self._step)
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

    def _totals(self) -> dict[str, Any]:
        """Add up the uses of each parameter of this process, in the order of units."""
        found = {key: g for stage in self._stages.values() for key, g in stage.gradients.items()}
        if self._channel is not None:
            self._exchange(self._channel, found)
        totals: dict[str, Any] = {}
        for (_, name), gradient in sorted(found.items(), key=lambda entry: entry[0][0]):
            totals[name] = totals[name] + gradient if name in totals else gradient
        return totals

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

    def _arrived(self, gradient: Any, unit: int, name: str) -> Any:
        """Put another rank's gradient of a weight on the device where this rank's is."""
        return gradient

    def _stage_of(self) -> list[int]:
        """Return by unit its stage."""
        edges = self.plan.edges(self._line)
        return [number for number, (first, stop) in enumerate(edges) for _ in range(first, stop)]

    def _from_first(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""
        if not self._across:
            return value
        return self._core.broadcast_object(value, 0, next_name("pipeline"), None)


def check_options(micro_batches: Any, place: Any) -> None:
    """Refuse what is no number of micro-batches or no list of devices.

    Raises:
        PlanError: it is not.
    """
    if not isinstance(micro_batches, int) or micro_batches < 1:
        raise PlanError(f"micro_batches={micro_batches!r}: give a whole number from 1")
    if place is not None and (isinstance(place, str) or not len(place)):
        raise PlanError(f"place={place!r}: give a list of devices, such as ['cpu', 'cpu']")


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


def largest(plan: Plan, most: int) -> Schedule:
    """Return the schedule with the most micro-batches, up to ``most``, that there is."""
    ranks, stages = max(plan.place) + 1, len(plan.place)
    problem: PlanError | None = None
    for count in range(most, 0, -1):
        try:
            return schedule_of(plan.schedule, ranks, count, stages)
        except PlanError as error:
            problem = problem or error
    assert problem is not None
    raise PlanError(f"a batch of {most} rows: {problem}")
