"""Running statistics of Keras' ``BatchNormalization``, of batches that come in pieces.

What pieces send each other, or leave for later, is count, sum and sum of squares by channel: in
float64, since E[x^2] - E[x]^2 cancels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from hvdx.pipeline.abreast import Abreast

Add: TypeAlias = Callable[[int, int, Any], Any]
"""Adds up sums of several batches: those of a layer's call, both by number."""


def sums(layer: Any, inputs: Any, mask: Any, mean: Any, variance: Any) -> Any:
    """Return count, sum and sum of squares by channel, (3, channels) in float64, of a batch.

    Args:
        layer: a ``BatchNormalization``.
        inputs: its.
        mask: of what counts in them, without the last dimension; None: all.
        mean: of what counts, by channel; anything where nothing does.
        variance: likewise.
    """
    mean, variance = (ops.cast(ops.reshape(x, (-1,)), "float64") for x in (mean, variance))
    count = _count(layer, inputs, mask) + ops.zeros_like(mean)
    present = count > 0
    mean, variance = (ops.where(present, x, 0.0) for x in (mean, variance))
    return ops.stack([count, count * mean, count * (variance + ops.square(mean))])


def moments(total: Any, dtype: Any) -> tuple[Any, Any]:
    """Return mean and variance by channel from added :func:`sums`."""
    count = ops.maximum(total[0], 1.0)
    mean = total[1] / count
    variance = ops.maximum(total[2] / count - ops.square(mean), 0.0)
    return ops.cast(mean, dtype), ops.cast(variance, dtype)


def _count(layer: Any, inputs: Any, mask: Any) -> Any:
    """Return how many elements of each channel count here: a number, or one per channel."""
    shape = ops.shape(inputs)
    if mask is not None:
        weights = ops.cast(ops.expand_dims(mask, -1), "float64")
        return ops.sum(ops.broadcast_to(weights, shape), layer._reduction_axes)
    count = ops.convert_to_tensor(1.0, "float64")
    for axis in layer._reduction_axes:
        count = count * ops.cast(shape[axis], "float64")
    return count


def deferrable(layer: Any) -> list[Any]:
    """Return the ``BatchNormalization`` layers in one whose statistics may move later.

    Those with ``renorm`` normalize training by their running statistics: they cannot wait.
    """
    inner = layer._flatten_layers() if isinstance(layer, keras.Layer) else ()
    kind = keras.layers.BatchNormalization
    return [each for each in inner if isinstance(each, kind) and not getattr(each, "renorm", 0)]


@contextlib.contextmanager
def gathering(layers: Sequence[Any], add: Add | None = None) -> Iterator[list[list[Any]]]:
    """Let ``layers`` leave their running statistics alone; yield their sums, by layer and call.

    Args:
        layers: that are called within.
        add: from :func:`over_replicas`; None: each batch is normalized by itself.
    """
    found: list[list[Any]] = [[] for _ in layers]
    moving = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    for number, (layer, into) in enumerate(zip(layers, found, strict=True)):
        own = None if add is None else functools.partial(add, number)
        vars(layer)["_moments"] = functools.partial(_noted, layer, layer._moments, own, into)
    for variable in moving:
        vars(variable)["assign"] = lambda value: value
    try:
        yield found
    finally:
        for layer in layers:
            del vars(layer)["_moments"]
        for variable in moving:
            del vars(variable)["assign"]


def _noted(
    layer: Any,
    compute: Callable[[Any, Any], Any],
    add: Callable[[int, Any], Any] | None,
    into: list[Any],
    inputs: Any,
    mask: Any,
) -> Any:
    mean, variance = compute(inputs, mask)
    own = sums(layer, inputs, mask, mean, variance)
    into.append(own)
    return (mean, variance) if add is None else moments(add(len(into) - 1, own), inputs.dtype)


def over_replicas(
    abreast: Abreast | None,
    smooth: Callable[[Any, Callable[[Any], Any], Callable[[Any], Any]], Any],
    unit: int,
    micro_batch: int,
) -> Add | None:
    """Return what adds up :func:`sums` over the replicas that normalize a micro-batch together.

    Args:
        abreast: these; None: there are none.
        smooth: a backend's: applies a function to a tensor, and another to the gradient.
        unit: that has the layers.
        micro_batch: of this replica.
    """
    if abreast is None:
        return None

    def add(layer: int, call: int, own: Any) -> Any:
        def total(what: str, tensor: Any) -> Any:
            name = f"{what} of unit {unit}, norm {layer}, call {call}"
            return abreast.summed(tensor, name, micro_batch)

        return smooth(own, functools.partial(total, "sums"), functools.partial(total, "gradients"))

    return add


def commit(layer: Any, total: Any) -> None:
    """Move a layer's running statistics as one call on the whole batch does.

    Args:
        layer: a ``BatchNormalization``.
        total: :func:`sums` of all pieces of the batch, added up.
    """
    moving = layer.moving_mean, layer.moving_variance
    for variable, new in zip(moving, moments(total, layer.moving_mean.dtype), strict=True):
        variable.assign(variable * layer.momentum + new * (1.0 - layer.momentum))
