"""Horovod for today's PyTorch, TensorFlow and Keras 3: ``import hvdx as hvd``.

Importing hvdx imports no framework; each call is served by the one its argument belongs to.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hvdx.collectives import (
    allgather,
    allreduce,
    alltoall,
    barrier,
    broadcast,
    grouped_allgather,
    grouped_allreduce,
    grouped_reducescatter,
    join,
    reducescatter,
)
from hvdx.compression import Compression
from hvdx.errors import (
    HorovodMissingError,
    HvdxError,
    InstallError,
    LaunchError,
    MismatchError,
    NotInitializedError,
    PipelineError,
    PlanError,
    StallError,
)
from hvdx.groups import Groups
from hvdx.metrics import Metrics
from hvdx.optimizer import DistributedOptimizer
from hvdx.pipeline.dispatch import Pipeline, plan
from hvdx.preemption import Preemption
from hvdx.reduce_op import Adasum, Average, Max, Min, Product, ReduceOp, Sum
from hvdx.replicas import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
    parameter_hash,
)
from hvdx.reporting import TrainingReport
from hvdx.watchdog import patience
from hvdx.world import (
    add_process_set,
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    remove_process_set,
    rocm_built,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
)

if TYPE_CHECKING:
    from typing import Any as ProcessSet  # noqa: F401

    from hvdx.integrations import keras_callbacks as callbacks  # noqa: F401

    global_process_set: Any

__version__ = "0.1.0"

# Without what __getattr__ loads late: `from hvdx import *` shall need no framework.
__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "Groups",
    "HorovodMissingError",
    "HvdxError",
    "InstallError",
    "LaunchError",
    "Max",
    "Metrics",
    "Min",
    "MismatchError",
    "NotInitializedError",
    "Pipeline",
    "PipelineError",
    "PlanError",
    "Preemption",
    "Product",
    "ReduceOp",
    "StallError",
    "Sum",
    "TrainingReport",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "parameter_hash",
    "patience",
    "plan",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]


def __getattr__(name: str) -> Any:
    """Load on first use what needs Horovod or Keras."""
    if name == "ProcessSet":
        return importlib.import_module("hvdx.world").process_set_class()
    if name == "global_process_set":
        return importlib.import_module("hvdx.world").global_process_set()
    if name == "callbacks":
        return importlib.import_module("hvdx.integrations.keras_callbacks")
    if name == "run":
        raise AttributeError(
            "hvdx has no run(function): Horovod's sends pickles through a port that anyone may "
            "write to (CVE-2026-31234). Put the function in a script and start it with "
            "`hvdx run`, or call horovod.run() on a network that you trust"
        )
    raise AttributeError(f"module 'hvdx' has no attribute {name!r}")
