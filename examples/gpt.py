"""A small GPT that reads English, byte by byte, with PyTorch, on as many processes as you like.

    hvdx run -np 2 -- python examples/gpt.py --generate               # writes like Python's manual
    hvdx run -np 2 -- python examples/gpt.py --compression powersgd   # for slow networks
    hvdx run -np 2 -- python examples/gpt.py --stages 2               # half of the model on each
    python examples/gpt.py --stages 2 --timeline run.html             # on each of two threads
    hvdx run -np 2 -- python examples/gpt.py --checkpoint saved       # kill it, and start it again

Whichever way it is spread, the same batches teach it the same: compare the losses. 1.3 million
parameters learn from the help texts that Python ships. examples/gpt_keras.py is the same in Keras.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression_sweep import method
from gpt_shared import SYMBOLS, Report, Text, devices, options, rate, share, written
from torch import nn
from torch.nn import functional as F

import hvdx as hvd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of several GPUs, hvdx's choice


def tensors(part: Iterable[np.ndarray]) -> list[torch.Tensor]:
    """Return what is read, and what is to be guessed, where the model is."""
    return [torch.from_numpy(each).to(DEVICE) for each in part]


class Block(nn.Module):
    """Bytes look back at those before them, then each is thought over."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_look, self.norm_think = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.saw = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what becomes of x, (n, length, width)."""
        parts = self.look(self.norm_look(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (n, heads, length, width / heads)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.saw(seen.transpose(1, 2).flatten(2))
        return x + self.think(self.norm_think(x))


class GPT(nn.Module):
    """A causal transformer whose head shares the weight of its embedding."""

    def __init__(self, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS, bias=False)
        self.head.weight = self.symbols.weight
        for each in self.modules():
            if isinstance(each, (nn.Linear, nn.Embedding)):
                nn.init.normal_(each.weight, std=0.02)
            if isinstance(each, nn.Linear) and each.bias is not None:
                nn.init.zeros_(each.bias)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return logits of the byte after each, (n, length, 256), of bytes, (n, length)."""
        places = torch.arange(text.shape[1], device=text.device)
        return self.head(self.norm(self.blocks(self.symbols(text) + self.places(places))))


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over all bytes, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class DataParallel:
    """Each rank trains the whole model on a share of the batch; verbs are those of hvd.Pipeline."""

    def __init__(self, model: nn.Module, told: argparse.Namespace) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), told.lr)
        self.model, self.steps, self._share = model, 0, share(told)
        self.optimizer: Any = hvd.DistributedOptimizer(
            optimizer, model, compression=method(told.compression)
        )
        self.optimizers = {0: self.optimizer}
        hvd.broadcast_parameters(model)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Train on this rank's share of a batch; return its loss."""
        self.optimizer.zero_grad()
        value = loss(self.model(x[self._share]), y[self._share])
        value.backward()
        self.optimizer.step()
        self.steps += 1
        return value.detach()

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits."""
        return self.model(x)

    def save(self, path: Path) -> None:
        """Write one file, on rank 0.

        What compression owes to training is each rank's own. All of it goes into this file: of
        one file per rank, some could be older than others when the job is killed.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "owed": hvd.allgather_object(self.optimizer.compression_state()),
            "owed_by_any": self.optimizer.portable_compression_state(),
            "steps": self.steps,
        }
        if hvd.rank() == 0:
            torch.save(state, f"{path}.partial")
            os.replace(f"{path}.partial", path)

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` wrote: on as many ranks to the last bit, or on others."""
        state = torch.load(path, map_location=DEVICE)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        alike = len(state["owed"]) == hvd.size()
        owed = state["owed"][hvd.rank()] if alike else state["owed_by_any"]
        self.optimizer.load_compression_state(owed)
        self.steps = state["steps"]


def trainer(model: nn.Module, text: Text, told: argparse.Namespace) -> Any:
    """Return what trains ``model``, in the way that is asked for."""
    if not told.stages:
        return DataParallel(model, told)
    return hvd.Pipeline(
        model,
        tensors(text.batch(0))[0],
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, told.lr),
        stages=told.stages,
        place=devices(told, DEVICE),
        schedule=told.schedule,
        micro_batches=told.micro_batches,
    )


def train(training: Any, text: Text, told: argparse.Namespace) -> None:
    """Train to the end, from where the last run was killed."""
    saved = told.checkpoint and told.checkpoint / ("stages.pt" if told.stages else "whole.pt")
    if saved and saved.exists():
        training.load(saved)
    report = Report(told, None if told.stages else training.optimizer)
    unseen, expected = tensors(text.unseen())
    while training.steps < told.steps:
        report.resume()
        losses = []
        for _ in range(told.every):
            for optimizer in training.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = rate(training.steps, told)
            losses.append(training.step(*tensors(text.batch(training.steps))))
        report.pause()
        mean = hvd.allreduce(torch.stack(losses).mean(), name="loss").item()
        report.steps(training.steps, mean, loss(training(unseen), expected).item())
        if saved:
            saved.parent.mkdir(parents=True, exist_ok=True)
            training.save(saved)


def main() -> None:
    """Train, and let the model write."""
    told = options(__doc__)
    hvd.init()
    torch.set_num_threads(1)  # the processes share the cores
    torch.manual_seed(told.seed)
    text = Text(told)
    model = GPT(told.length, told.width, told.depth, told.heads).to(DEVICE)
    training = trainer(model, text, told)
    train(training, text, told)
    if told.timeline:
        training.timeline(told.timeline)
    if told.generate:
        said = written(lambda text: training(*tensors((text,))).cpu(), told)
        if hvd.rank() == 0:
            print(f"\n{said}", flush=True)


if __name__ == "__main__":
    main()
