"""Encoding at memory speed: codecs against a copy and against a plain cast to float16.

    python benchmarks/gpu/codecs.py --compile

GB/s counts what must move: a codec's input read once and its output written once. 100 % of a copy
is the device's memory bandwidth, measured by copying as many numbers. Whole methods are one rank's
part of a reduction between two, without the network; their floor is the gradient, read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rig
import torch

from hvdx.comm import FACTS, Allgather, Owners, Ranks, Request, Work
from hvdx.compression import Compression, Spec, codecs
from hvdx.ops import Ops, ops_for

CODECS = {
    "bf16": codecs.bfloat16(),
    "fp16": codecs.float16(),
    "int8": codecs.integers(8, 256),
    "int8 stochastic": codecs.integers(8, 256, stochastic=True),
    "int4": codecs.integers(4, 128),
    "onebit": codecs.signs(1024),
}
METHODS = {
    "int8": Compression.int8(),
    "int4": Compression.int4(),
    "onebit": Compression.onebit(),
    "topk 1 %": Compression.topk(0.01),
    "randomk 1 %": Compression.randomk(0.01),
    "powersgd r=4": Compression.powersgd(4),
}


def coding(ops: Ops, x: torch.Tensor, wrap: Callable[[Any], Any]) -> dict[str, tuple[Any, int]]:
    """Return calls by name, with the bytes that each must move."""
    rows, size = x.view(1, -1), x.numel()
    calls: dict[str, tuple[Any, int]] = {}
    for name, codec in CODECS.items():
        key = [ops.constant(7, "int32")] if codec.noisy else []

        def encode(rows: Any, *key: Any, codec: Any = codec) -> Any:
            return codec.encode(ops, rows, size, *key)

        def decode(data: Any, codec: Any = codec) -> Any:
            return codec.decode(ops, data, size)

        encode, decode = wrap(encode), wrap(decode)
        data = encode(rows, *key)
        moved = 4 * size + data.numel()
        calls[f"{name}, encode"] = (lambda f=encode, k=key: f(rows, *k)), moved
        calls[f"{name}, decode"] = (lambda f=decode, d=data: f(d)), moved
    return calls


def reducing(ops: Ops, x: torch.Tensor) -> dict[str, tuple[Any, int]]:
    """Return whole methods likewise."""
    side = int(x.numel() ** 0.5)
    grad = x[: side * side].view(side, side)
    calls: dict[str, tuple[Any, int]] = {}
    for name, method in METHODS.items():
        state = method.init(ops, Spec("w", (side, side), "float32", 2))

        def reduce(method: Any = method, state: Any = state) -> Any:
            return answered(method.reduce(ops, grad.clone(), state))

        calls[f"{name}, whole method"] = reduce, 4 * grad.numel()
    return calls


def answered(work: Work[Any]) -> Any:
    """Run a reduction as if the other of two ranks had sent the same."""
    answer: Any = None
    while True:
        try:
            request: Request = work.send(answer)
        except StopIteration as done:
            return done.value
        if isinstance(request, FACTS):
            answer = {Ranks: 2, Owners: None}.get(type(request), 0)
        elif isinstance(request, Allgather):
            answer = torch.cat([request.tensor, request.tensor])
        else:
            answer = request.tensor  # type: ignore[union-attr]


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = rig.options(__doc__)
    parser.add_argument("--elements", type=int, default=0, help="default: 2^26; 2^18 with --short")
    parser.add_argument("--compile", action="store_true", help="codecs by torch.compile as well")
    told = parser.parse_args()
    size = told.elements or (2**18 if told.short else 2**26)
    size = max(size // 1024, 1) * 1024  # whole blocks of every codec
    runs = told.runs or (3 if told.short else 30)
    x = torch.randn(size, device=told.device)
    ops = ops_for(torch.Tensor).beside(x)

    copy = rig.seconds(x.clone, told.device, runs)
    cast = rig.seconds(x.half, told.device, runs)
    calls = {"cast to float16": (x.half, 6 * size), **coding(ops, x, lambda call: call)}
    if told.compile:
        quick = coding(ops, x, lambda call: torch.compile(call, dynamic=False))
        calls |= {f"{name}, compiled": call for name, call in quick.items()}
    calls |= reducing(ops, x)
    rows = [{"what": "copy", "ms": copy * 1e3, "GB/s": 8 * size / copy / 1e9,
             "% of copy": 100.0, "times the cast": copy / cast}]  # fmt: skip
    for name, (call, moved) in calls.items():
        taken = rig.seconds(call, told.device, runs)
        speed = moved / taken
        rows.append({"what": name, "ms": taken * 1e3, "GB/s": speed / 1e9,
                     "% of copy": 100 * speed / (8 * size / copy),
                     "times the cast": taken / cast})  # fmt: skip
    rig.report(told.device, rows, told.json)


if __name__ == "__main__":
    main()
