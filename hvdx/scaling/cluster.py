"""Hosts and links, and what a collective takes on them.

    host 0        host 1              inner   between two ranks of a host, for each of them
    [0 1 2 3]     [4 5 6 7]           outer   a host's link to all others, full duplex, which
        |  outer      |                       its ranks share
        +---- switch -+

Switches are taken to carry all that the links bring. With N ranks, n bytes, B bytes a second and
a latency of a, a ring allreduce has 2(N-1) steps of n/N bytes each: 2(N-1)a + 2(N-1)/N n/B, of
which 2n/B is left for large n. It goes from host to host, so that each link carries it once. An
alltoall sends from each rank of a host over its one link (Thakur, Rabenseifner, Gropp:
Optimization of Collective Communication Operations in MPICH. IJHPCA 2005).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hvdx.errors import PlanError
from hvdx.link import KINDS, Line, Link
from hvdx.pipeline.plan import Link as Hop

#: What TCP leaves of an Ethernet's rate: headers, and acknowledgements of the other direction.
GOODPUT = 0.94
INNER = Hop(2e-6, 25e9)


class Cluster(NamedTuple):
    """Ranks on hosts, as many on each.

    Attributes:
        ranks: of the job.
        hosts: that they are on.
        outer: each host's link, of which ``bandwidth`` is what programs get.
        inner: each rank's, to others of its host.
        flows: how many groups of ranks like this one send at the same time over each host's link.
    """

    ranks: int
    hosts: int
    outer: Hop
    inner: Hop = INNER
    flows: int = 1

    @property
    def per_host(self) -> int:
        """Count the ranks of a host."""
        return self.ranks // self.hosts

    def of(self, ranks: int) -> Cluster:
        """Return the same with fewer ranks: full hosts, or a part of one."""
        per_host = min(ranks, self.per_host)
        return self._replace(ranks=ranks, hosts=ranks // per_host)

    def sizes(self) -> list[int]:
        """Return numbers of ranks from 1 to all, about doubling: to draw a curve over."""
        found = [self.ranks]
        while found[-1] > 1:
            found.append(self._fewer(found[-1]))
        return found[::-1]

    def _fewer(self, ranks: int) -> int:
        per_host = self.per_host
        if ranks <= per_host:
            return ranks // 2
        return max(1, ranks // per_host // 2) * per_host

    @property
    def hop(self) -> float:
        """Return the latency of a step between neighbours, of which some are on two hosts."""
        if self.ranks == 1:
            return 0.0
        return self.outer.latency if self.hosts > 1 else self.inner.latency

    @property
    def byte(self) -> float:
        """Return the seconds in which a ring passes a byte on: at the pace of its slowest part."""
        inside = 1 / self.inner.bandwidth if self.per_host > 1 else 0.0
        between = self.flows / self.outer.bandwidth if self.hosts > 1 else 0.0
        return max(inside, between)


def checked(
    ranks: int, hosts: int, outer: Hop, inner: Hop = INNER, goodput: float = GOODPUT
) -> Cluster:
    """Return the cluster.

    Args:
        ranks: of the job.
        hosts: that they are on.
        outer: each host's link, at its nominal rate.
        inner: within a host.
        goodput: share of the outer rate that programs get.

    Raises:
        PlanError: there are not as many ranks on each host.
    """
    if hosts < 1 or ranks % hosts:
        near = sorted(
            {d for d in range(1, ranks + 1) if ranks % d == 0}, key=lambda d: abs(d - hosts)
        )
        raise PlanError(
            f"{ranks} ranks on {hosts} hosts: each host must have as many ranks; try --hosts "
            f"{' or '.join(map(str, sorted(near[:2])))}"
        )
    return Cluster(ranks, hosts, outer._replace(bandwidth=goodput * outer.bandwidth), inner)


def network(
    cluster: Cluster, software: Mapping[str, Line] | None = None, hierarchical: bool = False
) -> Link:
    """Return what each kind of collective takes: alpha, and beta for each byte that a rank sends.

    Args:
        cluster: the ranks.
        software: what operations cost where the network costs nothing, by kind, as measured
            inside of a machine; bytes are worked on while others travel.
        hierarchical: whether allreduces add up within hosts first, and then between them, as
            Horovod does with ``HOROVOD_HIERARCHICAL_ALLREDUCE=1`` over NCCL or MPI.
    """
    count = cluster.ranks
    if count == 1:
        return Link(1, {kind: Line(0.0, 0.0) for kind in (*KINDS, "reducescatter")})
    ring = Line(2 * (count - 1) * cluster.hop, cluster.byte)
    once = Line((count - 1) * cluster.hop, cluster.byte)
    reduced = _hierarchical(cluster) if hierarchical else ring
    lines = {
        "allreduce float32": reduced,
        "allreduce float16": reduced,
        "allgather": once,
        "alltoall": Line(once.alpha, _exchanged(cluster)),
        "reducescatter": once,
    }
    return Link(count, {kind: _worked(line, kind, software) for kind, line in lines.items()})


def _worked(line: Line, kind: str, software: Mapping[str, Line] | None) -> Line:
    """Add what an operation costs beside the network."""
    own = (software or {}).get(kind) or (software or {}).get("allreduce float32")
    return line if own is None else Line(line.alpha + own.alpha, max(line.beta, own.beta))


def _hierarchical(cluster: Cluster) -> Line:
    """Scatter-reduce within hosts, allreduce every part between hosts at once, gather within."""
    within, hosts, count = cluster.per_host, cluster.hosts, cluster.ranks
    alpha = 2 * (within - 1) * cluster.inner.latency + 2 * (hosts - 1) * cluster.outer.latency
    inside = 2 * (within - 1) / within / cluster.inner.bandwidth
    # Each of a host's ranks has a ring of its own for 1/within of the bytes, on one link.
    between = 2 * (hosts - 1) / hosts * cluster.flows / cluster.outer.bandwidth
    return Line(alpha, (inside + between) / (2 * (count - 1) / count))


def _exchanged(cluster: Cluster) -> float:
    """Return the seconds for each byte that a rank sends in an alltoall."""
    count, within = cluster.ranks, cluster.per_host
    others = count - 1
    inside = (within - 1) / others / cluster.inner.bandwidth
    outside = (count - within) / others
    return max(inside, outside * within * cluster.flows / cluster.outer.bandwidth)
