"""How the rows of sparse gradients travel: their numbers exactly, their values by a codec.

Each row is bytes of its own, so that ranks may gather different numbers of rows and need not
tell each other how many. There is no error feedback: rows differ from step to step.
"""

from __future__ import annotations

import math
from typing import Any

from hvdx.comm import Allgather, Together, Work
from hvdx.compression.base import Compressor
from hvdx.compression.codecs import Codec
from hvdx.ops import Ops

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_NUMBER = 4  # bytes of a row's number


def row_codec(compressor: Compressor, shape: tuple[int, ...], dtype: str) -> Codec | None:
    """Return what writes rows of a parameter under ``compressor``; None if they travel raw."""
    columns = math.prod(shape[1:])
    if compressor.rows is None or dtype not in _FLOATS or not columns or shape[0] >= 2**31:
        return None
    return compressor.rows(columns)


def gather_rows(
    ops: Ops, codec: Codec, where: Any, values: Any, *beside: Any
) -> Work[tuple[Any, Any, list[Any]]]:
    """Gather all ranks' rows in rank order.

    Args:
        ops: the verbs of the tensors.
        codec: of :func:`row_codec`.
        where: (n,) numbers of rows below 2^31; n may differ between ranks, and be 0.
        values: (n, ...) floats.
        beside: requests to carry out at the same time.

    Returns:
        Numbers in the dtype of ``where``, values in shape and dtype as given, and the answers to
        ``beside``.
    """
    shape = tuple(values.shape[1:])
    columns = math.prod(shape)
    whole = -(-columns // codec.block) * codec.block
    rows = ops.cast(ops.reshape(values, (-1, columns)), "float32")
    if whole > columns:  # a part of the row itself, times 0: how many rows may not be known yet
        rows = ops.concat([rows, rows[:, : whole - columns] * 0.0], axis=1)
    numbers = ops.reshape(ops.to_bytes(ops.cast(where, "int32")), (-1, _NUMBER))
    data = ops.concat([numbers, codec.encode(ops, rows, whole)], axis=1)
    everyone, *answers = yield Together((Allgather(data, "rows"), *beside))
    numbers = ops.from_bytes(ops.reshape(everyone[:, :_NUMBER], (-1,)), "int32")
    rows = codec.decode(ops, everyone[:, _NUMBER:], whole)[:, :columns]
    return (
        ops.cast(numbers, ops.dtype(where)),
        ops.cast(ops.reshape(rows, (-1, *shape)), ops.dtype(values)),
        answers,
    )
