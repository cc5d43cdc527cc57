"""What Horovod's TensorFlow core takes, and how all else goes in and comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

#: What Horovod reduces; all else is summed in float32 or refused.
REDUCIBLE = frozenset({tf.float32, tf.float64, tf.float16, tf.int32, tf.int64, tf.uint8, tf.int8})
SCATTERABLE = REDUCIBLE - {tf.uint8, tf.int8}  # what its reducescatter takes
MOVABLE = REDUCIBLE | {tf.uint16, tf.int16, tf.bool}
_SAME_WIDTH = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}


def reducible(tensor: Any, among: frozenset[Any] = REDUCIBLE) -> Any:
    """Return the tensor in a type that Horovod reduces; slices as they are.

    Raises:
        ValueError: it has no numbers that could be reduced.
    """
    if isinstance(tensor, tf.IndexedSlices):
        return tensor
    tensor = tf.convert_to_tensor(tensor)
    if tensor.dtype in among:
        return tensor
    if tensor.dtype.is_floating:
        return tf.cast(tensor, tf.float32)
    if tensor.dtype in (tf.uint8, tf.int8, tf.int16, tf.uint16):
        return tf.cast(tensor, tf.int32)
    raise ValueError(
        f"Horovod cannot reduce {tensor.dtype.name} tensors; convert this one of shape "
        f"{tuple(tensor.shape)} first, bool to uint8 for instance"
    )


def scatterable(tensor: Any) -> Any:
    """Return the tensor in a type that Horovod's reducescatter takes."""
    return reducible(tensor, SCATTERABLE)


def movable(tensor: Any) -> Any:
    """Return the tensor's bytes in a type of the same width that Horovod moves.

    Raises:
        ValueError: there is none.
    """
    if tensor.dtype in MOVABLE:
        return tensor
    if tensor.dtype.size not in _SAME_WIDTH:
        raise ValueError(f"Horovod cannot move {tensor.dtype.name} tensors")
    return tf.bitcast(tensor, _SAME_WIDTH[tensor.dtype.size])


def restored(result: Any, dtype: Any) -> Any:
    """Undo :func:`movable`."""
    return result if result.dtype == dtype else tf.bitcast(result, dtype)


def times(tensor: Any, factor: float) -> Any:
    """Multiply by a number that is rounded once, to the tensor's type; by 1 not at all."""
    if factor == 1.0:
        return tensor
    return tensor * tf.cast(tf.constant(factor, tf.float64), tensor.dtype)


def as_splits(splits: Any) -> Any:
    """Return the ``splits`` of an alltoall as Horovod wants them.

    Raises:
        tf.errors.InvalidArgumentError: they are no numbers of rows.
    """
    splits = tf.convert_to_tensor(splits)
    fault = None
    if not splits.dtype.is_integer:
        fault = f"{splits.dtype.name} numbers"
    elif tf.executing_eagerly() and splits.shape.num_elements() and int(tf.reduce_min(splits)) < 0:
        fault = "negative numbers"
    if fault:
        message = f"alltoall(splits={splits}) has {fault}; give the rows for each rank as integers"
        raise tf.errors.InvalidArgumentError(None, None, message)
    return tf.cast(splits, tf.int32)


def by_dtype(
    tensors: Sequence[Any],
    enter: Callable[[Any], Any],
    call: Callable[[list[Any], str | None], list[Any]],
    leave: Callable[[Any, Any], Any],
    name: str | None,
) -> list[Any]:
    """Make one grouped ``call`` for each dtype among ``tensors``, since Horovod takes but one.

    ``enter(tensor)`` and ``leave(result, dtype)`` convert. Slices make a group of their own.
    """
    sent = [enter(tensor) for tensor in tensors]
    kinds = [
        "sparse" if isinstance(each, tf.IndexedSlices) else str(each.dtype.name) for each in sent
    ]
    results: list[Any] = [None] * len(sent)
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        own = name and f"{name}.{kind}" if len(places) < len(kinds) else name
        for place, result in zip(places, call([sent[p] for p in places], own), strict=True):
            results[place] = leave(result, tensors[place].dtype)
    return results
