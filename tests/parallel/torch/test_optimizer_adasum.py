"""Adasum combines what the ranks' own steps change, tensor by tensor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd

sys.path.insert(0, str(Path(__file__).parent))

from training import BATCH, OPTIMIZERS, assert_replicas, data, loss_of, model, own


def combined(vectors):
    """Adasum of one tensor's changes, in one process."""
    while len(vectors) > 1:
        met = []
        for a, b in zip(vectors[::2], vectors[1::2], strict=False):
            dot, aa, bb = (a * b).sum(), (a * a).sum(), (b * b).sum()
            met.append((1 - dot / (2 * aa)) * a + (1 - dot / (2 * bb)) * b)
        vectors = met + vectors[2 * len(met) :]
    return vectors[0]


def delta_step(replicas, optimizers, x, y):
    """One step of all ranks in this process; replicas are equal before and after."""
    before = [p.detach().clone() for p in replicas[0].parameters()]
    rows = len(x) // len(replicas)
    for rank, (net, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
        part = slice(rank * rows, (rank + 1) * rows)
        optimizer.zero_grad()
        loss_of(net, x[part], y[part]).backward()
        optimizer.step()
    with torch.no_grad():
        for start, *each in zip(before, *(net.parameters() for net in replicas), strict=True):
            total = start + combined([p - start for p in each])
            for p in each:
                p.copy_(total)


@pytest.mark.parametrize(
    ("kind", "megabytes"),
    [
        pytest.param("sgd", "16", id="one bucket"),
        pytest.param("adam", "0.0005", id="many buckets"),
        pytest.param("sgd", "0.0005", id="many buckets, sgd", marks=pytest.mark.ranks(2)),
    ],
)
def test_n_ranks_equal_one_process(kind, megabytes, monkeypatch):
    monkeypatch.setenv("HVDX_BUCKET_MB", megabytes)
    replicas = [model() for _ in range(hvd.size())]
    theirs = [OPTIMIZERS[kind](net.parameters()) for net in replicas]
    net = model()
    ours = OPTIMIZERS[kind](net.parameters())
    assert hvd.DistributedOptimizer(ours, net, op=hvd.Adasum) is ours
    for x, y in data(steps=5):
        delta_step(replicas, theirs, x, y)
        ours.zero_grad()
        loss_of(net, own(x), own(y)).backward()
        ours.synchronize()  # of no effect
        ours.step()
    for p, q in zip(replicas[0].parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert_replicas(net)
    assert ours.communication_seconds > 0


def test_equal_changes_are_averaged_and_orthogonal_ones_summed():
    equal, apart = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(hvd.size()))
    ours = hvd.DistributedOptimizer(torch.optim.SGD([equal, apart], 1.0), op=hvd.Adasum)
    (equal.sum() + apart[hvd.rank()]).backward()
    ours.step()
    assert equal.tolist() == pytest.approx([-1.0] * 3)
    assert apart.tolist() == pytest.approx([-1.0] * hvd.size())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16], ids=str)
def test_dtypes_and_unused_parameters(dtype, compression):
    used, never = nn.Parameter(torch.zeros(5, dtype=dtype)), nn.Parameter(torch.ones(2))
    ours = torch.optim.SGD([used, never], 0.5)
    hvd.DistributedOptimizer(ours, op=hvd.Adasum, compression=compression)
    if hvd.rank() == 0:
        used.sum().backward()
    ours.step()
    assert used.tolist() == [-0.5] * 5
    assert never.tolist() == [1, 1]


def test_closures_and_process_sets(process_set):
    # Of any number of ranks: three of four.
    members = len(process_set.ranks)
    inside = hvd.rank() in process_set.ranks
    replicas = [model() for _ in range(members if inside else 1)]
    theirs = [OPTIMIZERS["sgd"](net.parameters()) for net in replicas]
    net = model()
    ours = OPTIMIZERS["sgd"](net.parameters())
    hvd.DistributedOptimizer(ours, net, op=hvd.Adasum, process_set=process_set)
    for x, y in data(steps=3):

        def closure(x=x, y=y):
            ours.zero_grad()
            loss = loss_of(net, own(x), own(y))
            loss.backward()
            return loss

        assert ours.step(closure) > 0
        seen = slice(members * BATCH) if inside else slice(hvd.rank() * BATCH, None)
        delta_step(replicas, theirs, x[seen], y[seen])
    for p, q in zip(replicas[0].parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.ranks(2)
def test_what_adasum_refuses():
    net = model()
    ours = hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net, op=hvd.Adasum)
    with pytest.raises(AssertionError, match="Adasum"), ours.skip_synchronize():
        pass
    with pytest.raises(ValueError, match="compression"):
        kind = type("Odd", (), {"compress": staticmethod(id), "decompress": staticmethod(id)})
        hvd.DistributedOptimizer(
            torch.optim.SGD(net.parameters(), 0.1), net, op=hvd.Adasum, compression=kind
        )
    with pytest.raises(ValueError, match="gradient_predivide_factor"):
        hvd.DistributedOptimizer(
            torch.optim.SGD(net.parameters(), 0.1), op=hvd.Adasum, gradient_predivide_factor=2.0
        )
