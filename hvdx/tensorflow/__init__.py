"""Drop-in face for TensorFlow: ``import hvdx.tensorflow as hvd`` for ``horovod.tensorflow``.

What hvdx does better is replaced, and takes Keras variables too; all else is Horovod's own.
Signatures are Horovod's. ``device_dense`` and ``device_sparse`` are accepted and not needed:
operations run where their tensors are.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvdx import collectives, frameworks, world
from hvdx.collectives import barrier
from hvdx.compression import as_compressor
from hvdx.errors import MismatchError, StallError
from hvdx.frameworks import kind_of
from hvdx.groups import Groups
from hvdx.metrics import Metrics
from hvdx.reduce_op import ReduceOp
from hvdx.replicas import allgather_object as _allgather_object
from hvdx.replicas import broadcast_object as _broadcast_object
from hvdx.replicas import broadcast_parameters, parameter_hash
from hvdx.reporting import TrainingReport
from hvdx.watchdog import patience
from hvdx.world import shutdown

_horovod = frameworks.adapter("tensorflow").horovod

from hvdx.integrations.process_sets import ProcessSet, everyone  # noqa: E402
from hvdx.integrations.tensorflow_operations import as_is, name_scopes  # noqa: E402
from hvdx.integrations.tensorflow_tape import (  # noqa: E402
    TapeOptions,
    distributed,
    variable_of,
)
from hvdx.integrations.tensorflow_variables import broadcast_in_place  # noqa: E402
from hvdx.tensorflow import data, elastic  # noqa: E402
from hvdx.tensorflow.compression import Compression  # noqa: E402

init = functools.partial(world.init, framework="tensorflow")
add_process_set = functools.partial(world.add_process_set, framework="tensorflow")
remove_process_set = functools.partial(world.remove_process_set, framework="tensorflow")
global_process_set = everyone("tensorflow")

__all__ = [
    "Compression",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "Groups",
    "Metrics",
    "MismatchError",
    "PartialDistributedGradientTape",
    "ProcessSet",
    "StallError",
    "TrainingReport",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_parameters",
    "broadcast_variables",
    "data",
    "elastic",
    "global_process_set",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "parameter_hash",
    "patience",
    "reducescatter",
    "remove_process_set",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    if name == "SyncBatchNormalization":  # loads Keras
        return importlib.import_module("hvdx.tensorflow.sync_batch_norm").SyncBatchNormalization
    if name == "BroadcastGlobalVariablesHook":
        raise AttributeError(
            "TensorFlow 2 has no hooks for sessions any more, and hence hvdx.tensorflow no "
            "BroadcastGlobalVariablesHook: call broadcast_variables(variables, root_rank)"
        )
    return getattr(_horovod, name)


def _tensor(value: Any) -> Any:
    """Let arrays and numbers become tensors, as Horovod does."""
    return value if kind_of(type(value)) in ("keras", "tensorflow") else tf.convert_to_tensor(value)


def _tensors(values: Sequence[Any]) -> list[Any]:
    """Likewise for several, which may be Keras' variables among TensorFlow's."""
    return [variable_of(_tensor(value)) for value in values]


@as_is
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
    """Reduce over the ranks, see :func:`hvdx.allreduce`.

    ``tf.IndexedSlices`` stay sparse: all ranks' rows are gathered, their numbers exactly.
    """
    tensor = _tensor(tensor)
    with name_scopes(kept=not ignore_name_scope):
        return collectives.allreduce(
            tensor,
            average,
            name,
            compression,
            op,
            prescale_factor,
            postscale_factor,
            process_set,
        )


@as_is
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
    with name_scopes(kept=not ignore_name_scope):
        return collectives.grouped_allreduce(
            _tensors(tensors),
            average,
            name,
            compression,
            op,
            prescale_factor,
            postscale_factor,
            process_set,
        )


@as_is
def allgather(
    tensor: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None
) -> Any:
    """Concatenate all ranks' tensors, see :func:`hvdx.allgather`."""
    with name_scopes(kept=not ignore_name_scope):
        return collectives.allgather(_tensor(tensor), name, process_set)


@as_is
def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> list[Any]:
    """Gather several tensors as one operation, see :func:`hvdx.grouped_allgather`."""
    if not tensors:
        return list(tensors)
    with name_scopes(kept=not ignore_name_scope):
        return collectives.grouped_allgather(_tensors(tensors), name, process_set)


@as_is
def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """Return the root's tensor, see :func:`hvdx.broadcast`."""
    with name_scopes(kept=not ignore_name_scope):
        return collectives.broadcast(_tensor(tensor), root_rank, name, process_set)


@as_is
def broadcast_(
    variables: Sequence[Any], root_rank: int, name: str | None = None, process_set: Any = None
) -> list[Any]:
    """Overwrite variables of equal dtypes and shapes with the root's; return their new values.

    Without a copy where Horovod moves the type; bool, bfloat16 and others with one.
    """
    world.core("tensorflow")  # or say that init() is missing
    variables = [variable_of(variable) for variable in variables]
    return broadcast_in_place(variables, root_rank, name, process_set)


@as_is
def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """Exchange slices of the first dimension, see :func:`hvdx.alltoall`."""
    with name_scopes(kept=not ignore_name_scope):
        return collectives.alltoall(_tensor(tensor), splits, name, process_set)


@as_is
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
    with name_scopes(kept=not ignore_name_scope):
        return collectives.reducescatter(
            _tensor(tensor), name, compression, op, process_set, prescale_factor, postscale_factor
        )


@as_is
def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = Compression.none,
    op: int = ReduceOp.Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Any]:
    """Reduce several tensors as one operation and keep this rank's slices of them."""
    if not tensors:
        return list(tensors)
    with name_scopes(kept=True):
        return collectives.grouped_reducescatter(
            _tensors(tensors), None, compression, op, process_set, prescale_factor, postscale_factor
        )


def _in_tensorflow_1() -> bool:
    """Tell whether operations go into a graph that a session will run."""
    with tf.init_scope():
        return not tf.executing_eagerly()


@as_is
def broadcast_variables(
    variables: Sequence[Any], root_rank: int, process_set: Any = None, inplace: bool = False
) -> Any:
    """Overwrite TensorFlow or Keras variables, mixed as they come, with the root's; any dtype.

    Eagerly and in a ``tf.function``, whose every call then does so. The ranks first compare
    names, shapes and dtypes. In graphs of TensorFlow 1 this is Horovod's, which returns an
    operation to be run.

    Args:
        variables: ``tf.Variable`` or ``keras.Variable``.
        root_rank: global rank to copy from.
        process_set: the ranks that take part; all by default.
        inplace: accepted for Horovod's sake: variables are always written to.
    """
    values = [variable_of(variable) for variable in variables]
    if _in_tensorflow_1():
        chosen = process_set or _horovod.global_process_set
        return _horovod.broadcast_variables(values, root_rank, chosen, inplace)
    if values:
        # By place: names of variables need not be unique.
        named = [(f"{place} {v.name}", v) for place, v in enumerate(values)]
        broadcast_parameters(named, root_rank, process_set)
    return None


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: Any = None,
) -> Any:
    """Return the root's picklable ``obj`` on every rank; ``session`` is TensorFlow 1's."""
    if _in_tensorflow_1():
        chosen = process_set or _horovod.global_process_set
        return _horovod.broadcast_object(obj, root_rank, session, name, chosen)
    return _broadcast_object(obj, root_rank, name, process_set)


def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = None
) -> Callable[[Any], Any]:
    """Return :func:`broadcast_object` with all arguments but the object."""
    return functools.partial(
        broadcast_object, root_rank=root_rank, session=session, name=name, process_set=process_set
    )


def allgather_object(
    obj: Any, session: Any = None, name: str | None = None, process_set: Any = None
) -> list[Any]:
    """Return every rank's picklable ``obj``, in rank order; ``session`` is TensorFlow 1's."""
    if _in_tensorflow_1():
        chosen = process_set or _horovod.global_process_set
        objects: list[Any] = _horovod.allgather_object(obj, session, name, chosen)
        return objects
    return _allgather_object(obj, name, process_set)


@as_is
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
    """Return a tape that continues ``gradtape`` and whose ``gradient`` averages over the ranks.

    The tape is an instance of the given one's class, which it leaves as it was: its gradients
    stay this rank's own. Gradients travel in flat buckets (``HVDX_BUCKET_MB``), after the ranks
    have compared, once for each list of sources, what they have. Where a rank has no gradient
    it sends zeros, where none has one it stays None.

    Args:
        gradtape: any tape; before, while or after it records.
        device_dense: accepted for Horovod's sake and not needed.
        device_sparse: likewise.
        compression: a compressor of ``hvd.Compression``, or a Horovod ``Compressor`` class.
            What it keeps from step to step belongs to the list of sources, which must be
            variables, and to the options: tapes may come and go. ``compression_state(sources)``,
            ``portable_compression_state(sources)`` and ``load_compression_state(state, sources)``
            of any such tape save and load it. A tape knows of no loss scale:
            ``hvd.DistributedOptimizer`` does.
        sparse_as_dense: make ``tf.IndexedSlices`` dense first. Else all ranks' rows are gathered,
            their values in 2 bytes or 1 a number under a ``compression``.
        op: how gradients combine. Adasum needs Horovod with MPI.
        gradient_predivide_factor: with Average, divides before the sum and multiplies after.
        num_groups: Horovod's older spelling of ``groups``.
        groups: accepted for Horovod's sake, a number or lists of variables; buckets take its place.
        process_set: the ranks to average over; all by default. Gradients of a rank that is not
            among them stay its own.
        scale_local_gradients: divide gradients of local sources by the number of ranks.

    Raises:
        TypeError: ``gradtape`` averages already, or is no tape.
        ValueError: options do not go together; the message names them.
        MismatchError: from ``gradient``, on every rank, where sources or options differ.

    Example:
        >>> with tf.GradientTape() as tape:
        ...     loss = model_loss(model(x), y)
        >>> tape = hvd.DistributedGradientTape(tape)
        >>> grads = tape.gradient(loss, model.trainable_variables)
    """
    if num_groups:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if groups is not None and not (isinstance(groups, list) or groups > 0):
        raise ValueError(f"groups={groups!r}: give a number above 0, or a list of variable lists")
    options = TapeOptions.of(
        compression, op, gradient_predivide_factor, sparse_as_dense, process_set
    )
    return distributed(gradtape, options, scale_local_gradients)


@as_is
def PartialDistributedGradientTape(
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
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> tf.GradientTape:
    """Return a :func:`DistributedGradientTape` with the weights of ``local_layers`` local.

    Args:
        gradtape: see :func:`DistributedGradientTape`.
        device_dense: likewise.
        device_sparse: likewise.
        compression: likewise.
        sparse_as_dense: likewise.
        op: likewise.
        gradient_predivide_factor: likewise.
        num_groups: likewise.
        groups: likewise.
        process_set: likewise.
        local_layers: a Keras layer or several, built, whose gradients stay this rank's own.
        scale_local_gradients: see :func:`DistributedGradientTape`.

    Raises:
        ValueError: ``local_layers`` holds what is no layer.
    """
    import keras

    layers = [local_layers] if isinstance(local_layers, keras.Layer) else list(local_layers or ())
    strange = [layer for layer in layers if not isinstance(layer, keras.Layer)]
    if strange:
        raise ValueError(f"local_layers: {strange[0]!r} is no keras.layers.Layer")
    tape: Any = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    for layer in layers:
        for variable in layer.trainable_weights:
            tape.register_local_source(variable)
    return tape


def DistributedOptimizer(
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: int = ReduceOp.Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
) -> Any:
    """Make an optimizer average gradients over the ranks.

    A Keras 3 optimizer becomes :func:`hvdx.keras.DistributedOptimizer`. For a
    ``tf.compat.v1.train.Optimizer`` this is Horovod's own wrapper, with all its arguments.

    Raises:
        TypeError: it is neither.
        ValueError: an option has no meaning for it.
    """
    legacy = isinstance(optimizer, tf.compat.v1.train.Optimizer)
    if not legacy and kind_of(type(optimizer)) != "keras":
        raise TypeError(
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__} is no optimizer that "
            "hvdx knows; give a Keras 3 optimizer or a tf.compat.v1.train.Optimizer"
        )
    if legacy and op == ReduceOp.Adasum:
        raise ValueError("op=hvd.Adasum: Horovod's delta optimizer needs TensorFlow 1")
    options: dict[str, Any] = {
        "name": name,
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "sparse_as_dense": sparse_as_dense,
        "backward_passes_per_step": backward_passes_per_step,
        "op": op,
        "gradient_predivide_factor": gradient_predivide_factor,
        "average_aggregated_gradients": average_aggregated_gradients,
        "num_groups": num_groups,
        "groups": groups,
        "scale_local_gradients": scale_local_gradients,
    }
    if legacy:
        return _horovod.DistributedOptimizer(
            optimizer,
            use_locking=use_locking,
            compression=_for_horovod(compression),
            process_set=process_set or _horovod.global_process_set,
            **{**options, "op": int(op)},
        )
    from hvdx.integrations import keras3

    return keras3.DistributedOptimizer(
        optimizer, compression=compression, process_set=process_set, **options
    )


def _for_horovod(compression: Any) -> Any:
    known = {"none": _horovod.Compression.none, "fp16": _horovod.Compression.fp16}
    compressor = as_compressor(compression)
    if compressor.name in known:
        return known[compressor.name]
    if isinstance(compression, type):  # of the user's, as Horovod wants it
        return compression
    raise ValueError(
        f"compression={compressor}: optimizers of tf.compat.v1 know none, fp16 and Horovod's "
        "Compressor classes; use a Keras 3 optimizer"
    )
