"""Mixed precision: ``GradScaler`` in the user's way and in Horovod's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd

sys.path.insert(0, str(Path(__file__).parent))
from training import assert_equal, assert_replicas, data, loss_of, own, pair, whole

pytestmark = pytest.mark.ranks(2)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def plainly(scale, net, optimizer):
    scale.step(optimizer)


def clipped(scale, net, optimizer):
    scale.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    scale.step(optimizer)


def horovods(scale, net, optimizer):
    if not hasattr(optimizer, "reducer"):
        return clipped(scale, net, optimizer)
    optimizer.synchronize()
    scale.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    with optimizer.skip_synchronize():
        scale.step(optimizer)


@pytest.mark.parametrize("way", [plainly, clipped, horovods])
@pytest.mark.parametrize("clear", [True, False], ids=["to none", "to zero"])
def test_scaled_steps_equal_one_process(way, clear):
    # The fourth step overflows on one rank alone: all skip it, as one process would.
    plain, theirs, replica, ours = pair("adam")
    scalers = [scaler(), scaler()]
    for step, (x, y) in enumerate(data()):
        for net, optimizer, part, scale in (
            (plain, theirs, whole, scalers[0]), (replica, ours, own, scalers[1])
        ):  # fmt: skip
            optimizer.zero_grad(set_to_none=clear)
            loss = scale.scale(loss_of(net, part(x), part(y)))
            if step == 3 and (net is plain or hvd.rank() == hvd.size() - 1):
                loss = loss * float("inf")
            loss.backward()
            way(scale, net, optimizer)
            scale.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 512.0
    assert ours.state[replica[0].weight]["step"] == 9
    assert_equal(plain, replica)


def test_fused_optimizers_skip_inside_their_kernel():
    torch.manual_seed(13)
    net = nn.Linear(6, 3).to(torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), 0.1, fused=True)
    hvd.DistributedOptimizer(optimizer, net)
    scale = scaler()
    before = None
    for step, (x, y) in enumerate(data(steps=4)):
        optimizer.zero_grad()
        loss = scale.scale(loss_of(net, own(x), own(y)))
        (loss * float("inf") if step == 3 and hvd.rank() == 0 else loss).backward()
        before = net.weight.detach().clone()
        scale.step(optimizer)
        scale.update()
        assert torch.equal(before, net.weight) == (step == 3)
    assert_replicas(net)


@pytest.mark.ranks(2, 4)
def test_sums_with_skipped_steps():
    _, _, replica, ours = pair(op=hvd.Sum)
    scale = scaler()
    for step, (x, y) in enumerate(data(steps=4)):
        ours.zero_grad(set_to_none=False)
        loss = scale.scale(loss_of(replica, own(x), own(y)))
        (loss * float("inf") if step == 1 and hvd.rank() == 0 else loss).backward()
        scale.step(ours)
        scale.update()
    assert scale.get_scale() == 512.0
    assert_replicas(replica)


def test_sparse_gradients_are_unscaled_too():
    table = nn.Embedding(6, 2, sparse=True)
    with torch.no_grad():
        table.weight.zero_()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(table.parameters(), 1.0), table)
    scale = scaler()
    scale.scale(table(torch.tensor([hvd.rank()])).sum()).backward()
    scale.step(optimizer)
    assert table.weight[: hvd.size(), 0].tolist() == [-1 / hvd.size()] * hvd.size()


def test_autocast():
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net)
    for x, y in data(torch.float32, steps=3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, own(x), own(y))
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        optimizer.step()
    assert_replicas(net)
