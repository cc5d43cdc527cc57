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
        return ops.reshape(ops.bfloat16_bytes(ops.reshape(rows, (-1,))), (rows.shape[0], -1))

    def decode(ops: Ops, data: Any, columns: int) -> Any:
        values = ops.from_bfloat16_bytes(ops.reshape(data, (-1,)))
        return ops.reshape(values, (data.shape[0], columns))

    return Codec("bf16", 1, lambda columns: 2 * columns, encode, decode)


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
    row_bytes = functools.partial(_with_scales, bits=bits, block=block, scale_bytes=1)

    def encode(ops: Ops, rows: Any, used: int, key: Any = None) -> Any:
        blocks = _blocks(ops, rows, block)
        top = ops.max(ops.abs_bits(blocks))
        exponent = _at_least(ops, ops.shift_right(top, 23) - (bits - 2), _FLOOR)
        noise = None
        if stochastic:
            exponent = _roomier(ops, top, exponent, bits)
            noise = ops.noise(key, blocks)
        inverse = ops.from_bits((254 - exponent) * _EXPONENT)
        codes = ops.quantise(blocks, inverse[..., None], limit, "int8", noise)
        exponent = ops.where(top < _INFINITE, exponent, ops.constant(255, "int32"))
        count = rows.shape[0]
        return ops.concat(
            [
                ops.reshape(ops.cast(exponent, "uint8"), (count, -1)),
                ops.reshape(_narrow(ops, ops.reshape(codes, (-1,)), bits), (count, -1)),
            ],
            axis=1,
        )

    def decode(ops: Ops, data: Any, columns: int) -> Any:
        scales = columns // block
        exponent = ops.cast(data[:, :scales], "int32")
        codes = _widen(ops, ops.reshape(data[:, scales:], (-1,)), bits)
        blocks = ops.reshape(ops.cast(codes, "float32"), (data.shape[0], scales, block))
        # Exponent 255 is infinity: nothing times that is finite.
        values = blocks * ops.from_bits(exponent * _EXPONENT)[..., None]
        return ops.reshape(values, (data.shape[0], columns))

    return Codec(f"int{bits}", block, row_bytes, encode, decode, stochastic)


def signs(block: int = 1024) -> Codec:
    """One bit an element, and per block the mean magnitude as float32.

    The mean is summed in whole numbers, hence exact and of any order: magnitudes are scaled to
    below 2^20, so that ``block`` of them stay below 2^31. A block of zeros decodes to zeros.
    """
    if block not in (256, 512, 1024):
        raise ValueError(f"block={block} must be 256, 512 or 1024: sums must stay below 2^31")
    halvings = block.bit_length() - 1
    row_bytes = functools.partial(_with_scales, bits=1, block=block, scale_bytes=4)

    def encode(ops: Ops, rows: Any, used: int) -> Any:
        blocks = _blocks(ops, rows, block)
        bits = ops.abs_bits(blocks)
        top = ops.max(bits)
        exponent = _at_least(ops, ops.shift_right(top, 23) - 19, 12)
        up = ops.from_bits((254 - exponent) * _EXPONENT)
        whole = ops.quantise(ops.from_bits(bits), up[..., None], 2**20, "int32")
        down = ops.from_bits((exponent - halvings) * _EXPONENT)
        mean = ops.cast(ops.sum(whole), "float32") * down
        mean = mean * ops.constant(_shares(tuple(blocks.shape[:2]), block, used), "float32")
        mean = ops.where(top < _INFINITE, mean, ops.constant(math.nan, "float32"))
        positive = ops.positive(ops.reshape(rows, (-1,)))
        count = rows.shape[0]
        scales = ops.reshape(ops.to_bytes(ops.reshape(mean, (-1,))), (count, -1))
        packed = ops.reshape(ops.pack_bits(positive), (count, -1))
        return ops.concat([scales, packed], axis=1)

    def decode(ops: Ops, data: Any, columns: int) -> Any:
        count, scales = data.shape[0], columns // block
        mean = ops.from_bytes(ops.reshape(data[:, : 4 * scales], (-1,)), "float32")
        mean = ops.reshape(mean, (count, scales, 1))
        positive = ops.unpack_bits(ops.reshape(data[:, 4 * scales :], (-1,)))
        positive = ops.reshape(positive, (count, scales, block))
        return ops.reshape(ops.where(positive, mean, -mean), (count, columns))

    return Codec("onebit", block, row_bytes, encode, decode)


def _with_scales(columns: int, *, bits: int, block: int, scale_bytes: int) -> int:
    return columns * bits // 8 + columns // block * scale_bytes


def _blocks(ops: Ops, rows: Any, block: int) -> Any:
    return ops.reshape(rows, (rows.shape[0], rows.shape[1] // block, block))


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


@functools.lru_cache(maxsize=256)
def _shares(shape: tuple[int, ...], block: int, used: int) -> Any:
    """Return block/count for every block, where count leaves out padding; 0 for padding alone."""
    import numpy as np

    starts = np.arange(math.prod(shape)) * block
    counts = np.clip(used - starts, 0, block)
    shares = np.divide(block, counts, out=np.zeros(len(counts)), where=counts > 0)
    return shares.astype(np.float32).reshape(shape)


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
