"""``Compression.auto`` under PyTorch's optimizer, on links that are as fast as told."""

from __future__ import annotations

import pytest
import torch

import hvdx
from hvdx import link
from hvdx.link import Line, Link


def on_link(monkeypatch, hvd, megabits):
    """Have the network measured to be of ``megabits``."""
    lines = dict.fromkeys(link.KINDS, Line(1e-4, 8e-6 / megabits))
    monkeypatch.setattr(link, "measure", lambda *args: Link(hvd.size(), lines))


def train(hvd, steps=3):
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 2))
    hvd.broadcast_parameters(model)
    auto = hvdx.Compression.auto("balanced", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=auto)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 128)).square().mean().backward()
        optimizer.step()
    return model, optimizer.compression_state()


@pytest.mark.parametrize("megabits", [0.1, 1e9])
def test_replicas_stay_equal(hvd, monkeypatch, megabits):
    on_link(monkeypatch, hvd, megabits)
    model, state = train(hvd)
    assert len(set(hvd.allgather_object(hvd.parameter_hash(model)))) == 1
    kept = {name for name, own in state["parameters"].items() if own}
    assert kept == ({"0.weight"} if megabits < 1 else set())  # what is small travels raw
