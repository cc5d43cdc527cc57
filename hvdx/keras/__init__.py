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
from hvdx.collectives import (
    alltoall,
    barrier,
    grouped_allgather,
    grouped_allreduce,
    join,
)
from hvdx.compression import Compression
from hvdx.errors import MismatchError
from hvdx.frameworks import kind_of
from hvdx.integrations import keras_callbacks as callbacks
from hvdx.integrations.keras3 import DistributedOptimizer
from hvdx.integrations.keras_data import DistributedDataset
from hvdx.reduce_op import Adasum, Average, Max, Min, Product, Sum
from hvdx.replicas import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
    parameter_hash,
)
from hvdx.reporting import TrainingReport
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
    "Compression",
    "DistributedDataset",
    "DistributedOptimizer",
    "Max",
    "Min",
    "MismatchError",
    "Product",
    "Sum",
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
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "parameter_hash",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]

#: Horovod's own would train without averaging anything, or fail, on Keras 3.
_UNFIT = {
    "PartialDistributedOptimizer": "Horovod's averages nothing on Keras 3",
}


def __getattr__(name: str) -> Any:
    if name in ("ProcessSet", "global_process_set"):
        return getattr(importlib.import_module("hvdx"), name)
    if name == "elastic":  # and never Horovod's, which fails on Keras 3
        return importlib.import_module("hvdx.keras.elastic")
    if name in _UNFIT:
        raise AttributeError(f"hvdx.keras has no {name} yet, and {_UNFIT[name]}")
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
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: Any = Compression.none,
    process_set: Any = None,
) -> Any:
    """Reduce a variable, tensor, array or number over the ranks; a tensor of the backend."""
    return collectives.allreduce(
        _tensor(value),
        average,
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

    Args:
        filepath: of a ``.keras`` or ``.h5`` file, saved with or without hvdx.
        custom_optimizers: classes that the file names.
        custom_objects: likewise, by name.
        compression: see :func:`DistributedOptimizer`.
        legacy_opts: accepted for Horovod's sake.
    """
    custom = {kind.__name__: kind for kind in custom_optimizers or ()}
    model = keras.models.load_model(filepath, custom_objects={**custom, **(custom_objects or {})})
    if model.optimizer is not None:
        DistributedOptimizer(model.optimizer, compression=compression)
    return model
