"""Add up the gradients of a stage over its replicas, over the pipeline's own channel.

Not over Horovod's process sets. Those must be declared when the job starts, one thread serves all
of them in turn, so that a large sum on one set delays the others, and a rank that dies is noticed
only when Gloo gives up. Here ranks of a row send each other what they have, directly; a sum goes
in the order of the row, whatever travels together, so that it has the same bits on every replica
and under every schedule and cut.

    two ranks     each sends all it has, and adds                       1 round,  n bytes sent
    r ranks       rank j gets piece j of all, adds, sends the sum       2 rounds, 2(r-1)/r n bytes

What is sent need not be waited for: ZeroMQ's thread carries it while Python computes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeAlias, TypeVar

from hvdx import buckets
from hvdx.comm import (
    Allgather,
    Allreduce,
    Alltoall,
    Owners,
    Rank,
    Ranks,
    Request,
    Together,
    Work,
    together,
)
from hvdx.compression import CompressionError, Compressor, Spec, none
from hvdx.compression.portable import pooled, restored
from hvdx.compression.state import leaves
from hvdx.errors import MismatchError
from hvdx.ops import Ops
from hvdx.pipeline.channel import Key
from hvdx.pipeline.probe import Post
from hvdx.reduce_op import ReduceOp

Result = TypeVar("Result")
Weight: TypeAlias = tuple[int, str]
"""A unit's number and the name of a parameter that it uses."""

_SMALL = 4096  # numbers up to which a sum over many ranks takes one round


class Row:
    """The ranks that have replicas of the same stages, and how they compute together.

    Args:
        ranks: in the order of sums.
        rank: this one.
        post: between them; None if this is the only one.
        ops: the verbs of their tensors.
        beside: ``(tensor, like)``: puts a tensor that has come where ``like`` is.

    Attributes:
        ranks: of the row.
        place: of this rank among them.
        beside: as given.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        post: Post | None,
        ops: Ops,
        beside: Callable[[Any, Any], Any] = lambda tensor, like: tensor,
    ) -> None:
        self.ranks, self.place = tuple(ranks), tuple(ranks).index(rank)
        self.ops, self._post, self.beside = ops, post, beside

    def start(self, work: Work[Result], key: Key) -> Talk[Result]:
        """Send what a generator of requests (:mod:`hvdx.comm`) asks for first; see :class:`Talk`.

        Args:
            work: the same on all ranks of the row.
            key: of which no other messages are under way in the row; they number micro-batches.
        """
        return Talk(self, work, key)

    def sum(self, tensors: Sequence[Any], key: Key) -> list[Any]:
        """Return the sums of ``tensors`` over the row, the same bits on each of its ranks."""
        return self.start(together([*map(_sum, tensors)], self.ops), key).finish()

    def swap(self, parts: Sequence[Any], key: Key) -> Callable[[], list[Any]]:
        """Send part j to the j-th rank; the function returned waits for what they send here.

        With fewer parts than ranks, only as many ranks, the first ones, take part.
        """
        count = len(parts)
        for step in range(1, count):  # not all to the first one at the same time
            other = (self.place + step) % count
            self.send(other, key, [parts[other]])

        def collect() -> list[Any]:
            own = parts[self.place]
            return [
                own if other == self.place else self.beside(self.receive(other, key)[0], own)
                for other in range(count)
            ]

        return collect

    def send(self, place: int, key: Key, tensors: Sequence[Any]) -> None:
        """Send to one rank of the row."""
        assert self._post is not None
        self._post.send(self.ranks[place], key, tensors)

    def receive(self, place: int, key: Key) -> Sequence[Any]:
        """Wait for what one rank of the row sends."""
        assert self._post is not None
        return self._post.receive(self.ranks[place], key)

    def fold(self, parts: Sequence[Any], op: ReduceOp) -> Any:
        """Add what the ranks have, in their order; or find the largest, by element.

        Raises:
            MismatchError: they have tensors of different sizes.
        """
        sizes = {rank: tuple(part.shape) for rank, part in zip(self.ranks, parts, strict=True)}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"rank {rank}: {math.prod(size)}" for rank, size in sizes.items())
            raise MismatchError(
                f"replicas of a stage have gradients of different numbers of elements ({told}): "
                "the model must use the same parameters on every rank, whatever the data"
            )
        return functools.reduce(self._larger if op is ReduceOp.Max else operator.add, parts)

    def _larger(self, one: Any, other: Any) -> Any:
        return self.ops.where(one < other, other, one)


class Talk(Generic[Result]):
    """A generator of requests on its way; it is resumed when its end is asked for."""

    def __init__(self, row: Row, work: Work[Result], key: Key) -> None:
        self._row, self._work, self._key = row, work, key
        self._messages = 0
        self._collect: Callable[[], Any] | None = None
        self._resume(None)

    def finish(self) -> Result:
        """Wait for the generator's end and return its result."""
        while self._collect is not None:
            self._resume(self._collect())
        return self._result  # type: ignore[no-any-return]  # of Any

    def _resume(self, answer: Any) -> None:
        try:
            self._collect = self._begin(self._work.send(answer))
        except StopIteration as done:
            self._collect, self._result = None, done.value

    def _begin(self, request: Request) -> Callable[[], Any]:
        """Send what ``request`` takes; the function returned waits for its answer."""
        row, ops = self._row, self._row.ops
        count = len(row.ranks)
        if isinstance(request, Ranks):
            return lambda: count
        if isinstance(request, Rank):
            return lambda: row.place
        if isinstance(request, Owners):
            return lambda: None  # all ranks need the whole
        if isinstance(request, Together):
            parts = [self._begin(each) for each in request.requests]
            return lambda: [part() for part in parts]
        if isinstance(request, Allreduce):
            return self._begin_sum(request)
        if isinstance(request, Allgather):
            collect = row.swap([request.tensor] * count, self._next())
        else:
            assert isinstance(request, Alltoall)
            size = request.tensor.shape[0] // count
            pieces = [request.tensor[size * i : size * (i + 1)] for i in range(count)]
            collect = row.swap(pieces, self._next())
        return lambda: ops.concat(collect())

    def _begin_sum(self, request: Allreduce) -> Callable[[], Any]:
        row, ops, count = self._row, self._row.ops, len(self._row.ranks)
        op = request.op
        if op not in (ReduceOp.Sum, ReduceOp.Average, ReduceOp.Max):
            raise NotImplementedError(f"replicas of a stage have no {op.name}")
        shape = tuple(request.tensor.shape)
        flat = ops.reshape(request.tensor, (-1,))
        size = math.prod(shape)
        if count <= 2 or size <= _SMALL:
            everyone = row.swap([flat] * count, self._next())

            def total() -> Any:
                return row.fold(everyone(), op)
        else:
            ends = [size * i // count for i in range(count + 1)]
            pieces = row.swap([flat[a:b] for a, b in pairwise(ends)], self._next())
            second = self._next()

            def total() -> Any:
                return ops.concat(row.swap([row.fold(pieces(), op)] * count, second)())

        factor = 1.0 / count if op is ReduceOp.Average and count > 1 else None

        def answer() -> Any:
            found = ops.reshape(total(), shape)
            return found if factor is None else ops.scale(found, factor)

        return answer

    def _next(self) -> Key:
        self._messages += 1
        return self._key._replace(micro_batch=self._messages)


def _sum(tensor: Any) -> Work[Any]:
    return (yield Allreduce(tensor, op=ReduceOp.Sum))


class Sums:
    """Adds up the gradients of a rank's stages, compressed or not, and keeps compressors' states.

    Compressors average; what they return is multiplied by the number of replicas, since each has
    its micro-batches' part of the sum. Each use of a tied weight is a gradient of its own, with a
    state of its own, so that results depend on no cut.

    Args:
        row: of the rank.
        compressor: any that needs no preparation.
        specs: of all weights of this rank's stages, by stage.
        names: of their states, the same wherever the model is cut.
        blank: makes zeros for a weight.

    Attributes:
        steps: how many there were.
    """

    def __init__(
        self,
        row: Row,
        compressor: Compressor,
        specs: Mapping[int, Mapping[Weight, Spec]],
        names: Mapping[Weight, str],
        blank: Callable[[Weight], Any],
    ) -> None:
        self.row, self.compressor, self.steps = row, compressor, 0
        self._by_stage, self._names, self._blank = specs, names, blank
        self._specs = {weight: spec for own in specs.values() for weight, spec in own.items()}
        self._states: dict[str, Any] = {}
        self._under_way: dict[int, list[tuple[list[Weight], Talk[list[Any]]]]] = {}

    def start(self, stage: int, found: Mapping[Weight, Any], step: int, working: int) -> None:
        """Send a stage's gradients, as soon as it has them all.

        Args:
            stage: that has them.
            found: gradients of this rank's micro-batches.
            step: of the training.
            working: how many replicas, from the first on, have micro-batches in this step.
        """
        if working < len(self.row.ranks):
            found = self._filled(stage, found, step, working)
        weights = sorted(found, reverse=True)  # backward finds the last units' first
        entries = [buckets.Entry(weight[1], math.prod(spec.shape), spec.dtype, "")
                   for weight in weights for spec in [self._specs[weight]]]  # fmt: skip
        self._under_way[stage] = []
        for number, places in enumerate(buckets.plan(entries, buckets.limit_bytes())):
            members = [weights[place] for place in places]
            works = [self._reduce(weight, found[weight]) for weight in members]
            key = Key(f"sum{number}", step, stage, 0)
            talk = self.row.start(together(works, self.row.ops), key)
            self._under_way[stage].append((members, talk))

    def finish(self) -> dict[Weight, Any]:
        """Wait for the sums of all stages that have been started."""
        totals: dict[Weight, Any] = {}
        for talks in self._under_way.values():
            for members, talk in talks:
                totals.update(zip(members, talk.finish(), strict=True))
        self._under_way = {}
        self.steps += 1
        return totals

    @property
    def started(self) -> Iterable[int]:
        """The stages whose gradients are on their way."""
        return self._under_way.keys()

    def _reduce(self, weight: Weight, gradient: Any) -> Work[Any]:
        ops, count = self.row.ops.beside(gradient), len(self.row.ranks)
        if self.compressor is none:
            return (yield from _sum(gradient))
        spec, name = self._specs[weight], self._names[weight]
        chosen = self.compressor.of(spec)
        if name not in self._states:
            self._states[name] = chosen.init(ops, spec)
        # A copy: compressors may write over it, and autograd may have given one memory twice.
        copy = ops.scale(gradient, 1.0)
        reduced = yield from chosen.at(self.steps).reduce(ops, copy, self._states[name])
        self._states[name] = reduced.state
        return ops.scale(reduced.mean, count) if count > 1 else reduced.mean

    def _filled(
        self, stage: int, found: Mapping[Weight, Any], step: int, working: int
    ) -> Mapping[Weight, Any]:
        """Give replicas without a micro-batch zeros for what the first one has gradients of."""
        row, key, weights = self.row, Key("which", step, stage, 0), sorted(self._by_stage[stage])
        if row.place == 0:
            told = row.ops.constant([int(weight in found) for weight in weights], "int64")
            for place in range(working, len(row.ranks)):
                row.send(place, key, [told])
        if row.place < working:  # these may still have work, for which others wait
            return found
        (which,) = row.receive(0, key)
        used = which.numpy().tolist()
        return {weight: self._blank(weight) for weight, n in zip(weights, used, strict=True) if n}

    # --- checkpoints

    def saved(self, step: int, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return what compressors keep, by parameter and path, for any number of replicas.

        Of the states of these ``names``, or of all. All ranks of the row call it, and get the same.
        """
        wanted = self._states.keys() if names is None else self._states.keys() & set(names)
        held = {name: leaves(self._states[name]) for name in sorted(wanted)}
        works = [pooled(self.row.ops, own) for own in held.values()]
        found = self.row.start(together(works, self.row.ops), Key("owed", step, 0, 0)).finish()
        return {name: tensors for name, tensors in zip(held, found, strict=True) if tensors}

    def of_units(
        self, units: Iterable[int], step: int | None = None
    ) -> dict[int, dict[str, dict[str, Any]]]:
        """Return by unit and parameter what :meth:`load` takes, for the units' next ranks.

        Args:
            units: of this row.
            step: None: for the replica of this rank's number in a row as long, to the bit. Else
                for any number of replicas; then all ranks of the row call it.
        """
        names = {unit: [name for weight, name in self._names.items() if weight[0] == unit]
                 for unit in units}  # fmt: skip
        if step is None:
            states = {name: {leaf.path: leaf.tensor for leaf in leaves(state)}
                      for name, state in self._states.items()}  # fmt: skip
        else:
            states = self.saved(step, [name for own in names.values() for name in own])
        return {unit: {name: states[name] for name in own if name in states}
                for unit, own in names.items()}  # fmt: skip

    def load(self, saved: Mapping[str, Mapping[str, Any]], steps: int) -> None:
        """Go on from what :meth:`saved` returned of all rows.

        Raises:
            CompressionError: it does not fit; the message names the parameter. Nothing has changed.
        """
        states = {}
        for weight, spec in self._specs.items():
            name = self._names[weight]
            if name in saved:
                like = self._blank(weight)
                first = self.compressor.of(spec).init(self.row.ops.beside(like), spec)
                own = {path: self.row.beside(t, like) for path, t in saved[name].items()}
                try:
                    states[name] = restored(first, own)
                except CompressionError as error:
                    raise CompressionError(f"parameter {name!r}: {error}") from None
        self._states, self.steps = states, steps
