"""How large the elements of a gradient are, as its rows and columns tell.

In gradients of transformers some rows and columns are many times larger than others: words that are
frequent, units that are active. Signs with one magnitude for 1024 elements give the small ones the
size of the large; feeding that error back takes long, and Adam takes it for noise. A byte for each
row and column tells most of it, as sums of rows and of columns tell Adafactor most of the second
moments (Shazeer and Stern, ICML 2018).

Sizes are powers of two, made of exponents of largest magnitudes: exact, and so the same on every
framework.
"""

from __future__ import annotations

import math
from typing import Any

from hvdx.comm import Allgather, Allreduce, Ranks, Work
from hvdx.compression.powersgd import matrix_shape
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

_LEAST = 97  # the biased exponent of 2^-30
_EXPONENT = 2**23  # where the exponent begins in a float32
_FEW = 8  # ranks up to which all can have a byte of all as cheaply as Horovod's maxima of int32


def leveled(shape: tuple[int, ...]) -> bool:
    """Tell whether a byte for each row and column is no more than a bit for each element."""
    rows, columns = matrix_shape(shape)
    return 8 * (rows + columns) <= rows * columns


def sizes_of(ops: Ops, flat: Any, shape: tuple[int, ...], lost: Any = None) -> Work[Any]:
    """Agree with the other ranks on the sizes of a gradient's elements, against the largest.

    With e and f the exponents of the largest magnitudes in an element's row and column, on any
    rank, and t that of the largest of all, its size is 2^(e - t) 2^(f - t), of which neither counts
    as less than 2^-30.

    Args:
        ops: the verbs.
        flat: float32, in row-major order.
        shape: what it is flattened from.
        lost: what this rank, as owner of a piece, will add to the mean: laid out likewise. Where
            gradients have become small it is to be sent none the less.

    Returns:
        Float32, flat.
    """
    rows, columns = matrix_shape(shape)
    bits = ops.abs_bits(flat)
    if lost is not None:
        others = ops.abs_bits(lost)
        bits = ops.where(bits < others, others, bits)
    bits = ops.reshape(bits, (rows, columns))
    largest = ops.concat([ops.max(bits), ops.max(bits, 0)])
    told = yield from _largest_anywhere(ops, ops.shift_right(largest, 23))
    exponents = told - ops.max(told) + 127
    exponents = ops.where(exponents < _LEAST, ops.constant(_LEAST, "int32"), exponents)
    sides = ops.from_bits(exponents * _EXPONENT)
    return ops.reshape(sides[:rows, None] * sides[None, rows:], (math.prod(shape),))


def _largest_anywhere(ops: Ops, exponents: Any) -> Work[Any]:
    """Return what is largest over the ranks; Horovod's maxima know no bytes in PyTorch."""
    ranks = yield Ranks()
    if ranks > _FEW:
        return (yield Allreduce(exponents, "levels", ReduceOp.Max))
    everyone = yield Allgather(ops.cast(exponents, "uint8"), "levels")
    table = ops.reshape(everyone, (ranks, exponents.shape[0]))
    return ops.max(ops.cast(table, "int32"), 0)
