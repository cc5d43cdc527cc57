"""Units that move between the stages of one process: training learns the same bits."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PlanError  # noqa: E402


def load_models():
    path = Path(__file__).parent / "test_pipeline_torch.py"
    spec = importlib.util.spec_from_file_location("pipeline_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_models()


def grouped(params):
    """Weights decay, biases do not; a stage may have none of either."""
    kinds = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    groups = [
        {"params": each, "weight_decay": rate} for each, rate in zip(kinds, (0.1, 0.0), strict=True)
    ]
    return torch.optim.AdamW(groups, 1e-2)


def states(pipe):
    """What the optimizers keep, by parameter."""
    return {f"{name}.{key}": value for name, each in pipe._optimizer_states().items()
            for key, value in each["state"].items()}  # fmt: skip


def train(data, cuts=(), kind=models.Everything, **options):
    """Train with a schedule of rates, moving units after every other step."""
    model, cuts = models.made(kind), list(cuts)
    options = {"micro_batches": 4, "seed": 7, "stages": 2, **options}
    pipe = hvd.Pipeline(model, data[0][0], F.mse_loss, grouped, **options)
    rates = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in pipe.optimizers.values()]
    for number, (x, y) in enumerate(data):
        if number % 2 and cuts:
            pipe.rebalance(cuts.pop())
        loss = pipe.step(x, y)
        for rate in rates:
            rate.step()
    pipe.close()
    return models.weights(model), states(pipe), loss, pipe


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_moves_change_no_bit(schedule):
    """Tied weights, skips, dropout, BatchNorm, buffers, groups of parameters, rates that fall."""
    data = models.batches(8)
    expected = train(data, schedule=schedule)
    names = expected[-1].units
    counts = [[1, len(names) - 1], [len(names) - 1, 1], names[2:3]]
    found = train(data, counts, schedule=schedule)
    assert found[-1].moves == 3 and expected[-1].moves == 0
    assert found[-1].plan.cuts == (names[1],)
    for one, other in zip(found[:2], expected[:2], strict=True):
        models.assert_same(one, other)
    assert torch.equal(found[2], expected[2])


def test_two_stages_of_each_rank_and_replaced_schedules():
    data = models.batches(4)
    expected = train(data, schedule="zbv", stages=4)
    plan = expected[-1].plan
    moved = type(plan)(expected[-1].units[1:4], plan.place, "zbv-slack", plan.micro_batches)
    found = train(data, [moved], schedule="zbv", stages=4)
    assert found[-1].plan == moved
    models.assert_same(found[0], expected[0])
    models.assert_same(found[1], expected[1])


def test_what_cannot_move_is_told_and_nothing_changes():
    x, y = models.batches(1)[0]
    pipe = hvd.Pipeline(models.sequential(), x, F.mse_loss, models.adam, stages=2, micro_batches=4)
    for stages, told in (
        (["nine"], "no unit is named 'nine'"),
        ([1, 1], r"stages=\[1, 1\] are 2 units; it has 6"),
        ([2, 2, 2], "3 stages on 2 ranks"),
        (
            pipe.plan.from_json(pipe.plan.to_json().replace(": 4", ": 5")),
            "has micro_batches=5, the",
        ),
        (None, "no unit has a time: make the pipeline with by='time'"),
    ):
        with pytest.raises(PlanError, match=told):
            pipe.rebalance(stages)
    pipe.step(x, y)
    assert pipe.moves == 0
    for optimizer in list(pipe.optimizers.values())[:1]:
        optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(PlanError, match=r"'2.weight' is trained with lr=0.5, but .* lr=0.01: give"):
        pipe.rebalance([2, 4])
    pipe.close()
    model = nn.Sequential(*(nn.Linear(6, 6, bias=i < 2) for i in range(4)))
    pipe = hvd.Pipeline(model, x, F.mse_loss, some_groups, stages=[2, 2], micro_batches=4)
    with pytest.raises(PlanError, match=r"stage 1 has 1 groups, but the function .* makes 2"):
        pipe.rebalance([1, 3])
    pipe.step(x, y)
    pipe.close()


def some_groups(params):
    kinds = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    return torch.optim.SGD([{"params": each} for each in kinds if each], 0.1)


class Counted(torch.autograd.Function):
    """Counts backward passes, in ``calls``, by name."""

    @staticmethod
    def forward(ctx, x, name, calls):
        ctx.told = name, calls
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        name, calls = ctx.told
        calls[name] = calls.get(name, 0) + 1
        return gradient, None, None


class Watched(nn.Module):
    """A layer that counts the gradients of its weight (W) and of its input (I)."""

    def __init__(self, name, calls):
        super().__init__()
        self.weight, self.told = nn.Parameter(torch.eye(6)), (name, calls)

    def forward(self, x):
        name, calls = self.told
        weight = Counted.apply(self.weight, f"W{name}", calls)
        return Counted.apply(x, f"I{name}", calls) @ weight


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_what_is_frozen_while_training_takes_no_gradients(schedule):
    """Below the lowest layer that trains there are none at all, also where units have moved."""
    calls, (x, y) = {}, models.batches(1)[0]
    model = nn.Sequential(*(Watched(i, calls) for i in range(6)))
    options = {"micro_batches": 4, "stages": [3, 3], "schedule": schedule}
    pipe = hvd.Pipeline(model, x, F.mse_loss, models.adam, leaves=[Watched], **options)
    pipe.step(x, y)
    assert calls == {f"{kind}{i}": 4 for i in range(6) for kind in "WI"[: 1 + (i > 0)]}
    for i in (0, 1, 2, 4):
        model[i].requires_grad_(False)
    assert pipe._trained() == (0.0, 0.0, 0.0, 1.0, 0.0, 1.0)
    for cuts in ([3, 3], [5, 1], [2, 4]):
        pipe.rebalance(cuts)
        calls.clear()
        pipe.step(x, y)
        assert calls == {"W3": 4, "I4": 4, "I5": 4, "W5": 4}
    pipe.close()


def test_the_best_cuts_follow_what_was_frozen(monkeypatch):
    """By the units' costs, which are told here, as the times of steps are."""
    x, y = models.batches(1)[0]
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    options = {"micro_batches": 4, "stages": 2, "by": "time"}
    pipe = hvd.Pipeline(model, x, F.mse_loss, models.adam, **options)
    units = [replace(unit, forward=1.0, inputs=float(i > 0), weights=1.0)
             for i, unit in enumerate(pipe._graph.line.units)]  # fmt: skip
    pipe._graph.line = replace(pipe._graph.line, units=tuple(units))
    pipe.rebalance([6, 6])
    with pytest.raises(PlanError, match="no step has been observed"):
        pipe.rebalance()
    monkeypatch.setattr(pipe, "_seconds", lambda spans: {0: 17.0, 1: 18.0})
    pipe.step(x, y)
    assert pipe.rebalance().cuts == ("6",)
    model[:6].requires_grad_(False)
    assert pipe.rebalance().cuts == ("8",)  # 6 + 2 + 3 = 11 and 12 seconds
    pipe.step(x, y)
    pipe.close()
