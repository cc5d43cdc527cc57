"""Drop-in face for TensorFlow: ``import hvdx.tensorflow as hvd`` for ``horovod.tensorflow``.

What hvdx does better is replaced, and takes Keras variables too; all else is Horovod's own.
Signatures are Horovod's. ``device_dense`` and ``device_sparse`` are accepted and not needed:
operations run where their tensors are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdx import collectives, frameworks, world
from hvdx.collectives import barrier
from hvdx.compression import Compression, as_compressor
from hvdx.errors import MismatchError
from hvdx.frameworks import kind_of
from hvdx.optimizer import DistributedOptimizer
from hvdx.reduce_op import ReduceOp
from hvdx.replicas import allgather_object as _allgather_object
from hvdx.replicas import broadcast_object as _broadcast_object
from hvdx.replicas import broadcast_parameters, parameter_hash
from hvdx.reporting import TrainingReport
from hvdx.world import shutdown

_horovod = frameworks.adapter("tensorflow").horovod

from hvdx.tensorflow import data, elastic  # noqa: E402

init = functools.partial(world.init, framework="tensorflow")

__all__ = [
    "Compression",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "MismatchError",
    "TrainingReport",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_parameters",
    "broadcast_variables",
    "data",
    "elastic",
    "grouped_allgather",
    "grouped_allreduce",
    "init",
    "parameter_hash",
    "reducescatter",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)


def _tensor(value: Any) -> Any:
    """Let arrays and numbers become tensors, as Horovod does."""
    return value if kind_of(type(value)) in ("keras", "tensorflow") else tf.convert_to_tensor(value)


def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = False,
) -> Any:
    """Reduce over the ranks, see :func:`hvdx.allreduce`; ``tf.IndexedSlices`` stay sparse."""
    return collectives.allreduce(
        _tensor(tensor),
        average,
        name,
        compression,
        op,
        prescale_factor,
        postscale_factor,
        process_set,
    )


def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[Any]:
    """Reduce several tensors as one operation, see :func:`hvdx.grouped_allreduce`."""
    if not tensors:
        return list(tensors)
    return collectives.grouped_allreduce(
        [_tensor(tensor) for tensor in tensors],
        average,
        name,
        compression,
        op,
        prescale_factor,
        postscale_factor,
        process_set,
    )


def allgather(
    tensor: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None
) -> Any:
    """Concatenate all ranks' tensors, see :func:`hvdx.allgather`."""
    return collectives.allgather(_tensor(tensor), name, process_set)


def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> list[Any]:
    """Gather several tensors as one operation, see :func:`hvdx.grouped_allgather`."""
    if not tensors:
        return list(tensors)
    return collectives.grouped_allgather([_tensor(tensor) for tensor in tensors], name, process_set)


def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """Return the root's tensor, see :func:`hvdx.broadcast`."""
    return collectives.broadcast(_tensor(tensor), root_rank, name, process_set)


def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """Exchange slices of the first dimension, see :func:`hvdx.alltoall`."""
    return collectives.alltoall(_tensor(tensor), splits, name, process_set)


def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = Compression.none,
    op: int = ReduceOp.Average,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Reduce and keep this rank's slice, see :func:`hvdx.reducescatter`."""
    return collectives.reducescatter(
        _tensor(tensor), name, compression, op, process_set, prescale_factor, postscale_factor
    )


def broadcast_variables(
    variables: Sequence[Any], root_rank: int, process_set: Any = None, inplace: bool = False
) -> None:
    """Overwrite TensorFlow or Keras variables with the root's, any dtype; eagerly.

    Args:
        variables: ``tf.Variable`` or ``keras.Variable``.
        root_rank: global rank to copy from.
        process_set: the ranks that take part; all by default.
        inplace: accepted for Horovod's sake; always so.
    """
    # By place: names of variables need not be unique.
    broadcast_parameters(
        [(f"{place} {v.name}", v) for place, v in enumerate(variables)], root_rank, process_set
    )


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    session: None = None,
    name: str | None = None,
    process_set: Any = None,
) -> Any:
    """Return the root's picklable ``obj`` on every rank; TensorFlow 1 sessions are not served."""
    return _broadcast_object(obj, root_rank, name, process_set)


def allgather_object(
    obj: Any, session: None = None, name: str | None = None, process_set: Any = None
) -> list[Any]:
    """Return every rank's picklable ``obj``, in rank order."""
    return _allgather_object(obj, name, process_set)


def DistributedGradientTape(
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: int = ReduceOp.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
) -> tf.GradientTape:
    """Horovod's tape, whose ``gradient`` averages, taking Keras variables as sources too.

    Raises:
        ValueError: ``compression`` is none that Horovod knows.
    """
    tape = _horovod.DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        _for_horovod(compression),
        sparse_as_dense,
        int(op),
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set or _horovod.global_process_set,
        scale_local_gradients,
    )
    # On the instance: a subclass of Horovod's class calls itself for ever.
    gradient, register = tape.gradient, tape.register_local_source

    def gradient_of_any(
        target: Any, sources: Any, output_gradients: Any = None, use_generic_names: bool = False
    ) -> Any:
        whole = sources if isinstance(sources, (list, tuple)) else [sources]
        results = gradient(target, [*map(_value, whole)], output_gradients, use_generic_names)
        return results if whole is sources else results[0]

    tape.gradient = gradient_of_any
    tape.register_local_source = lambda source: register(_value(source))
    return tape


def _value(variable: Any) -> Any:
    return variable.value if kind_of(type(variable)) == "keras" else variable


def _for_horovod(compression: Any) -> Any:
    compressor = as_compressor(compression)
    known = {"none": _horovod.Compression.none, "fp16": _horovod.Compression.fp16}
    if hasattr(compression, "compress"):
        return compression
    if compressor.name not in known:
        raise ValueError(
            f"DistributedGradientTape(compression={compressor}): the tape knows none and fp16; "
            "with Keras' optimizers use DistributedOptimizer"
        )
    return known[compressor.name]
