"""Average what a codec has written, which no allreduce can add up.

With two ranks each gathers the other's bytes: one phase, one rounding. With more, gathering
would cost as much as it saves, so that rank j gets the j-th piece of everyone (alltoall), adds
the pieces up in float32, and sends their mean, written once more, to all (allgather). Every rank
decodes the same bytes, so that replicas stay equal to the last bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hvdx.comm import Allgather, Alltoall, Rank, Ranks, Work
from hvdx.compression.base import Compressor, Reduced, Spec
from hvdx.compression.codecs import Codec
from hvdx.compression.state import OwedPiece
from hvdx.ops import Ops


class Owner(NamedTuple):
    """State of :func:`exchange` with owner feedback, between three ranks or more."""

    lost: OwedPiece  # by writing this rank's piece of the mean; whole blocks of float32


def exchange(codec: Codec, *, owner_feedback: bool = False) -> Compressor:
    """Return the compressor that sends gradients written by ``codec``.

    Args:
        codec: how rows of float32 become bytes.
        owner_feedback: keep what the second phase's rounding loses at the rank that rounds,
            and add it to that piece's next mean. Biased codecs need it beside the feedback for
            the first phase (:func:`hvdx.compression.feedback.error_feedback`).
    """

    def init(ops: Ops, spec: Spec) -> Any:
        if not owner_feedback or spec.ranks <= 2:
            return None
        columns = _columns(math.prod(spec.shape), spec.ranks, codec.block)
        return Owner(ops.zeros((columns,), "float32"))

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        shape, dtype = tuple(grad.shape), ops.dtype(grad)
        size = math.prod(shape)
        ranks = yield Ranks()
        if ranks == 1 or size == 0:
            return Reduced(grad, grad, state)
        flat = ops.cast(ops.reshape(grad, (-1,)), "float32")
        if ranks == 2:
            mean, own = yield from _one_phase(ops, codec, flat, size)
        else:
            mean, own, state = yield from _two_phases(ops, codec, flat, size, ranks, state)
        return Reduced(_like(ops, mean, shape, dtype), _like(ops, own, shape, dtype), state)

    return Compressor(codec.name, init, reduce, stateful=owner_feedback)


def _one_phase(ops: Ops, codec: Codec, flat: Any, size: int) -> Work[tuple[Any, Any]]:
    columns = _columns(size, 1, codec.block)
    rank = yield Rank()
    data = codec.encode(ops, _rows(ops, flat, size, 1, columns), size)
    everyone = yield Allgather(ops.reshape(data, (-1,)))
    rows = codec.decode(ops, ops.reshape(everyone, (2, codec.row_bytes(columns))), columns)
    mean = ops.scale(rows[0] + rows[1], 0.5)
    return mean[:size], rows[rank][:size]


def _two_phases(
    ops: Ops, codec: Codec, flat: Any, size: int, ranks: int, owed: Any
) -> Work[tuple[Any, Any, Any]]:
    columns = _columns(size, ranks, codec.block)
    shape = (ranks, codec.row_bytes(columns))
    rank = yield Rank()
    data = codec.encode(ops, _rows(ops, flat, size, ranks, columns), size)
    pieces = yield Alltoall(ops.reshape(data, (-1,)))
    rows = codec.decode(ops, ops.reshape(pieces, shape), columns)
    total = rows[0]
    for row in range(1, ranks):  # in rank order: another order rounds otherwise
        total = total + rows[row]
    piece = ops.scale(total, 1.0 / ranks)
    if owed is not None:
        piece = piece + owed.lost
    used = min(max(size - rank * columns, 0), columns)
    piece = _rows(ops, piece[:used], used, 1, columns)  # signs have made padding more than zeros
    everyone = yield Allgather(ops.reshape(codec.encode(ops, piece, used), (-1,)))
    means = codec.decode(ops, ops.reshape(everyone, shape), columns)
    if owed is not None:
        lost = piece[0] - means[rank]
        owed = Owner(ops.where(ops.finite(lost), lost, owed.lost))
    own = codec.decode(ops, data, columns)
    return ops.reshape(means, (-1,))[:size], ops.reshape(own, (-1,))[:size], owed


def _columns(size: int, rows: int, block: int) -> int:
    """Return how long each of ``rows`` equal rows of whole blocks is, to hold ``size``."""
    return -(-size // (rows * block)) * block


def _rows(ops: Ops, flat: Any, size: int, rows: int, columns: int) -> Any:
    padding = rows * columns - size
    if padding:
        flat = ops.concat([flat, ops.zeros((padding,), "float32")])
    return ops.reshape(flat, (rows, columns))


def _like(ops: Ops, flat: Any, shape: tuple[int, ...], dtype: str) -> Any:
    return ops.cast(ops.reshape(flat, shape), dtype)
