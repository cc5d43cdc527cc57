"""Drop-in face for Keras 3: ``import hvdx.keras as hvd`` in the place of ``horovod.keras``.

Serves the TensorFlow and the torch backend; on the latter TensorFlow is not needed. What
Horovod's module has beyond this is passed through on the TensorFlow backend, but for the names
that fail on Keras 3, silently or not.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hvdx import collectives, frameworks, world
from hvdx.checkpoints.files import load_state
from hvdx.checkpoints.saver import Checkpoints
from hvdx.collectives import (
    alltoall,
    barrier,
    grouped_allgather,
    grouped_allreduce,
    join,
)
from hvdx.compression import Compression
from hvdx.consistency import check_consistency
from hvdx.errors import CheckpointError, MismatchError, StallError
from hvdx.frameworks import kind_of
from hvdx.groups import Groups
from hvdx.integrations import keras3_files
from hvdx.integrations.keras3 import (
    DistributedOptimizer,
    PartialDistributedOptimizer,
    averaging,
)
from hvdx.integrations.keras_data import DistributedDataset
from hvdx.integrations.keras_sync_batch_norm import SyncBatchNormalization
from hvdx.keras import callbacks
from hvdx.metrics import Metrics
from hvdx.reduce_op import Adasum, Average, Max, Min, Product, Sum
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

__all__ = [
    "Adasum",
    "Average",
    "CheckpointError",
    "Checkpoints",
    "Compression",
    "DistributedDataset",
    "DistributedOptimizer",
    "Groups",
    "Max",
    "Metrics",
    "Min",
    "MismatchError",
    "PartialDistributedOptimizer",
    "Product",
    "StallError",
    "Sum",
    "SyncBatchNormalization",
    "TrainingReport",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "callbacks",
    "ccl_built",
    "check_consistency",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allreduce",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "load_model",
    "load_state",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "parameter_hash",
    "patience",
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
    if name in ("ProcessSet", "global_process_set"):
        return getattr(importlib.import_module("hvdx"), name)
    if name == "elastic":  # and never Horovod's, which fails on Keras 3
        return importlib.import_module("hvdx.keras.elastic")
    if keras.backend.backend() == "tensorflow":
        return getattr(importlib.import_module("horovod.keras"), name)
    raise AttributeError(f"module 'hvdx.keras' has no attribute {name!r}")


def init(comm: Any = None, process_sets: Any = None) -> None:
    """Start Horovod for the backend of Keras; see :func:`hvdx.init`."""
    world.init(comm, process_sets, framework=frameworks.framework_of_kind("keras"))


def _tensor(value: Any) -> Any:
    """Let arrays, lists and numbers become tensors of the backend, as Horovod does."""
    if kind_of(type(value)) in ("keras", "tensorflow", "torch"):
        return value
    return keras.ops.convert_to_tensor(value)


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool = True,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: Any = Compression.none,
    process_set: Any = None,
) -> Any:
    """Reduce a variable, tensor, array, list or number over the ranks.

    Args:
        value: what to reduce; equal shapes on all ranks.
        name: of the operation; equal on all ranks.
        average: the mean, else the sum; where ``op`` is given it decides.
        prescale_factor: multiplies each rank's value first.
        postscale_factor: multiplies the result.
        op: see :func:`hvdx.allreduce`, as for the arguments after it.
        compression: likewise.
        process_set: likewise.

    Returns:
        A tensor of the backend.
    """
    return collectives.allreduce(
        _tensor(value),
        bool(average) if op is None else None,
        name,
        compression,
        op,
        prescale_factor,
        postscale_factor,
        process_set,
    )


def allgather(value: Any, name: str | None = None, process_set: Any = None) -> Any:
    """Concatenate all ranks' values along the first dimension; a tensor of the backend."""
    return collectives.allgather(_tensor(value), name, process_set)


def broadcast(value: Any, root_rank: int, name: str | None = None, process_set: Any = None) -> Any:
    """Return the root's value as a tensor of the backend."""
    return collectives.broadcast(_tensor(value), root_rank, name, process_set)


def reducescatter(
    value: Any, name: str | None = None, op: int = Average, process_set: Any = None
) -> Any:
    """Reduce, and return this rank's slice of the first dimension; a tensor of the backend."""
    return collectives.reducescatter(_tensor(value), name, op=op, process_set=process_set)


def broadcast_global_variables(root_rank: int) -> None:
    """Refuse: Keras 3 keeps no list of all variables.

    Raises:
        NotImplementedError: always; it names what to use.
    """
    raise NotImplementedError(
        "Keras 3 keeps no list of all variables; use hvd.broadcast_parameters(model, root_rank) "
        "and hvd.broadcast_parameters(optimizer, root_rank), or "
        "hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank)"
    )


def load_model(
    filepath: Any,
    custom_optimizers: Sequence[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
) -> keras.Model:
    """Load a model that Keras saved, and make its optimizer average gradients again.

    From ``.h5`` files too it gets the optimizer's state, which Keras 3 itself loses.

    Args:
        filepath: of a ``.keras`` or ``.h5`` file, saved with or without hvdx.
        custom_optimizers: classes that the file names.
        custom_objects: likewise, by name; for the optimizer also a function that makes one of
            its configuration, wrapped or not.
        compression: see :func:`DistributedOptimizer`.
        legacy_opts: accepted for Horovod's sake.
    """
    known = {kind.__name__: kind for kind in custom_optimizers or ()} | dict(custom_objects or {})
    kind = keras3_files.optimizer_class(filepath)
    if kind in known and not isinstance(known[kind], type):
        known[kind] = keras3_files.class_of(known[kind])
    model = keras.models.load_model(filepath, custom_objects=known)
    if model.optimizer is not None:
        keras3_files.restore_optimizer(filepath, model)
        if averaging(model.optimizer) is None:
            DistributedOptimizer(model.optimizer, compression=compression)
        keras3_files.leave_xla_out(model)
    return model
