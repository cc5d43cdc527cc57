"""What compressors cost: encoding and decoding, against copying the same gradient in memory.

    python benchmarks/codecs.py --json codecs.json

On one thread, in PyTorch, in TensorFlow eagerly and as a `tf.function`, all variants alternating.
Times are nanoseconds of the process's own CPU time an element, so that other programs disturb
little. Methods are timed as a whole, too: a rank's part of a reduction between two, without the
network.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness

from hvdx.comm import FACTS, Allgather, Allreduce, Alltoall, Rank, Ranks, Work, drive
from hvdx.compression import Compression, Spec, codecs

CODECS = {
    "bf16": codecs.bfloat16(),
    "int8": codecs.integers(8, 256),
    "int8 stochastic": codecs.integers(8, 256, stochastic=True),
    "int4": codecs.integers(4, 128),
    "onebit": codecs.signs(1024),
}
METHODS = {
    "int8": Compression.int8(),
    "onebit": Compression.onebit(),
    "topk 1 %": Compression.topk(0.01),
    "dgc 0.1 %": Compression.dgc(0.001),
    "randomk 1 %": Compression.randomk(0.01),
    "powersgd r=4": Compression.powersgd(4),
    "powersgd r=4, alternating": Compression.powersgd(4, alternating=True),
}
Calls = dict[str, Callable[[], Any]]


class Torch:
    """PyTorch."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        from hvdx.ops import TorchOps

        torch.set_num_threads(1)
        self.ops = TorchOps()
        self.normal = torch.randn
        self.copy = torch.clone
        self.concat = torch.cat

    def compiled(self, call: Callable[..., Any], *tensors: Any) -> Callable[[], Any]:
        """Return what calls ``call(*tensors)``."""
        return lambda: call(*tensors)


class Eager:
    """TensorFlow, operation by operation."""

    name = "TensorFlow"

    def __init__(self) -> None:
        import tensorflow as tf

        from hvdx.ops import TensorFlowOps

        for threads in ("intra_op", "inter_op"):
            getattr(tf.config.threading, f"set_{threads}_parallelism_threads")(1)
        self.ops = TensorFlowOps()
        self.normal = tf.random.normal
        self.copy = lambda x: tf.raw_ops.DeepCopy(x=x)  # identity copies nothing
        self.concat = lambda parts: tf.concat(parts, 0)

    def compiled(self, call: Callable[..., Any], *tensors: Any) -> Callable[[], Any]:
        """See :meth:`Torch.compiled`."""
        return lambda: call(*tensors)


class Graph(Eager):
    """TensorFlow, as a graph."""

    name = "tf.function"

    def compiled(self, call: Callable[..., Any], *tensors: Any) -> Callable[[], Any]:
        """See :meth:`Torch.compiled`."""
        import tensorflow as tf

        graph = tf.function(call, autograph=False)
        return lambda: graph(*tensors)


def coding(framework: Any, elements: int) -> Calls:
    """Return what encodes and decodes ``elements`` numbers, by name."""
    ops, rows = framework.ops, framework.normal((1, elements))
    calls: Calls = {"copy": framework.compiled(framework.copy, rows)}
    for name, codec in CODECS.items():
        key = [ops.constant(7, "int32")] if codec.noisy else []

        def encode(rows: Any, *key: Any, codec: Any = codec) -> Any:
            return codec.encode(ops, rows, elements, *key)

        def decode(data: Any, codec: Any = codec) -> Any:
            return codec.decode(ops, data, elements)

        calls[f"{name}, encode"] = framework.compiled(encode, rows, *key)
        data = calls[f"{name}, encode"]()
        calls[f"{name}, decode"] = framework.compiled(decode, data)
    return calls


def reducing(framework: Any, elements: int) -> Calls:
    """Return what does a rank's part of a reduction between two ranks, by name."""
    ops, side = framework.ops, int(elements**0.5)
    shape = (side, elements // side)
    grad = framework.normal(shape)
    calls: Calls = {}
    for name, compressor in METHODS.items():
        state = compressor.init(ops, Spec("w", shape, "float32", 2))

        def reduce(grad: Any, compressor: Any = compressor, state: Any = state) -> Any:
            work: Work[Any] = compressor.reduce(ops, grad, state)
            done = drive(work, functools.partial(answered, framework))
            return done.mean, done.state

        calls[f"{name}, all"] = framework.compiled(reduce, grad)
    return calls


def answered(framework: Any, request: Any) -> Any:
    """Answer as if the other of two ranks had sent the same."""
    if isinstance(request, Ranks):
        return 2
    if isinstance(request, FACTS):
        return 0 if isinstance(request, Rank) else None
    if isinstance(request, Allgather):
        return framework.concat([request.tensor, request.tensor])
    assert isinstance(request, (Allreduce, Alltoall))
    return request.tensor


def measure(framework: Any, elements: int, runs: int) -> list[harness.Row]:
    """Compare every call with a copy."""
    calls = {**coding(framework, elements), **reducing(framework, elements)}

    def timed(call: Callable[[], Any]) -> float:
        start = time.process_time()
        call()
        return (time.process_time() - start) / elements * 1e9

    for call in calls.values():
        call()
    samples = harness.interleave({k: functools.partial(timed, v) for k, v in calls.items()}, runs)
    copies = samples.pop("copy")
    return [
        harness.Row(
            f"{framework.name}, {name}, {elements} elements", "ns per element",
            statistics.median(each), "copy", statistics.median(copies),
            statistics.median(c / max(e, 1e-9) for c, e in zip(copies, each, strict=True)),
            runs, harness.spread(each),
        )
        for name, each in samples.items()
    ]  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    arguments = harness.options(__doc__).parse_args()
    sizes, runs = ([2**16], 3) if arguments.short else ([2**20, 2**22], 15)
    rows = [
        row
        for kind in (Torch, Eager, Graph)
        for elements in sizes
        for row in measure(kind(), elements, runs)
    ]
    harness.report(rows, arguments.json)


if __name__ == "__main__":
    main()
