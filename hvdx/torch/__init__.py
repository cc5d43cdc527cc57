"""Drop-in face for PyTorch: ``import hvdx.torch as hvd`` in the place of ``horovod.torch``.

What hvdx does better is replaced; all else is Horovod's own.
"""

from __future__ import annotations

import functools
from typing import Any

from hvdx import frameworks, world
from hvdx.collectives import (
    allgather,
    allreduce,
    alltoall,
    barrier,
    broadcast,
    grouped_allgather,
    grouped_allreduce,
    reducescatter,
)
from hvdx.compression import Compression
from hvdx.replicas import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
    parameter_hash,
)
from hvdx.reporting import TrainingReport
from hvdx.world import shutdown

_horovod = frameworks.adapter("torch").horovod

from hvdx.integrations.pytorch_data import (  # noqa: E402
    DistributedBatchSampler,
    DistributedSampler,
    uneven,
)
from hvdx.integrations.pytorch_optimizer import DistributedOptimizer  # noqa: E402
from hvdx.torch import elastic  # noqa: E402

init = functools.partial(world.init, framework="torch")

__all__ = [
    "Compression",
    "DistributedBatchSampler",
    "DistributedOptimizer",
    "DistributedSampler",
    "TrainingReport",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "elastic",
    "grouped_allgather",
    "grouped_allreduce",
    "init",
    "parameter_hash",
    "reducescatter",
    "shutdown",
    "uneven",
]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
