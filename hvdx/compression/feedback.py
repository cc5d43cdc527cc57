"""Wrappers that compose with any compressor: error feedback, warm-up, a floor in size."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hvdx.comm import Work
from hvdx.compression.base import Compressor, Reduced, Spec, none
from hvdx.ops import Ops


class Feedback(NamedTuple):
    """State of :func:`error_feedback`."""

    residual: Any  # what this rank has not sent yet, in the gradient's shape; float32
    inner: Any


def error_feedback(inner: Compressor) -> Compressor:
    """Add to each gradient what earlier steps left unsent (Seide et al. 2014; EF-SGD, 2019).

    The residual is local: it subtracts what this rank has sent, not the mean, which would let
    ranks' residuals drift apart without bound. Where a gradient is not finite nothing was sent,
    and the residual stays.
    """

    def init(ops: Ops, spec: Spec) -> Feedback:
        return Feedback(ops.zeros(spec.shape, "float32"), inner.init(ops, spec))

    def reduce(ops: Ops, grad: Any, state: Feedback) -> Work[Reduced]:
        dtype = ops.dtype(grad)
        owed = ops.cast(grad, "float32") + state.residual
        mean, own, kept = yield from inner.reduce(ops, owed, state.inner)
        left = owed - own
        residual = ops.where(ops.finite(left), left, state.residual)
        return Reduced(ops.cast(mean, dtype), ops.cast(own, dtype), Feedback(residual, kept))

    return inner._replace(init=init, reduce=reduce)


def min_size(elements: int, inner: Compressor) -> Compressor:
    """Send parameters of fewer than ``elements``, and all with one dimension or none, raw.

    They are few bytes and suffer most from being compressed.
    """

    def small(shape: tuple[int, ...]) -> bool:
        return len(shape) < 2 or math.prod(shape) < elements

    def init(ops: Ops, spec: Spec) -> Any:
        return None if small(spec.shape) else inner.init(ops, spec)

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        if small(tuple(grad.shape)):
            return (yield from none.reduce(ops, grad, state))
        return (yield from inner.reduce(ops, grad, state))

    return inner._replace(init=init, reduce=reduce, flat=False)
