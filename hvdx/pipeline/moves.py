"""Units change stages between two steps, with all that training has made of them.

    before   rank 0: a b c d        rank 1: e f
                          |
                          +-- c, d: parameters, buffers, state of the optimizer
                                         |
    after    rank 0: a b            rank 1: c d e f

All ranks agree on the cuts first. What a rank does not have yet it gets from one that had it, over
the pipeline's own channel: replica number j from the old row's replica number j, since what each
keeps for itself (running statistics, what compression holds back) is its own. Then each rank makes
its stages anew. Nothing of what a step computes depends on the stage that a unit is in, so it
learns the same bits as if nothing had moved.
"""

from __future__ import annotations

import abc
import collections
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hvdx.compression import none
from hvdx.errors import PipelineError, PlanError
from hvdx.pipeline.balance import (
    Balancer,
    busy,
    observed,
    partly,
    propose,
    rows_of_units,
    typical,
    whole,
)
from hvdx.pipeline.base import BasePipeline
from hvdx.pipeline.channel import Key
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.options import Told
from hvdx.pipeline.plan import Link, Means, Plan, make, stage_times
from hvdx.pipeline.rebalance import rebalance_of


class Way(NamedTuple):
    """A unit that goes from one rank to another."""

    unit: int
    sender: int
    receiver: int


def ways(line: Graph, before: Plan, after: Plan) -> list[Way]:
    """Return what goes where, in the order of the units."""
    found = []
    rows = zip(rows_of_units(line, before), rows_of_units(line, after), strict=True)
    for unit, (old, new) in enumerate(rows):
        for place, rank in enumerate(new):
            if rank not in old:
                found.append(Way(unit, old[place % len(old)], rank))
    return found


class MovingPipeline(BasePipeline):
    """A pipeline whose units can move.

    Args:
        *args: of :class:`BasePipeline`.
        rebalance: whether units move by themselves; see :func:`rebalance_of`.
        **options: of :class:`BasePipeline`.

    Attributes:
        moves: how often units have moved.
    """

    moves: int = 0

    def __init__(self, *args: Any, rebalance: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rebalance = rebalance
        self._balancer: Balancer | None = None
        self._link = Link()
        self._measured_with: tuple[float, ...] = ()  # shares trained when units were measured
        # Of the last steps with these cuts: shares trained, seconds by rank of this process.
        self._seen: collections.deque[tuple[tuple[float, ...], dict[int, float]]]
        self._seen = collections.deque(maxlen=8)

    def rebalance(self, stages: Plan | Sequence[str] | Sequence[int] | int | None = None) -> Plan:
        """Cut the model anew, between two steps; every rank calls it.

        Parameters, buffers and the optimizers' state go with the units: training goes on to the
        same bits. The schedule, the number of stages and the ranks stay.

        Args:
            stages: the new cuts, as for the pipeline: names of the units that all but the first
                stage begin with, how many units each has, or a plan. None: the best for what the
                last steps took, which needs units that were measured (``by="time"``,
                ``schedule="auto"`` or ``rebalance=``).

        Returns:
            The plan that is followed now.

        Raises:
            PlanError: the model cannot be cut so; nothing has changed.
            MismatchError: ranks ask for different cuts; raised on every rank, nothing has changed.
        """
        if self._failed:
            raise PipelineError(f"this pipeline is of no more use, since {self._failed}")
        with self._peers.alike("rebalance the pipeline"):
            plan = None
            if stages is None:
                self._check_observed()
            else:
                plan = self._recut(stages)
        self._check_cuts(plan)
        if plan is None:
            plan = self._best()
        self._move_to(plan)
        return self.plan

    # --- what a framework adds

    @abc.abstractmethod
    def _trained(self, anew: bool = False) -> tuple[float, ...]:
        """Return by unit the share of its parameters that are trained.

        In the last step, or ``anew``: in the next one.
        """

    @abc.abstractmethod
    def _about(self, unit: int) -> Any:
        """Describe, in plain data, what must fit where this process' ``unit`` goes."""

    @abc.abstractmethod
    def _prepared(self, plan: Plan, about: Mapping[int, Any]) -> Any:
        """Check that units can move as planned, and return what :meth:`_rebuild` takes.

        Args:
            plan: to be followed.
            about: what their givers tell of the units that move here.

        Raises:
            PlanError: they cannot; nothing has changed.
        """

    @abc.abstractmethod
    def _packed(self, unit: int, known: Sequence[int]) -> dict[str, Any]:
        """Return what this process has of a unit: containers of tensors and plain data.

        Args:
            unit: that moves.
            known: units that its receiver has; it knows the weights that they share.
        """

    @abc.abstractmethod
    def _rebuild(self, prepared: Any, arrived: Mapping[int, dict[str, Any]]) -> None:
        """Make stages and optimizers for :attr:`plan`.

        Args:
            prepared: by :meth:`_prepared`.
            arrived: by unit, what :meth:`_packed` returned on another rank.
        """

    # --- making one

    def _agree_on(self, **options: Any) -> None:
        super()._agree_on(**options, rebalance=self._rebalance)

    def _planned(
        self,
        sample: Any,
        stages: Any,
        given: Told,
        by: str | None,
        memory: float | Sequence[float] | None,
        target: Any = None,
    ) -> Plan:
        options = rebalance_of(self._rebalance)
        plan = super()._planned(sample, stages, given, by, memory, target)
        if options is not None and not self._timed:
            self._graph.line, _ = self._profiled(sample, plan.micro_batches)
        limits = [memory] * plan.ranks if isinstance(memory, (int, float)) else memory
        recompute = self._checkpoint != "never"
        self._means = Means(
            plan.ranks, self._link, memory=limits, recompute=recompute, mesh=plan.mesh
        )
        self._measured_with = self._trained()
        if options is not None:
            self._balancer = Balancer(self._line, self._means, options, self._measured_with)
        return plan

    def _profiled(self, sample: Any, micro_batches: int) -> tuple[Graph, Link]:
        line, self._link = super()._profiled(sample, micro_batches)
        return line, self._link

    @property
    def _timed(self) -> bool:
        return any(unit.forward for unit in self._line.units)

    # --- which cuts

    def _recut(self, stages: Any) -> Plan:
        """Return the plan with these cuts; raises as :meth:`rebalance` does."""
        own = self.plan
        if isinstance(stages, Plan):
            plan = stages if stages.mesh else replace(stages, mesh=own.mesh)
            plan.edges(self._line)
        else:
            by, count = "time" if self._timed else "params", own.micro_batches
            told = own.schedule
            plan = make(self._line, self._means, count, schedule=told, stages=stages, by=by)
        for name in ("place", "mesh", "micro_batches"):
            if getattr(own, name) != getattr(plan, name):
                raise PlanError(
                    f"the new plan has {name}={getattr(plan, name)}, the pipeline "
                    f"{getattr(own, name)}: units can move, but other ranks, numbers of stages and "
                    "micro-batches take a new pipeline; save() and load() carry over what is learnt"
                )
        return plan

    def _check_observed(self) -> None:
        """Check that there is what the best cuts follow from."""
        if not self._timed:
            raise PlanError(
                "no unit has a time: make the pipeline with by='time', schedule='auto' or "
                "rebalance=, or say which stages"
            )
        if not self._seen:
            raise PlanError("no step has been observed with these cuts: call step() first")

    def _best(self) -> Plan:
        """Return the best cuts for what the last steps took."""
        trained = self._seen[-1][0]
        own = typical([seconds for then, seconds in self._seen if then == trained])
        seconds = self._agreed_seconds(own)
        line = whole(self._line, self._measured_with)
        with self._peers.alike("rebalance the pipeline"):
            known = observed(partly(line, trained), self._means, self.plan, seconds)
            return propose(partly(line, self._trained(anew=True)), known, self.plan).plan

    def _check_cuts(self, plan: Plan | None) -> None:
        """Compare what the ranks want, before they do what takes all of them."""
        cuts = "the best for what was observed" if plan is None else list(plan.cuts)
        entries = {"cuts": f"= {cuts}", "schedule": f"= {(plan or self.plan).schedule}"}
        self._peers.check_same(entries, "new stages")

    def _seconds(self, spans: Sequence[Any]) -> dict[int, float]:
        """Return by rank of this process what a micro-batch took in one step."""
        ranks = [self._rank] if self._across else range(len(spans))
        taken = {rank: busy(own) for rank, own in zip(ranks, spans, strict=True)}
        return {rank: seconds for rank, seconds in taken.items() if seconds is not None}

    def _agreed_seconds(self, own: Mapping[int, float]) -> dict[int, float]:
        """Return the numbers of all ranks by rank, equal everywhere."""
        with self._telling("rebalance"):
            self._note("rebalance")
            told = self._everyone("A", [[float(rank) for rank in own], list(own.values())])
        pairs = [pair for each in told for pair in zip(*each, strict=True)]
        return {int(rank): number for rank, number in sorted(pairs)}

    def _step_done(self) -> None:
        """Look, after a step, whether units should move by themselves."""
        if not self._timed:
            return
        trained, seconds = self._trained(), self._seconds(self._measured[-1][-1])
        self._seen.append((trained, seconds))
        if self._balancer is None:
            return
        seen = self._balancer.observe(seconds, trained)
        if seen is None:
            return
        plan = self._balancer.decide(self.plan, self._agreed_seconds(seen))
        if plan is None:
            return
        try:
            self._check_cuts(plan)
            self._balancer.moved(self._move_to(plan))
        except PlanError as error:  # on all ranks
            self._balancer = None
            warnings.warn(f"units do not move by themselves any more: {error}", stacklevel=4)

    # --- moving

    def _move_to(self, plan: Plan) -> float:
        """Follow ``plan``; return the seconds that it took the slowest rank to change over."""
        start, line = time.perf_counter(), self._line
        if plan.edges(line) == self.plan.edges(line) and plan.schedule == self.plan.schedule:
            return 0.0
        routes = ways(line, self.plan, plan)
        leaving = [way for way in routes if way.sender == self._rank and self._across]
        about = self._peers.gathered({way.unit: self._about(way.unit) for way in leaving})
        arriving = [way for way in routes if way.receiver == self._rank and self._across]
        with self._peers.alike("rebalance the pipeline"):
            prepared = self._prepared(plan, {w.unit: about[w.sender][w.unit] for w in arriving})
        with self._telling("rebalance"):
            self._note("rebalance")
            arrived = self._traded(leaving, arriving, plan)
            kept = self._kept_back({unit: each["compression"] for unit, each in arrived.items()})
            self._follow(plan)
            self._rebuild(prepared, {unit: each["state"] for unit, each in arrived.items()})
            if self._sums is not None:
                steps, self._sums = self._sums.steps, self._make_sums()
                self._sums.load(kept, steps)
            told = self._everyone("D", [[time.perf_counter() - start]])
        self.moves += 1
        return max(seconds for ((seconds,),) in told)

    def _follow(self, plan: Plan) -> None:
        """Take a plan: forget what was made of the old one."""
        own = self.plan
        self.plan = replace(plan, checkpoint=own.checkpoint, compression=own.compression)
        for of_old in (self._orders, self._measured, self._seen):
            of_old.clear()
        self._times = None
        if self._timed:
            self._times = stage_times(self._line, self._means, plan.order(), plan.edges(self._line))

    def _traded(
        self, leaving: Sequence[Way], arriving: Sequence[Way], plan: Plan
    ) -> dict[int, dict[str, Any]]:
        """Send and receive units; all ranks call it."""
        channel = self._channel
        if channel is None:
            return {}
        rows, kind = rows_of_units(self._line, self.plan), type(self._tensor([0.0]))
        owed = self._owed(plan)
        outlines: dict[tuple[int, int], Any] = {}
        for unit, _, receiver in leaving:
            known = [other for other, row in enumerate(rows) if receiver in row]
            parcel = {"state": self._packed(unit, known), "compression": owed.get(unit, {})}
            tensors: list[Any] = []
            outlines[unit, receiver] = outlined(parcel, kind, tensors)
            channel.send(receiver, Key("M", self._step, unit, 0), tensors)
        everyone = self._peers.gathered(outlines)
        arrived = {}
        for unit, sender, receiver in arriving:
            tensors = list(channel.receive(sender, Key("M", self._step, unit, 0)))
            arrived[unit] = filled(everyone[sender][unit, receiver], tensors)
        return arrived

    def _owed(self, plan: Plan) -> dict[int, dict[str, Any]]:
        """Return by unit that leaves this row what its compressors keep.

        A replica of a row as long gets this replica's; else, what all of the row owe together.
        All ranks of the row call it.
        """
        if self._sums is None or self._compressor is none:
            return {}
        rows = [rows_of_units(self._line, each) for each in (self.plan, plan)]
        own = self._row.ranks
        gone = [unit for unit, (old, new) in enumerate(zip(*rows, strict=True))
                if old == own != new]  # fmt: skip
        alike = [unit for unit in gone if len(rows[1][unit]) == len(own)]
        owed = self._sums.of_units(alike)
        if other := [unit for unit in gone if unit not in alike]:
            owed |= self._sums.of_units(other, self._step)
        return owed

    def _kept_back(self, arrived: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        """Return by parameter what compressors keep of the units that were or came here."""
        if self._sums is None or self._compressor is none:
            return {}
        own = self._sums.of_units(range(len(self._line.units)))
        return {
            name: held for each in (own | dict(arrived)).values() for name, held in each.items()
        }

    def _note(self, what: str) -> None:
        if self._channel is not None:
            self._channel.note = f"{what} before step {self.steps}"


class _Slot(NamedTuple):
    """Stands for a tensor in an outline."""

    number: int


def outlined(nested: Any, kind: type, tensors: list[Any]) -> Any:
    """Return ``nested``, dictionaries, lists and tuples, with tensors taken out into a list."""

    def leave(tensor: Any) -> Any:
        tensors.append(tensor)
        return _Slot(len(tensors) - 1)

    return _mapped(nested, lambda leaf: leave(leaf) if isinstance(leaf, kind) else leaf)


def filled(outline: Any, tensors: Sequence[Any]) -> Any:
    """Undo :func:`outlined`."""
    return _mapped(outline, lambda leaf: tensors[leaf.number] if isinstance(leaf, _Slot) else leaf)


def _mapped(nested: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(nested, dict):
        return {key: _mapped(value, change) for key, value in nested.items()}
    if type(nested) in (list, tuple):
        return type(nested)(_mapped(value, change) for value in nested)
    return change(nested)
