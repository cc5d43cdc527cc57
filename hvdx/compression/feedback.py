"""Wrappers that compose with any compressor: error feedback, warm-up, a floor in size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hvdx.comm import Work
from hvdx.compression.base import Compressor, Reduced, Spec, none
from hvdx.compression.state import Owed
from hvdx.ops import Ops


def each_phase(inner: Compressor, change: Callable[[Compressor], Compressor]) -> Compressor:
    """Apply a wrapper to a compressor and to all its phases."""
    changed = tuple((start, change(phase)) for start, phase in inner.phases)
    return change(inner)._replace(phases=changed)


class Feedback(NamedTuple):
    """State of :func:`error_feedback`."""

    residual: Owed  # what this rank has not sent yet, in the gradient's shape; float32
    inner: Any


def error_feedback(compressor: Compressor) -> Compressor:
    """Add to each gradient what earlier steps left unsent (Seide et al. 2014; EF-SGD, 2019).

    The residual is local: it subtracts what this rank has sent, not the mean, which would let
    ranks' residuals drift apart without bound. Where a gradient is not finite nothing was sent,
    and the residual stays.
    """
    return each_phase(compressor, _with_feedback)


def _with_feedback(inner: Compressor) -> Compressor:
    def init(ops: Ops, spec: Spec) -> Feedback:
        return Feedback(ops.zeros(spec.shape, "float32"), inner.init(ops, spec))

    def reduce(ops: Ops, grad: Any, state: Feedback) -> Work[Reduced]:
        dtype = ops.dtype(grad)
        owed = ops.cast(grad, "float32") + state.residual
        mean, own, kept = yield from inner.reduce(ops, owed, state.inner)
        left = owed - own
        residual = ops.where(ops.finite(left), left, state.residual)
        return Reduced(ops.cast(mean, dtype), ops.cast(own, dtype), Feedback(residual, kept))

    return inner._replace(init=init, reduce=reduce, elementwise=False, stateful=True)


def after(steps: int, inner: Compressor, first: Compressor = none) -> Compressor:
    """Use ``first`` for the first ``steps`` optimizer steps, then ``inner``.

    Gradients change quickly in the beginning, and what error feedback delays hurts most there.

    Args:
        steps: how many; equal on all ranks.
        inner: what comes after; its own phases are counted from then.
        first: a compressor without state.
    """

    def hold(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        reduced = yield from first.reduce(ops, grad, None)
        return reduced._replace(state=state)

    name = f"after({steps}, {inner.name})"
    early = inner._replace(reduce=hold, phases=())
    late = [(steps + start, phase) for start, phase in inner.phases]
    phases = ((0, early), (steps, inner._replace(phases=())), *late)
    return inner._replace(name=name, phases=phases)


def min_size(elements: int, compressor: Compressor) -> Compressor:
    """Send parameters of fewer than ``elements``, and all with one dimension or none, raw.

    They are few bytes and suffer most from being compressed.
    """
    return each_phase(compressor, functools.partial(_unless_small, elements))


def _unless_small(elements: int, inner: Compressor) -> Compressor:
    def small(shape: tuple[int, ...]) -> bool:
        return len(shape) < 2 or math.prod(shape) < elements

    def init(ops: Ops, spec: Spec) -> Any:
        return None if small(spec.shape) else inner.init(ops, spec)

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        if small(tuple(grad.shape)):
            return (yield from none.reduce(ops, grad, state))
        return (yield from inner.reduce(ops, grad, state))

    return inner._replace(init=init, reduce=reduce, elementwise=False)
