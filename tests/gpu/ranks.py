"""What ranks do in ``test_training.py``: ``ranks.py allreduce|train DEVICE``."""

from __future__ import annotations

import sys

import torch
from torch import nn

import hvdx as hvd
import hvdx.torch


def reduce_once(device: str) -> None:
    """One allreduce, to be seen in Horovod's timeline."""
    total = hvd.allreduce(torch.ones(1000, device=device), op=hvd.Sum, name="seen")
    assert total.sum().item() == 1000 * hvd.size()
    print(f"nccl {bool(hvdx.torch.nccl_built())}", flush=True)


class TwoStreams(nn.Module):
    """Computes its halves on streams of their own, where there are streams."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both."""
        if not x.is_cuda:
            return self.left(x) + self.right(x)
        own, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(own)
        with torch.cuda.stream(other):
            right = self.right(x)
        left = self.left(x)
        own.wait_stream(other)
        right.record_stream(own)
        return left + right


def trained(model: nn.Module, device: str, compression: object, steps: int = 5) -> list:
    """Return what a model has learned."""
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=compression)
    random = torch.Generator().manual_seed(hvd.rank())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 256, generator=random).to(device)).square().mean().backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


def train(device: str) -> None:
    """Train with every method, on the device and on the CPU."""
    c = hvd.Compression
    methods = [c.none, c.fp16, c.bf16, c.int8(), c.int4(), c.onebit(), c.topk(0.05),
               c.randomk(0.1), c.powersgd(2), c.powersgd(2, alternating=True),
               c.auto(seconds=0.1, verbose=False)]  # fmt: skip
    for method in methods:
        for kind in (TwoStreams, lambda: nn.Linear(256, 8)):
            torch.manual_seed(1)
            model = kind()
            state = {name: value.clone() for name, value in model.state_dict().items()}
            here = trained(model, device, method)
            model.cpu().load_state_dict(state)
            there = trained(model, "cpu", c.none)
            everyone = hvd.allgather_object([each.numpy().tobytes() for each in here])
            assert everyone[0] == everyone[-1], f"{method}: ranks differ"
            for one, other in zip(here, there, strict=True):
                assert (one - other).norm() < 0.2 * other.norm() + 0.05, method
            if method is c.none:
                for one, other in zip(here, there, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if hvd.rank() == 0:
        print(f"{hvd.size()} ranks agree", flush=True)


if __name__ == "__main__":
    hvd.init(framework="torch")
    {"allreduce": reduce_once, "train": train}[sys.argv[1]](sys.argv[2])
