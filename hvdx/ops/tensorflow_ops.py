"""The verbs in TensorFlow, eager and in graphs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from hvdx.ops.protocol import Ops
from hvdx.ops.shared import DIAGONAL, GATHER_BITS, MIX, REPEAT, SAMPLED, SPREAD, STEP, aim


class TensorFlowOps:
    """The verbs of :class:`Ops` for ``tf.Tensor``, eager and while tracing."""

    def __init__(self) -> None:
        self._tf = sys.modules["tensorflow"]

    def beside(self, x: Any) -> Ops:
        """See :meth:`Ops.beside`; TensorFlow itself moves what lies elsewhere."""
        return self

    def dtype(self, x: Any) -> str:
        """See :meth:`Ops.dtype`."""
        return str(x.dtype.name)

    def cast(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.cast`."""
        return self._tf.cast(x, dtype)

    def clip(self, x: Any, low: float, high: float) -> Any:
        """See :meth:`Ops.clip`."""
        limited = self._tf.clip_by_value(x, low, high)
        return self._tf.where(self._tf.math.is_finite(x), limited, x)

    def quantise(self, x: Any, factor: Any, limit: int, dtype: str, noise: Any = None) -> Any:
        """See :meth:`Ops.quantise`."""
        scaled = x * factor if noise is None else x * factor + noise
        # Twice as quick as where and clip_by_value.
        finite = self._tf.cast(self._tf.math.is_finite(scaled), self._tf.float32)
        whole = self._tf.round(self._tf.math.multiply_no_nan(scaled, finite))
        whole = self._tf.maximum(self._tf.minimum(whole, float(limit)), -float(limit))
        return self._tf.cast(whole, dtype)

    def noise(self, key: Any, like: Any, start: int = 0) -> Any:
        """See :meth:`Ops.noise`."""
        count = math.prod(like.shape)
        bitwise = self._tf.bitwise
        words = self._tf.range(start // 2, -(-(start + count) // 2)) * SPREAD + key
        for shift, kept, factor in MIX:
            lower = bitwise.bitwise_and(bitwise.right_shift(words, shift), kept)
            words = bitwise.bitwise_xor(words, lower) * factor
        halves = self._tf.reshape(self._tf.bitcast(words, self._tf.int16), [-1])[:count]
        return (self._tf.cast(self._tf.reshape(halves, like.shape), self._tf.float32) + 0.5) * STEP

    def scale(self, x: Any, factor: float) -> Any:
        """See :meth:`Ops.scale`."""
        exact = self._tf.constant(factor, self._tf.float64)  # float32 unless told
        return x * self._tf.cast(exact, x.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :meth:`Ops.zeros`."""
        return self._tf.zeros(shape, dtype)

    def constant(self, values: Any, dtype: str) -> Any:
        """See :meth:`Ops.constant`."""
        return self._tf.constant(values, dtype)

    def arange(self, size: int) -> Any:
        """See :meth:`Ops.arange`."""
        return self._tf.range(size, dtype=self._tf.int64)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """See :meth:`Ops.reshape`."""
        return self._tf.reshape(x, shape)

    def concat(self, parts: list[Any], axis: int = 0) -> Any:
        """See :meth:`Ops.concat`."""
        return self._tf.concat(parts, axis)

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        """See :meth:`Ops.where`."""
        return self._tf.where(condition, one, other)

    def either(self, condition: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """See :meth:`Ops.either`."""
        return self._tf.cond(condition, one, other)

    def finite(self, x: Any) -> Any:
        """See :meth:`Ops.finite`."""
        return self._tf.math.is_finite(x)

    def finite_or(self, x: Any, other: Any) -> Any:
        """See :meth:`Ops.finite_or`."""
        return self._tf.where(self._tf.math.is_finite(x), x, other)

    def abs_bits(self, x: Any) -> Any:
        """See :meth:`Ops.abs_bits`."""
        bits = self._tf.bitcast(x, self._tf.int32)
        return self._tf.bitwise.bitwise_and(bits, 0x7FFFFFFF)

    def positive(self, x: Any) -> Any:
        """See :meth:`Ops.positive`."""
        return self._tf.bitcast(x, self._tf.int32) >= 0

    def from_bits(self, x: Any) -> Any:
        """See :meth:`Ops.from_bits`."""
        return self._tf.bitcast(x, self._tf.float32)

    def shift_right(self, x: Any, bits: int) -> Any:
        """See :meth:`Ops.shift_right`."""
        return self._tf.bitwise.right_shift(x, self._tf.cast(bits, x.dtype))

    def mask(self, x: Any, bits: int) -> Any:
        """See :meth:`Ops.mask`."""
        return self._tf.bitwise.bitwise_and(x, self._tf.cast(bits, x.dtype))

    def max(self, x: Any, axis: int = -1) -> Any:
        """See :meth:`Ops.max`."""
        return self._tf.reduce_max(x, axis)

    def sum(self, x: Any) -> Any:
        """See :meth:`Ops.sum`."""
        return self._tf.reduce_sum(x, -1)

    def to_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.to_bytes`."""
        return self._tf.reshape(self._tf.bitcast(x, self._tf.uint8), [-1])

    def from_bytes(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.from_bytes`."""
        kind = self._tf.as_dtype(dtype)
        split = self._tf.reshape(x, [-1, kind.size]) if kind.size > 1 else x
        return self._tf.bitcast(split, kind)

    def pack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.pack_bits`."""
        eights = self.from_bytes(self._tf.cast(x, self._tf.uint8), "int64")
        top = self._tf.bitwise.right_shift(eights * GATHER_BITS, 56)
        return self._tf.cast(self._tf.bitwise.bitwise_and(top, 255), self._tf.uint8)

    def unpack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.unpack_bits`."""
        eights = self._tf.cast(x, self._tf.int64) * REPEAT
        bits = self._tf.bitcast(self._tf.bitwise.bitwise_and(eights, DIAGONAL), self._tf.uint8)
        return self._tf.reshape(bits, [-1]) > 0

    def signed(self, positive: Any, magnitude: Any) -> Any:
        """See :meth:`Ops.signed`."""
        return self._tf.where(positive, magnitude, -magnitude)

    def dequantise(self, x: Any, factor: Any) -> Any:
        """See :meth:`Ops.dequantise`."""
        return self._tf.cast(x, self._tf.float32) * factor

    def pieces(self, x: Any, columns: int) -> list[slice]:
        """See :meth:`Ops.pieces`; TensorFlow keeps the memory that it had, and graphs grow."""
        return [slice(None)]

    def bfloat16_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.bfloat16_bytes`."""
        return self.to_bytes(self._tf.cast(x, self._tf.bfloat16))

    def from_bfloat16_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.from_bfloat16_bytes`."""
        return self._tf.cast(self.from_bytes(x, "bfloat16"), self._tf.float32)

    def largest(self, x: Any, count: int) -> Any:
        """See :meth:`Ops.largest`."""
        tf = self._tf
        bits, size = self.abs_bits(x), x.shape[0]
        found = tf.range(size)
        if size >= SAMPLED * SAMPLED and count * 2 <= size:
            bound = tf.math.top_k(bits[::SAMPLED], aim(size, count)).values[-1]
            passing = tf.cast(tf.where(bits >= bound)[:, 0], tf.int32)
            found = tf.cond(tf.size(passing) >= count, lambda: passing, lambda: found)
        close = tf.gather(bits, found)
        least = self._least(close, count)
        equal = tf.cast(close == least, tf.int32)
        spare = count - tf.math.count_nonzero(close > least, dtype=tf.int32)
        chosen = (close > least) | ((equal > 0) & (tf.cumsum(equal) <= spare))
        return tf.reshape(tf.boolean_mask(found, chosen), [count])

    def _least(self, bits: Any, count: Any) -> Any:
        """Return the least of the ``count`` largest int32 that are not negative: by counting.

        First by their upper 16 bits, then, among those equal there, by their lower 15.
        """
        tf = self._tf

        def place(numbers: Any, size: int, count: Any) -> tuple[Any, Any]:
            each = tf.math.bincount(numbers, minlength=size, maxlength=size)
            reached = tf.cumsum(each, reverse=True)
            found = tf.math.count_nonzero(reached >= count, dtype=tf.int32) - 1
            return found, count - (reached[found] - each[found])

        upper = tf.bitwise.right_shift(bits, 15)
        high, rest = place(upper, 2**16, count)
        lower = tf.boolean_mask(tf.bitwise.bitwise_and(bits, 2**15 - 1), upper == high)
        return high * 2**15 + place(lower, 2**15, rest)[0]

    def take(self, x: Any, where: Any) -> Any:
        """See :meth:`Ops.take`."""
        return self._tf.gather(x, where)

    def add_at(self, x: Any, where: Any, values: Any, over: bool = False) -> Any:
        """See :meth:`Ops.add_at`."""
        return self._tf.tensor_scatter_nd_add(x, where[:, None], values)

    def repeat(self, count: Any, total: int) -> Any:
        """See :meth:`Ops.repeat`."""
        places = self._tf.repeat(self._tf.range(count.shape[0]), count)
        return self._tf.reshape(places, [total])

    def counts(self, x: Any, size: int) -> Any:
        """See :meth:`Ops.counts`."""
        found = self._tf.math.bincount(x, minlength=size, maxlength=size)
        return self._tf.reshape(found, [size])  # which a graph would not know

    def matmul(self, x: Any, y: Any, transposed: bool = False) -> Any:
        """See :meth:`Ops.matmul`."""
        return self._tf.matmul(x, y, transpose_b=transposed)

    def outer(self, left: Any, right: Any, over: Any) -> Any:
        """See :meth:`Ops.outer`."""
        product = self._tf.matmul(left, right, transpose_a=True)
        return self._tf.cast(self._tf.reshape(product, over.shape), over.dtype)

    def minus_outer(self, x: Any, left: Any, right: Any) -> Any:
        """See :meth:`Ops.minus_outer`."""
        product = self._tf.matmul(left, right, transpose_a=True)
        return x - self._tf.reshape(product, x.shape)

    def orthonormal(self, x: Any) -> Any:
        """See :meth:`Ops.orthonormal`."""
        return self._tf.transpose(self._tf.linalg.qr(self._tf.transpose(x)).q)
