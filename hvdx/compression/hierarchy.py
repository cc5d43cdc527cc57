"""Average within hosts as things are, and compress between hosts only.

Inside a host the network is fast. So the ranks of a host first average their gradients raw. Then
each of them does what one rank per host would do: it keeps that rank's state, writes the same
bytes, and reads the same answers. But of each message it sends only its part, one in L, to the
ranks of its number in the other hosts, and the ranks of a host gather what has come:

    raw      allreduce of the gradient        within a host
    between  the method's own collective      of 1/L of its bytes, among ranks of equal numbers
    gather   allgather of the answers' parts  within a host

So hosts exchange the bytes that a method takes between as many ranks as there are hosts, on L
connections side by side, and what is applied is what the method makes of the hosts' means, to the
last bit, whatever the method. Cutting gradients before they are compressed would save the copies of
states, but tear up the matrices of PowerSGD, send other elements, and compress with smaller blocks.

States are equal within a host. As each rank's counts one N-th, sums of what is owed hold as they do
without hosts, and portable states go from the one to the other.

References:
    Hierarchical communication with compression between machines is known from BytePS (Jiang et
    al., OSDI 2020), Bagua (Gan et al., VLDB 2021) and SDP4Bit (Jia et al., NeurIPS 2024).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from hvdx import world
from hvdx.agreement import next_name
from hvdx.comm import Allgather, Allreduce, Alltoall, Among, Owners, Rank, Ranks, Together, Work
from hvdx.compression.base import CompressionError, Compressor, Reduced, Spec
from hvdx.compression.feedback import each_phase
from hvdx.compression.state import in_common, leaves, rebuilt
from hvdx.frameworks import Adapter
from hvdx.ops import Ops


class Hosts(NamedTuple):
    """Ranks in hosts of equal sizes, host by host: place p is rank p % L of host p // L.

    Process sets are Horovod's; None between ranks that live in one process, and for all ranks.
    """

    ranks: int
    local_size: int  # L
    place: int
    within: Any = None  # the process set of this host's ranks
    across: Any = None  # of the ranks that have this one's number in their hosts

    @property
    def number(self) -> int:
        """How many hosts there are."""
        return self.ranks // self.local_size

    @property
    def host(self) -> int:
        """Which is this rank's."""
        return self.place // self.local_size

    @property
    def mates(self) -> tuple[int, ...]:
        """The places of this host's ranks."""
        first = self.host * self.local_size
        return tuple(range(first, first + self.local_size))

    @property
    def peers(self) -> tuple[int, ...]:
        """The places of the ranks with this one's number."""
        return tuple(range(self.place % self.local_size, self.ranks, self.local_size))

    def inside(self, request: Any) -> Any:
        """Return what asks for ``request`` within this host."""
        return request if self.number == 1 else Among(self.mates, request, self.within)

    def between(self, request: Any) -> Any:
        """Return what asks for ``request`` among the ranks of this one's number."""
        return Among(self.peers, request, self.across)


def hierarchical(inner: Compressor, local_size: int | None = None) -> Compressor:
    """Return the compressor that averages raw within hosts and by ``inner`` between them.

    Args:
        inner: any that need not measure before.
        local_size: ranks of a host; as the launcher says by default.

    Raises:
        CompressionError: ``inner`` measures, or is hierarchical; ``local_size`` is no number.
    """
    if local_size is not None and (type(local_size) is not int or local_size < 1):
        raise CompressionError(
            f"Compression.hierarchical(local_size={local_size!r}): it must be an integer from 1"
        )
    if inner.prepare is not None:
        raise CompressionError(
            f"Compression.hierarchical({inner}): this makes preparations of its own over all "
            "ranks; name a method, such as hvd.Compression.int8"
        )
    name = f"hierarchical({inner.name})"

    def prepare(adapter: Adapter, specs: list[Spec], process_set: Any) -> Compressor:
        with adapter.at_once():
            return among_hosts(inner, meet(adapter, process_set, local_size))

    return Compressor(
        name,
        _init,
        _reduce,
        elementwise=inner.elementwise,
        stateful=inner.stateful,
        phases=tuple((start, _unprepared) for start, _ in inner.phases),
        owns_momentum=inner.owns_momentum,
        prepare=prepare,
        sharers=0,
        rows=inner.rows,
    )


def _init(ops: Ops, spec: Spec) -> Any:
    raise CompressionError(_UNPREPARED)


def _reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
    raise CompressionError(_UNPREPARED)


_UNPREPARED = (
    "Compression.hierarchical needs to know the hosts, which an optimizer's or a tape's ranks tell "
    "each other when they meet: a single operation cannot use it"
)
_unprepared = Compressor("hierarchical", _init, _reduce)


def among_hosts(inner: Compressor, hosts: Hosts) -> Compressor:
    """Return :func:`hierarchical` for these hosts."""
    if hosts.local_size == 1:
        return inner
    if hosts.number == 1 and not inner.owns_momentum:  # raw gradients would lack that
        inner = each_phase(inner, _raw)
    return each_phase(inner, functools.partial(_among, hosts))


def _among(hosts: Hosts, inner: Compressor) -> Compressor:
    shared = in_common(hosts.local_size)

    def init(ops: Ops, spec: Spec) -> Any:
        state = inner.init(ops, spec._replace(ranks=hosts.number))
        return None if state is None else shared(state)

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        given = None if state is None else state.inner
        mean = yield hosts.inside(Allreduce(grad, "host"))
        work = inner.reduce(ops, mean, given)
        mean, own, kept = yield from for_host(ops, work, hosts)
        return Reduced(mean, own, state if kept is given else shared(kept))

    return inner._replace(
        name=f"hierarchical({inner.name})", init=init, reduce=reduce, sharers=hosts.local_size
    )


def for_host(ops: Ops, work: Work[Any], hosts: Hosts) -> Work[Any]:
    """Run ``work``, which is the same on all ranks of a host, as if it were on one rank a host."""
    answer: Any = None
    while True:
        try:
            request = work.send(answer)
        except StopIteration as done:
            return done.value
        if isinstance(request, Ranks):
            answer = hosts.number
        elif isinstance(request, Rank):
            answer = hosts.host
        elif isinstance(request, Owners):
            answer = None
        elif isinstance(request, Together):
            answer = yield from _carried_out(ops, request.requests, hosts)
        else:
            (answer,) = yield from _carried_out(ops, [request], hosts)


def _carried_out(ops: Ops, requests: Sequence[Any], hosts: Hosts) -> Work[list[Any]]:
    """Have each rank of a host send a part of each message; return the whole answers."""
    if hosts.number == 1:  # what a rank alone is answered
        return [request.tensor for request in requests]
    parts = [_part(ops, request, hosts) for request in requests]
    received = yield from _at_once([hosts.between(part) for part in parts])
    own = [ops.to_bytes(x) if ops.dtype(x) == "bfloat16" else x for x in received]
    gathers = [
        hosts.inside(Allgather(ops.reshape(each, (-1,)), f"{request.phase}.host"))
        for each, request in zip(own, requests, strict=True)
    ]
    gathered = yield from _at_once(gathers)
    return [
        _whole(ops, each, request, hosts) for each, request in zip(gathered, requests, strict=True)
    ]


def _at_once(requests: Sequence[Any]) -> Work[list[Any]]:
    if len(requests) == 1:
        return [(yield requests[0])]
    return (yield Together(tuple(requests)))  # type: ignore[no-any-return]


def _cut(request: Any, hosts: Hosts) -> tuple[int, int, int]:
    """Return rows and columns of a message, each row for another host; and columns of a part."""
    rows = hosts.number if isinstance(request, Alltoall) else 1
    columns = math.prod(request.tensor.shape) // rows
    return rows, columns, -(-columns // hosts.local_size)


def _part(ops: Ops, request: Any, hosts: Hosts) -> Any:
    """Return the request for what this rank sends of its host's message."""
    rows, columns, width = _cut(request, hosts)
    table = ops.reshape(request.tensor, (rows, columns))
    padding = hosts.local_size * width - columns
    if padding:
        dtype = ops.dtype(request.tensor)
        table = ops.concat([table, ops.zeros((rows, padding), dtype)], axis=1)
    start = hosts.place % hosts.local_size * width
    part = ops.reshape(table[:, start : start + width], (-1,))
    if isinstance(request, Allreduce):
        return request._replace(tensor=part, in_place=False)
    return request._replace(tensor=part)


def _whole(ops: Ops, gathered: Any, request: Any, hosts: Hosts) -> Any:
    """Put the parts of an answer together, which lie rank by rank of the host."""
    dtype, shape = ops.dtype(request.tensor), tuple(request.tensor.shape)
    if dtype == "bfloat16":
        gathered = ops.from_bytes(gathered, dtype)
    _, columns, width = _cut(request, hosts)
    rows = 1 if isinstance(request, Allreduce) else hosts.number
    parts = ops.reshape(gathered, (hosts.local_size, rows, width))
    table = ops.concat([parts[rank] for rank in range(hosts.local_size)], axis=1)[:, :columns]
    if isinstance(request, Allreduce):
        return ops.reshape(table, shape)
    rest = shape[1:] if isinstance(request, Allgather) else ()
    return ops.reshape(table, (rows * columns // math.prod(rest), *rest) if rest else (-1,))


def _raw(inner: Compressor) -> Compressor:
    """Send all, and all that is owed: where there is one host, nothing need be lost."""

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        yield from ()
        held = leaves(state)
        owed = [leaf.tensor for leaf in held if leaf.kind == "owed"]
        if not owed:
            return Reduced(grad, grad, state)
        mean = ops.cast(ops.cast(grad, "float32") + owed[0], ops.dtype(grad))
        left = [
            ops.zeros(tuple(leaf.tensor.shape), "float32") if leaf.kind == "owed" else leaf.tensor
            for leaf in held
        ]
        return Reduced(mean, None, rebuilt(state, iter(left)))

    return inner._replace(reduce=reduce)


# -- who is where


def meet(adapter: Adapter, process_set: Any, local_size: int | None = None) -> Hosts:
    """Find out which ranks are in which host, and their process sets; a collective call.

    Args:
        adapter: the running core.
        process_set: the ranks that take part.
        local_size: ranks of a host; as the launcher says by default.

    Raises:
        CompressionError: hosts are of unequal sizes, or not in the order of ranks; or their process
            sets are not there, and cannot be made. On every rank.
    """
    place, ranks = adapter.place(process_set), adapter.ranks(process_set)
    own = local_size or world.local_size()
    name = next_name("hosts", process_set)
    told = own, (world.local_rank() if local_size is None else None)
    everyone = adapter.allgather_object(told, name, process_set)
    _check([size for size, _ in everyone], [local for _, local in everyone])
    if own == 1 or own == ranks:
        if own > 1 and place == 0:
            print(
                f"hvdx: Compression.hierarchical: all {ranks} ranks are in one host, so that "
                "gradients travel raw",
                file=sys.stderr,
            )
        return Hosts(ranks, own, place)
    every = [Hosts(ranks, own, each) for each in range(ranks)]
    groups = dict.fromkeys([each.mates for each in every] + [each.peers for each in every])
    found = _process_sets(adapter, list(groups), process_set)
    mine = every[place]
    return mine._replace(within=found[mine.mates], across=found[mine.peers])


def _check(sizes: list[int], numbers: list[int | None]) -> None:
    """Refuse hosts that are unequal, or not one after the other.

    Args:
        sizes: of each place's host.
        numbers: of each place in its host; None where the user has told the size.
    """
    ranks, size = len(sizes), sizes[0]
    if len(set(sizes)) > 1:
        each = ", ".join(f"rank {rank}: {size}" for rank, size in enumerate(sizes))
        raise CompressionError(
            f"Compression.hierarchical needs hosts of equal sizes, but ranks tell others ({each}); "
            "start as many on each host, or give local_size=, the same on all ranks"
        )
    if ranks % size:
        raise CompressionError(
            f"Compression.hierarchical: {ranks} ranks are no hosts of {size}; start as many on "
            "each host, or give local_size= that divides their number"
        )
    wrong = [place for place, own in enumerate(numbers) if own not in (None, place % size)]
    if wrong:
        raise CompressionError(
            "Compression.hierarchical needs ranks that are numbered host by host, but the one in "
            f"place {wrong[0]} of {ranks} is number {numbers[wrong[0]]} of {size} in its host; "
            "give local_size= if ranks that follow each other are near each other all the same"
        )


def _process_sets(
    adapter: Adapter, groups: list[tuple[int, ...]], process_set: Any
) -> dict[tuple[int, ...], Any]:
    """Return the process sets of groups of places; those that are not there are added, if allowed.

    Only all ranks together can add a set.
    """
    from hvdx.integrations.process_sets import known

    members = range(adapter.ranks(None)) if process_set is None else process_set.ranks
    wanted = {group: tuple(members[place] for place in group) for group in groups}
    there = known(adapter)
    missing = [ranks for ranks in wanted.values() if ranks not in there]
    try:
        if missing and process_set is not None:
            raise ValueError("ranks outside the optimizer's process set do not take part")
        for ranks in missing:
            world.add_process_set(list(ranks), framework=adapter.framework)
    except ValueError as error:
        sets = ", ".join(f"hvd.ProcessSet({list(ranks)})" for ranks in wanted.values())
        remedy = "hvd.init(process_sets='dynamic'), or " if process_set is None else ""
        raise CompressionError(
            f"Compression.hierarchical needs process sets that cannot be made now ({error}): start "
            f"with {remedy}hvd.init(process_sets=[{sets}])"
        ) from None
    there = known(adapter) if missing else there
    return {group: there[ranks] for group, ranks in wanted.items()}
