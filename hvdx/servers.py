"""Parameter servers: each rank owns a part of the parameters, and alone steps the optimizer there.

A step is

    push    workers' gradients are summed at the ranks that own them      (reducescatter, alltoall)
    update  an owner steps the optimizer on its part, from the mean       (no communication)
    pull    what owners have made of their parts goes to all ranks        (allgather)

With every rank a server this is an allreduce whose halves have the update between them: as many
bytes, and an optimizer state that is cut in as many parts as there are ranks (ZeRO, stage 1). With
few servers the others keep no state at all, and servers carry their traffic.

Parameters lie side by side in buckets, and a bucket is cut into equal parts wherever a parameter
begins: servers own as many bytes each, also of a model that is one huge embedding. So an
optimizer must treat each element alone. Most do; what measures whole tensors (LAMB, Adafactor,
Muon) does not.

References:
    Li, Andersen, Park, Smola, Ahmed, Josifovski, Long, Shekita, Su: Scaling Distributed Machine
    Learning with the Parameter Server. OSDI 2014.
    Rajbhandari, Rasley, Ruwase, He: ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models. SC 2020. arXiv:1910.02054.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hvdx.buckets import width
from hvdx.comm import Allgather, Allreduce, Alltoall, Owners, Rank, Reducescatter, Work
from hvdx.compression.base import Compressor, Spec
from hvdx.compression.updates import Messenger
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

STRATEGIES = ("allreduce", "parameter_server")


def checked_servers(sync: Any, servers: Any, ranks: Sequence[int]) -> tuple[int, ...] | None:
    """Return the servers' places in ``ranks``, ascending; None without parameter servers.

    Args:
        sync: what the user gave, as ``servers``.
        servers: global ranks; None: all of ``ranks``.
        ranks: the global ranks that train together, ascending.

    Raises:
        ValueError: they are no such thing; the message names the value and the remedy.
    """
    if sync not in STRATEGIES:
        raise ValueError(f"sync={sync!r}: use one of {', '.join(map(repr, STRATEGIES))}")
    if sync == "allreduce":
        if servers is not None:
            raise ValueError(f"servers={servers!r} needs sync='parameter_server'")
        return None
    if servers is None:
        return tuple(range(len(ranks)))
    told = list(servers) if isinstance(servers, Iterable) else None
    if told is None or isinstance(servers, str) or any(type(rank) is not int for rank in told):
        raise ValueError(f"servers={servers!r}: give a list of ranks, such as [0], or None for all")
    if not told:
        raise ValueError("servers=[] is empty: somebody must own the parameters; None means all")
    if len(set(told)) < len(told):
        raise ValueError(f"servers={told}: a rank is named twice; name each once")
    for rank in told:
        if rank not in ranks:
            raise ValueError(
                f"servers={told}: rank {rank} is not among the {len(ranks)} that train, "
                f"{', '.join(map(str, ranks))}"
            )
    return tuple(sorted(ranks.index(rank) for rank in told))


def refuse_measuring(compressor: Compressor) -> None:
    """Refuse a compressor that measures what an allreduce takes, since none takes place.

    And one that is hierarchical: owners are ranks, not hosts.

    Raises:
        ValueError: it is such a one.
    """
    if compressor.sharers != 1:
        raise ValueError(
            f"sync='parameter_server' with compression={compressor}: parts of parameters belong to "
            "ranks, not to hosts; name a method alone, such as hvd.Compression.int8()"
        )
    if compressor.prepare is not None:
        raise ValueError(
            f"sync='parameter_server' with compression={compressor}: it chooses by the time that "
            "allreduces take, of which there are none; name a method, such as "
            "hvd.Compression.int8()"
        )


class Cut(NamedTuple):
    """Who owns which part of a flat tensor: rank after rank, without gaps."""

    sizes: tuple[int, ...]
    """By place; 0 for ranks that own nothing."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and stop of each rank's part."""
        ends = list(itertools.accumulate(self.sizes))
        return [(end - size, end) for size, end in zip(self.sizes, ends, strict=True)]

    @property
    def even(self) -> bool:
        """Whether a reducescatter cuts so, and every rank gets something."""
        size, ranks = sum(self.sizes), len(self.sizes)
        return size >= ranks and self.sizes == tuple(map(len, _evenly(size, ranks)))

    def within(self, start: int, stop: int) -> Cut:
        """Return who owns which part of ``[start:stop]``, counted from ``start``."""
        return Cut(tuple(max(0, min(b, stop) - max(a, start)) for a, b in self.spans))


def cut(size: int, ranks: int, servers: Sequence[int]) -> Cut:
    """Cut ``size`` elements into parts of equal lengths, or less one, for the servers' places."""
    parts = dict(zip(servers, map(len, _evenly(size, len(servers))), strict=True))
    return Cut(tuple(parts.get(place, 0) for place in range(ranks)))


def _evenly(size: int, parts: int) -> list[range]:
    """Cut as Horovod's reducescatter does: the first parts are longer by one."""
    longer, least = size % parts, size // parts
    ends = [place * least + min(place, longer) for place in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def push(ops: Ops, flat: Any, cut: Cut) -> Work[Any]:
    """Return this rank's part of the sum of all ranks' ``flat``.

    Args:
        ops: the verbs of the tensors.
        flat: shape (n,).
        cut: of n elements.

    Returns:
        Shape (own,), of the same dtype; bfloat16 is summed in float32. Between two ranks it is
        what an allreduce gives, to the last bit; between more, terms are added in another order.
    """
    dtype = ops.dtype(flat)
    wide = ops.cast(flat, "float32") if dtype == "bfloat16" else flat
    if cut.even:
        part = yield Reducescatter(wide, "push")
    else:
        rank = yield Rank()
        rows = yield Alltoall(wide, "push", cut.sizes)
        rows = ops.reshape(rows, (len(cut.sizes), cut.sizes[rank]))
        part = rows[0]
        for row in range(1, len(cut.sizes)):
            part = part + rows[row]
    return ops.cast(part, dtype)


def pull(ops: Ops, part: Any) -> Work[Any]:
    """Return all ranks' parts, side by side: shape (n,). Any dtype."""
    dtype = ops.dtype(part)
    if dtype != "bfloat16":  # which Horovod does not know
        return (yield Allgather(part, "pull"))
    data = yield Allgather(ops.to_bytes(part), "pull")
    return ops.from_bytes(data, dtype)


def for_owners(ops: Ops, compressor: Compressor, grad: Any, state: Any, cut: Cut) -> Work[Any]:
    """Reduce a gradient where only owners need the mean.

    A method that quantises sends pieces to their owners and saves the way back; an elementwise
    one travels as :func:`push` does. Others know no owners, and end with the mean on all ranks.

    Args:
        ops: the verbs of the tensors.
        compressor: for this step.
        grad: any shape.
        state: the compressor's.
        cut: of the elements of ``grad``, in row-major order.

    Returns:
        :class:`hvdx.compression.Reduced`; its mean holds on this rank's part, and is anything
        elsewhere.
    """
    work, answer = compressor.reduce(ops, grad, state), None
    while True:
        try:
            request = work.send(answer)
        except StopIteration as done:
            return done.value
        if isinstance(request, Owners):
            answer = cut
        elif compressor.elementwise and isinstance(request, Allreduce):
            answer = yield from _pushed(ops, request, cut)
        else:
            answer = yield request


def _pushed(ops: Ops, request: Allreduce, cut: Cut) -> Work[Any]:
    """Answer an allreduce on this rank's part alone, with zeros elsewhere."""
    shape, dtype = tuple(request.tensor.shape), ops.dtype(request.tensor)
    part = yield from push(ops, ops.reshape(request.tensor, (-1,)), cut)
    if request.op == ReduceOp.Average:
        part = ops.scale(part, 1.0 / len(cut.sizes))
    rank = yield Rank()
    return ops.reshape(placed(ops, part, cut, rank, dtype), shape)


def placed(ops: Ops, part: Any, cut: Cut, rank: int, dtype: str) -> Any:
    """Return a flat tensor that holds ``part`` in the place that ``rank`` owns, and zeros."""
    start, stop = cut.spans[rank]
    around = [ops.zeros((size,), dtype) for size in (start, sum(cut.sizes) - stop)]
    return ops.concat([around[0], part, around[1]])


class Member(NamedTuple):
    """A parameter in a bucket."""

    spec: Spec
    start: int
    """Where in the bucket it begins."""
    messenger: Messenger | None = None
    """How its changes travel; None: its values do."""

    def size(self, start: int, stop: int) -> int | None:
        """Return how many bytes a change of these elements is; None if values travel."""
        plain = self.messenger is None or self.spec.dtype not in _CODED
        return None if plain else self.messenger.size(self.spec, start, stop)  # type: ignore[union-attr]


#: Types of parameters that hold what a change has left behind, beside themselves.
_CODED = ("float32", "float64")


class Piece(NamedTuple):
    """What has become of elements ``start`` to ``stop`` of the member that has this number."""

    member: int
    start: int
    stop: int
    values: Any  # of the parameter's dtype; or None
    change: Any  # float32; or None


def pieces(members: Sequence[Member], cut: Cut, place: int) -> list[tuple[int, int, int]]:
    """List what a rank owns: (index, start, stop) of members that are not empty there."""
    found = []
    for index, member in enumerate(members):
        end = member.start + math.prod(member.spec.shape)
        start, stop = cut.within(member.start, end).spans[place]
        if stop > start:
            found.append((index, start, stop))
    return found


def pull_changes(
    ops: Ops, members: Sequence[Member], cut: Cut, parts: dict[int, Any], states: dict[int, Any]
) -> Work[tuple[list[Piece], dict[int, Any]]]:
    """Tell all ranks what this one has made of its parts, and hear what others have.

    Args:
        ops: the verbs of the tensors.
        members: of the bucket.
        cut: who owns which part of it.
        parts: by index, of what this rank owns: values, or the change where :meth:`Member.size`
            is a number.
        states: messengers' own, likewise.

    Returns:
        All pieces of all members, equal on all ranks, and this rank's next states.
    """
    rank, kept, data = (yield Rank()), {}, [ops.zeros((0,), "uint8")]
    for index, start, stop in pieces(members, cut, rank):
        member = members[index]
        if member.size(start, stop) is None:
            data.append(ops.to_bytes(parts[index]))
        else:
            assert member.messenger is not None
            written, kept[index] = member.messenger.write(
                ops, parts[index], member.spec, start, states[index]
            )
            data.append(written)
    whole = yield Allgather(ops.concat(data), "pull")
    found, position = [], 0
    for place in range(len(cut.sizes)):
        for index, start, stop in pieces(members, cut, place):
            member = members[index]
            size = member.size(start, stop)
            end = position + (size or (stop - start) * width(member.spec.dtype))
            chunk, position = whole[position:end], end
            if size is None:
                values = ops.from_bytes(chunk, member.spec.dtype)
                found.append(Piece(index, start, stop, values, None))
            else:
                assert member.messenger is not None
                change = member.messenger.read(ops, chunk, member.spec, start, stop)
                found.append(Piece(index, start, stop, None, change))
    return found, kept
