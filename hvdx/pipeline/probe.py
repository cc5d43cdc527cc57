"""Measure what a hop between two ranks costs, tensors in and out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

from hvdx.pipeline.channel import Key, Tensors
from hvdx.pipeline.plan import Link

#: Between threads of one process: waking up costs, tensors pass as they are.
THREADS = Link(latency=5e-5)
_SIZES = 1 << 12, 1 << 22
_ROUNDS = 8  # of which the first does not count


class Post(Protocol):
    """A channel whose ranks write to each other directly, as ``ZmqChannel`` does."""

    def send(self, peer: int, key: Key, tensors: Tensors) -> None:
        """Send to rank ``peer``."""

    def receive(self, peer: int, key: Key) -> Tensors:
        """Wait for what ``peer`` sends."""


def measure_link(post: Post, rank: int, blank: Callable[[int], Any]) -> Link | None:
    """Send there and back between ranks 0 and 1; return the link on rank 0.

    Args:
        post: between all ranks.
        rank: this one; above 1 nothing is done.
        blank: makes a tensor of so many bytes.
    """
    seconds = [_one_way(post, rank, number, blank(size)) for number, size in enumerate(_SIZES)]
    if rank:
        return None
    (short, long), (few, many) = seconds, _SIZES
    return Link(short, (many - few) / max(long - short, 1e-9))


def _one_way(post: Post, rank: int, number: int, tensor: Any) -> float:
    taken = []
    for k in range(_ROUNDS):
        key = Key("P", 0, number, k)
        start = time.perf_counter()
        if rank == 0:
            post.send(1, key, [tensor])
            post.receive(1, key)
        elif rank == 1:
            post.send(0, key, post.receive(0, key))
        taken.append((time.perf_counter() - start) / 2)
    return statistics.median(taken[1:])
