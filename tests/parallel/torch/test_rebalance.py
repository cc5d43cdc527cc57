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
    saved = hvd.load_state(path)
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


@pytest.mark.parametrize(
    ("place", "options"),
    [
        (None, {"clip_norm": 0.5}),
        pytest.param(None, {"channel": "horovod"}, marks=two),
        pytest.param(None, {"channel": "gloo", "schedule": "zbv"}, marks=two),
        pytest.param([[0, 2], [3, 1]], {"schedule": "zb1p", "batchnorm": "sync"}, marks=four),
        pytest.param([[0, 2], [3, 1]],
                     {"compression": hvd.Compression.powersgd(rank=1, min_elements=1)}, marks=four),
    ],
)  # fmt: skip
def test_five_moves_change_no_bit(place, options, shared):
    """Tied weights, skips, dropout, BatchNorm, buffers, groups, rates; fifty steps of the first."""
    steps = 50 if hvd.size() == 2 and "channel" not in options else 15
    _, losses, (expected, rates) = train(steps, 0, shared / "still", place=place, **options)
    moves, found, (state, own) = train(steps, steps // 5, shared / "moved", place=place, **options)
    assert moves == 5
    assert found == losses and own == rates
    models.assert_same(state, expected)


@four
def test_what_compression_holds_back_goes_to_rows_of_other_lengths(shared):
    """To the bit within a row as long, as checkpoints have it elsewhere; all replicas agree."""
    options = {"place": [[3, 1, 0], [2]], "micro_batches": 6, "seed": 7}
    options["compression"] = hvd.Compression.topk(0.5, min_elements=1)
    x, y = models.batches(1)[0]
    pipe = hvd.Pipeline(models.made(models.Residual), x, F.mse_loss, models.adam, **options)
    pipe.step(x, y)
    for cuts in ([1, 5], [5, 1]):
        pipe.rebalance(cuts)
        loss = pipe.step(x, y)
    assert pipe.moves == 2 and pipe._sums.steps == 3
    own = {name: p for each in pipe._params.values() for name, p in each.items()}
    assert own.keys() <= {name.partition(" in ")[0] for name in pipe._sums._states}
    everyone = hvd.allgather_object({name: p.detach() for name, p in own.items()})
    first = everyone[pipe._row.ranks[0]]
    assert all(torch.equal(own[name], value) for name, value in first.items())
    assert len(set(hvd.allgather_object(loss.item()))) == 1
    pipe.close()


@two
def test_ranks_that_ask_for_different_cuts_are_told_and_go_on():
    x, y = models.batches(1)[0]
    pipe = hvd.Pipeline(models.sequential(), x, F.mse_loss, models.adam, micro_batches=4)
    first = pipe.plan
    told = r"about the new stages: .*rank 0: 'cuts' = \['1'\], rank 1: 'cuts' = \['2'\]"
    with pytest.raises(MismatchError, match=told):
        pipe.rebalance([1 + hvd.rank(), 5 - hvd.rank()])
    message = "no unit is named" if hvd.rank() else "rank 1 cannot rebalance the pipeline: PlanErr"
    with pytest.raises(PlanError, match=message):
        pipe.rebalance(["nine" if hvd.rank() else "1"])
    pipe.step(x, y)
    assert pipe.plan == first and pipe.moves == 0
    pipe.close()
    with pytest.raises(MismatchError, match="'rebalance' = None, rank 1: 'rebalance' = Rebalance"):
        options = {"rebalance": hvd.Rebalance(every=3) if hvd.rank() else None}
        hvd.Pipeline(models.sequential(), x, F.mse_loss, models.adam, micro_batches=4, **options)


SLOW: dict[int, float] = {}  # by rank, how often longer its layers take


class Sleeper(nn.Module):
    """A layer that takes a while, the more so on slow ranks."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6))

    def forward(self, x):
        time.sleep(5e-3 * SLOW.get(hvd.rank(), 1.0))
        return x @ self.weight


class Undelayed(nn.Module):
    """The same layers, as quick as they are."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ParameterList(torch.eye(6) for _ in range(count))

    def forward(self, x):
        for weight in self.layers:
            x = x @ weight
        return x


@two
def test_units_leave_a_rank_that_becomes_slow(monkeypatch):
    """For real: what moves when is left to the machine, but in the end the slow rank has less."""
    x, y = models.batches(1)[0]
    model = nn.Sequential(*(Sleeper() for _ in range(8)))
    options = {"micro_batches": 4, "leaves": [Sleeper], "stages": [4, 4]}
    options["rebalance"] = hvd.Rebalance(every=4)
    pipe = hvd.Pipeline(model, x, F.mse_loss, models.adam, **options)
    monkeypatch.setitem(SLOW, 1, 4.0)
    steps = 0
    while steps < 200:
        loss, steps = pipe.step(x, y), steps + 1
        if pipe.plan.edges(pipe._line)[1][0] >= 6:  # the optimum: 6 or 7
            break
    assert steps < 200 and 1 <= pipe.moves < 6
    assert len(set(hvd.allgather_object((pipe.plan, loss.item(), pipe.moves)))) == 1
    pipe.close()
    options = {"micro_batches": 4, "place": ["cpu"]}
    still = hvd.Pipeline(Undelayed(8), x, F.mse_loss, models.adam, **options)
    for _ in range(steps):
        expected = still.step(x, y)
    still.close()
    assert torch.equal(loss, expected)
