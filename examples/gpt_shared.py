"""What the two GPT examples share: English text, options, progress, and how a model writes."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

import hvdx as hvd

Part: TypeAlias = tuple[np.ndarray, np.ndarray]
SYMBOLS = 256  # a byte is a token
UNSEEN = 32  # windows of text kept for the test that are looked at
WRITTEN = 300  # bytes


def english() -> Part:
    """Return the help texts that Python ships, bytes as int64: nine tenths, and the last one."""
    text = np.frombuffer("\n".join(topics.values()).encode(), np.uint8).astype(np.int64)
    train, test = np.split(text, [len(text) * 9 // 10])
    return train, test


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Return runs of ``length`` bytes and the one after each, (starts, length + 1)."""
    return text[starts[:, np.newaxis] + np.arange(length + 1)]


class Text:
    """Batches that are the same on all ranks, however many they are, and after a restart.

    Args:
        told: the options.
    """

    def __init__(self, told: argparse.Namespace) -> None:
        self._told = told
        self._train, self._test = english()

    def batch(self, step: int) -> Part:
        """Return what is read and what is to be guessed in ``step``: it alone says where."""
        told, room = self._told, len(self._train) - self._told.length
        draw = np.random.default_rng([told.seed, step])
        return self._pair(self._train, draw.integers(room, size=told.batch_size))

    def unseen(self) -> Part:
        """Return the windows for the test, evenly spread."""
        room = len(self._test) - self._told.length
        return self._pair(self._test, np.arange(UNSEEN) * room // UNSEEN)

    def _pair(self, text: np.ndarray, starts: np.ndarray) -> Part:
        rows = windows(text, starts, self._told.length)
        return rows[:, :-1], rows[:, 1:]


def rate(step: int, told: argparse.Namespace) -> float:
    """Return the learning rate: it rises over a tenth of the steps, then falls like a cosine."""
    rising = max(1, told.steps // 10)
    if step < rising:
        return told.lr * (step + 1) / rising
    return told.lr * (1 + math.cos(math.pi * (step - rising) / (told.steps - rising))) / 2


class Report(hvd.TrainingReport):
    """Lines of bits per byte and tokens per second: on rank 0, for people and for programs.

    Args:
        told: the options.
        optimizer: that averages gradients, if one does.
    """

    def __init__(self, told: argparse.Namespace, optimizer: Any = None) -> None:
        super().__init__(optimizer or SimpleNamespace(communication_seconds=0.0))
        self._told, self._averages = told, optimizer is not None

    def steps(self, done: int, loss: float, unseen: float) -> None:
        """Print the line after ``done`` steps; losses are in nats, as frameworks have them."""
        self.batch(self._told.every * self._told.batch_size * self._told.length / hvd.size())
        self.epoch(step=done, loss=loss / math.log(2), unseen=unseen / math.log(2))
        self.pause()

    def line(self, samples_per_second: float, share: float, metrics: dict[str, float]) -> None:
        """Print a line; samples are tokens here."""
        waited = f"  communication {share:.1%}" if self._averages else ""
        print(
            f"step {metrics['step']}/{self._told.steps}  {metrics['loss']:.3f} bits/byte"
            f"  unseen {metrics['unseen']:.3f}  {samples_per_second:,.0f} tokens/s"
            f" on {hvd.size()} ranks{waited}",
            flush=True,
        )
        if self._told.log:
            told = {**metrics, "tokens_per_second": samples_per_second, "communication": share}
            with open(self._told.log, "a") as file:
                file.write(json.dumps(told) + "\n")


def written(logits: Callable[[np.ndarray], Any], told: argparse.Namespace) -> str:
    """Return the prompt and what the model goes on with, the same on all ranks.

    Args:
        logits: of bytes, int64 (1, length): (1, length, 256). What lies behind a byte does not
            matter to it, so that short texts are filled up.
        told: the options.
    """
    text, draw = list(told.generate.encode()), np.random.default_rng(told.seed)
    for _ in range(WRITTEN):
        seen = text[-told.length :]
        filled = np.array([seen + [0] * (told.length - len(seen))])
        chances = np.asarray(logits(filled))[0, len(seen) - 1].astype(np.float64) / 0.7
        chances = np.exp(chances - chances.max())
        text.append(int(draw.choice(SYMBOLS, p=chances / chances.sum())))
    return bytes(text).decode(errors="replace")


def options(description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=300)
    add("--every", type=int, default=25, help="steps between lines, tests and checkpoints")
    add("--batch-size", type=int, default=16, help="windows of text, for all processes together")
    add("--length", type=int, default=128, help="bytes in a window")
    add("--width", type=int, default=160)
    add("--depth", type=int, default=4, help="blocks")
    add("--heads", type=int, default=4)
    add("--lr", type=float, default=2e-3, help="the highest; it rises first, and falls")
    add("--seed", type=int, default=0)
    add("--compression", default="none", metavar="METHOD", help="of gradients: a name in "
        "hvd.Compression, with options if you like: topk:density=0.05")  # fmt: skip
    add("--stages", type=int, metavar="N", help="cut the model, instead of the batch")
    add("--schedule", default="1f1b", help="of the stages, as hvd.Pipeline takes it")
    add("--micro-batches", type=int, default=4, help="of the stages")
    add("--timeline", metavar="FILE", help="draw the last steps of the stages: .html, .png, .json")
    add("--checkpoint", type=Path, metavar="FOLDER", help="go on from there; write to it")
    add("--log", metavar="FILE", help="JSON lines are added to it")
    add("--generate", nargs="?", const="The ", metavar="PROMPT", help="let the model write")
    told = parser.parse_args()
    if told.steps % told.every:
        parser.error(f"--steps {told.steps} is no multiple of --every {told.every}")
    if told.stages and told.compression != "none":
        parser.error("--compression is for data parallel training: give no --stages")
    if told.timeline and not told.stages:
        parser.error("--timeline shows stages: give --stages")
    return told


def share(told: argparse.Namespace) -> slice:
    """Return this rank's rows of a batch.

    Raises:
        ValueError: some ranks would have more rows than others.
    """
    if told.batch_size % hvd.size():
        raise ValueError(f"--batch-size {told.batch_size} does not divide by {hvd.size()} ranks")
    return slice(hvd.rank(), None, hvd.size())


def devices(told: argparse.Namespace, device: str = "cpu") -> list[str] | None:
    """Return where the stages go: None, to the ranks of the job, or threads of a lone process."""
    return None if hvd.size() > 1 else [device] * told.stages
