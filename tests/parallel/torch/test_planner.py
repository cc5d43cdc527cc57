"""``place="auto"``: all ranks take the same plan, and train as with the plan given by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hvdx as hvd
from hvdx.errors import MismatchError, PlanError
from hvdx.pipeline.plan import Plan

ROWS = 8  # few, that there be few plans


def made():
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Tanh()) for _ in range(5)]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(24, 24))


def batches(count):
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(ROWS, 24, generator=draw), torch.randn(ROWS, 24, generator=draw))
            for _ in range(count)]  # fmt: skip


def pipeline(model, x, **options):
    options = {"seed": 7, "batchnorm": "sync", **options}
    return hvd.Pipeline(model, x, F.mse_loss, lambda ps: torch.optim.Adam(ps, 1e-2), **options)


def learnt(pipe, path):
    """Losses of some steps, and the whole model and optimizer afterwards."""
    losses = [float(pipe.step(x, y)) for x, y in batches(5)]
    pipe.save(path)
    hvd.barrier()
    told = hvd.load_state(path)
    pipe.close()
    return losses, told["model"], told["optimizer"]


def same(one, other):
    """Whether all tensors in them are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture
def shared(tmp_path):
    """A folder that all ranks know."""
    return Path(hvd.broadcast_object(str(tmp_path)))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="all", marks=pytest.mark.ranks(4)),
        pytest.param(
            {"micro_batches": 4, "schedule": "1f1b", "compression": hvd.Compression.auto("safe")},
            id="compressed",
            marks=pytest.mark.ranks(2),
        ),
    ],
)
def test_training_is_that_of_the_plan_given_by_hand(options, shared, capfd):
    (x, y), *_ = batches(1)
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state(), random.getstate()
    pipe = pipeline(model, x, place="auto", target=y, **options)
    assert torch.equal(drawn[0], torch.get_rng_state()) and drawn[1] == random.getstate()
    assert same(before, dict(model.state_dict()))
    assert all(p.grad is None for p in model.parameters())
    assert len({each.to_json() for each in hvd.allgather_object(pipe.plan)}) == 1
    assert pipe.plan.ranks == hvd.size() and pipe.plan.step > 0 and min(pipe.plan.memory) > 0
    told = capfd.readouterr().err
    assert ("predicted ms  measured ms" in told) == (hvd.rank() == 0)
    if hvd.rank() == 0:
        pipe.plan.save(shared / "plan.json")
        assert "* is taken" in told and "ms: take " in told
    found = learnt(pipe, shared / "auto.pt")
    plan = Plan.load(shared / "plan.json")
    given = learnt(pipeline(made(), x, stages=plan), shared / "given.pt")
    assert same(found[0], given[0]) and same(found[1], given[1]) and same(found[2], given[2])
    if options:
        assert plan.micro_batches == 4 and plan.compression in ("none", "fp16", "bf16", "int8")


@pytest.mark.ranks(2)
def test_what_needs_less_memory_is_taken_where_there_is_little():
    (x, y), *_ = batches(1)
    wide = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(2 * hvd.size())))
    size = sum(p.numel() * 4 for p in wide.parameters())
    # Weights, gradients as they come and as sums, and Adam's slots of all layers do not fit.
    options = {"place": "auto", "target": y, "schedule": "1f1b", "micro_batches": 4}
    plan = pipeline(wide, x, memory=4 * size, **options).plan
    assert len(plan.rows) > 1 and max(plan.memory) <= 4 * size
    with pytest.raises(PlanError, match=r"no plan fits into memory=1000 B a rank\. The smallest"):
        pipeline(wide, x, memory=1000, **options)


@pytest.mark.ranks(2)
def test_what_cannot_be_planned_is_told_on_every_rank():
    (x, y), *_ = batches(1)
    with pytest.raises(MismatchError, match="memory"):
        pipeline(made(), x, place="auto", target=y, memory=1e9 + hvd.rank())
    with pytest.raises(MismatchError, match="rows"):
        pipeline(made(), x[: ROWS - hvd.rank()], place="auto", target=y)
    with pytest.raises(PlanError, match="stages=2: place='auto' chooses them"):
        pipeline(made(), x, place="auto", target=y, stages=2)
    with pytest.raises(PlanError, match="schedule='quick': use one of"):
        pipeline(made(), x, place="auto", target=y, schedule="quick")
    with pytest.raises(PlanError, match="memory has 1 entries"):
        pipeline(made(), x, place="auto", target=y, memory=[1e9])
    with pytest.raises(PlanError, match="without target= it has nothing for the loss"):
        hvd.Pipeline(made(), x, lambda output, y: F.cross_entropy(output, y.long()),
                     lambda ps: torch.optim.SGD(ps, 0.1), place="auto")  # fmt: skip
    with pytest.raises(PlanError, match="give loss= and optimizer="):
        hvd.Pipeline(made(), x, place="auto")
