"""Metrics of several ranks: what they add up, what they count, and where they disagree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx
from hvdx.metrics.log import read

sys.path.insert(0, str(Path(__file__).parent))
from training import BATCH, data, loss_of, model, own, pair


@pytest.fixture
def path(tmp_path):
    """The same file on all ranks."""
    return hvdx.broadcast_object(tmp_path / "run.jsonl", 0)


def intervals(hvd, path):
    hvd.barrier()
    return [told for told in read(path) if told["kind"] == "interval"]


@pytest.mark.parametrize(("compression", "width"), [("none", 8), ("fp16", 2)])
def test_optimizers(hvd, path, compression, width):
    _, _, net, optimizer = pair(compression=getattr(hvd.Compression, compression))
    metrics = hvdx.Metrics(path, optimizer, every=4, target="loss <= 0", quiet=True)
    losses = []
    for x, y in data(steps=5):
        optimizer.zero_grad()
        loss = loss_of(net, own(x), own(y))
        loss.backward()
        optimizer.step()
        metrics.step(BATCH, loss=loss, rank=hvd.rank())
        losses.append(hvd.allreduce(loss.detach()).item())
    metrics.close()
    first, last = intervals(hvd, path)
    assert (first["steps"], last["steps"]) == (4, 1)
    assert (first["samples"], last["samples"]) == (4 * BATCH * hvd.size(), BATCH * hvd.size())
    assert first["values"]["loss"] == pytest.approx(sum(losses[:4]) / 4)
    assert first["values"]["rank"] == pytest.approx((hvd.size() - 1) / 2)
    assert 0 < first["communication"]["min"] <= first["communication"]["max"] < 1
    elements = sum(p.numel() for p in net.parameters())
    ring = 2 * (hvd.size() - 1) / hvd.size()
    sent = {
        told["megabytes_per_step"][how] * 1e6 for told in (first, last) for how in ("min", "max")
    }
    assert len(sent) == 1  # with the words which gradients there are
    assert 1 <= sent.pop() / (width * elements * ring) < 1.3


def test_files_that_one_rank_cannot_write_are_refused_on_all(hvd, tmp_path):
    with pytest.raises(OSError, match="metrics, rank 0: metrics cannot be written to"):
        hvdx.Metrics("/proc/nowhere/run.jsonl")
    with pytest.raises(ValueError, match=f"metrics, rank {hvd.size() - 1}: every=0: give a"):
        hvdx.Metrics(every=0 if hvd.rank() == hvd.size() - 1 else 5)
    with pytest.raises(hvdx.MismatchError, match="their metrics: entry 0 is rank 0: 'every' = 1"):
        hvdx.Metrics(every=hvd.rank() + 1)


def test_a_part_of_the_job(hvd, path, process_set):
    if not process_set.included():
        with pytest.raises(ValueError, match=r"is not part of .* and records nothing"):
            hvdx.Metrics(path, process_set=process_set)
    else:
        with hvdx.Metrics(path, process_set=process_set, every=2, quiet=True) as metrics:
            metrics.step(1, loss=hvd.rank())
            metrics.step(1, loss=hvd.rank())
            metrics.evaluated(accuracy=hvd.rank())
    hvd.barrier()
    header, interval, evaluation = read(path)
    assert (header["ranks"], interval["samples"]) == (hvd.size() - 1, 2 * (hvd.size() - 1))
    mean = (hvd.size() - 2) / 2
    assert interval["values"]["loss"] == evaluation["values"]["accuracy"] == mean


@pytest.mark.ranks(2)
def test_pipelines(hvd, path):
    net = model()
    pipe = hvd.Pipeline(
        net,
        torch.zeros(8, 6, dtype=torch.float64),
        loss=nn.functional.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        micro_batches=4,
        stages=[2, 3],
    )
    metrics = hvdx.Metrics(path, pipe, every=3, quiet=True)
    for _ in range(3):
        loss = pipe.step(torch.ones(8, 6, dtype=torch.float64), torch.ones(8, 3).double())
        metrics.step(8, loss=loss)
    metrics.close()
    pipe.close()
    (told,) = intervals(hvd, path)
    assert told["samples"] == 24  # the same ones on all ranks
    assert 0 < told["bubble"]["min"] < 1 and 0 < told["busy"]["min"] < 1
    assert 0 < told["communication"]["max"] < 1
    crossing = 8 * 16 * 8 / 1e6  # activations one way, their gradients the other
    assert crossing <= told["megabytes_per_step"]["min"] < 1.2 * crossing
