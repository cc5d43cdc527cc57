"""Wrappers that compose with any compressor: error feedback, warm-up, momentum, a floor in size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hvdx.comm import Work
from hvdx.compression.base import (
    BEFORE,
    CompressionError,
    Compressor,
    Reduced,
    Spec,
    none,
    remembered,
)
from hvdx.compression.state import Owed
from hvdx.ops import Ops


def each_phase(inner: Compressor, change: Callable[[Compressor], Compressor]) -> Compressor:
    """Apply a wrapper to a compressor, to all its phases, and to all that it may choose."""
    changed = tuple((start, change(phase)) for start, phase in inner.phases)
    wrap = functools.partial(each_phase, change=change)
    return _chosen_too(inner, change(inner)._replace(phases=changed), wrap)


def _chosen_too(
    inner: Compressor, wrapped: Compressor, wrap: Callable[[Compressor], Compressor]
) -> Compressor:
    """Have ``wrapped`` choose what ``inner`` chooses, if it does, but wrapped as well."""
    policy, prepare = inner.policy, inner.prepare
    if policy is not None:
        wrapped = wrapped._replace(policy=lambda spec: wrap(policy(spec)))
    if prepare is not None:
        wrapped = wrapped._replace(prepare=lambda *job: wrap(prepare(*job)))
    return wrapped


class Feedback(NamedTuple):
    """State of :func:`error_feedback`."""

    residual: Owed  # what this rank has not sent yet, in the gradient's shape; float32
    inner: Any


@remembered
def error_feedback(compressor: Compressor) -> Compressor:
    """Add to each gradient what earlier steps left unsent (Seide et al. 2014; EF-SGD, 2019).

    The residual is local: it subtracts what this rank has sent, not the mean, which would let
    ranks' residuals drift apart without bound. Where a gradient is not finite nothing was sent,
    and the residual stays.

    Raises:
        CompressionError: ``compressor`` is hierarchical.
    """
    if compressor.sharers != 1:
        raise CompressionError(
            f"error_feedback({compressor}): hosts lose what is compressed, not ranks; write "
            "hierarchical(error_feedback(...))"
        )
    return each_phase(compressor, _with_feedback)


def _with_feedback(inner: Compressor) -> Compressor:
    def init(ops: Ops, spec: Spec) -> Feedback:
        return Feedback(ops.zeros(spec.shape, "float32"), inner.init(ops, spec))

    def reduce(ops: Ops, grad: Any, state: Feedback) -> Work[Reduced]:
        dtype = ops.dtype(grad)
        owed = ops.cast(grad, "float32") + state.residual
        mean, own, kept = yield from inner.reduce(ops, owed, state.inner)
        if own is None:
            raise CompressionError(
                f"error_feedback(Compression.{inner.name}): it has error feedback already"
            )
        own = own() if callable(own) else own
        residual = ops.finite_or(owed - own, state.residual)
        return Reduced(ops.cast(mean, dtype), None, Feedback(residual, kept))

    return inner._replace(init=init, reduce=reduce, elementwise=False, stateful=True)


@remembered
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

    if not isinstance(steps, int) or steps < 0:
        raise CompressionError(f"after({steps!r}, {inner}): steps must be an integer from 0")
    if first.stateful or first.phases or first.policy or first.prepare:
        raise CompressionError(
            f"after({steps}, {inner}, first={first}): what comes first must keep no state"
        )
    name = f"after({steps}, {inner.name})"
    early = inner._replace(reduce=hold, phases=(), clock=None, updates=first.updates)
    wrap = functools.partial(after, steps, first=first)
    if inner.clock is not None:
        phases = ((BEFORE, early), *inner.phases)
        return inner._replace(name=name, phases=phases, clock=inner.clock.later(steps))
    late = [(steps + start, phase) for start, phase in inner.phases]
    phases = ((0, early), (steps, inner._replace(phases=())), *late)
    return _chosen_too(inner, inner._replace(name=name, phases=phases), wrap)


@remembered
def min_size(elements: int, compressor: Compressor, small: Compressor = none) -> Compressor:
    """Send parameters of fewer than ``elements``, and all with one dimension or none, raw.

    They are few bytes and suffer most from being compressed.

    Args:
        elements: the least that is compressed.
        compressor: for those.
        small: for the others; without phases.
    """
    if not isinstance(elements, int) or elements < 0:
        raise CompressionError(
            f"{compressor} for parameters of min_elements={elements!r}: it must be an integer "
            "from 0"
        )
    return each_phase(compressor, functools.partial(_unless_small, elements, small))


def _unless_small(elements: int, small: Compressor, inner: Compressor) -> Compressor:
    def chosen(shape: tuple[int, ...]) -> Compressor:
        return small if len(shape) < 2 or math.prod(shape) < elements else inner

    def init(ops: Ops, spec: Spec) -> Any:
        return chosen(spec.shape).init(ops, spec)

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        return (yield from chosen(tuple(grad.shape)).reduce(ops, grad, state))

    return inner._replace(init=init, reduce=reduce, elementwise=False)


def only_floats(compressor: Compressor) -> Compressor:
    """Send gradients of other types, as complex ones, raw: nothing is known of their rounding."""
    return each_phase(compressor, _unless_other)


def _unless_other(inner: Compressor) -> Compressor:
    def init(ops: Ops, spec: Spec) -> Any:
        return inner.init(ops, spec) if spec.dtype in _FLOATS else None

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        chosen = inner if ops.dtype(grad) in _FLOATS else none
        return (yield from chosen.reduce(ops, grad, state))

    return inner._replace(init=init, reduce=reduce)


_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Momentum(NamedTuple):
    """State of :func:`momentum`."""

    velocity: Any  # of the means, equal on all ranks; in the gradient's shape, float32
    inner: Any


def momentum(factor: float, compressor: Compressor = none) -> Compressor:
    """Add to each mean ``factor`` times what was returned before, as SGD with momentum does.

    For parameters beside those of a method that applies momentum itself (DGC), since it must be
    off in their optimizer. A step whose mean is not finite leaves the velocity as it was.

    Raises:
        CompressionError: ``factor`` is not in [0, 1), or ``compressor`` applies momentum.
    """
    check_momentum("momentum", factor)
    if compressor.owns_momentum:
        raise CompressionError(f"momentum({factor}, {compressor}): that applies momentum itself")
    compressor = compressor._replace(name=f"momentum({factor:g}, {compressor.name})")
    return each_phase(compressor, functools.partial(_with_momentum, factor))


def check_momentum(method: str, factor: float) -> None:
    """Raise a :class:`CompressionError` if ``factor`` is no momentum."""
    if not isinstance(factor, (int, float)) or not 0 <= factor < 1:
        raise CompressionError(
            f"{method}(momentum={factor!r}): momentum must be 0 or more and below 1"
        )


def _with_momentum(factor: float, inner: Compressor) -> Compressor:
    def init(ops: Ops, spec: Spec) -> Momentum:
        return Momentum(ops.zeros(spec.shape, "float32"), inner.init(ops, spec))

    def reduce(ops: Ops, grad: Any, state: Momentum) -> Work[Reduced]:
        dtype = ops.dtype(grad)
        mean, own, kept = yield from inner.reduce(ops, grad, state.inner)
        velocity = ops.scale(state.velocity, factor) + ops.cast(mean, "float32")
        kept = Momentum(ops.finite_or(velocity, state.velocity), kept)
        return Reduced(ops.cast(velocity, dtype), own, kept)

    return inner._replace(
        init=init, reduce=reduce, elementwise=False, stateful=True, owns_momentum=True
    )
