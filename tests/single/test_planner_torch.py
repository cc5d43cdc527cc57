"""``place="auto"`` without a job: one rank, whose micro-batches the planner chooses."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PlanError  # noqa: E402


def made():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 8))


def pipeline(**options):
    x = torch.linspace(0, 1, 64).reshape(8, 8)
    return hvd.Pipeline(
        made(), x, F.mse_loss, lambda ps: torch.optim.Adam(ps, 0.1), seed=5, **options
    )


def losses(pipe):
    x = torch.linspace(0, 1, 64).reshape(8, 8)
    found = [float(pipe.step(x, x)) for _ in range(4)]
    pipe.close()
    return found


def test_one_rank_plans_and_trains_as_by_hand(capsys):
    pipe = pipeline(place="auto")
    assert "* is taken" in capsys.readouterr().err
    assert {each.prediction.candidate.micro_batches for each in pipe.compared} == {1, 2, 4}
    assert pipe.plan.ranks == 1 and any(each.measured for each in pipe.compared)
    assert losses(pipe) == losses(pipeline(stages=pipe.plan))


def test_a_plan_keeps_what_was_chosen(capsys):
    options = {"micro_batches": 2, "checkpoint": "always"}
    pipe = pipeline(place="auto", compression=hvd.Compression.int8, **options)
    assert (pipe.plan.micro_batches, pipe.plan.checkpoint) == (2, "always")
    assert pipe.plan.compression == "int8"
    again = pipeline(stages=type(pipe.plan).from_json(pipe.plan.to_json()))
    assert again._checkpoint == "always" and again._compressor.name == pipe._compressor.name
    assert losses(pipe) == losses(again)
    custom = pipe.plan.to_json().replace("int8", "topk(density=0.5)")
    with pytest.raises(PlanError, match=r"compresses gradients by topk\(density=0.5\), which has"):
        pipeline(stages=type(pipe.plan).from_json(custom))


def test_what_a_single_rank_cannot_hold_is_told():
    with pytest.raises(PlanError, match=r"no plan fits into memory=100 B a rank.*that does fit is"):
        pipeline(place="auto", memory=100)
    with pytest.raises(PlanError, match=r"place='anywhere': give a list of devices.* or 'auto'"):
        pipeline(place="anywhere")
