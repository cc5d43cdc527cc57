"""Units that move between ranks while training: not a bit of what is learnt changes."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hvdx as hvd
from hvdx.errors import MismatchError, PlanError
from hvdx.pipeline.plan import Plan


def load_tests():
    """The same in one process, and its models."""
    path = Path(__file__).parents[2] / "single" / "test_pipeline_moves.py"
    spec = importlib.util.spec_from_file_location("pipeline_moves", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


alone = load_tests()
models = alone.models
four, two = pytest.mark.ranks(4), pytest.mark.ranks(2)
#: How many of the 10 units each stage has, by the number of stages: what they move to.
CUTS = {
    1: [[10]],
    2: [[1, 9], [7, 3], [2, 8], [9, 1], [5, 5]],
    4: [[1, 1, 1, 7], [5, 2, 2, 1], [1, 6, 1, 2], [4, 1, 4, 1], [2, 2, 3, 3]],
}


@pytest.fixture
def shared(tmp_path):
    """A folder that all ranks know."""
    return Path(hvd.broadcast_object(str(tmp_path)))


def learnt(pipe, path):
    """Rank 0's whole model and the optimizers' states, gathered by a checkpoint."""
    pipe.save(path)
    hvd.barrier()
    saved = torch.load(path)
    kept = {f"{name}.{key}": value for name, each in saved["optimizer"].items()
            for key, value in each["state"].items()}  # fmt: skip
    return saved["model"] | kept, {n: each["options"] for n, each in saved["optimizer"].items()}


def train(steps, every, path, kind=models.Everything, **options):
    """Move units to other ranks after ``every`` steps; 0: never."""
    data = models.batches(steps)
    options = {"micro_batches": 4, "seed": 7, **options}
    pipe = hvd.Pipeline(models.made(kind), data[0][0], F.mse_loss, alone.grouped, **options)
    rates = [torch.optim.lr_scheduler.ExponentialLR(each, 0.95)
             for each in pipe.optimizers.values()]  # fmt: skip
    cuts, losses = list(CUTS[len(pipe.plan.place)]), []
    for number, (x, y) in enumerate(data):
        if every and number % every == every // 2 and cuts:
            pipe.rebalance(cuts.pop(0))
        losses.append(pipe.step(x, y))
        for rate in rates:
            rate.step()
    moves = pipe.moves
    found = learnt(pipe, path)
    pipe.close()
    return moves, losses, found


MESHES = [None, pytest.param([[0, 2], [3, 1]], marks=four), pytest.param([[1, 0]], marks=two)]


@pytest.mark.parametrize(
    ("place", "options"),
    [
        (None, {"clip_norm": 0.5}),
        pytest.param(None, {"channel": "horovod"}, marks=two),
        pytest.param(None, {"channel": "gloo", "schedule": "zbv"}, marks=two),
        pytest.param([[0, 2], [3, 1]], {"schedule": "zb1p"}, marks=four),
        pytest.param([[0, 2], [3, 1]],
                     {"compression": hvd.Compression.powersgd(rank=1, min_elements=1)}, marks=four),
    ],
)  # fmt: skip
def test_five_moves_in_fifty_steps_change_no_bit(place, options, shared):
    """Tied weights, skips, dropout, BatchNorm, buffers, groups, rates that fall."""
    steps = 20 if options.get("channel") else 50
    _, losses, (expected, rates) = train(steps, 0, shared / "still", place=place, **options)
    moves, found, (state, own) = train(steps, steps // 5, shared / "moved", place=place, **options)
    assert moves == 5
    assert found == losses and own == rates
    models.assert_same(state, expected)
