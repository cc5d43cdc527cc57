"""Send a few elements of a gradient: the largest, or some that all ranks know.

Where so many are few no more, since what all ranks have chosen is gathered, and would be no fewer
bytes than an allreduce of all, the gradient and what is owed travel raw.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hvdx.buckets import summed_width
from hvdx.comm import Allgather, Allreduce, Ranks, Work
from hvdx.compression import draws
from hvdx.compression.base import Compressor, Reduced, Spec
from hvdx.compression.feedback import Feedback
from hvdx.compression.state import Averaged, Owed
from hvdx.ops import Ops

_HALF_LIMIT = 65504.0  # the largest float16
_CHUNK_BITS = 16  # indices travel as 16 bits, within chunks of 2^16 elements


def top_k(density: float) -> Compressor:
    """Send the largest ``density`` of each parameter's elements, at least one.

    An element travels as float16 and the lower 16 bits of its index. All ranks send equally
    many, so that sizes never have to be exchanged. What is not sent is added to the next gradient
    (Stich et al., Sparsified SGD with Memory, 2018); so is what float16 has lost.
    """

    def init(ops: Ops, spec: Spec) -> Feedback:
        return Feedback(ops.zeros(spec.shape, "float32"), None)

    def reduce(ops: Ops, grad: Any, state: Feedback) -> Work[Reduced]:
        shape, dtype = tuple(grad.shape), ops.dtype(grad)
        owed = ops.cast(grad, "float32") + state.residual
        if math.prod(shape) == 0:
            return Reduced(grad, None, state)
        ranks = yield Ranks()
        if ranks == 1:
            return Reduced(ops.cast(owed, dtype), None, init(ops, Spec("", shape, dtype)))
        if not gathering_pays(math.prod(shape), density, dtype, ranks):
            return (yield from _all(ops, owed, dtype, state))
        flat = ops.reshape(owed, (-1,))
        where = ops.largest(flat, chosen(math.prod(shape), density))
        mean, sent = yield from _gather(ops, flat, where)
        left = ops.reshape(ops.add_at(flat, where, -sent, over=True), shape)
        residual = ops.finite_or(left, state.residual)
        mean = ops.cast(ops.reshape(mean, shape), dtype)
        return Reduced(mean, None, Feedback(residual, None))

    return Compressor(f"topk({density:g})", init, reduce, stateful=True)


class Velocity(NamedTuple):
    """State of :func:`deep_gradient_compression`; both in the gradient's shape, float32."""

    momentum: Averaged  # of what this rank has not sent since it last sent it
    owed: Owed  # what it has not sent


def deep_gradient_compression(density: float, momentum: float, warmup_steps: int = 0) -> Compressor:
    """Send the largest elements of what momentum would have applied (Lin et al., ICLR 2018).

    Each rank keeps the momentum of its own gradients, and sums what it has not sent ("momentum
    correction"); an element that is sent starts afresh ("factor masking"), so that late
    elements do not push on in an old direction. The optimizer itself must have no momentum.

    Args:
        density: share of the elements sent.
        momentum: usually the optimizer's, 0.9.
        warmup_steps: in four equal parts of these, 25 %, 6.25 %, 1.6 % and 0.4 % are sent.
    """

    def init(ops: Ops, spec: Spec) -> Velocity:
        zeros = ops.zeros(spec.shape, "float32")
        return Velocity(zeros, zeros)

    def at(density: float) -> Compressor:
        def reduce(ops: Ops, grad: Any, state: Velocity) -> Work[Reduced]:
            shape, dtype = tuple(grad.shape), ops.dtype(grad)
            given = ops.cast(grad, "float32")
            pushed = ops.scale(state.momentum, momentum) + given
            owed = state.owed + pushed
            if math.prod(shape) == 0:
                return Reduced(grad, grad, state)
            if not gathering_pays(math.prod(shape), density, dtype, (yield Ranks())):
                # All is sent: to plain momentum there is nothing to correct, and no late element
                # whose momentum is old.
                given = Feedback(state.owed, None)
                mean, own, kept = yield from _all(ops, owed, dtype, given)
                push = ops.finite_or(pushed, state.momentum)
                return Reduced(mean, own, Velocity(push, kept.residual))
            flat = ops.reshape(owed, (-1,))
            where = ops.largest(flat, chosen(math.prod(shape), density))
            mean, sent = yield from _gather(ops, flat, where)
            rest = ops.reshape(pushed, (-1,))
            rest = ops.add_at(rest, where, -ops.take(rest, where), over=True)
            left = ops.add_at(flat, where, -sent, over=True)
            kept = Velocity(
                ops.finite_or(ops.reshape(rest, shape), state.momentum),
                ops.finite_or(ops.reshape(left, shape), state.owed),
            )
            return Reduced(ops.cast(ops.reshape(mean, shape), dtype), None, kept)

        name = f"dgc(density={density:g}, momentum={momentum:g})"
        return Compressor(name, init, reduce, stateful=True, owns_momentum=True)

    quarters = [0.25, 0.0625, 0.015625, 0.00390625] if warmup_steps else []
    phases = [(n * warmup_steps // 4, at(max(d, density))) for n, d in enumerate(quarters)]
    last = at(density)
    return last._replace(phases=(*phases, (warmup_steps, last)))


def gathering_pays(size: int, density: float, dtype: str, ranks: int) -> bool:
    """Tell whether the chosen elements of all ranks are fewer bytes than an allreduce of all.

    A rank sends ranks - 1 times the former, and 2 (ranks - 1) / ranks times the latter.
    """
    index = 4 * _chunks(size) if _chunks(size) > 1 else 0
    return ranks * (4 * chosen(size, density) + index) < 2 * size * summed_width(dtype)


def _all(ops: Ops, owed: Any, dtype: str, state: Feedback) -> Work[Reduced]:
    """Send all that is owed, but for what the gradient's dtype has no room for."""
    payload = ops.cast(owed, dtype)
    mean = yield Allreduce(payload)
    left = owed - ops.cast(payload, "float32")
    return Reduced(mean, None, state._replace(residual=ops.finite_or(left, state.residual)))


def _gather(ops: Ops, flat: Any, where: Any) -> Work[tuple[Any, Any]]:
    """Exchange the elements at ``where``; return the mean over ranks, and what this rank sent."""
    ranks = yield Ranks()
    size, count = flat.shape[0], where.shape[0]
    data = _write(ops, where, ops.take(flat, where), size)
    everyone = ops.reshape((yield Allgather(data)), (ranks, data.shape[0]))
    total = ops.zeros((size,), "float32")
    for rank in range(ranks):  # in rank order: another order rounds otherwise
        places, values = _read(ops, everyone[rank], count, size)
        total = ops.add_at(total, places, ops.scale(values, 1.0 / ranks), over=True)
    return total, _read(ops, data, count, size)[1]


class Turn(NamedTuple):
    """State of :func:`random_k` beside the residual."""

    draw: Any  # int64 scalar: where the comb stands in the next step, equal on all ranks


def random_k(density: float, seed: int = 0) -> Compressor:
    """Send a comb of ``density`` of each parameter's elements, at another place each step.

    All ranks draw the first place from (seed, parameter), so that no index travels and Horovod's
    allreduce adds the values up. Then the comb advances by the golden section of the distance
    between its teeth: every element has its turn once in 1/density steps. Places drawn anew in
    each step would leave some elements waiting for many times as long, and all of them for twice
    as long on average. What is not sent is added to the next gradient.
    """

    def init(ops: Ops, spec: Spec) -> Feedback:
        return Feedback(ops.zeros(spec.shape, "float32"), Turn(draws.first(ops, seed, spec.name)))

    def reduce(ops: Ops, grad: Any, state: Feedback) -> Work[Reduced]:
        shape, dtype = tuple(grad.shape), ops.dtype(grad)
        size = math.prod(shape)
        if size == 0:
            return Reduced(grad, None, state)
        draw = state.inner.draw
        owed = ops.cast(grad, "float32") + state.residual
        apart = -(-size // chosen(size, density))
        count = -(-size // apart)  # so that the last tooth never meets the first
        following = Turn(draw + _advance(apart))
        if 4 * count >= size * summed_width(dtype):
            return (yield from _all(ops, owed, dtype, state._replace(inner=following)))
        flat = ops.reshape(owed, (-1,))
        where = ops.cast((ops.arange(count) * apart + draw % apart) % size, "int32")
        values = ops.take(flat, where)
        means = yield Allreduce(values)
        mean = ops.add_at(ops.zeros((size,), "float32"), where, means, over=True)
        left = ops.reshape(ops.add_at(flat, where, -values, over=True), shape)
        return Reduced(
            ops.cast(ops.reshape(mean, shape), dtype),
            None,
            Feedback(ops.finite_or(left, state.residual), following),
        )

    return Compressor(f"randomk({density:g})", init, reduce, stateful=True)


def _advance(apart: int) -> int:
    """Return a step that meets all of 0 ... apart-1 before it meets one again."""
    step = max(1, (618 * apart + 500) // 1000)
    while math.gcd(step, apart) > 1:
        step += 1
    return step


def chosen(size: int, density: float) -> int:
    """Return how many of ``size`` elements are sent."""
    return int(max(1, min(size, math.ceil(size * density))))


def _write(ops: Ops, where: Any, values: Any, size: int) -> Any:
    """Return bytes: values, then low halves of indices, then how many lie in each chunk."""
    halves = ops.to_bytes(ops.cast(ops.clip(values, -_HALF_LIMIT, _HALF_LIMIT), "float16"))
    low = ops.reshape(ops.to_bytes(where), (-1, 4))[:, :2]
    parts = [halves, ops.reshape(low, (-1,))]
    if _chunks(size) > 1:
        parts.append(ops.to_bytes(ops.counts(ops.shift_right(where, _CHUNK_BITS), _chunks(size))))
    return ops.concat(parts)


def _read(ops: Ops, data: Any, count: int, size: int) -> tuple[Any, Any]:
    """Return indices and values."""
    values = ops.cast(ops.from_bytes(data[: 2 * count], "float16"), "float32")
    low = ops.reshape(data[2 * count : 4 * count], (count, 2))
    padded = ops.concat([low, ops.zeros((count, 2), "uint8")], axis=1)
    where = ops.from_bytes(ops.reshape(padded, (-1,)), "int32")
    if _chunks(size) > 1:
        counts = ops.from_bytes(data[4 * count :], "int32")
        where = where + ops.repeat(counts, count) * 2**_CHUNK_BITS
    return where, values


def _chunks(size: int) -> int:
    return -(-size >> _CHUNK_BITS)  # rounded up
