"""How fast Horovod reduces: bandwidth by size, of tensors on the device.

    hvdx run -np 2 -- python benchmarks/gpu/allreduce.py

GB/s is bytes over seconds; "bus" counts what each rank must send and receive, 2 (n - 1) / n of
them, and is 0 for one rank, whose allreduce is a copy at best. By NCCL where Horovod was built
with it and tensors are on GPUs, else by Gloo or MPI, on the host.
"""

from __future__ import annotations

import time
from typing import Any

import rig
import torch

import hvdx as hvd
import hvdx.torch


def main() -> None:
    """Measure, print and write."""
    told = rig.options(__doc__).parse_args()
    hvd.init(framework="torch")
    runs = told.runs or (3 if told.short else 30)
    sizes = [2**12, 2**16] if told.short else [2**power for power in range(12, 29, 2)]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        x, name = torch.zeros(size // 4, device=told.device), f"bandwidth.{size}"

        def reduce(x: torch.Tensor = x, name: str = name) -> None:
            hvdx.torch.allreduce_(x, op=hvd.Sum, name=name)

        for _ in range(2):
            reduce()
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()  # ranks wait for each other, and for the GPU, in each
        for _ in range(runs):
            reduce()
        if x.is_cuda:
            torch.cuda.synchronize()
        taken = (time.perf_counter() - start) / runs
        speed, ranks = size / taken / 1e9, hvd.size()
        rows.append({"bytes": size, "us": taken * 1e6, "GB/s": speed,
                     "bus GB/s": speed * 2 * (ranks - 1) / ranks})  # fmt: skip
    if hvd.rank() == 0:
        nccl = hvdx.torch.nccl_built() and torch.device(told.device).type == "cuda"
        print(f"{hvd.size()} ranks, {'NCCL' if nccl else 'no NCCL'}. ", end="")
        rig.report(told.device, rows, told.json)


if __name__ == "__main__":
    main()
