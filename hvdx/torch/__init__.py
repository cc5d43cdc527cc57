"""Drop-in face for PyTorch: ``import hvdx.torch as hvd`` in the place of ``horovod.torch``.

What hvdx does better is replaced; all else is Horovod's own. Submodules are called as
Horovod's are.
"""

from __future__ import annotations

from typing import Any

from hvdx import frameworks
from hvdx.checkpoints.files import load_state
from hvdx.checkpoints.saver import Checkpoints
from hvdx.consistency import check_consistency
from hvdx.errors import CheckpointError, MismatchError, PipelineError, PlanError, StallError
from hvdx.groups import Groups
from hvdx.metrics import Metrics
from hvdx.pipeline.dispatch import plan
from hvdx.pipeline.rebalance import Rebalance
from hvdx.replicas import parameter_hash
from hvdx.reporting import TrainingReport
from hvdx.watchdog import patience

_horovod = frameworks.adapter("torch").horovod  # first: it says where Horovod is missing

from hvdx.integrations.pytorch_data import (  # noqa: E402
    DistributedBatchSampler,
    DistributedSampler,
    uneven,
)
from hvdx.integrations.pytorch_pipeline import Pipeline  # noqa: E402
from hvdx.torch import elastic, mpi_ops  # noqa: E402
from hvdx.torch.functions import (  # noqa: E402
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from hvdx.torch.mpi_ops import *  # noqa: E402, F403  (all of them, as Horovod's face has)
from hvdx.torch.optimizer import DistributedOptimizer  # noqa: E402
from hvdx.torch.sync_batch_norm import SyncBatchNorm  # noqa: E402

#: Horovod's own, reached through __getattr__.
_UNCHANGED = [
    "HorovodInternalError",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "is_initialized",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "rocm_built",
    "size",
    "start_timeline",
    "stop_timeline",
]

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DistributedBatchSampler",
    "DistributedOptimizer",
    "DistributedSampler",
    "Groups",
    "Metrics",
    "MismatchError",
    "Pipeline",
    "PipelineError",
    "PlanError",
    "Rebalance",
    "StallError",
    "SyncBatchNorm",
    "TrainingReport",
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "check_consistency",
    "elastic",
    "load_state",
    "parameter_hash",
    "patience",
    "plan",
    "uneven",
]
__all__ += mpi_ops.__all__
__all__ += _UNCHANGED


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
