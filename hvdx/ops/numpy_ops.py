"""The verbs in NumPy: the reference that the others are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hvdx.ops.protocol import Ops
from hvdx.ops.shared import MIX, SPREAD, STEP, slices


class NumpyOps:
    """The verbs of :class:`Ops` for ``numpy.ndarray``."""

    def __init__(self) -> None:
        import numpy

        self._np = numpy

    def beside(self, x: Any) -> Ops:
        """See :meth:`Ops.beside`."""
        return self

    def dtype(self, x: Any) -> str:
        """See :meth:`Ops.dtype`."""
        return str(x.dtype)

    def cast(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.cast`."""
        return self._np.asarray(x).astype(dtype, copy=False)

    def clip(self, x: Any, low: float, high: float) -> Any:
        """See :meth:`Ops.clip`."""
        return self._np.where(self._np.isfinite(x), self._np.clip(x, low, high), x)

    def quantise(self, x: Any, factor: Any, limit: int, dtype: str, noise: Any = None) -> Any:
        """See :meth:`Ops.quantise`."""
        scaled = x * factor if noise is None else x * factor + noise
        scaled = self._np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
        return self._np.clip(self._np.rint(scaled), -limit, limit).astype(dtype)

    def noise(self, key: Any, like: Any, start: int = 0) -> Any:
        """See :meth:`Ops.noise`."""
        count = math.prod(like.shape)
        places = self._np.arange(start // 2, -(-(start + count) // 2), dtype="int32")
        words = places * self._np.int32(SPREAD) + self._np.asarray(key)
        for shift, kept, factor in MIX:
            words = (words ^ words >> shift & kept) * self._np.int32(factor)
        halves = words.view("int16")[:count].reshape(like.shape)
        return (halves.astype("float32") + self._np.float32(0.5)) * STEP

    def scale(self, x: Any, factor: float) -> Any:
        """See :meth:`Ops.scale`."""
        return self._np.asarray(x * self._np.asarray(factor, x.dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :meth:`Ops.zeros`."""
        return self._np.zeros(shape, dtype)

    def constant(self, values: Any, dtype: str) -> Any:
        """See :meth:`Ops.constant`."""
        return self._np.asarray(values, dtype)

    def arange(self, size: int) -> Any:
        """See :meth:`Ops.arange`."""
        return self._np.arange(size, dtype="int64")

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """See :meth:`Ops.reshape`."""
        return x.reshape(shape)

    def concat(self, parts: list[Any], axis: int = 0) -> Any:
        """See :meth:`Ops.concat`."""
        return self._np.concatenate(parts, axis)

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        """See :meth:`Ops.where`."""
        return self._np.where(condition, one, other)

    def either(self, condition: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """See :meth:`Ops.either`."""
        return one() if condition else other()

    def finite(self, x: Any) -> Any:
        """See :meth:`Ops.finite`."""
        return self._np.isfinite(x)

    def finite_or(self, x: Any, other: Any) -> Any:
        """See :meth:`Ops.finite_or`."""
        return self._np.where(self._np.isfinite(x), x, other)

    def abs_bits(self, x: Any) -> Any:
        """See :meth:`Ops.abs_bits`."""
        return self._np.abs(x).view("int32")

    def positive(self, x: Any) -> Any:
        """See :meth:`Ops.positive`."""
        return ~self._np.signbit(x)

    def from_bits(self, x: Any) -> Any:
        """See :meth:`Ops.from_bits`."""
        return x.view("float32")

    def shift_right(self, x: Any, bits: int) -> Any:
        """See :meth:`Ops.shift_right`."""
        return x >> bits

    def mask(self, x: Any, bits: int) -> Any:
        """See :meth:`Ops.mask`."""
        return x & bits

    def max(self, x: Any, axis: int = -1) -> Any:
        """See :meth:`Ops.max`."""
        return x.max(axis)

    def sum(self, x: Any) -> Any:
        """See :meth:`Ops.sum`."""
        return x.sum(-1, dtype=x.dtype)

    def to_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.to_bytes`."""
        return self._np.ascontiguousarray(x).view("uint8")

    def from_bytes(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.from_bytes`."""
        return self._np.array(x).view(dtype)  # a copy: aligned

    def pack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.pack_bits`."""
        return self._np.packbits(x, bitorder="little")

    def unpack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.unpack_bits`."""
        return self._np.unpackbits(x, bitorder="little").astype(bool)

    def signed(self, positive: Any, magnitude: Any) -> Any:
        """See :meth:`Ops.signed`."""
        return self._np.where(positive, magnitude, -magnitude)

    def dequantise(self, x: Any, factor: Any) -> Any:
        """See :meth:`Ops.dequantise`."""
        return x.astype("float32") * factor

    def pieces(self, x: Any, columns: int) -> list[slice]:
        """See :meth:`Ops.pieces`."""
        return slices(x.shape[0], columns)

    def bfloat16_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.bfloat16_bytes`; NumPy has no such type."""
        bits = self._np.ascontiguousarray(x).view("uint32")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        rounded = self._np.where(self._np.isnan(x), 0x7FC0, rounded)
        return rounded.astype("uint16").view("uint8")

    def from_bfloat16_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.from_bfloat16_bytes`."""
        return (self.from_bytes(x, "uint16").astype("uint32") << 16).view("float32")

    def largest(self, x: Any, count: int) -> Any:
        """See :meth:`Ops.largest`."""
        order = self._np.argsort(-self.abs_bits(x), kind="stable")
        return self._np.sort(order[:count]).astype("int32")

    def take(self, x: Any, where: Any) -> Any:
        """See :meth:`Ops.take`."""
        return x[where]

    def add_at(self, x: Any, where: Any, values: Any, over: bool = False) -> Any:
        """See :meth:`Ops.add_at`."""
        result = x if over else x.copy()
        result[where] += values
        return result

    def repeat(self, count: Any, total: int) -> Any:
        """See :meth:`Ops.repeat`."""
        return self._np.repeat(self._np.arange(len(count), dtype="int32"), count)

    def counts(self, x: Any, size: int) -> Any:
        """See :meth:`Ops.counts`."""
        return self._np.bincount(x, minlength=size).astype("int32")

    def matmul(self, x: Any, y: Any, transposed: bool = False) -> Any:
        """See :meth:`Ops.matmul`."""
        return x @ (y.T if transposed else y)

    def outer(self, left: Any, right: Any, over: Any) -> Any:
        """See :meth:`Ops.outer`."""
        return (left.T @ right).reshape(over.shape).astype(over.dtype, copy=False)

    def minus_outer(self, x: Any, left: Any, right: Any) -> Any:
        """See :meth:`Ops.minus_outer`."""
        return x - (left.T @ right).reshape(x.shape)

    def orthonormal(self, x: Any) -> Any:
        """See :meth:`Ops.orthonormal`."""
        return self._np.ascontiguousarray(self._np.linalg.qr(x.T)[0].T)
