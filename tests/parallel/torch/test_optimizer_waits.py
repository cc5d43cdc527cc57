"""A step asks for no value of a tensor: for each, a GPU would have to be waited for.

Compressors ask on a CPU where that is quicker; what they do on a GPU is in
tests/single/test_gpu_tensors.py.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hvdx

ASKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class Asked(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in ASKS
        return function(*args, **(kwargs or {}))


def trained(hvd, method, mode, steps=2, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=method, groups=3)
    vars(optimizer).update(options)
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 32)).square().mean()
        with mode if step else contextlib.nullcontext():  # ranks meet in the first
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("method", ["none", "bf16", "int8"])
def test_reductions_without_a_state_ask_for_nothing(hvd, method):
    compression = hvdx.Compression
    asked = Asked()
    trained(hvd, compression.int8() if method == "int8" else getattr(compression, method), asked)
    assert asked.count == 0
    with asked:
        torch.ones(3).sum().item()
    assert asked.count == 1


def test_the_loss_scale_is_asked_for_once_a_step(hvd):
    times = []
    told = {"loss_scale": lambda: times.append(1) or 2.0}
    trained(hvd, hvdx.Compression.int4(), contextlib.nullcontext(), **told)
    assert len(times) == 3
