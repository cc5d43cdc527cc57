"""The tensor verbs that compressors need, one class per framework.

An algorithm written against :class:`Ops` names no framework. The class is picked by the
tensor's type, among frameworks that are imported already. NumPy is the reference.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, Protocol

from hvdx.frameworks import framework_of_kind, kind_of


class Ops(Protocol):
    """Verbs on tensors of one framework. They change no argument, but where they say so.

    Results are the same to the last bit on every framework, unless a verb says otherwise.
    Tensors also know ``+ - *``, comparisons, indexing and ``.shape``, alike everywhere.

    On a GPU no verb waits for it: none brings a value or a size to the host.
    """

    def beside(self, x: Any) -> Ops:
        """Return the verbs for tensors on the device of ``x``: there new ones are made."""

    def dtype(self, x: Any) -> str:
        """Name the dtype as NumPy does: ``float32``."""

    def cast(self, x: Any, dtype: str) -> Any:
        """Convert to ``dtype``, rounding to nearest even; no copy where it is that already."""

    def clip(self, x: Any, low: float, high: float) -> Any:
        """Limit every finite element to [low, high]; infinities and NaN stay what they are.

        May return ``x`` itself. Fast where nothing exceeds: for large tensors.
        """

    def quantise(self, x: Any, factor: Any, limit: int, dtype: str, noise: Any = None) -> Any:
        """Return ``x * factor + noise`` rounded to even within ±``limit``, as ``dtype`` integers.

        0 where that is not finite. ``factor`` broadcasts; it must be a power of two if there is
        noise, since a product may be rounded before the sum or not.
        """

    def noise(self, key: Any, like: Any, start: int = 0) -> Any:
        """Return odd multiples of 2^-17 between -1/2 and 1/2, float32, in the shape of ``like``.

        Each is as likely as any other. The i-th depends on ``start + i`` and on ``key``, an
        int32 without dimensions, and on nothing else: no generator is touched. ``start`` is even.
        """

    def scale(self, x: Any, factor: float) -> Any:
        """Multiply by a Python number in the dtype of ``x``."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return zeros."""

    def constant(self, values: Any, dtype: str) -> Any:
        """Return the tensor of a number, a list or an array."""

    def arange(self, size: int) -> Any:
        """Return 0 ... size-1 as int64."""

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return the same elements, in row-major order, in another shape; one -1 is allowed."""

    def concat(self, parts: list[Any], axis: int = 0) -> Any:
        """Join along ``axis``."""

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        """Take from ``one`` where ``condition`` holds, else from ``other``; broadcasts."""

    def either(self, condition: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """Return ``one()`` where a boolean without dimensions holds, else ``other()``.

        Both must be of one shape and dtype. Both may be called.
        """

    def finite(self, x: Any) -> Any:
        """Tell, by element, what is neither infinite nor NaN."""

    def finite_or(self, x: Any, other: Any) -> Any:
        """Take from ``x`` what is finite, the rest from ``other``, of the same shape.

        Fast where all is finite: for large tensors, of which that is expected.
        """

    def abs_bits(self, x: Any) -> Any:
        """Return the bits of |x| of float32 as int32: ordered as the magnitudes are."""

    def positive(self, x: Any) -> Any:
        """Tell, by element of float32, whether the sign bit is unset; -0.0 is not positive."""

    def from_bits(self, x: Any) -> Any:
        """Return the float32 that have the bits of these int32."""

    def shift_right(self, x: Any, bits: int) -> Any:
        """Shift int32 that are not negative, or uint8."""

    def mask(self, x: Any, bits: int) -> Any:
        """Keep only the bits set in ``bits``, of integers."""

    def max(self, x: Any) -> Any:
        """Return the largest along the last axis."""

    def sum(self, x: Any) -> Any:
        """Return the sum along the last axis, in the same dtype; exact for integers only."""

    def to_bytes(self, x: Any) -> Any:
        """Return a 1-D tensor's memory as uint8, little-endian."""

    def from_bytes(self, x: Any, dtype: str) -> Any:
        """Return the 1-D tensor whose memory these uint8 are."""

    def pack_bits(self, x: Any) -> Any:
        """Write 1-D booleans, a multiple of 8 of them, as uint8: the first is the lowest bit."""

    def unpack_bits(self, x: Any) -> Any:
        """Undo :meth:`pack_bits`."""

    def signed(self, positive: Any, magnitude: Any) -> Any:
        """Return float32 magnitudes where ``positive`` holds, else their negatives; broadcasts."""

    def dequantise(self, x: Any, factor: Any) -> Any:
        """Return integers times float32 ``factor``, which broadcasts."""

    def pieces(self, x: Any, columns: int) -> list[slice]:
        """Return the slices in which to treat rows of ``columns`` elements, one after the other.

        ``x`` is what is to be sliced.

        On a CPU, temporary tensors that fit its cache are far quicker than large ones, for which
        the system finds and clears new pages each time.
        """

    def bfloat16_bytes(self, x: Any) -> Any:
        """Return 1-D float32, rounded to bfloat16 (ties to even; NaN stay NaN), as uint8."""

    def from_bfloat16_bytes(self, x: Any) -> Any:
        """Return the float32 of a 1-D tensor's bfloat16."""

    def largest(self, x: Any, count: int) -> Any:
        """Return where the ``count`` largest magnitudes of 1-D float32 are: int32, ascending.

        Among equals the lower index wins. NaN and infinities count as larger than all else.
        """

    def take(self, x: Any, where: Any) -> Any:
        """Return the elements of a 1-D tensor at the indices ``where``."""

    def add_at(self, x: Any, where: Any, values: Any, over: bool = False) -> Any:
        """Return 1-D ``x`` with ``values`` added at the indices ``where``, none of them twice.

        With ``over`` it may be written over ``x``.
        """

    def repeat(self, count: Any, total: int) -> Any:
        """Return index i ``count[i]`` times, as int32; the counts add up to ``total``."""

    def counts(self, x: Any, size: int) -> Any:
        """Count how often each of 0 ... size-1 occurs among int32, as int32."""

    def matmul(self, x: Any, y: Any, transposed: bool = False) -> Any:
        """Multiply ``x`` by ``y``, or by ``y`` transposed; last bits differ between frameworks.

        A flat ``x`` and a large ``y`` are far quicker than a large ``x`` and a tall ``y``.
        """

    def outer(self, left: Any, right: Any, over: Any) -> Any:
        """Return leftᵀ right, in the shape and dtype of ``over``: it may be written there.

        Last bits differ between frameworks.
        """

    def minus_outer(self, x: Any, left: Any, right: Any) -> Any:
        """Return ``x`` less leftᵀ right, in its shape; it may be written over ``x``."""

    def orthonormal(self, x: Any) -> Any:
        """Return an orthonormal basis of a flat matrix's rows, by QR; bits may differ.

        Rows that depend on others, zeros among them, become any orthonormal complement.
        """


#: A byte multiplied by the first stands in all eight bytes of an int64; the second leaves of
#: byte i only its bit i.
_REPEAT, _DIAGONAL = 0x0101010101010101, 0x8040201008040201 - 2**64
#: Eight bytes of 0 or 1, read as an int64 (the first is the lowest) and multiplied by this, have
#: their bits side by side in the highest byte: byte i comes to rest at bit 56 + i.
_GATHER_BITS = 0x0102040810204080
#: How :meth:`Ops.noise` mixes an index into a random number of 32 bits: shift, keep what a shift
#: without sign would, multiply. Multiplications wrap; the constants are signed.
_MIX = ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B - 2**32), (16, 0xFFFF, 1))
_SPREAD = 0x9E3779B1 - 2**32
_STEP = 2.0**-16
_PIECE = 2**18  # elements, 1 MiB of float32
_SAMPLED = 64  # one element in so many tells what the largest are like


def _aim(size: int, count: int) -> int:
    """Return how many of a sample shall pass, for somewhat more than ``count`` of all to do so."""
    mean = count // _SAMPLED
    return min(-(-size // _SAMPLED), mean + 4 * math.isqrt(mean) + 8)


def _slices(rows: int, columns: int) -> list[slice]:
    """Cut rows into pieces of about ``_PIECE`` elements."""
    step = max(1, _PIECE // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


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
        words = places * self._np.int32(_SPREAD) + self._np.asarray(key)
        for shift, kept, factor in _MIX:
            words = (words ^ words >> shift & kept) * self._np.int32(factor)
        halves = words.view("int16")[:count].reshape(like.shape)
        return (halves.astype("float32") + self._np.float32(0.5)) * _STEP

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

    def max(self, x: Any) -> Any:
        """See :meth:`Ops.max`."""
        return x.max(-1)

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
        return _slices(x.shape[0], columns)

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


class TorchOps:
    """The verbs of :class:`Ops` for ``torch.Tensor``.

    Args:
        device: where new tensors are made; None: on the device in use by default.
    """

    def __init__(self, device: Any = None) -> None:
        self._torch = sys.modules["torch"]
        self._device = device

    def beside(self, x: Any) -> Ops:
        """See :meth:`Ops.beside`."""
        return _on_device(x.device)

    def dtype(self, x: Any) -> str:
        """See :meth:`Ops.dtype`."""
        return str(x.dtype).removeprefix("torch.")

    def cast(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.cast`."""
        return x.to(getattr(self._torch, dtype))

    def clip(self, x: Any, low: float, high: float) -> Any:
        """See :meth:`Ops.clip`; on a CPU looking takes a tenth of the time."""
        if x.device.type == "cpu" and x.numel():
            least, most = self._torch.aminmax(x)  # NaN if any is
            if low <= least and most <= high:
                return x
        return self._torch.where(self._torch.isfinite(x), x.clamp(low, high), x)

    def quantise(self, x: Any, factor: Any, limit: int, dtype: str, noise: Any = None) -> Any:
        """See :meth:`Ops.quantise`."""
        scaled = x * factor if noise is None else self._torch.addcmul(noise, x, factor)
        scaled = scaled.nan_to_num_(0.0, 0.0, 0.0)
        return scaled.round_().clamp_(-limit, limit).to(getattr(self._torch, dtype))

    def noise(self, key: Any, like: Any, start: int = 0) -> Any:
        """See :meth:`Ops.noise`."""
        count = math.prod(like.shape)
        words = self._torch.arange(
            start // 2, -(-(start + count) // 2), dtype=self._torch.int32, device=like.device
        )
        words.mul_(_SPREAD).add_(key)
        for shift, kept, factor in _MIX:
            words.bitwise_xor_((words >> shift).bitwise_and_(kept))
            if factor != 1:
                words.mul_(factor)
        halves = words.view(self._torch.int16)[:count].view(like.shape)
        return halves.float().add_(0.5).mul_(_STEP)

    def scale(self, x: Any, factor: float) -> Any:
        """See :meth:`Ops.scale`."""
        return x * factor

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :meth:`Ops.zeros`."""
        return self._torch.zeros(shape, dtype=getattr(self._torch, dtype), device=self._device)

    def constant(self, values: Any, dtype: str) -> Any:
        """See :meth:`Ops.constant`; a GPU is waited for, unless it is a number."""
        kind = getattr(self._torch, dtype)
        if isinstance(values, (int, float)):
            return self._torch.full((), values, dtype=kind, device=self._device)
        return self._torch.as_tensor(values, dtype=kind, device=self._device)

    def arange(self, size: int) -> Any:
        """See :meth:`Ops.arange`."""
        return self._torch.arange(size, device=self._device)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """See :meth:`Ops.reshape`."""
        return x.reshape(shape)

    def concat(self, parts: list[Any], axis: int = 0) -> Any:
        """See :meth:`Ops.concat`."""
        return self._torch.cat(parts, axis)

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        """See :meth:`Ops.where`."""
        return self._torch.where(condition, one, other)

    def either(self, condition: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """See :meth:`Ops.either`; a GPU is not waited for."""
        if condition.device.type == "cpu":
            return one() if condition else other()
        return self._torch.where(condition, one(), other())

    def finite(self, x: Any) -> Any:
        """See :meth:`Ops.finite`."""
        return self._torch.isfinite(x)

    def finite_or(self, x: Any, other: Any) -> Any:
        """See :meth:`Ops.finite_or`; on a CPU a sum takes a tenth of the time."""
        if x.device.type == "cpu" and bool(x.sum().isfinite()):
            return x
        return self._torch.where(self._torch.isfinite(x), x, other)

    def abs_bits(self, x: Any) -> Any:
        """See :meth:`Ops.abs_bits`."""
        return x.abs().view(self._torch.int32)

    def positive(self, x: Any) -> Any:
        """See :meth:`Ops.positive`."""
        return x.view(self._torch.int32) >= 0

    def from_bits(self, x: Any) -> Any:
        """See :meth:`Ops.from_bits`."""
        return x.view(self._torch.float32)

    def shift_right(self, x: Any, bits: int) -> Any:
        """See :meth:`Ops.shift_right`."""
        return x >> bits

    def mask(self, x: Any, bits: int) -> Any:
        """See :meth:`Ops.mask`."""
        return x & bits

    def max(self, x: Any) -> Any:
        """See :meth:`Ops.max`."""
        return x.amax(-1)

    def sum(self, x: Any) -> Any:
        """See :meth:`Ops.sum`."""
        return x.sum(-1, dtype=x.dtype)

    def to_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.to_bytes`."""
        return x.contiguous().view(self._torch.uint8)

    def from_bytes(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.from_bytes`."""
        return x.clone().view(getattr(self._torch, dtype))  # a copy: aligned

    def pack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.pack_bits`."""
        eights = x.view(self._torch.uint8).view(self._torch.int64)
        return (eights * _GATHER_BITS >> 56).to(self._torch.uint8)

    def unpack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.unpack_bits`."""
        eights = x.long().mul_(_REPEAT).bitwise_and_(_DIAGONAL)
        return eights.view(self._torch.uint8).ne(0)

    def signed(self, positive: Any, magnitude: Any) -> Any:
        """See :meth:`Ops.signed`; many times quicker than ``where``."""
        signs = positive.to(self._torch.int8).mul_(2).sub_(1)
        return signs.float().mul_(magnitude)

    def dequantise(self, x: Any, factor: Any) -> Any:
        """See :meth:`Ops.dequantise`."""
        return x.float().mul_(factor)

    def pieces(self, x: Any, columns: int) -> list[slice]:
        """See :meth:`Ops.pieces`."""
        return _slices(x.shape[0], columns) if x.device.type == "cpu" else [slice(None)]

    def bfloat16_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.bfloat16_bytes`."""
        return self.to_bytes(x.bfloat16())

    def from_bfloat16_bytes(self, x: Any) -> Any:
        """See :meth:`Ops.from_bfloat16_bytes`."""
        return self.from_bytes(x, "bfloat16").float()

    def largest(self, x: Any, count: int) -> Any:
        """See :meth:`Ops.largest`; on a CPU looks closer only at what passes a sample's bound."""
        bits = self.abs_bits(x)
        if x.device.type != "cpu":
            return self._largest_unseen(bits, count)
        found = self._passing(bits, self._bound(bits, count))
        if len(found) < count:
            found = self._torch.arange(len(bits), device=x.device)
        close = bits[found]
        least = close.kthvalue(len(close) - count + 1).values
        equal = close == least
        spare = count - (close > least).sum()
        chosen = (close > least) | equal & (equal.cumsum(0) <= spare)
        return found[chosen].int()

    def _largest_unseen(self, bits: Any, count: int) -> Any:
        """Do the same without asking how many elements pass a bound, for which a GPU must wait.

        A magnitude and, below it, its index counted from the end are one number: no two are equal.
        """
        places = self._torch.arange(len(bits), device=bits.device)
        keys = (bits.long() << 32).add_(places, alpha=-1)
        return keys.topk(count, sorted=False).indices.sort().values.int()

    def _passing(self, bits: Any, bound: Any) -> Any:
        """Return where ``bits`` is ``bound`` or more; they are few: whole eights are looked at."""
        passes = bits >= bound
        whole = len(passes) // 8 * 8
        eights = passes[:whole].view(self._torch.int64).nonzero()
        inside = passes[:whole].view(-1, 8)[eights[:, 0]].nonzero()
        found = eights[inside[:, 0], 0] * 8 + inside[:, 1]
        return self._torch.cat([found, passes[whole:].nonzero()[:, 0] + whole])

    def _bound(self, bits: Any, count: int) -> Any:
        """Guess a bound that somewhat more than ``count`` elements pass, from one in 64."""
        size = len(bits)
        if size < _SAMPLED * _SAMPLED or count * 2 > size:
            return 0
        return bits[::_SAMPLED].topk(_aim(size, count), sorted=False).values.amin()

    def take(self, x: Any, where: Any) -> Any:
        """See :meth:`Ops.take`."""
        return x[where.long()]

    def add_at(self, x: Any, where: Any, values: Any, over: bool = False) -> Any:
        """See :meth:`Ops.add_at`."""
        return x.index_add_(0, where, values) if over else x.index_add(0, where, values)

    def repeat(self, count: Any, total: int) -> Any:
        """See :meth:`Ops.repeat`."""
        places = self._torch.arange(len(count), dtype=self._torch.int32, device=count.device)
        return places.repeat_interleave(count.long(), output_size=total)

    def counts(self, x: Any, size: int) -> Any:
        """See :meth:`Ops.counts`."""
        if x.device.type == "cpu":
            return x.bincount(minlength=size).int()
        found = self._torch.zeros(size, dtype=self._torch.int32, device=x.device)
        return found.index_add_(0, x, self._torch.ones_like(x))

    def matmul(self, x: Any, y: Any, transposed: bool = False) -> Any:
        """See :meth:`Ops.matmul`."""
        return x @ (y.t() if transposed else y)

    def outer(self, left: Any, right: Any, over: Any) -> Any:
        """See :meth:`Ops.outer`."""
        if over.dtype != left.dtype or not over.is_contiguous():
            return (left.t() @ right).reshape(over.shape).to(over.dtype)
        self._torch.mm(left.t(), right, out=over.view(left.shape[1], right.shape[1]))
        return over

    def minus_outer(self, x: Any, left: Any, right: Any) -> Any:
        """See :meth:`Ops.minus_outer`."""
        matrix = x.reshape(left.shape[1], right.shape[1])
        return matrix.addmm_(left.t(), right, alpha=-1).reshape(x.shape)

    def orthonormal(self, x: Any) -> Any:
        """See :meth:`Ops.orthonormal`."""
        return self._torch.linalg.qr(x.t()).Q.t().contiguous()


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
        words = self._tf.range(start // 2, -(-(start + count) // 2)) * _SPREAD + key
        for shift, kept, factor in _MIX:
            lower = bitwise.bitwise_and(bitwise.right_shift(words, shift), kept)
            words = bitwise.bitwise_xor(words, lower) * factor
        halves = self._tf.reshape(self._tf.bitcast(words, self._tf.int16), [-1])[:count]
        return (self._tf.cast(self._tf.reshape(halves, like.shape), self._tf.float32) + 0.5) * _STEP

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

    def max(self, x: Any) -> Any:
        """See :meth:`Ops.max`."""
        return self._tf.reduce_max(x, -1)

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
        top = self._tf.bitwise.right_shift(eights * _GATHER_BITS, 56)
        return self._tf.cast(self._tf.bitwise.bitwise_and(top, 255), self._tf.uint8)

    def unpack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.unpack_bits`."""
        eights = self._tf.cast(x, self._tf.int64) * _REPEAT
        bits = self._tf.bitcast(self._tf.bitwise.bitwise_and(eights, _DIAGONAL), self._tf.uint8)
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
        if size >= _SAMPLED * _SAMPLED and count * 2 <= size:
            bound = tf.math.top_k(bits[::_SAMPLED], _aim(size, count)).values[-1]
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


_CLASSES: dict[str, type[Any]] = {
    "numpy": NumpyOps,
    "torch": TorchOps,
    "tensorflow": TensorFlowOps,
}


_made: dict[type, Ops] = {}


@functools.cache
def _on_device(device: Any) -> TorchOps:
    return TorchOps(device)


def ops_for(kind: type) -> Ops:
    """Return the verbs for tensors of type ``kind``.

    Raises:
        TypeError: it is a tensor of no framework hvdx serves.
    """
    if kind in _made:
        return _made[kind]
    library = kind_of(kind)
    if library is None:
        raise TypeError(f"no tensor verbs for {kind.__module__}.{kind.__qualname__}")
    ops: Ops = _CLASSES[framework_of_kind(library)]()
    _made[kind] = ops
    return ops
