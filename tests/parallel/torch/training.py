"""A small model, data for all ranks, and what it means that replicas are equal."""

from __future__ import annotations

import copy

import torch
from torch import nn

import hvdx as hvd

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
}
BATCH = 4


def model(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    ).to(dtype)


def data(dtype=torch.float64, steps=10):
    """All ranks' batches, step by step; rank r owns rows r * BATCH to (r + 1) * BATCH."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(BATCH * hvd.size(), 6, generator=generator, dtype=torch.float64)
        y = torch.randn(BATCH * hvd.size(), 3, generator=generator, dtype=torch.float64)
        yield x.to(dtype), y.to(dtype)


def own(whole):
    return whole[hvd.rank() * BATCH : (hvd.rank() + 1) * BATCH]


def loss_of(net, x, y):
    return nn.functional.mse_loss(net(x), y)


def assert_equal(one, other, tolerance=1e-12):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() <= tolerance * max(p.abs().max().item(), 1e-30)


def assert_replicas(net):
    assert len(set(hvd.allgather_object(hvd.parameter_hash(net)))) == 1


def pair(kind="sgd", **options):
    plain = model()
    replica = copy.deepcopy(plain)
    ours = OPTIMIZERS[kind](replica.parameters())
    hvd.DistributedOptimizer(ours, replica, **options)
    return plain, OPTIMIZERS[kind](plain.parameters()), replica, ours


def train(pairs, batches=None, *, zero=True, clip=None):
    """Step both of ``pairs``, one process with all data and a rank with its own, alike."""
    for x, y in batches or data():
        for net, optimizer, part in pairs:
            if zero:
                optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()


def whole(x):
    return x
