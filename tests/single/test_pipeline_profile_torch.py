"""Measured costs of PyTorch models' units, and the plans made of them."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PlanError  # noqa: E402
from hvdx.integrations.pytorch_profile import measured  # noqa: E402
from hvdx.pipeline import probe  # noqa: E402
from hvdx.pipeline.ir import Graph, Unit  # noqa: E402
from hvdx.pipeline.plan import SCHEDULES, Means, make  # noqa: E402


def adam(params):
    return torch.optim.Adam(params, 1e-2)


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1)


def lopsided():
    """The parameters lie in the head, the time in the blocks."""
    torch.manual_seed(1)
    blocks = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*blocks, Pooled(), nn.Linear(64, 1024))


def batches(count=3):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(32, 128, 64, generator=generator), torch.zeros(32, 1024))
            for _ in range(count)]  # fmt: skip


X = batches(1)[0][0]


class Mixed(nn.Module):
    """Frozen, random, counting, writing in place, with a skip."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(32, 64), nn.BatchNorm1d(64)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.leave = nn.Linear(64, 64)
        self.enter.requires_grad_(False)

    def forward(self, x):
        h = self.norm(self.enter(x))
        return self.leave(self.drop(self.relu(h))) + h


def test_what_a_profile_tells():
    model, x = Mixed(), torch.randn(64, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    graph = measured(model, x, micro_batches=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad

    units = {unit.name: unit for unit in graph.units}
    assert all(unit.forward > 0 for unit in graph.units)
    enter, norm = units["enter"], graph.units[1]
    assert enter.inputs == enter.weights == 0.0  # frozen, and nothing before it learns
    assert norm.inputs == 0.0 < norm.weights  # its input depends on nothing that learns
    assert units["leave"].inputs > 0 and units["leave"].weights > 0
    assert units["leave"].makes == {"add": 16 * 64 * 4}  # per micro-batch of 16 rows
    assert units["drop"].weights == 0.0 and units["drop"].uses_rng
    # What Linear keeps is what it reads; parameters do not count.
    assert units["leave"].kept_bytes <= 16 * 64 * 4
    assert sum(unit.kept_bytes for unit in graph.units) >= 3 * 16 * 64 * 4


def test_cuts_by_time_even_out_what_cuts_by_parameters_do_not():
    graph = measured(lopsided(), X, micro_batches=4)
    assert make(graph, Means(2), 4, schedule="1f1b", by="params").cuts == ("9",)
    cut = graph.find(make(graph, Means(2), 4, schedule="1f1b", by="time").cuts[0])
    assert 2 <= cut <= 6, [unit.forward for unit in graph.units]


def test_the_quickest_within_memory_is_taken_and_changes_no_bit():
    def learnt(**options):
        model, data = lopsided(), batches()
        pipe = hvd.Pipeline(model, data[0][0], F.mse_loss, adam, micro_batches=4, **options)
        losses = [pipe.step(*batch) for batch in data]
        pipe.close()
        return pipe, losses, model.state_dict()

    _, losses, weights = learnt(stages=1)
    for options in ({"place": ["cpu", "cpu"]}, {"stages": 2, "memory": 1e9, "by": "memory"}):
        pipe, others, found = learnt(schedule="auto", **options)
        assert torch.stack(losses).equal(torch.stack(others)), pipe.plan
        assert all(torch.equal(weights[name], found[name]) for name in weights)
        line, means = pipe._graph.line, Means(2, probe.THREADS)
        steps = {}
        for name, per_rank in SCHEDULES.items():
            if per_rank == 1 or "place" in options:
                by = options.get("by", "time")
                steps[name] = make(line, means, 4, schedule=name, by=by).step
        assert pipe.plan.step == steps[pipe.plan.schedule] == min(steps.values())


def test_what_does_not_fit_is_not_chosen():
    with pytest.raises(PlanError, match=r"not enough memory for 2 stages.* of 1 MiB"):
        hvd.Pipeline(lopsided(), X, stages=2, memory=1 << 20)
    with pytest.raises(PlanError, match="memory has 3 entries for 2 ranks"):
        hvd.Pipeline(lopsided(), X, stages=2, memory=[1e9] * 3)
    with pytest.raises(PlanError, match="by='flops': use 'time', 'params' or 'memory'"):
        hvd.Pipeline(lopsided(), X, stages=2, by="flops")


def test_a_unit_that_only_fails_in_training_says_so():
    class Failing(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise ArithmeticError("no such luck")
            return x

    model = nn.Sequential(nn.Linear(6, 6), Failing())
    with pytest.raises(PlanError, match=r"cannot be profiled: ArithmeticError: no such luck"):
        hvd.Pipeline(model, torch.ones(4, 6), schedule="auto")


def test_splitting_costs():
    line = [Unit(f"u{i}", forward=1.0, inputs=1.0, weights=1.0, apart=0.0) for i in range(4)]
    free = make(Graph.chain(line), Means(2), 4)
    dear = [Unit(f"u{i}", forward=1.0, inputs=1.0, weights=1.0, apart=2.0) for i in range(4)]
    assert free.schedule in ("zb1p", "zbv")
    assert make(Graph.chain(dear), Means(2), 4).schedule not in ("zb1p", "zbv", "zbv-slack")


class Echo:
    """Rank 1, and a clock that knows nothing but its messages."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def send(self, peer, key, tensors):
        self.sent = peer, key, tensors
        self.now += 1e-4 + len(tensors[0]) / 1e9

    def receive(self, peer, key):
        assert self.sent[:2] == (peer, key)
        self.now += 1e-4 + len(self.sent[2][0]) / 1e9
        return self.sent[2]


def test_a_link(monkeypatch):
    echo = Echo()
    monkeypatch.setattr(probe, "time", echo)
    link = probe.measure_link(echo, 0, bytes)
    assert link.latency == pytest.approx(1e-4 + 4096e-9)
    assert link.bandwidth == pytest.approx(1e9)


@pytest.mark.parametrize(
    ("schedule", "name"), [("1f1b", "with these times and no hops"), ("auto", "predicted")]
)
def test_a_timeline_of_the_last_steps(schedule, name, tmp_path):
    pipe = hvd.Pipeline(lopsided(), X, F.mse_loss, adam, place=["cpu"] * 2, schedule=schedule)
    with pytest.raises(PlanError, match="no step to draw yet: call step"):
        pipe.timeline(tmp_path / "run.html")
    x, y = batches(1)[0]
    for _ in range(3):
        pipe.step(x, y)
    pipe(x)  # inference is not drawn
    pipe.timeline(tmp_path / "run.html", steps=2)
    drawn = (tmp_path / "run.html").read_text()
    lanes = re.findall(r'font-weight="bold">([^:]+): ', drawn)
    assert lanes == [name, "step 1", "step 2"]
    pipe.timeline(tmp_path / "run.json", steps=1)
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert sorted(event["name"] for event in spans) == sorted(
        str(action) for row in pipe._order(32, True).rows for action in row
    )
    with pytest.raises(OSError, match=r"cannot be written to .*missing"):
        pipe.timeline(tmp_path / "missing" / "run.html")
    pipe.step(x, y)  # goes on
    pipe.close()
