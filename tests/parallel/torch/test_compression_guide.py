"""The PyTorch examples of docs/compression.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import hvdx

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "compression.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def example(told: str) -> str:
    """Return the example that contains ``told``."""
    (found,) = [block for block in BLOCKS if told in block]
    return found


def train(model, optimizer, steps=3):
    torch.manual_seed(hvdx.rank())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
    assert len(set(hvdx.allgather_object(hvdx.parameter_hash(model)))) == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "told",
    ["hvd.init()\noptimizer = torch", "after(500", "by_layer(", "compression=hvd.Compression.dgc("],
)
def test_ways_to_compress(told):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 3))
    names = {"torch": torch, "hvd": hvdx, "model": model}
    exec(example(told), names)
    if "optimizer" not in names:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        names["optimizer"] = hvdx.DistributedOptimizer(
            optimizer, model, compression=names["compression"]
        )
    train(model, names["optimizer"])


@pytest.mark.ranks(2)
@pytest.mark.filterwarnings("ignore:torch.amp.GradScaler")  # without a GPU it is disabled
def test_a_scaled_loss():
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hvdx.DistributedOptimizer(optimizer, model, compression=hvdx.Compression.onebit())
    exec(example("GradScaler("), {"torch": torch, "optimizer": optimizer})
    assert optimizer.loss_scale() >= 1
    train(model, optimizer)


@pytest.mark.ranks(2)
def test_saving_and_resuming(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hvdx.DistributedOptimizer(optimizer, model, compression=hvdx.Compression.onebit())
    train(model, optimizer)
    names = {"torch": torch, "hvd": hvdx, "model": model, "optimizer": optimizer}
    exec(example("optimizer.load_compression_state"), names)
    kept = names["state"]["compression"]["parameters"]
    assert set(kept) == {"weight"}  # the bias travels raw
    train(model, optimizer)
