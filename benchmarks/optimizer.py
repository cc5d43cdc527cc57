"""Step time of training with PyTorch and with Keras.

PyTorch: hvdx, Horovod's own optimizer and DistributedDataParallel. Keras: ``fit`` with and
without hvdx; see ``keras_fit.py``, which also runs by itself.

    python benchmarks/optimizer.py --json optimizer.json

PyTorch's variants run in one job of two ranks over Gloo, one thread each, a few steps at a time in
changing order. A step is forward, backward, averaging and an SGD update.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import keras_fit
import torch
from torch import nn

RANKS = 2


class Deep(nn.Module):
    """Many small layers: 120 of them, two tensors each."""

    def __init__(self, layers: int = 120, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(step for _ in range(layers) for step in (nn.Linear(width, width), nn.ReLU()))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a scalar loss."""
        return self.net(x).mean()


class Wide(nn.Module):
    """A few large layers."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a scalar loss."""
        return self.net(x).square().mean()


class Transformer(nn.Module):
    """A small causal language model."""

    def __init__(self, vocabulary: int = 512, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the next token."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.blocks(self.embedding(tokens), mask=mask, is_causal=True)
        logits = self.head(hidden)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "many small layers (240 tensors)": (
        Deep,
        lambda: torch.randn(32, 64),
    ),
    "large layers (10 M parameters)": (Wide, lambda: torch.randn(32, 784)),
    "transformer (3.4 M parameters)": (
        Transformer,
        lambda: torch.randint(0, 512, (2, 64)),
    ),
}


def variants(model: Callable[[], nn.Module]) -> dict[str, tuple[nn.Module, Any]]:
    """Return module and optimizer of each variant, equal at the start."""
    import horovod.torch as horovod

    import hvdx as hvd

    made: dict[str, tuple[nn.Module, Any]] = {}
    for name in ("hvdx", "horovod", "ddp"):
        torch.manual_seed(0)
        module = model()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        if name == "hvdx":
            hvd.DistributedOptimizer(optimizer, module)
        elif name == "horovod":
            optimizer = horovod.DistributedOptimizer(
                optimizer, named_parameters=module.named_parameters()
            )
        else:
            module = nn.parallel.DistributedDataParallel(module)
        made[name] = (module, optimizer)
    return made


def stepper(module: nn.Module, optimizer: Any, batch: torch.Tensor, steps: int) -> float:
    """Return the milliseconds of a step, over ``steps`` of them."""
    import hvdx as hvd

    hvd.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        # Horovod's optimizer refuses set_to_none, so that it gets what it can do.
        if hasattr(optimizer, "_requires_update"):
            optimizer.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=True)
        module(batch).backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps * 1e3


def measure(short: bool) -> list[harness.Row]:
    """Compare the variants' steps, on every rank."""
    import hvdx as hvd

    rows: list[harness.Row] = []
    runs, steps = (4, 3) if short else (20, 6)
    for case, (model, batch) in CASES.items():
        torch.manual_seed(hvd.rank())
        data = batch()
        made = variants(model)
        for module, optimizer in made.values():
            stepper(module, optimizer, data, 3)  # warm up
        samples = harness.interleave(
            {
                name: functools.partial(stepper, module, optimizer, data, steps)
                for name, (module, optimizer) in made.items()
            },
            runs,
        )
        rows += harness.compare(case, "step ms", samples)
        waited = made["hvdx"][1].communication_seconds
        if hvd.rank() == 0:
            print(f"{case}: {waited / (runs * steps + 3) * 1e3:.1f} ms a step waiting", flush=True)
    return rows


def work(file: str, short: bool) -> None:
    """Measure on one rank; rank 0 leaves the rows."""
    import hvdx as hvd

    with harness.torch_job():
        rows = measure(short)
        if hvd.rank() == 0:
            harness.leave(rows, file)


def main() -> None:
    """Launch the jobs and print their table."""
    told = harness.options(__doc__).parse_args()
    if told.worker:
        work(told.worker, told.short)
        return
    rows = harness.launch(__file__, RANKS, ["--short"] * told.short)
    rows += keras_fit.measure(told.short)
    harness.report(rows, told.json)


if __name__ == "__main__":
    sys.exit(main())
