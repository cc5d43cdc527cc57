"""Train alone for some steps, then average what they have changed: local SGD and DiLoCo.

Ranks communicate once in H steps instead of in each. Between, each has its own parameters, which
start from the same place: the *anchor*. After H steps the mean over the ranks of (anchor -
parameters) is an *outer gradient*; an outer optimizer, SGD with Nesterov momentum, moves the
anchor along it, and all ranks go on from there.

The outer step is a :class:`Compressor` of *parameters*: engines reduce these as they would
gradients, and put the results in their place. What it keeps is saved, loaded and moved to other
numbers of ranks as what other compressors keep.

References:
    Stich: Local SGD Converges Fast and Communicates Little. ICLR 2019. arXiv:1805.09767.
    Douillard, Feng, Rusu, Chhaparia, Donchev, Kuncoro, Ranzato, Szlam, Shen: DiLoCo:
    Distributed Low-Communication Training of Language Models. 2023. arXiv:2311.08105.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from hvdx.comm import Allreduce, Work
from hvdx.compression.base import CompressionError, Compressor, Reduced, Spec, stateless
from hvdx.compression.feedback import each_phase
from hvdx.ops import Ops

Start: TypeAlias = Callable[[Spec], Any]
"""Returns the parameter as it is, in a tensor of its own or one that nobody changes in place."""


class Local(NamedTuple):
    """A way of training; ``DistributedOptimizer`` takes it in the place of a compressor.

    Made by ``hvd.Compression.local_sgd`` and ``hvd.Compression.diloco``.
    """

    name: str
    steps: int  # of each rank alone between two outer steps
    outer: Callable[[Start], Compressor]  # of parameters, whose first values are asked for

    def __repr__(self) -> str:
        return f"Compression.{self.name}"


class Outer(NamedTuple):
    """State of a parameter; the same on all ranks but for ``inner``."""

    anchor: Any  # the parameter after the last outer step; float32, or float64 if it is that
    momentum: Any  # the outer optimizer's, of the same dtype; None without
    inner: Any  # the compressor's


def local_sgd(steps: int) -> Local:
    """Average parameters themselves: an outer step of rate 1 without momentum or state.

    Raises:
        CompressionError: ``steps`` is below 1.
    """
    _check_steps("local_sgd", steps)
    average = Compressor("local_sgd", stateless, _average)
    return Local(f"local_sgd(steps={steps})", steps, lambda start: average)


def diloco(steps: int, lr: float, momentum: float, compressor: Compressor) -> Local:
    """Average what the steps have changed, through ``compressor``, into Nesterov momentum.

    Raises:
        CompressionError: a number is out of its range, or ``compressor`` has momentum itself.
    """
    _check_steps("diloco", steps)
    if not 0 < lr < math.inf:
        raise CompressionError(f"Compression.diloco(outer_lr={lr!r}): outer_lr must be above 0")
    if not 0 <= momentum < 1:
        raise CompressionError(
            f"Compression.diloco(outer_momentum={momentum!r}): outer_momentum must be 0 or more "
            "and below 1"
        )
    if compressor.owns_momentum:
        raise CompressionError(
            f"Compression.diloco(compression={compressor}): this applies momentum, and so does "
            "the outer optimizer; give a method without, such as hvd.Compression.topk"
        )
    told = f"steps={steps}, outer_lr={lr:g}, outer_momentum={momentum:g}"
    name = f"diloco({told}, compression={compressor.name})"
    return Local(name, steps, functools.partial(outer_optimizer, compressor, lr, momentum))


def _check_steps(method: str, steps: Any) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise CompressionError(
            f"Compression.{method}(steps={steps!r}): steps must be a whole number, 1 or more"
        )


def outer_optimizer(inner: Compressor, lr: float, momentum: float, start: Start) -> Compressor:
    """Return the compressor that moves parameters along the mean of what ranks have changed.

    With m the momentum, kept from step to step, and g the outer gradient: m = momentum * m + g;
    anchor = anchor - lr * (g + momentum * m). All in float32 (float64 for such parameters). A
    parameter that is not finite on some rank is not on any after the step, for all to see.

    Args:
        inner: averages outer gradients. Its phases are counted in outer steps.
        lr: the outer learning rate.
        momentum: the outer momentum; 0 keeps none.
        start: tells where anchors are at first; equal on all ranks.
    """

    def wrap(inner: Compressor) -> Compressor:
        return outer_optimizer(inner, lr, momentum, start)

    policy, prepare = inner.policy, inner.prepare
    outer = each_phase(inner, functools.partial(_with_optimizer, lr, momentum, start))
    return outer._replace(
        name=f"diloco of {inner.name}",
        policy=None if policy is None else lambda spec: wrap(policy(spec)),
        prepare=None if prepare is None else lambda *given: wrap(prepare(*given)),
    )


def _with_optimizer(lr: float, momentum: float, start: Start, inner: Compressor) -> Compressor:
    def init(ops: Ops, spec: Spec) -> Outer:
        spec = spec._replace(dtype=_wide(spec.dtype))
        anchor = ops.cast(start(spec), spec.dtype)
        zeros = anchor - anchor if momentum else None  # beside the parameter
        return Outer(anchor, zeros, inner.init(ops, spec))

    def reduce(ops: Ops, parameter: Any, state: Outer) -> Work[Reduced]:
        anchor, velocity = state.anchor, state.momentum
        moved = anchor - ops.cast(parameter, ops.dtype(anchor))
        mean, own, kept = yield from inner.reduce(ops, moved, state.inner)
        step = mean
        if velocity is not None:
            velocity = ops.scale(velocity, momentum) + mean
            step = mean + ops.scale(velocity, momentum)
        anchor = anchor - ops.scale(step, lr)
        result = ops.cast(anchor, ops.dtype(parameter))
        return Reduced(result, own, Outer(anchor, velocity, kept))

    return inner._replace(init=init, reduce=reduce, elementwise=False, stateful=True)


def _average(ops: Ops, parameter: Any, state: None) -> Work[Reduced]:
    dtype = ops.dtype(parameter)
    mean = yield Allreduce(ops.cast(parameter, _wide(dtype)))
    return Reduced(ops.cast(mean, dtype), parameter, state)


def _wide(dtype: str) -> str:
    return dtype if dtype == "float64" else "float32"
