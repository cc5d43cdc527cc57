"""Variables that take the root's values: as bytes, in graphs, or where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops
from tensorflow.python.ops import resource_variable_ops

from hvdx import world
from hvdx.buckets import runs
from hvdx.frameworks import Adapter
from hvdx.integrations.tensorflow_operations import refuse_xla
from hvdx.integrations.tensorflow_types import MOVABLE, movable, restored

_BROADCAST_BYTES = 64 << 20  # parameters travel in pieces of this size


def broadcast_bytes(
    adapter: Adapter, variables: Sequence[Any], root_rank: int, name: str, process_set: Any
) -> None:
    """Send the root's values as bytes, in a few large pieces, and assign them."""
    for index, piece in enumerate(_pieces(variables)):
        arrays = [np.asarray(variable.numpy(), order="C") for variable in piece]
        flat = np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays])
        result = adapter.broadcast(
            tf.constant(flat),
            root_rank=root_rank,
            name=f"{name}.{index}",
            process_set=process_set,
        ).numpy()
        ends = np.cumsum([array.nbytes for array in arrays])
        for variable, array, end in zip(piece, arrays, ends, strict=True):
            part = result[end - array.nbytes : end].copy().view(array.dtype)
            variable.assign(part.reshape(array.shape))


def broadcast_in_graph(
    adapter: Adapter, variables: Sequence[Any], root_rank: int, name: str, process_set: Any
) -> None:
    """Have the graph that is being traced do it, each time that it runs."""
    for dtype in dict.fromkeys(variable.dtype for variable in variables):
        alike = [variable for variable in variables if variable.dtype == dtype]
        for index, piece in enumerate(_pieces(alike)):
            flat = adapter.broadcast(
                tf.concat([tf.reshape(variable, [-1]) for variable in piece], 0),
                root_rank=root_rank,
                name=f"{name}.{dtype.name}.{index}",
                process_set=process_set,
            )
            parts = tf.split(flat, [int(np.prod(variable.shape)) for variable in piece])
            for variable, part in zip(piece, parts, strict=True):
                variable.assign(tf.reshape(part, variable.shape))


def broadcast_in_place(
    variables: Sequence[Any], root_rank: int, name: str | None, process_set: Any
) -> list[Any]:
    """Overwrite ``tf.Variable``s with the root's as one operation; see ``hvd.broadcast_``."""
    everyone = world.own_set("tensorflow", process_set) or mpi_ops.global_process_set
    if not tf.executing_eagerly():
        refuse_xla()
    if not all(resource_variable_ops.is_resource_variable(variable) for variable in variables):
        return mpi_ops.broadcast_(variables, root_rank, name, everyone)
    easy = [variable for variable in variables if variable.dtype in MOVABLE]
    done = []
    if easy:
        operation = mpi_ops.MPI_LIB.horovod_broadcast_inplace_resource(
            [variable.handle for variable in easy],
            # By place: names of variables need not be unique.
            variable_names=[f"{place}.{variable.name}" for place, variable in enumerate(easy)],
            name=name and name.replace("/", "."),
            root_rank=root_rank,
            process_set_id=everyone.process_set_id,
        )
        done = [] if operation is None else [operation]
    for place, variable in enumerate(variables):
        if variable.dtype not in MOVABLE:
            value = mpi_ops.broadcast(
                movable(tf.convert_to_tensor(variable)),
                root_rank,
                name=name and f"{name}.{place}",
                process_set=everyone,
            )
            variable.assign(restored(value, variable.dtype))
    with tf.control_dependencies(done):
        return [variable.read_value() for variable in variables]


def _pieces(variables: Iterable[Any]) -> Iterable[list[Any]]:
    return runs(
        variables,
        lambda variable: int(np.prod(variable.shape)) * variable.dtype.size,
        _BROADCAST_BYTES,
    )
