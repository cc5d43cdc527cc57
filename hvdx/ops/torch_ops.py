"""The verbs in PyTorch, on any device."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

from hvdx.ops.protocol import Ops
from hvdx.ops.shared import DIAGONAL, GATHER_BITS, MIX, REPEAT, SAMPLED, SPREAD, STEP, aim, slices


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
        words.mul_(SPREAD).add_(key)
        for shift, kept, factor in MIX:
            words.bitwise_xor_((words >> shift).bitwise_and_(kept))
            if factor != 1:
                words.mul_(factor)
        halves = words.view(self._torch.int16)[:count].view(like.shape)
        return halves.float().add_(0.5).mul_(STEP)

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

    def max(self, x: Any, axis: int = -1) -> Any:
        """See :meth:`Ops.max`."""
        return x.amax(axis)

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
        return (eights * GATHER_BITS >> 56).to(self._torch.uint8)

    def unpack_bits(self, x: Any) -> Any:
        """See :meth:`Ops.unpack_bits`."""
        eights = x.long().mul_(REPEAT).bitwise_and_(DIAGONAL)
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
        return slices(x.shape[0], columns) if x.device.type == "cpu" else [slice(None)]

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
        places = self._torch.arange(len(bits), dtype=self._torch.int32, device=bits.device)
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
        if size < SAMPLED * SAMPLED or count * 2 > size:
            return 0
        return bits[::SAMPLED].topk(aim(size, count), sorted=False).values.amin()

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


@functools.cache
def _on_device(device: Any) -> TorchOps:
    return TorchOps(device)
