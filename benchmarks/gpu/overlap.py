"""Do reductions run while backward goes on? Looked up in torch's profile of a few steps.

    hvdx run -np 1 -- python benchmarks/gpu/overlap.py --trace overlap.json

Counts how many buckets have left while gradients were still to be computed and, on a GPU, how much
of the time of NCCL's kernels others ran beside them. The trace is for chrome://tracing or Perfetto:
"hvdx: bucket leaves" are the hooks, on autograd's own thread on a GPU.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import rig
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import hvdx as hvd
from hvdx.integrations.pytorch_optimizer_reducer import Reducer

LEAVES, BACKWARD = "hvdx: bucket leaves", "backward"
NODE = "autograd::engine::evaluate_function"


def marked() -> None:
    """Have the moments in which buckets leave appear in profiles."""
    send = Reducer._send

    @functools.wraps(send)
    def leave(self: Reducer, bucket: Any) -> None:
        with record_function(LEAVES):
            send(self, bucket)

    Reducer._send = leave  # type: ignore[method-assign]


def steps(told: Any, width: int, depth: int) -> Any:
    """Train; return the profile of the last three steps."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers).to(told.device)
    optimizer: Any = torch.optim.SGD(model.parameters(), 1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, model)
    x = torch.randn(256, width, device=told.device)

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        with record_function(BACKWARD):
            loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    kinds = [ProfilerActivity.CPU]
    if torch.device(told.device).type == "cuda":
        torch.cuda.synchronize()
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as found:
        for _ in range(3):
            step()
        if len(kinds) > 1:
            torch.cuda.synchronize()
    return found


def spans(events: Any, wanted: Any) -> list[tuple[float, float]]:
    """Return when events ran, in microseconds."""
    return [(e.time_range.start, e.time_range.end) for e in events if wanted(e)]


def shared(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Return how long something of ``one`` and something of ``other`` ran at the same time."""
    edges = [(at, way, which) for which, given in enumerate((one, other))
             for span in given for at, way in zip(span, (1, -1), strict=True)]  # fmt: skip
    running, last, total = [0, 0], 0.0, 0.0
    for at, way, which in sorted(edges):
        total += (at - last) * (running[0] > 0 and running[1] > 0)
        running[which] += way
        last = at
    return total


def main() -> None:
    """Measure, print and write."""
    parser = rig.options(__doc__)
    parser.add_argument("--trace", type=Path, help="write rank 0's profile there")
    told = parser.parse_args()
    hvd.init(framework="torch")
    torch.manual_seed(0)
    marked()
    # Buckets hold 32 MiB at most: the weights are 16 MiB each, so that many leave.
    found = steps(told, *((1024, 12) if told.short else (2048, 12)))
    events = found.events()
    if hvd.rank() == 0:
        leaves = spans(events, lambda e: e.name == LEAVES)
        early = 0
        for begin, end in spans(events, lambda e: e.name == BACKWARD):
            nodes = spans(events, lambda e, a=begin, b=end: e.name.startswith(NODE)
                          and a <= e.time_range.start <= b)  # fmt: skip
            last = max(nodes)[0]  # the last gradient's; what waits for reductions comes after it
            early += sum(begin <= start < last for start, _ in leaves)
        row = {"buckets": len(leaves), "left while backward had work to do": early}
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        nccl = spans(kernels, lambda e: "nccl" in e.name.lower())
        if nccl:
            others = spans(kernels, lambda e: "nccl" not in e.name.lower())
            busy = shared(nccl, nccl)
            row |= {"NCCL ms": busy / 1e3, "of it beside other kernels, %":
                    100 * shared(nccl, others) / busy}  # fmt: skip
        rig.report(told.device, [row], told.json)
        if told.trace:
            found.export_chrome_trace(str(told.trace))


if __name__ == "__main__":
    main()
