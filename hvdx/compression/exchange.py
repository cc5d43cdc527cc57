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
from typing import Any, NamedTuple

from hvdx.buckets import summed_width
from hvdx.comm import Allgather, Alltoall, Owners, Rank, Ranks, Work
from hvdx.compression import draws
from hvdx.compression.base import Compressor, Reduced, Spec, none
from hvdx.compression.codecs import Codec
from hvdx.compression.levels import leveled, sizes_of
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
    codec: Codec, *, owner_feedback: bool = False, seed: int = 0, sized: Codec | None = None
) -> Compressor:
    """Return the compressor that sends gradients written by ``codec``.

    Args:
        codec: how rows of float32 become bytes.
        owner_feedback: keep what the second phase's rounding loses at the rank that rounds,
            and add it to that piece's next mean. Biased codecs need it beside the feedback for
            the first phase (:func:`hvdx.compression.feedback.error_feedback`).
        seed: of noisy codecs, equal on all ranks; each of them then rounds in its own way.
        sized: takes its place for matrices, and is told how large their elements are
            (:mod:`hvdx.compression.levels`), on which ranks agree in a phase before. It has the
            same blocks and bytes.
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
        flat = ops.cast(ops.reshape(grad, (-1,)), "float32")
        wire = Wire(ops, codec, draw)
        if sized is not None and leveled(shape):
            lost = None if owner is None else (yield from _in_place(ops, owner.lost, ranks, size))
            wire = Wire(ops, sized, draw, (yield from sizes_of(ops, flat, shape, lost)))
        if cut is not None:
            mean, own = yield from _to_owners(wire, flat, cut.spans)
        elif ranks == 2:
            mean, own = yield from _one_phase(wire, flat, size)
        else:
            mean, own, owner = yield from _two_phases(wire, flat, size, ranks, owner)
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


class Wire(NamedTuple):
    """How one gradient is written and read in one step."""

    ops: Ops
    codec: Codec
    draw: Any = None  # of a noisy codec
    sizes: Any = None  # of a sized one: those of the gradient's elements, flat

    def laid(self, flat: Any, size: int, rows: int, columns: int) -> Any:
        """Return the ``size`` elements of ``flat`` as rows, with padding at the end."""
        padding = rows * columns - size
        if padding:
            flat = self.ops.concat([flat, self.ops.zeros((padding,), "float32")])
        return self.ops.reshape(flat, (rows, columns))

    def sizes_in(self, start: int, stop: int, rows: int, columns: int) -> Any:
        """Return those of the elements from ``start`` to ``stop``, laid out as these are."""
        if self.sizes is None:
            return None
        return self.laid(self.sizes[start:stop], stop - start, rows, columns)

    def write(self, rows: Any, used: int, stream: int, sizes: Any) -> Any:
        """Return the bytes of rows, flat; each ``stream`` has noise of its own."""
        more = [draws.key(self.ops, self.draw, stream)] if self.codec.noisy else []
        more += [] if sizes is None else [sizes]
        return self.ops.reshape(self.codec.encode(self.ops, rows, used, *more), (-1,))

    def read(self, data: Any, rows: int, columns: int) -> Any:
        """Return the rows whose bytes these are, still without sizes."""
        data = self.ops.reshape(data, (rows, self.codec.row_bytes(columns)))
        return self.codec.decode(self.ops, data, columns)


def _of(sizes: Any, read: Any) -> Any:
    """Multiply by sizes, if there are any; by powers of two, so that sums may be taken before."""
    return read if sizes is None else read * sizes


def _one_phase(wire: Wire, flat: Any, size: int) -> Work[tuple[Any, Callable[[], Any]]]:
    columns = _columns(size, 1, wire.codec.block)
    rank = yield Rank()
    sizes = wire.sizes_in(0, size, 1, columns)
    data = wire.write(wire.laid(flat, size, 1, columns), size, rank, sizes)
    rows = wire.read((yield Allgather(data)), 2, columns)
    mean = _of(sizes, _mean(wire.ops, rows, 2))
    return mean[0, :size], lambda: _of(sizes, rows[rank : rank + 1])[0, :size]


def _two_phases(
    wire: Wire, flat: Any, size: int, ranks: int, owner: Owner | None
) -> Work[tuple[Any, Callable[[], Any], Owner | None]]:
    ops, columns = wire.ops, _columns(size, ranks, wire.codec.block)
    rank = yield Rank()
    sizes = wire.sizes_in(0, size, ranks, columns)
    own_sizes = None if sizes is None else sizes[rank : rank + 1]
    data = wire.write(wire.laid(flat, size, ranks, columns), size, rank, sizes)
    rows = wire.read((yield Alltoall(data)), ranks, columns)
    piece = _of(own_sizes, _mean(ops, rows, ranks))[0]
    if owner is not None:
        piece = piece + owner.lost
    used = min(max(size - rank * columns, 0), columns)
    rows = wire.laid(piece[:used], used, 1, columns)  # padding has decoded to anything
    everyone = yield Allgather(wire.write(rows, used, ranks + rank, own_sizes))
    means = _of(sizes, wire.read(everyone, ranks, columns))
    if owner is not None:
        owner = Owner(ops.finite_or(rows[0] - means[rank], owner.lost))

    def own() -> Any:
        return ops.reshape(_of(sizes, wire.read(data, ranks, columns)), (-1,))[:size]

    return ops.reshape(means, (-1,))[:size], own, owner


def _mean(ops: Ops, rows: Any, ranks: int) -> Any:
    """Return the mean of the ranks' rows, as one row."""
    total = rows[:1]
    for rank in range(1, ranks):  # in their order: another order rounds otherwise
        total = total + rows[rank : rank + 1]
    return ops.scale(total, 1.0 / ranks)


def _in_place(ops: Ops, piece: Any, ranks: int, size: int) -> Work[Any]:
    """Return a flat gradient's size of zeros, with this rank's piece in its place."""
    rank, columns = (yield Rank()), piece.shape[0]
    before, after = (ops.zeros((count * columns,), "float32") for count in (rank, ranks - 1 - rank))
    return ops.concat([before, piece, after])[:size]


def _to_owners(
    wire: Wire, flat: Any, spans: list[tuple[int, int]]
) -> Work[tuple[Any, Callable[[], Any]]]:
    """Send each rank the piece that it owns, and average one's own; zeros stand elsewhere.

    Servers send parameters back, not means: the second phase and its rounding are not needed.
    """
    ops, codec = wire.ops, wire.codec
    rank, ranks = (yield Rank()), len(spans)
    columns = [_columns(stop - start, 1, codec.block) for start, stop in spans]

    def sizes(place: int) -> Any:
        return wire.sizes_in(*spans[place], 1, columns[place])

    pushed = [place for place, (start, stop) in enumerate(spans) if stop > start]
    data = []
    for place in pushed:
        start, stop = spans[place]
        rows = wire.laid(flat[start:stop], stop - start, 1, columns[place])
        data.append(wire.write(rows, stop - start, rank + ranks * place, sizes(place)))
    splits = tuple(codec.row_bytes(each) for each in columns)
    received = yield Alltoall(ops.concat(data), "push", splits)
    start, stop = spans[rank]
    parts = [ops.zeros((start,), "float32"), ops.zeros((flat.shape[0] - stop,), "float32")]
    if stop > start:
        rows = wire.read(received, ranks, columns[rank])
        parts.insert(1, _of(sizes(rank), _mean(ops, rows, ranks))[0, : stop - start])

    def own() -> Any:
        pieces = []
        for one, place in zip(data, pushed, strict=True):
            start, stop = spans[place]
            read = _of(sizes(place), wire.read(one, 1, columns[place]))
            pieces.append(read[0, : stop - start])
        return ops.concat(pieces)

    return ops.concat(parts), own


def _columns(size: int, rows: int, block: int) -> int:
    """Return how long each of ``rows`` equal rows of whole blocks is, to hold ``size``."""
    return -(-size // (rows * block)) * block
