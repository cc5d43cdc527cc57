"""Average what a codec has written, which no allreduce can add up.

With two ranks each gathers the other's bytes: one phase, one rounding. With more, gathering
would cost as much as it saves, so that rank j gets the j-th piece of everyone (alltoall), adds
the pieces up in float32, and sends their mean, written once more, to all (allgather). Every rank
decodes the same bytes, so that replicas stay equal to the last bit.

A gradient for which that would be no fewer bytes travels raw: a block is written in full, however
few elements are in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from hvdx.buckets import summed_width
from hvdx.comm import Allgather, Alltoall, Rank, Ranks, Work
from hvdx.compression import draws
from hvdx.compression.base import Compressor, Reduced, Spec, none
from hvdx.compression.codecs import Codec
from hvdx.compression.state import OwedPiece
from hvdx.ops import Ops


class Owner(NamedTuple):
    """State of :func:`exchange` with owner feedback, between three ranks or more."""

    lost: OwedPiece  # by writing this rank's piece of the mean; whole blocks of float32


class Rounding(NamedTuple):
    """State of :func:`exchange` with a noisy codec."""

    draw: Any  # int64 scalar: this step's random number, equal on all ranks
    owner: Owner | None


def exchange(codec: Codec, *, owner_feedback: bool = False, seed: int = 0) -> Compressor:
    """Return the compressor that sends gradients written by ``codec``.

    Args:
        codec: how rows of float32 become bytes.
        owner_feedback: keep what the second phase's rounding loses at the rank that rounds,
            and add it to that piece's next mean. Biased codecs need it beside the feedback for
            the first phase (:func:`hvdx.compression.feedback.error_feedback`).
        seed: of noisy codecs, equal on all ranks; each of them then rounds in its own way.
    """

    def init(ops: Ops, spec: Spec) -> Any:
        owner = None
        if owner_feedback and spec.ranks > 2:
            columns = _columns(math.prod(spec.shape), spec.ranks, codec.block)
            owner = Owner(ops.zeros((columns,), "float32"))
        return Rounding(draws.first(ops, seed, spec.name), owner) if codec.noisy else owner

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        shape, dtype = tuple(grad.shape), ops.dtype(grad)
        size = math.prod(shape)
        ranks = yield Ranks()
        if ranks == 1 or size == 0:
            return Reduced(grad, grad, state)
        if not pays(codec, size, dtype, ranks):
            # States have their form all the same: with other ranks it may pay. What error
            # feedback has kept till then is delivered, and nothing is lost.
            return (yield from none.reduce(ops, grad, state))
        draw, owner = state if codec.noisy else (None, state)

        def write(rows: Any, used: int, stream: int) -> Any:
            keys = [draws.key(ops, draw, stream)] if codec.noisy else []
            return codec.encode(ops, rows, used, *keys)

        flat = ops.cast(ops.reshape(grad, (-1,)), "float32")
        if ranks == 2:
            mean, own = yield from _one_phase(ops, codec, write, flat, size)
        else:
            mean, own, owner = yield from _two_phases(ops, codec, write, flat, size, ranks, owner)
        return Reduced(
            ops.cast(ops.reshape(mean, shape), dtype),
            lambda: ops.cast(ops.reshape(own(), shape), dtype),
            Rounding(draws.following(draw), owner) if codec.noisy else owner,
        )

    return Compressor(codec.name, init, reduce, stateful=owner_feedback or codec.noisy)


def pays(codec: Codec, size: int, dtype: str, ranks: int) -> bool:
    """Tell whether a gradient is fewer bytes as ``codec`` writes it than as it is.

    Both ways a rank sends 2 (ranks - 1) / ranks times those bytes.
    """
    rows = 1 if ranks == 2 else ranks
    written = rows * codec.row_bytes(_columns(size, rows, codec.block))
    return written < size * summed_width(dtype)


Write: TypeAlias = Callable[[Any, int, int], Any]
"""``(rows, used, stream) -> bytes``: the codec's, with another key for each stream."""


def _one_phase(
    ops: Ops, codec: Codec, write: Write, flat: Any, size: int
) -> Work[tuple[Any, Callable[[], Any]]]:
    columns = _columns(size, 1, codec.block)
    rank = yield Rank()
    data = write(_rows(ops, flat, size, 1, columns), size, rank)
    everyone = yield Allgather(ops.reshape(data, (-1,)))
    rows = codec.decode(ops, ops.reshape(everyone, (2, codec.row_bytes(columns))), columns)
    mean = ops.scale(rows[0] + rows[1], 0.5)
    return mean[:size], lambda: rows[rank][:size]


def _two_phases(
    ops: Ops, codec: Codec, write: Write, flat: Any, size: int, ranks: int, owner: Owner | None
) -> Work[tuple[Any, Callable[[], Any], Owner | None]]:
    columns = _columns(size, ranks, codec.block)
    shape = (ranks, codec.row_bytes(columns))
    rank = yield Rank()
    data = write(_rows(ops, flat, size, ranks, columns), size, rank)
    pieces = yield Alltoall(ops.reshape(data, (-1,)))
    rows = codec.decode(ops, ops.reshape(pieces, shape), columns)
    total = rows[0]
    for row in range(1, ranks):  # in rank order: another order rounds otherwise
        total = total + rows[row]
    piece = ops.scale(total, 1.0 / ranks)
    if owner is not None:
        piece = piece + owner.lost
    used = min(max(size - rank * columns, 0), columns)
    rows = _rows(ops, piece[:used], used, 1, columns)  # padding has decoded to anything
    everyone = yield Allgather(ops.reshape(write(rows, used, ranks + rank), (-1,)))
    means = codec.decode(ops, ops.reshape(everyone, shape), columns)
    if owner is not None:
        owner = Owner(ops.finite_or(rows[0] - means[rank], owner.lost))

    def own() -> Any:
        return ops.reshape(codec.decode(ops, data, columns), (-1,))[:size]

    return ops.reshape(means, (-1,))[:size], own, owner


def _columns(size: int, rows: int, block: int) -> int:
    """Return how long each of ``rows`` equal rows of whole blocks is, to hold ``size``."""
    return -(-size // (rows * block)) * block


def _rows(ops: Ops, flat: Any, size: int, rows: int, columns: int) -> Any:
    padding = rows * columns - size
    if padding:
        flat = ops.concat([flat, ops.zeros((padding,), "float32")])
    return ops.reshape(flat, (rows, columns))
