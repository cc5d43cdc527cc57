"""Predictions for many ranks: closed forms, limits, and what was measured."""

from __future__ import annotations

import importlib
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdx.errors import PlanError
from hvdx.link import Line
from hvdx.pipeline.ir import Graph, Unit
from hvdx.pipeline.plan import Link as Hop
from hvdx.scaling.cluster import Cluster, checked, network
from hvdx.scaling.predict import MICRO_BATCHES, overlapped, predict, waiting
from hvdx.scaling.profile import Parameter, Profile
from hvdx.scaling.ways import USUAL, read_way

SIZE = 4 * 1024 * 1024
OUTER, INNER = Hop(5e-6, 3e9), Hop(2e-6, 25e9)
LAYERS = 8
METHODS = ("fp16", "int8", "onebit", "topk=0.01", "powersgd=4", "diloco")


def model(layers: int = LAYERS, seconds: float = 0.09, wide: int = 1 << 16, **changed) -> Profile:
    """Return a profile of equal layers of 4 MB."""
    each = seconds / 9 / layers  # forward 3, backward 6 of these
    units = [
        Unit(f"{n}", makes={"y": wide}, parameters={f"{n}.weight": SIZE}, kept_bytes=1 << 20,
             forward=3 * each, inputs=3 * each, weights=3 * each)
        for n in range(layers)
    ]  # fmt: skip
    made = Profile(
        "layers", 32, seconds / 3, 2 * seconds / 3, 0.0,
        tuple(Parameter(f"{n}.weight", (1024, 1024)) for n in range(layers)),
        kept=layers << 20,
        codecs={name: ((2, 1e-9), (4, 1e-9)) for name in METHODS},
        graph=Graph.chain(units, wide),
    )  # fmt: skip
    return replace(made, **changed)


def seconds(way: str, cluster: Cluster, profile: Profile | None = None) -> float:
    """Return what a step takes beside computing alone."""
    profile = profile or model()
    return predict(profile, cluster, read_way(way)).step - profile.alone


def test_hosts_must_divide_ranks():
    with pytest.raises(PlanError, match=r"1000 ranks on 128 hosts.*--hosts 100 or 125"):
        checked(1000, 128, OUTER)
    assert checked(1024, 128, OUTER, goodput=0.5).outer == Hop(5e-6, 1.5e9)


def test_sizes_are_full_hosts():
    assert Cluster(1024, 128, OUTER).sizes() == [2**n for n in range(11)]
    cluster = Cluster(36, 3, OUTER)
    assert cluster.sizes() == [1, 3, 6, 12, 36]
    assert [cluster.of(ranks).hosts for ranks in cluster.sizes()] == [1, 1, 1, 1, 3]


def test_a_ring_has_its_closed_form():
    """2(N-1) steps of latency, 2(N-1)/N n bytes; each link carries the ring once."""
    cluster = Cluster(1024, 128, OUTER, INNER)
    link, size = network(cluster), 1e8
    kind = "allreduce float32"
    taken = link.alpha(kind) + link.beta(kind) * link.sent(kind, size)
    assert taken == pytest.approx(2 * 1023 * 5e-6 + 2 * 1023 / 1024 * size / 3e9)


def test_a_ring_tends_to_twice_the_bytes():
    size = LAYERS * SIZE
    free = Hop(0.0, 3e9)
    taken = seconds("ring", Cluster(2**20, 2**20, free), model(seconds=1e-9))
    assert taken == pytest.approx(2 * size / 3e9, rel=1e-4)


def test_a_hierarchy_has_its_closed_form():
    """Inside, 2(g-1) steps and 2(g-1)/g n bytes; between, 2(H-1) and 2(H-1)/H n on one link."""
    link, size = network(Cluster(64, 8, OUTER, INNER), hierarchical=True), 1e8
    kind = "allreduce float32"
    taken = link.alpha(kind) + link.beta(kind) * link.sent(kind, size)
    inside = 2 * 7 * 2e-6 + 2 * 7 / 8 * size / 25e9
    assert taken == pytest.approx(inside + 2 * 7 * 5e-6 + 2 * 7 / 8 * size / 3e9)


def test_a_hierarchy_of_one_is_a_ring():
    for ranks, hosts in ((8, 1), (8, 8)):
        cluster = Cluster(ranks, hosts, OUTER, INNER)
        ring, other = network(cluster), network(cluster, hierarchical=True)
        kind = "allreduce float32"
        assert other.alpha(kind) == pytest.approx(ring.alpha(kind))
        assert other.beta(kind) == pytest.approx(ring.beta(kind))


def test_an_alltoall_shares_the_link_of_a_host():
    """8 ranks of a host send 56/64 of their bytes over its link."""
    link, size = network(Cluster(64, 8, OUTER, INNER)), 1e8
    taken = link.beta("alltoall") * link.sent("alltoall", size)
    assert taken == pytest.approx(8 * size * 56 / 64 / 3e9)


def test_software_adds_up_or_hides():
    """Operations cost their own time, too; bytes are worked on while others travel."""
    cluster = Cluster(4, 4, OUTER)
    software = {"allreduce float32": Line(1e-3, 1e-9), "allgather": Line(2e-3, 1e-12)}
    link = network(cluster, software)
    assert link.alpha("allreduce float32") == pytest.approx(6 * 5e-6 + 1e-3)
    assert link.beta("allreduce float32") == pytest.approx(1e-9)
    assert link.alpha("allgather") == pytest.approx(3 * 5e-6 + 2e-3)
    assert link.beta("allgather") == pytest.approx(1 / 3e9)


def test_overlap():
    assert overlapped([(2, 3), (2, 1), (1, 3)]) == 9
    assert overlapped([(2, 0), (2, 0)]) == 4  # nothing to send
    assert overlapped([(0, 2), (0, 3)]) == 5  # nothing to compute
    assert overlapped([]) == 0


def test_one_rank_is_free():
    cluster = Cluster(1, 1, OUTER)
    profile = model(jitter=0.1)
    for text in USUAL:
        way = read_way(text)
        if way.stages > 1 or way.servers == 1:
            continue
        found = predict(profile, cluster, way)
        assert (found.step, found.efficiency, found.sent) == (profile.alone, 1.0, 0.0), text
        assert found.memory == 4 * profile.bytes + profile.kept


def test_networks_that_cost_nothing():
    free = Hop(0.0, math.inf)
    for way in ("ring", "hierarchical", "servers", "servers=2"):
        assert seconds(way, Cluster(64, 8, free, free)) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    way=st.sampled_from(["ring", "hierarchical", "fp16", "int8", "onebit", "topk=0.01",
                         "powersgd=4", "hierarchical+powersgd=4", "diloco=8", "servers",
                         "servers=1"]),
    per_host=st.sampled_from([1, 2, 8]),
    latency=st.floats(0, 1e-3),
    bandwidth=st.floats(1e7, 1e11),
    step=st.floats(1e-4, 1.0),
)  # fmt: skip
def test_more_ranks_are_never_quicker_between_hosts(way, per_host, latency, bandwidth, step):
    """Efficiency is at most 1, and falls; but inside of hosts, where links are of another kind."""
    cluster = Cluster(1024, 1024 // per_host, Hop(latency, bandwidth), Hop(0.0, math.inf))
    profile, before = model(2, step), 0.0
    for ranks in cluster.sizes():
        found = predict(profile, cluster.of(ranks), read_way(way))
        assert found.efficiency <= 1 + 1e-9
        if way != "topk=0.01" or ranks < 200:  # from where on it travels raw
            assert found.step >= before * (1 - 1e-9)
            before = found.step


def test_gathered_bytes_grow_until_they_are_no_fewer():
    """Topk of 1 % pays between few ranks; from 200 on gradients travel raw."""
    sent = {
        ranks: predict(model(), Cluster(ranks, ranks, OUTER), read_way("topk=0.01")).sent
        for ranks in (2, 16, 128, 256)
    }
    raw = predict(model(), Cluster(256, 256, OUTER), read_way("ring")).sent
    assert sent[16] == pytest.approx(15 * sent[2]) and sent[128] == pytest.approx(127 * sent[2])
    assert sent[256] == raw


def test_int8_with_many_ranks_on_a_host_is_slower_than_a_ring():
    """The ring uses a host's link once; an alltoall, once for each rank of the host."""
    profile = model(seconds=1e-6)
    few, many = Cluster(64, 64, OUTER, INNER), Cluster(64, 4, OUTER, INNER)
    assert seconds("int8", few, profile) < seconds("ring", few, profile)
    assert seconds("int8", many, profile) > seconds("ring", many, profile)


def test_local_training_shares_an_exchange_out():
    cluster = Cluster(16, 16, OUTER)
    assert seconds("diloco=64", cluster) == pytest.approx(seconds("diloco=8", cluster) / 8)


def test_a_central_server_is_the_bottleneck():
    """It is sent n bytes by each worker over one link."""
    cluster, profile = Cluster(64, 64, Hop(0.0, 3e9)), model(seconds=1e-9)
    pushed = 63 * profile.bytes / 3e9
    assert seconds("servers=1", cluster, profile) == pytest.approx(pushed + profile.bytes / 3e9)
    ring, servers = (seconds(way, cluster, profile) for way in ("ring", "servers"))
    assert servers == pytest.approx(ring)  # the same bytes, in two halves


def test_servers_share_state_and_update():
    profile, cluster = model(update=0.064), Cluster(64, 64, Hop(0.0, math.inf))
    found = predict(profile, cluster, read_way("servers"))
    assert found.memory == pytest.approx((2 + 2 / 64) * profile.bytes + profile.kept)
    assert found.step == pytest.approx(profile.alone - 0.064 + 0.001)


def test_waiting_for_the_slowest():
    """The expected largest of N normal numbers: 0.564 of 2, 1.539 of 10, 3.24 of 1000."""
    for ranks, expected in ((1, 0.0), (2, 0.564), (10, 1.539), (1000, 3.241)):
        assert waiting(ranks, 1.0) == pytest.approx(expected, rel=0.05, abs=1e-12)


def test_a_chain_of_stages():
    """No network: m micro-batches through S equal stages take (m + S - 1) / m of their time."""
    free = Hop(0.0, math.inf)
    found = predict(model(), Cluster(4, 1, free, free), read_way("stages=4"))
    count = 4 * MICRO_BATCHES
    assert 0.09 <= found.step <= 0.09 * (count + 3) / count * (1 + 1e-9)  # zb1p idles less
    assert found.memory < predict(model(), Cluster(4, 1, free), read_way("ring")).memory / 2


def test_replicas_of_stages_add_up_their_part():
    """Where hosts have one stage each, a link carries the quarter of the gradients."""
    profile, slow = model(seconds=1e-6, wide=0), Hop(0.0, 1e8)
    cluster = Cluster(64, 16, slow, Hop(0.0, math.inf))
    ring, staged = seconds("ring", cluster, profile), seconds("stages=4", cluster, profile)
    assert staged < ring / 2
    found = predict(profile, cluster, read_way("stages=4"))
    assert "a host has one stage" in found.note


def test_stages_that_do_not_fit():
    with pytest.raises(PlanError, match="6 ranks are no whole number of chains of 4 stages"):
        predict(model(), Cluster(6, 1, OUTER), read_way("stages=4"))
    with pytest.raises(PlanError, match="neither do whole chains"):
        predict(model(), Cluster(24, 6, OUTER), read_way("stages=8"))
    with pytest.raises(PlanError, match="no units"):
        predict(model(graph=None), Cluster(8, 1, OUTER), read_way("stages=4"))
    with pytest.raises(PlanError):
        predict(model(2), Cluster(8, 1, OUTER), read_way("stages=4"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "no 'foo'; use ring"),
        ("auto", "no 'auto'"),
        ("int8+fp16", "name one method"),
        ("int8=4", "int8 takes no number"),
        ("topk=2", "density must be above 0"),
        ("powersgd=x", "'x' is no number"),
        ("stages", "such as stages=4"),
        ("stages=0", "such as stages=4"),
        ("servers+int8", "predicted alone"),
        ("stages=2+diloco", "do not train alone"),
    ],
)
def test_ways_that_there_are_not(text, message):
    with pytest.raises(PlanError, match=message):
        read_way(text)


def test_more_servers_than_ranks():
    with pytest.raises(PlanError, match="9 servers, but the job has 8 ranks"):
        predict(model(), Cluster(8, 8, OUTER), read_way("servers=9"))


ROOT = Path(__file__).resolve().parents[2]
MEDIAN, MOST = 0.10, 0.30  # what docs/scaling.md promises


@pytest.fixture(scope="module")
def compared():
    """Return the benchmark, and its rows: fitted to 2 ranks at 1 Gbit/s, and not fitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        scaling = importlib.import_module("scaling")
    profile = Profile.load(ROOT / "benchmarks/profiles/mlp.json")
    measured = scaling.read([ROOT / "benchmarks/profiles/mlp-steps.json"])
    base = scaling.quickest(measured)
    crowd = {base: 1.0, scaling.Where(2, 100): 1.0, scaling.Where(4, 100): 2.0}  # on two cores
    assert set(measured) == set(crowd)
    plain = replace(profile, software={})
    fitted = scaling.fitted(profile, base, measured[base], 1.0)
    return [
        [row for row in scaling.rows(each, measured, crowd.get) if row.case != str(base)]
        for each in (fitted, plain)
    ]


def test_what_was_measured(compared):
    """Fitted to 2 ranks at 1 Gbit/s, predictions hold for 2 and 4 at 100 Mbit/s."""
    rows, plain = compared
    off = sorted(abs(row.ratio - 1) for row in rows)
    assert len(rows) == 26 and statistics.median(off) < MEDIAN and off[-1] < MOST, off
    assert max(abs(row.ratio - 1) for row in plain) > MOST  # a worse model would be seen


def test_the_page_tells_what_is_predicted(compared):
    page = (ROOT / "docs/scaling.md").read_text()
    found = re.findall(r"^\| `(\S+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    told = {way: [int(number) for number in numbers] for way, *numbers in found}
    assert len(told) == 9
    for way, numbers in told.items():
        name = "none" if way == "ring" else way.replace("=", " ")
        rows = [row for row in compared[0] if row.metric.startswith(f"{name}, ")]
        assert numbers == [round(each) for row in rows for each in (row.value, row.baseline_value)]


def test_the_profile_on_the_page(tmp_path):
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.S)
    (tmp_path / "profile.json").write_text(text)
    profile = Profile.load(tmp_path / "profile.json")
    assert predict(profile, Cluster(8, 8, OUTER), read_way("int8")).efficiency < 1


def test_measured_profiles_load():
    profile = Profile.load(ROOT / "benchmarks/profiles/gpt.json")
    assert profile.bytes == pytest.approx(152.6e6, rel=1e-3) and len(profile.graph.units) == 15
