"""Training on a GPU: examples, loss scaling, stages, and ranks that share one."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hvdx as hvd


@pytest.fixture(scope="module", autouse=True)
def job():
    hvd.init(framework="torch")


def net(device):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.Tanh(),
                         nn.Linear(96, 8)).to(device)  # fmt: skip


def batches(device, count=4):
    random = torch.Generator().manual_seed(5)
    return [(torch.randn(16, 64, generator=random).to(device),
             torch.randn(16, 8, generator=random).to(device)) for _ in range(count)]  # fmt: skip


def test_the_timeline_names_what_reduces(run, device, tmp_path):
    path = tmp_path / "timeline.json"
    told = run(1, "ranks.py", "allreduce", device, HOROVOD_TIMELINE=str(path))
    nccl = "nccl True" in told
    activities = set(re.findall(r'"name": "([A-Z_]+)"', path.read_text()))
    assert ("NCCL_ALLREDUCE" in activities) == (nccl and device.type == "cuda"), activities
    assert nccl or any("ALLREDUCE" in each for each in activities)


@pytest.mark.parametrize("cut", [[1, 3], None])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_stages_on_the_device_learn_what_the_plain_model_does(device, schedule, cut):
    model, data = net(device), batches(device)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for x, y in data:
        optimizer.zero_grad()
        F.mse_loss(plain(x), y).backward()
        optimizer.step()
    pipe = hvd.Pipeline(
        model,
        data[0][0],
        F.mse_loss,
        lambda parameters: torch.optim.SGD(parameters, 0.1),
        stages=2,
        place=[device.type, device.type],  # without a number: the current one
        schedule=schedule,
        micro_batches=4,
    )
    try:
        for x, y in data:
            pipe.step(x, y)
    finally:
        pipe.close()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.device.type == device.type
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_loss_scaling_skips_what_overflows(device):
    model, data = net(device), batches(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=hvd.Compression.fp16)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=100)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    for step, (x, y) in enumerate(data):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            value = F.mse_loss(model(x), y)
        scaler.scale(value * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(map(torch.equal, before, model.parameters()))
        assert same == (step == 1)
    assert scaler.get_scale() == 128.0


def test_checkpoints_go_back_to_the_device(device):
    model, (x, y) = net(device), batches(device)[0]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), 1e-3), model, compression=hvd.Compression.int4()
    )
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    saved = optimizer.compression_state()
    told = {n: {p: t.cpu() for p, t in own.items()} for n, own in saved["parameters"].items()}
    optimizer.load_compression_state({**saved, "parameters": told})
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    held = optimizer.compression_state()["parameters"]
    assert {t.device.type for own in held.values() for t in own.values()} == {device.type}


def test_objects_travel_whatever_the_default_device(device):
    with device:
        assert hvd.broadcast_object({"a": 1}, name="gpu.object") == {"a": 1}
        assert hvd.allgather_object([2], name="gpu.objects") == [[2]]


def test_ranks_on_one_device(run, device):
    """Two of them, by NCCL where each has a GPU of its own, else by Gloo."""
    if device.type == "cuda" and hvd.nccl_built() and torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one rank a GPU, and there is one: hvdx install --gpu none, and "
                    "Gloo reduces CUDA tensors")  # fmt: skip
    assert "2 ranks agree" in run(2, "ranks.py", "train", device.type)


@pytest.mark.parametrize("script, options", [
    ("digits_torch.py", ["--epochs", "3"]),
    ("gpt.py", ["--steps", "4", "--every", "2", "--width", "32", "--depth", "2", "--heads", "2",
                "--length", "32", "--batch-size", "8", "--compression", "int8"]),
    ("gpt.py", ["--steps", "4", "--every", "2", "--width", "32", "--depth", "2", "--heads", "2",
                "--length", "32", "--batch-size", "8", "--stages", "2"]),
])  # fmt: skip
def test_examples(run, script, options):
    assert run(1, f"../../examples/{script}", *options)
