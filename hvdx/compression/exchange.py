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
from hvdx.comm import Allgather, Alltoall, Owners, Rank, Ranks, Work
from hvdx.compression import draws
from hvdx.compression.base import Compressor, Reduced, Spec, none
from hvdx.compression.codecs import Codec
from hvdx.compression.levels import Levels, leveled, levels
from hvdx.compression.state import OwedPiece
from hvdx.ops import Ops


class Owner(NamedTuple):
    """State of :func:`exchange` with owner feedback, between three ranks or more."""

    lost: OwedPiece  # by writing this rank's piece of the mean; whole blocks of float32


class Rounding(NamedTuple):
    """State of :func:`exchange` with a noisy codec."""

    draw: Any  # int64 scalar: this step's random number, equal on all ranks
    owner: Owner | None


def exchange(
    codec: Codec, *, owner_feedback: bool = False, seed: int = 0, even: bool = False
) -> Compressor:
    """Return the compressor that sends gradients written by ``codec``.

    Args:
        codec: how rows of float32 become bytes.
        owner_feedback: keep what the second phase's rounding loses at the rank that rounds,
            and add it to that piece's next mean. Biased codecs need it beside the feedback for
            the first phase (:func:`hvdx.compression.feedback.error_feedback`).
        seed: of noisy codecs, equal on all ranks; each of them then rounds in its own way.
        even: give rows and columns of matrices scales of their own
            (:mod:`hvdx.compression.levels`), which takes one phase more.
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
        ranks, cut = (yield Ranks()), (yield Owners())
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
        level = None
        if even and leveled(shape):
            level = yield from levels(ops, flat, shape)
            flat = flat * level.up
        if cut is not None:
            mean, own = yield from _to_owners(ops, codec, write, flat, cut.spans)
        elif ranks == 2:
            mean, own = yield from _one_phase(ops, codec, write, flat, size)
        else:
            mean, own, owner = yield from _two_phases(
                ops, codec, write, flat, size, ranks, owner, level
            )

        def back(read: Any) -> Any:
            read = read if level is None else read * level.down
            return ops.cast(ops.reshape(read, shape), dtype)

        return Reduced(
            back(mean),
            lambda: back(own()),
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
    ops: Ops,
    codec: Codec,
    write: Write,
    flat: Any,
    size: int,
    ranks: int,
    owner: Owner | None,
    level: Levels | None,
) -> Work[tuple[Any, Callable[[], Any], Owner | None]]:
    columns = _columns(size, ranks, codec.block)
    shape = (ranks, codec.row_bytes(columns))
    rank = yield Rank()

    def mine(whole: Any) -> Any:
        return _rows(ops, whole, size, ranks, columns)[rank]

    data = write(_rows(ops, flat, size, ranks, columns), size, rank)
    pieces = yield Alltoall(ops.reshape(data, (-1,)))
    rows = codec.decode(ops, ops.reshape(pieces, shape), columns)
    total = rows[0]
    for row in range(1, ranks):  # in rank order: another order rounds otherwise
        total = total + rows[row]
    piece = ops.scale(total, 1.0 / ranks)
    if owner is not None:
        lost = owner.lost if level is None else owner.lost * mine(level.up)
        piece = piece + lost
    used = min(max(size - rank * columns, 0), columns)
    rows = _rows(ops, piece[:used], used, 1, columns)  # padding has decoded to anything
    everyone = yield Allgather(ops.reshape(write(rows, used, ranks + rank), (-1,)))
    means = codec.decode(ops, ops.reshape(everyone, shape), columns)
    if owner is not None:
        lost = rows[0] - means[rank]
        lost = lost if level is None else lost * mine(level.down)
        owner = Owner(ops.finite_or(lost, owner.lost))

    def own() -> Any:
        return ops.reshape(codec.decode(ops, data, columns), (-1,))[:size]

    return ops.reshape(means, (-1,))[:size], own, owner


def _to_owners(
    ops: Ops, codec: Codec, write: Write, flat: Any, spans: list[tuple[int, int]]
) -> Work[tuple[Any, Callable[[], Any]]]:
    """Send each rank the piece that it owns, and average one's own; zeros stand elsewhere.

    Servers send parameters back, not means: the second phase and its rounding are not needed.
    """
    rank, ranks = (yield Rank()), len(spans)
    columns = [_columns(stop - start, 1, codec.block) for start, stop in spans]
    data = []
    for place, (start, stop) in enumerate(spans):
        if stop > start:
            rows = _rows(ops, flat[start:stop], stop - start, 1, columns[place])
            data.append(ops.reshape(write(rows, stop - start, rank + ranks * place), (-1,)))
    splits = tuple(codec.row_bytes(each) for each in columns)
    received = yield Alltoall(ops.concat(data), "push", splits)
    start, stop = spans[rank]
    parts = [ops.zeros((start,), "float32"), ops.zeros((flat.shape[0] - stop,), "float32")]
    if stop > start:
        rows = codec.decode(ops, ops.reshape(received, (ranks, splits[rank])), columns[rank])
        total = rows[0]
        for row in range(1, ranks):  # in rank order: another order rounds otherwise
            total = total + rows[row]
        parts.insert(1, ops.scale(total, 1.0 / ranks)[: stop - start])

    def own() -> Any:
        sizes = [stop - start for start, stop in spans if stop > start]
        used = [each for each in columns if each]
        pieces = [
            codec.decode(ops, ops.reshape(one, (1, -1)), width)[0][:size]
            for one, width, size in zip(data, used, sizes, strict=True)
        ]
        return ops.concat(pieces)

    return ops.concat(parts), own


def _columns(size: int, rows: int, block: int) -> int:
    """Return how long each of ``rows`` equal rows of whole blocks is, to hold ``size``."""
    return -(-size // (rows * block)) * block


def _rows(ops: Ops, flat: Any, size: int, rows: int, columns: int) -> Any:
    padding = rows * columns - size
    if padding:
        flat = ops.concat([flat, ops.zeros((padding,), "float32")])
    return ops.reshape(flat, (rows, columns))
