"""Step time, efficiency, bytes and memory of one way of training on a cluster."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from hvdx import buckets
from hvdx.compression.base import Spec, none
from hvdx.compression.plans import Form, Model, laid_out
from hvdx.errors import PlanError
from hvdx.link import Footprint, Link
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.plan import Link as Hop
from hvdx.pipeline.plan import Plan
from hvdx.pipeline.simulator import simulate
from hvdx.planner import costs, facts
from hvdx.scaling.cluster import Cluster, network
from hvdx.scaling.outline import asked, kept
from hvdx.scaling.profile import Parameter, Profile
from hvdx.scaling.ways import Way

MICRO_BATCHES = 4  # for each stage of a pipeline, so that it idles a fifth of the time at most


class Prediction(NamedTuple):
    """What a way of training takes on a cluster.

    Attributes:
        way: as told.
        ranks: of the job.
        step: seconds.
        alone: seconds of a step of one rank, which has no others to wait for.
        sent: bytes that a rank sends in a step, the one that sends most.
        memory: bytes that a rank needs, the one that needs most.
        samples: per second, of all ranks.
        note: how stages lie on hosts.
    """

    way: str
    ranks: int
    step: float
    alone: float
    sent: float
    memory: float
    samples: float
    note: str = ""

    @property
    def efficiency(self) -> float:
        """Return the samples of a second over those of as many ranks that need no others."""
        return self.alone / self.step


def predict(profile: Profile, cluster: Cluster, way: Way) -> Prediction:
    """Predict one way; each rank adds ``profile.batch`` samples to a step (weak scaling).

    Raises:
        PlanError: it cannot be done with so many ranks, or the profile lacks what it needs.
    """
    if way.stages > 1:
        return _staged(profile, cluster, way)
    if way.servers is not None:
        return _served(profile, cluster, way)
    return _averaged(profile, cluster, way)


def waiting(ranks: int, jitter: float) -> float:
    """Return how much longer the slowest of ``ranks`` computes, over the mean.

    The expected largest of so many normal numbers (Blom 1958), ``jitter`` times.
    """
    share = (ranks - 0.375) / (ranks + 0.25)
    return jitter * statistics.NormalDist().inv_cdf(share)


def overlapped(pieces: Sequence[tuple[float, float]]) -> float:
    """Return how long it takes to compute some pieces and send each when it is done.

    One after the other is computed, and one after the other is sent:

        compute   1 1 2 2 3
        send          1 1 1 2 3 3 3      7 slots more than nothing

    Args:
        pieces: (seconds of computing, seconds of sending).
    """
    computed = sent = 0.0
    for compute, send in pieces:
        computed += compute
        sent = max(sent, computed) + send
    return max(computed, sent)


class Exchange(NamedTuple):
    """What averaging a bucket, or several, takes.

    Attributes:
        codec: seconds of computing.
        network: seconds of operations.
        sent: bytes that a rank sends.
    """

    codec: float
    network: float
    sent: float


def exchanges(
    profile: Profile, specs: Sequence[Spec], link: Link, way: Way
) -> list[tuple[list[Spec], Exchange]]:
    """Return buckets of ``specs``, and what each takes.

    Args:
        profile: tells what methods compute.
        specs: in the order in which gradients become ready.
        link: between the ranks.
        way: of which the compressor counts.
    """
    ranks, limit = link.ranks, buckets.limit_bytes()
    forms = list(dict.fromkeys(map(Form.of, specs)))
    told = {form: asked(way.compressor, form, ranks) for form in forms}
    choice = {} if way.compressor is none else dict.fromkeys(forms, way.method)
    free = {(way.method, form): Footprint(0.0, told[form]) for form in forms}
    model = Model(link, specs, free, {way.method: way.compressor}, limit)
    found = []
    for bucket in laid_out(specs, limit):
        of_bucket = [Form.of(spec) for spec in bucket]
        codec = sum(_codec(profile, way, form, ranks) for form in of_bucket)
        sent = sum(link.sent(each.kind, each.payload) for form in of_bucket for each in told[form])
        found.append((bucket, Exchange(codec, model.seconds(of_bucket, choice), sent)))
    return found


def _codec(profile: Profile, way: Way, form: Form, ranks: int) -> float:
    """Return what a method computes for a gradient; nothing where that travels raw."""
    if ranks == 1 or way.compressor is none:
        return 0.0
    if way.every == 1 and asked(way.compressor, form, ranks) == asked(none, form, ranks):
        return 0.0
    return profile.codec(way.method, ranks) * math.prod(form.shape)


def _averaged(profile: Profile, cluster: Cluster, way: Way) -> Prediction:
    """All ranks have the whole model: data parallel."""
    link = network(cluster, profile.software, way.hierarchical)
    found = exchanges(profile, profile.specs, link, way)
    late = waiting(cluster.ranks, profile.jitter) * profile.alone
    if cluster.ranks == 1:
        step = profile.alone
    elif way.every > 1:
        each = sum(exchange.codec + exchange.network for _, exchange in found)
        step = profile.alone + each / way.every
    else:
        step = (
            profile.forward
            + profile.update
            + overlapped(
                [(_backward(profile, bucket) + each.codec, each.network) for bucket, each in found]
            )
        )
    sent = sum(exchange.sent for _, exchange in found) / way.every
    state = 0 if cluster.ranks == 1 else _state(profile.parameters, way, cluster.ranks)
    memory = (2 + profile.slots) * profile.bytes + profile.kept + state
    return _prediction(profile, cluster, way, step + late, sent, memory)


def _prediction(
    profile: Profile, cluster: Cluster, way: Way, step: float, sent: float, memory: float,
    note: str = "",
) -> Prediction:  # fmt: skip
    samples = cluster.ranks * profile.batch / step
    return Prediction(way.text, cluster.ranks, step, profile.alone, sent, memory, samples, note)


def _backward(profile: Profile, bucket: Sequence[Spec]) -> float:
    """Return the part of backward that a bucket's parameters have: by their bytes."""
    return profile.backward * sum(Form.of(spec).bytes for spec in bucket) / profile.bytes


def _state(parameters: Sequence[Parameter], way: Way, ranks: int) -> int:
    return sum(kept(way.compressor, each.form, ranks) for each in parameters)


def _served(profile: Profile, cluster: Cluster, way: Way) -> Prediction:
    """Push gradients to owners, update there, pull parameters: by buckets, as hvdx does."""
    ranks, servers = cluster.ranks, way.servers or cluster.ranks
    if servers > ranks:
        raise PlanError(f"way {way.text!r}: {servers} servers, but the job has {ranks} ranks")
    if ranks == 1:
        return _averaged(profile, cluster, way)
    link = network(cluster, profile.software)
    pieces, pulled = [], 0.0
    for bucket in laid_out(profile.specs, buckets.limit_bytes()):
        size = sum(Form.of(spec).bytes for spec in bucket)
        pieces.append((_backward(profile, bucket), _pushed(link, cluster, size, servers)))
        pulled += link.alpha("allgather") + link.beta("allgather") * size * _others(ranks, servers)
    late = waiting(ranks, profile.jitter) * profile.alone
    step = profile.forward + overlapped(pieces) + profile.update / servers + pulled + late
    # A worker pushes what it does not own itself; a server's part goes round the ring.
    sent = profile.bytes * (1 - 1 / ranks if servers == ranks else 1.0)
    sent += profile.bytes * _others(ranks, servers)
    memory = (2 + profile.slots / servers) * profile.bytes + profile.kept
    return _prediction(profile, cluster, way, step, sent, memory)


def _others(ranks: int, servers: int) -> float:
    """Return the share of the parameters that each rank passes on in a pull."""
    return 1 - 1 / ranks if servers == ranks else 1.0


def _pushed(link: Link, cluster: Cluster, size: int, servers: int) -> float:
    """Return how long a bucket's gradients travel to the servers.

    With every rank a server that is a reducescatter. Few servers are each sent as much by every
    other rank, through the one link of their host (incast).
    """
    ranks = cluster.ranks
    if servers == ranks:
        return link.alpha("reducescatter") + link.beta("reducescatter") * size * (1 - 1 / ranks)
    part = size / servers
    of_host = -(-servers // cluster.hosts)  # servers are on as many hosts as there are
    inside = (cluster.per_host - 1) * part / cluster.inner.bandwidth
    received = of_host * (ranks - cluster.per_host) * part / cluster.outer.bandwidth
    given = cluster.per_host * size / cluster.outer.bandwidth if cluster.hosts > 1 else 0.0
    return link.alpha("alltoall") + max(inside, received, given)


def _staged(profile: Profile, cluster: Cluster, way: Way) -> Prediction:
    """Chains of stages, each stage replicated: the better of two ways to lay them on hosts."""
    if profile.graph is None:
        raise PlanError(
            f"way {way.text!r}: profile {profile.name!r} has no units to cut into stages"
        )
    if cluster.ranks % way.stages:
        raise PlanError(
            f"way {way.text!r}: {cluster.ranks} ranks are no whole number of chains of "
            f"{way.stages} stages"
        )
    found = [
        _laid(profile, cluster, way, hop, group, note)
        for hop, group, note in _layouts(cluster, way.stages)
    ]
    return min(found, key=lambda each: each.step)


def _layouts(cluster: Cluster, stages: int) -> list[tuple[Hop, Cluster, str]]:
    """Return what a hop takes, the ranks that have one stage, and how they lie.

    Either a host has all stages of a chain, whose gradients then share its link, or a host's
    ranks have the same stage, and what passes between stages shares it.
    """
    replicas, within, hosts = cluster.ranks // stages, cluster.per_host, cluster.hosts
    if hosts == 1:
        return [(cluster.inner, cluster._replace(ranks=replicas), "on one host")]
    found = []
    if within % stages == 0:
        group = cluster._replace(ranks=replicas, flows=stages)
        found.append((cluster.inner, group, "a host has whole chains"))
    shared = cluster.outer._replace(bandwidth=cluster.outer.bandwidth / within)
    if replicas % within == 0:
        group = cluster._replace(ranks=replicas, hosts=replicas // within)
        found.append((shared, group, "a host has one stage"))
    elif within % replicas == 0:
        group = cluster._replace(ranks=replicas, hosts=1)
        found.append((shared, group, "a host has a few stages"))
    if not found:
        raise PlanError(
            f"{stages} stages on {hosts} hosts of {within} ranks: neither do whole chains fit on "
            "a host, nor replicas of a stage; try a divisor of the ranks of a host"
        )
    return found


def _laid(
    profile: Profile, cluster: Cluster, way: Way, hop: Hop, group: Cluster, note: str
) -> Prediction:
    _, plan, times, *_ = _chain(profile, way.stages, hop)
    assert profile.graph is not None
    graph, order = profile.graph, plan.order(times)
    edges = plan.edges(graph)
    owned = [_owned(profile, graph, edge) for edge in edges]
    link = network(group, profile.software, way.hierarchical)
    sums, sent = [], []
    for parameters in owned:
        specs = [Spec(*each) for each in reversed(parameters)]
        found = [each for _, each in exchanges(profile, specs, link, way)] if specs else []
        sums.append(sum(each.codec + each.network for each in found))
        sent.append(sum(each.sent for each in found))
    step = simulate(order, times._replace(sums=tuple(sums))).step
    shares = _by_rank([sum(p.form.bytes for p in stage) for stage in owned], plan.place)
    step += profile.update * max(shares) / profile.bytes
    step += waiting(cluster.ranks, profile.jitter) * profile.alone
    state = [_state(stage, way, group.ranks) if group.ranks > 1 else 0 for stage in owned]
    kept_by_rank = zip(plan.memory, _by_rank(state, plan.place), strict=True)
    memory = max(each + more for each, more in kept_by_rank)
    passed = [size + more for size, more in zip(sent, _passed(plan, graph), strict=True)]
    total = max(_by_rank(passed, plan.place))
    return _prediction(profile, cluster, way, step, total, memory, f"{plan.schedule}, {note}")


def _passed(plan: Plan, graph: Graph) -> list[float]:
    """Return by stage the bytes that it sends to its neighbours on other ranks in a step."""
    # A chain has its ranks' batches, one after the other: each value crosses for all of them.
    sizes, sent = graph.live_bytes(), [0.0] * len(plan.place)
    ranks = max(plan.place) + 1
    for stage, (start, _) in enumerate(plan.edges(graph)[1:], start=1):
        if plan.place[stage] != plan.place[stage - 1]:
            for each in (stage - 1, stage):  # values onward, their gradients back
                sent[each] += ranks * sizes[start]
    return sent


def _by_rank(values: Sequence[float], place: Sequence[int]) -> list[float]:
    """Add up what the stages of each rank have."""
    sums = [0.0] * (max(place) + 1)
    for rank, value in zip(place, values, strict=True):
        sums[rank] += value
    return sums


def _owned(profile: Profile, graph: Graph, edge: tuple[int, int]) -> list[Parameter]:
    names = {name for unit in graph.units[slice(*edge)] for name in unit.parameters}
    return [each for each in profile.parameters if each.name in names]


@functools.lru_cache(maxsize=64)
def _chain(profile: Profile, stages: int, hop: Hop) -> costs.Prediction:
    """Plan one chain of stages for the samples of as many ranks, as the planner does."""
    assert profile.graph is not None
    known = facts.Profile(
        stages * profile.batch, ((profile.batch, profile.graph),), slots=profile.slots
    )
    rows = tuple((rank,) for rank in range(stages))
    candidate = costs.Candidate(rows, MICRO_BATCHES * stages, "auto")
    return costs.predict(candidate, known, facts.Job(stages, facts.Network(hop)))
