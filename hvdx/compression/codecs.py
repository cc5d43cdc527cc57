"""What floats look like on the wire: codecs whose bytes are equal on every framework.

A codec turns rows of float32 into rows of bytes, block by block, and back. Scales are powers of
two found by integer arithmetic on the bits of the floats: an exponent is exact and does not
depend on the order of a reduction, on how a library rounds a division, or on whether it flushes
subnormals. Products with such a scale are exact too, so that fused multiply-adds do no harm.

A block with an infinity or a NaN decodes to nothing finite: a rank that diverged must be seen by
all. (A cast of NaN to an integer would send a zero and hide it.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hvdx.ops import Ops

_EXPONENT = 2**23  # where the exponent begins in a float32
_INFINITE = 0x7F800000  # bits of infinity; NaN lie above
#: The smallest biased exponent of a scale: below, products would meet subnormals, which some
#: libraries flush to zero and others do not.
_FLOOR = 2
_HALF_LIMIT = 65504.0  # the largest float16


class Codec(NamedTuple):
    """A way of writing float32 as bytes.

    ``encode(ops, rows, used)`` takes (rows, columns), columns a multiple of ``block``, of which
    the first ``used`` elements, counted through all rows, are not padding; padding must be
    zeros. It returns uint8 of (rows, ``row_bytes(columns)``). ``decode(ops, data, columns)``
    is the way back, to float32. ``encode`` takes one argument more if the codec is ``noisy``: a
    key (see :mod:`hvdx.compression.draws`), another for each call.
    """

    name: str
    block: int
    row_bytes: Callable[[int], int]
    encode: Callable[..., Any]
    decode: Callable[[Ops, Any, int], Any]
    noisy: bool = False


def bfloat16() -> Codec:
    """Two bytes an element: float32 without its last 16 bits, rounded to nearest even."""

    def encode(ops: Ops, rows: Any, used: int) -> Any:
        return ops.reshape(ops.bfloat16_bytes(ops.reshape(rows, (-1,))), (-1, 2 * rows.shape[1]))

    def decode(ops: Ops, data: Any, columns: int) -> Any:
        return ops.reshape(ops.from_bfloat16_bytes(ops.reshape(data, (-1,))), (-1, columns))

    return Codec("bf16", 1, lambda columns: 2 * columns, encode, decode)


def float16() -> Codec:
    """Two bytes an element: float16, where finite numbers saturate at ±65504."""

    def encode(ops: Ops, rows: Any, used: int) -> Any:
        halves = ops.cast(ops.clip(ops.reshape(rows, (-1,)), -_HALF_LIMIT, _HALF_LIMIT), "float16")
        return ops.reshape(ops.to_bytes(halves), (-1, 2 * rows.shape[1]))

    def decode(ops: Ops, data: Any, columns: int) -> Any:
        halves = ops.from_bytes(ops.reshape(data, (-1,)), "float16")
        return ops.reshape(ops.cast(halves, "float32"), (-1, columns))

    return Codec("fp16", 1, lambda columns: 2 * columns, encode, decode)


def integers(bits: int, block: int, *, stochastic: bool = False) -> Codec:
    """Whole numbers of 8 or 4 bits times a power of two that each block has for itself.

    The largest of a block falls in the upper half of the codes, so that at most one bit is
    lost against the best scale.

    Args:
        bits: 8 or 4.
        block: elements that share a scale.
        stochastic: round up with the probability of the fraction, so that the expected value is
            the number itself, instead of to the nearest.
    """
    limit = 2 ** (bits - 1) - 1

    def write(ops: Ops, blocks: Any, start: int, used: int, key: Any = None) -> tuple[Any, Any]:
        top = ops.max(ops.abs_bits(blocks))
        exponent = _at_least(ops, ops.shift_right(top, 23) - (bits - 2), _FLOOR)
        noise = None
        if stochastic:
            exponent = _roomier(ops, top, exponent, bits)
            noise = ops.noise(key, blocks, start * block)
        inverse = ops.from_bits((254 - exponent) * _EXPONENT)
        codes = ops.quantise(blocks, inverse[:, None], limit, "int8", noise)
        exponent = ops.where(top < _INFINITE, exponent, ops.constant(255, "int32"))
        return ops.cast(exponent, "uint8"), _narrow(ops, ops.reshape(codes, (-1,)), bits)

    def read(ops: Ops, scales: Any, codes: Any) -> Any:
        # Exponent 255 is infinity: nothing times that is finite.
        scale = ops.from_bits(ops.cast(scales, "int32") * _EXPONENT)
        numbers = ops.reshape(_widen(ops, codes, bits), (-1, block))
        return ops.dequantise(numbers, scale[:, None])

    return _in_blocks(f"int{bits}", block, bits, 1, write, read)._replace(noisy=stochastic)


def signs(block: int = 1024) -> Codec:
    """One bit an element, and per block the mean magnitude as float32.

    The mean is summed in whole numbers, hence exact and of any order: magnitudes are scaled to
    below 2^20, so that ``block`` of them stay below 2^31. A block of zeros decodes to zeros.
    """
    if block not in (256, 512, 1024):
        raise ValueError(f"block={block} must be 256, 512 or 1024: sums must stay below 2^31")
    halvings = block.bit_length() - 1

    def write(ops: Ops, blocks: Any, start: int, used: int) -> tuple[Any, Any]:
        top, exponent, total = _total(ops, ops.abs_bits(blocks))
        down = ops.from_bits((exponent - halvings) * _EXPONENT)
        mean = ops.cast(total, "float32") * down
        mean = _without_padding(ops, mean, block, used - start * block)
        return _told(ops, top, mean), _signs(ops, blocks)

    return _in_blocks("onebit", block, 1, 4, write, functools.partial(_read_signs, block))


def sized_signs(block: int = 1024) -> Codec:
    """One bit an element, and per block a factor, where all know sizes for the elements.

    What is read is still to be multiplied by the sizes. The factor is that of least squares: the
    signs, as large as told, miss the block by no more than zeros would, whatever the sizes are, so
    that error feedback is as sure to settle as with :func:`signs`.

    ``encode`` takes the sizes, in the shape of the rows: powers of two, none of which is under
    2^-60 of another, and 0 in padding.
    """

    def write(ops: Ops, blocks: Any, start: int, used: int, sizes: Any) -> tuple[Any, Any]:
        sizes = ops.reshape(sizes, (-1, block))[start : start + blocks.shape[0]]
        inverse = ops.from_bits(254 * _EXPONENT - ops.abs_bits(ops.max(sizes)))
        near = sizes * inverse[:, None]  # 1 at most
        top, exponent, total = _total(ops, ops.abs_bits(blocks * near))
        squares = ops.sum(ops.quantise(near, ops.scale(near, 2.0**20), 2**20, "int32"))
        ratio = ops.cast(total, "float32") / ops.cast(_at_least(ops, squares, 1), "float32")
        factor = ops.scale(ratio, 2.0**20) * ops.from_bits(exponent * _EXPONENT)
        return _told(ops, top, factor * inverse), _signs(ops, blocks)

    return _in_blocks("onebit", block, 1, 4, write, functools.partial(_read_signs, block))


def _total(ops: Ops, bits: Any) -> tuple[Any, Any, Any]:
    """Return each block's largest bits, the exponent of a unit, and the sum of magnitudes in it."""
    top = ops.max(bits)
    exponent = _at_least(ops, ops.shift_right(top, 23) - 19, 12)
    up = ops.from_bits((254 - exponent) * _EXPONENT)
    whole = ops.quantise(ops.from_bits(bits), up[:, None], 2**20, "int32")
    return top, exponent, ops.sum(whole)


def _told(ops: Ops, top: Any, scale: Any) -> Any:
    """Return the bytes of each block's scale, NaN where something in it is not finite."""
    return ops.to_bytes(ops.where(top < _INFINITE, scale, ops.constant(math.nan, "float32")))


def _signs(ops: Ops, blocks: Any) -> Any:
    return ops.pack_bits(ops.positive(ops.reshape(blocks, (-1,))))


def _read_signs(block: int, ops: Ops, scales: Any, codes: Any) -> Any:
    positive = ops.reshape(ops.unpack_bits(codes), (-1, block))
    return ops.signed(positive, ops.from_bytes(scales, "float32")[:, None])


def _in_blocks(
    name: str,
    block: int,
    bits: int,
    scale_bytes: int,
    write: Callable[..., tuple[Any, Any]],
    read: Callable[[Ops, Any, Any], Any],
) -> Codec:
    """Return the codec whose rows are all their scales and then all their codes.

    ``write(ops, blocks, start, used, *key)`` returns both, flat, for (count, block) elements
    that begin with block ``start``; ``read(ops, scales, codes)`` is the way back.
    """

    def widths(columns: int) -> tuple[int, int]:
        return columns // block * scale_bytes, columns * bits // 8

    def encode(ops: Ops, rows: Any, used: int, *key: Any) -> Any:
        blocks = ops.reshape(rows, (-1, block))
        parts = [
            write(ops, blocks[piece], piece.start or 0, used, *key)
            for piece in ops.pieces(blocks, block)
        ]
        whole = [
            ops.reshape(part[0] if len(part) == 1 else ops.concat(list(part)), (-1, width))
            for part, width in zip(zip(*parts, strict=True), widths(rows.shape[1]), strict=True)
        ]
        return ops.concat(whole, axis=1)

    def decode(ops: Ops, data: Any, columns: int) -> Any:
        split = widths(columns)[0]
        scales = ops.reshape(data[:, :split], (-1, scale_bytes))
        codes = ops.reshape(data[:, split:], (-1, block * bits // 8))
        parts = [
            read(ops, ops.reshape(scales[piece], (-1,)), ops.reshape(codes[piece], (-1,)))
            for piece in ops.pieces(codes, block)
        ]
        return ops.reshape(ops.concat(parts) if len(parts) > 1 else parts[0], (-1, columns))

    return Codec(name, block, lambda columns: sum(widths(columns)), encode, decode)


def _roomier(ops: Ops, top: Any, exponent: Any, bits: int) -> Any:
    """Return the exponents for stochastic rounding.

    They leave room for the largest of a block, of which to the nearest the last code's half is
    cut off: that would be a bias. And where subnormals are not flushed to zero, noise may not
    lift them to 1: with a scale of 2^-107 they are below its last bit.
    """
    beyond = ops.mask(top, _EXPONENT - 1) > _EXPONENT - 2 ** (25 - bits)
    exponent = exponent + ops.cast(beyond, "int32")
    largest = ops.constant(256 - bits, "int32")  # of which the last code is below infinity
    return _at_least(ops, ops.where(exponent > largest, largest, exponent), _FLOOR + 18)


def _at_least(ops: Ops, x: Any, low: int) -> Any:
    return ops.where(x < low, ops.constant(low, "int32"), x)


def _without_padding(ops: Ops, mean: Any, block: int, used: int) -> Any:
    """Have the mean of the block that padding fills up be that of its first elements alone.

    Padding is zeros, and so are the means of blocks of nothing else.
    """
    full, rest = divmod(max(used, 0), block)
    if not rest or full >= mean.shape[0]:
        return mean
    partial = ops.scale(mean[full : full + 1], block / rest)
    return ops.concat([mean[:full], partial, mean[full + 1 :]])


def _narrow(ops: Ops, codes: Any, bits: int) -> Any:
    """Write int8 codes as bytes: two a byte if they have 4 bits, the first one low."""
    data = ops.to_bytes(codes)
    if bits == 8:
        return data
    pairs = ops.reshape(ops.mask(data, 15), (-1, 2))
    return pairs[:, 0] + pairs[:, 1] * 16


def _widen(ops: Ops, data: Any, bits: int) -> Any:
    """Undo :func:`_narrow`."""
    if bits == 8:
        return ops.from_bytes(data, "int8")
    pairs = ops.concat([ops.mask(data, 15)[:, None], ops.shift_right(data, 4)[:, None]], axis=1)
    codes = ops.cast(ops.reshape(pairs, (-1,)), "int8")
    return codes - ops.cast(codes > 7, "int8") * 16
