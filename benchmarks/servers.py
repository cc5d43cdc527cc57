"""What ranks keep of Adam's state under each way of keeping them in step, in bytes.

    python benchmarks/servers.py --json servers.json

An MLP (784-512-512-10) is trained for two steps on 4 ranks with PyTorch; then what the optimizer
keeps on each rank is counted. Nothing is timed.
"""

from __future__ import annotations

import sys
from typing import Any

import harness

RANKS = 4


def kept(**options: Any) -> list[float]:
    """Train two steps; return what each rank keeps, in MB."""
    import torch

    import hvdx as hvd

    nn = torch.nn
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    optimizer: Any = torch.optim.Adam(model.parameters(), 1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, model, **options)
    hvd.broadcast_parameters(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 784)).square().mean().backward()
        optimizer.step()
    own = [v for state in optimizer.state.values() for v in state.values()]
    size = sum(value.nbytes for value in own if isinstance(value, torch.Tensor))
    return [each / 1e6 for each in hvd.allgather_object(size)]


def work(file: str) -> None:
    """Count on one rank; rank 0 leaves the rows."""
    import hvdx as hvd

    hvd.init(framework="torch")
    servers: dict[str, Any] = {"sync": "parameter_server"}
    variants: dict[str, dict[str, Any]] = {
        "allreduce": {},
        "all are servers": servers,
        "servers=[0, 1]": {**servers, "servers": [0, 1]},
        "servers=[0]": {**servers, "servers": [0]},
        "all, int8": {**servers, "compression": hvd.Compression.int8()},
        "all, powersgd": {**servers, "compression": hvd.Compression.powersgd(rank=4)},
    }
    counted = {name: kept(**options) for name, options in variants.items()}
    rows = []
    for name, sizes in counted.items():
        for rank, size in enumerate(sizes):
            whole = counted["allreduce"][rank]
            told = name, f"MB on rank {rank}", size, "allreduce", whole, size / whole, 1, 0.0
            rows.append(harness.Row(*told))
    if hvd.rank() == 0:
        harness.leave(rows, file)


def main() -> None:
    """Print the table."""
    told = harness.options(__doc__).parse_args()
    if told.worker:
        work(told.worker)
    else:
        harness.report(harness.launch(__file__, RANKS, []), told.json)


if __name__ == "__main__":
    sys.exit(main())
