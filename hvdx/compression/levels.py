"""Bring rows and columns to one level before a codec gives one size to many elements.

In gradients of transformers some rows and columns are many times larger than others: words that are
frequent, units that are active. Signs with one mean magnitude for 1024 elements give the small ones
the size of the large; feeding that error back takes long, and Adam takes it for noise. A power of
two for each row and each column, a byte each, tells most of it, as sums of rows and of columns tell
Adafactor most of the second moments (Shazeer and Stern, ICML 2018).

Powers of two come from exponents of largest magnitudes: exact, and the same on every framework.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hvdx.comm import Allgather, Allreduce, Ranks, Work
from hvdx.compression.powersgd import matrix_shape
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

_LEAST, _MOST = 2, 252  # of biased exponents whose powers of two, and their inverses, are normal
_EXPONENT = 2**23  # where the exponent begins in a float32
_FEW = 8  # ranks up to which all can have a byte of all as cheaply as Horovod's maxima of int32


class Levels(NamedTuple):
    """Two powers of two for each element, flat: float32, their product is 1."""

    up: Any  # what it is multiplied by before it is written
    down: Any  # what it is multiplied by once it has been read


def leveled(shape: tuple[int, ...]) -> bool:
    """Tell whether a byte for each row and column is no more than a bit for each element."""
    rows, columns = matrix_shape(shape)
    return 8 * (rows + columns) <= rows * columns


def levels(ops: Ops, flat: Any, shape: tuple[int, ...]) -> Work[Levels]:
    """Agree with the other ranks on the levels of a gradient.

    With e and f the exponents of the largest magnitudes in an element's row and column, on any
    rank, and t that of the largest of all, its power of two is 2^(e + f - t).

    Args:
        ops: the verbs.
        flat: float32, in row-major order.
        shape: what it is flattened from.
    """
    rows, columns = matrix_shape(shape)
    bits = ops.abs_bits(ops.reshape(flat, (rows, columns)))
    largest = ops.concat([ops.max(bits), ops.max(bits, 0)])
    told = yield from _largest_anywhere(ops, ops.shift_right(largest, 23))
    told = ops.where(told > _MOST, ops.constant(_MOST, "int32"), told)
    both = told[:rows, None] + told[None, rows:] - ops.max(told)
    both = ops.where(both < _LEAST, ops.constant(_LEAST, "int32"), both)
    both = ops.reshape(both, (math.prod(shape),))
    return Levels(ops.from_bits((254 - both) * _EXPONENT), ops.from_bits(both * _EXPONENT))


def _largest_anywhere(ops: Ops, exponents: Any) -> Work[Any]:
    """Return what is largest over the ranks; Horovod's maxima know no bytes in PyTorch."""
    ranks = yield Ranks()
    if ranks > _FEW:
        return (yield Allreduce(exponents, "levels", ReduceOp.Max))
    everyone = yield Allgather(ops.cast(exponents, "uint8"), "levels")
    table = ops.reshape(everyone, (ranks, exponents.shape[0]))
    return ops.max(ops.cast(table, "int32"), 0)
