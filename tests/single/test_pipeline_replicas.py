"""Replicas of a stage, as threads of one process."""

from __future__ import annotations

import queue
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hvdx.comm import in_step
from hvdx.compression import Compression, Spec
from hvdx.ops import NumpyOps
from hvdx.pipeline.channel import Key
from hvdx.pipeline.replicas import Row


class Mail:
    """What one rank has of a post that all share."""

    def __init__(self, boxes, rank):
        self.boxes, self.rank = boxes, rank

    def send(self, rank, key, tensors):
        self.boxes[self.rank, rank, key].put(tensors)

    def receive(self, rank, key):
        return self.boxes[rank, self.rank, key].get(timeout=30)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_levels_are_agreed_on(count):
    """Nine ask for the largest, which replicas once could not find."""
    compressor, shape, ops = Compression.onebit(scales="matrix"), (48, 96), NumpyOps()
    grads = np.random.default_rng(0).normal(size=(count, *shape)).astype("f4") ** 3
    spec, boxes = Spec("w", shape, "float32", count), defaultdict(queue.Queue)

    def work(rank):
        return compressor.reduce(ops, grads[rank].copy(), compressor.init(ops, spec))

    def on_thread(rank):
        row = Row(range(count), rank, Mail(boxes, rank), ops)
        return row.start(work(rank), Key("G", 0, 0, 0)).finish().mean

    expected = in_step([work(rank) for rank in range(count)])[0].mean
    with ThreadPoolExecutor(count) as pool:
        for mean in pool.map(on_thread, range(count)):
            np.testing.assert_array_equal(mean, expected)
