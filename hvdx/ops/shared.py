"""Numbers and sizes by which several frameworks' verbs do the same in the same way."""

from __future__ import annotations

import math

#: A byte multiplied by the first stands in all eight bytes of an int64; the second leaves of
#: byte i only its bit i.
REPEAT, DIAGONAL = 0x0101010101010101, 0x8040201008040201 - 2**64
#: Eight bytes of 0 or 1, read as an int64 (the first is the lowest) and multiplied by this, have
#: their bits side by side in the highest byte: byte i comes to rest at bit 56 + i.
GATHER_BITS = 0x0102040810204080
#: How :meth:`Ops.noise` mixes an index into a random number of 32 bits: shift, keep what a shift
#: without sign would, multiply. Multiplications wrap; the constants are signed.
MIX = ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B - 2**32), (16, 0xFFFF, 1))
SPREAD = 0x9E3779B1 - 2**32
STEP = 2.0**-16
PIECE = 2**18  # elements, 1 MiB of float32
SAMPLED = 64  # one element in so many tells what the largest are like


def aim(size: int, count: int) -> int:
    """Return how many of a sample shall pass, for somewhat more than ``count`` of all to do so."""
    mean = count // SAMPLED
    return min(-(-size // SAMPLED), mean + 4 * math.isqrt(mean) + 8)


def slices(rows: int, columns: int) -> list[slice]:
    """Cut rows into pieces of about ``PIECE`` elements."""
    step = max(1, PIECE // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]
