"""Tensors with a shape and a dtype and no values, to ask a compressor what it would send.

What a method sends may depend on shapes, options and the number of ranks, never on values
(:mod:`hvdx.comm`). So the very code that trains tells its bytes for a model of any size between
any number of ranks, in no time and without memory; no formula has to be kept beside it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from hvdx.buckets import width
from hvdx.comm import (
    FACTS,
    Allgather,
    Rank,
    Ranks,
    Reducescatter,
    Together,
    Work,
    drive,
)
from hvdx.compression.base import Compressor, Spec
from hvdx.compression.plans import Form
from hvdx.compression.state import leaves
from hvdx.link import Message, messages


class Outline:
    """A tensor without values."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = tuple(shape), dtype

    @property
    def size(self) -> int:
        """Count the elements."""
        return math.prod(self.shape)

    def of(self, dtype: str) -> Outline:
        """Return the same shape in another dtype."""
        return Outline(self.shape, dtype)

    def __getitem__(self, key: Any) -> Outline:
        import numpy as np

        return Outline(np.broadcast_to(np.False_, self.shape)[key].shape, self.dtype)

    def _with(self, other: Any) -> Outline:
        return Outline(_broadcast(self, other), self.dtype)

    def _compared(self, other: Any) -> Outline:
        return Outline(_broadcast(self, other), "bool")

    def __neg__(self) -> Outline:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = _with
    __lt__ = __le__ = __gt__ = __ge__ = _compared
    __eq__ = _compared  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def _broadcast(*tensors: Any) -> tuple[int, ...]:
    import numpy as np

    return np.broadcast_shapes(*(getattr(each, "shape", ()) for each in tensors))


def _same(self: Any, x: Outline, *_: Any, **__: Any) -> Outline:
    return x


def _as(dtype: str) -> Callable[..., Outline]:
    def verb(self: Any, x: Outline) -> Outline:
        return x.of(dtype)

    return verb


def _folded(self: Any, x: Outline) -> Outline:
    return Outline(x.shape[:-1], x.dtype)


class OutlineOps:
    """The verbs of :class:`hvdx.ops.Ops` for :class:`Outline`."""

    clip = scale = finite_or = shift_right = mask = add_at = orthonormal = minus_outer = _same
    max = sum = _folded
    finite = positive = _as("bool")
    abs_bits, from_bits = _as("int32"), _as("float32")

    def dtype(self, x: Outline) -> str:
        """See :meth:`hvdx.ops.Ops.dtype`, as for all verbs below."""
        return x.dtype

    def cast(self, x: Any, dtype: str) -> Outline:
        """Change the dtype."""
        return Outline(getattr(x, "shape", ()), dtype)

    def quantise(
        self, x: Outline, factor: Any, limit: int, dtype: str, noise: Any = None
    ) -> Outline:
        """Change the dtype."""
        return x.of(dtype)

    def noise(self, key: Any, like: Outline, start: int = 0) -> Outline:
        """Return float32 of that shape."""
        return like.of("float32")

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Outline:
        """Return a tensor of that shape."""
        return Outline(shape, dtype)

    def constant(self, values: Any, dtype: str) -> Outline:
        """Return a tensor of the shape that the values have."""
        import numpy as np

        return Outline(np.shape(values), dtype)

    def arange(self, size: int) -> Outline:
        """Return int64."""
        return Outline((size,), "int64")

    def reshape(self, x: Outline, shape: tuple[int, ...]) -> Outline:
        """Change the shape."""
        known = math.prod(each for each in shape if each >= 0)
        return Outline(
            tuple(each if each >= 0 else x.size // max(known, 1) for each in shape), x.dtype
        )

    def concat(self, parts: list[Outline], axis: int = 0) -> Outline:
        """Add up one side."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return Outline(tuple(shape), parts[0].dtype)

    def where(self, condition: Any, one: Any, other: Any) -> Outline:
        """Return what all three broadcast to."""
        dtype = next(each.dtype for each in (one, other) if isinstance(each, Outline))
        return Outline(_broadcast(condition, one, other), dtype)

    def either(self, condition: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """Return the first: both are alike."""
        return one()

    def to_bytes(self, x: Outline) -> Outline:
        """Return uint8."""
        return Outline((x.size * width(x.dtype),), "uint8")

    def from_bytes(self, x: Outline, dtype: str) -> Outline:
        """Return as many elements as those bytes hold."""
        return Outline((x.size // width(dtype),), dtype)

    def pack_bits(self, x: Outline) -> Outline:
        """Return an eighth."""
        return Outline((x.size // 8,), "uint8")

    def unpack_bits(self, x: Outline) -> Outline:
        """Return eight times as many."""
        return Outline((x.size * 8,), "bool")

    def signed(self, positive: Outline, magnitude: Outline) -> Outline:
        """Return float32."""
        return Outline(_broadcast(positive, magnitude), "float32")

    def dequantise(self, x: Outline, factor: Any) -> Outline:
        """Return float32."""
        return x.of("float32")

    def pieces(self, x: Outline, columns: int) -> list[slice]:
        """Return one: there is no memory to save."""
        return [slice(None)]

    def bfloat16_bytes(self, x: Outline) -> Outline:
        """Return two bytes an element."""
        return Outline((2 * x.size,), "uint8")

    def from_bfloat16_bytes(self, x: Outline) -> Outline:
        """Return float32."""
        return Outline((x.size // 2,), "float32")

    def largest(self, x: Outline, count: int) -> Outline:
        """Return int32."""
        return Outline((count,), "int32")

    def take(self, x: Outline, where: Outline) -> Outline:
        """Return as many elements as there are indices."""
        return Outline(where.shape, x.dtype)

    def repeat(self, count: Outline, total: int) -> Outline:
        """Return int32."""
        return Outline((total,), "int32")

    def counts(self, x: Outline, size: int) -> Outline:
        """Return int32."""
        return Outline((size,), "int32")

    def matmul(self, x: Outline, y: Outline, transposed: bool = False) -> Outline:
        """Return the product's shape."""
        return Outline((x.shape[0], y.shape[0 if transposed else 1]), x.dtype)

    def outer(self, left: Outline, right: Outline, over: Outline) -> Outline:
        """Return what it may be written over."""
        return over


OPS: Any = OutlineOps()


@functools.lru_cache(maxsize=4096)
def asked(compressor: Compressor, form: Form, ranks: int) -> tuple[Message, ...]:
    """Return what ``compressor`` sends for a gradient of this form between so many ranks.

    Raises:
        hvdx.compression.CompressionError: it cannot compress that.
    """
    told: list[Message] = []
    rounds = 0

    def answer(request: Any) -> Any:
        nonlocal rounds
        if not isinstance(request, FACTS):
            told.extend(messages(OPS, request, rounds))
            rounds += 1
        return _answer(request, ranks)

    spec = Spec("gradient", form.shape, form.dtype, ranks)
    work: Work[Any] = compressor.reduce(
        OPS, Outline(form.shape, form.dtype), compressor.init(OPS, spec)
    )
    drive(work, answer)
    return tuple(told)


def _answer(request: Any, ranks: int) -> Any:
    if isinstance(request, Ranks):
        return ranks
    if isinstance(request, FACTS):
        return 0 if isinstance(request, Rank) else None
    if isinstance(request, Together):
        return [_answer(each, ranks) for each in request.requests]
    tensor = request.tensor
    if isinstance(request, Allgather):
        return Outline((tensor.shape[0] * ranks, *tensor.shape[1:]), tensor.dtype)
    if isinstance(request, Reducescatter):
        return Outline((-(-tensor.size // ranks),), tensor.dtype)
    return tensor


def kept(compressor: Compressor, form: Form, ranks: int) -> int:
    """Return the bytes that ``compressor`` keeps from step to step for a gradient of this form."""
    state = compressor.init(OPS, Spec("gradient", form.shape, form.dtype, ranks))
    return sum(leaf.tensor.size * width(leaf.tensor.dtype) for leaf in leaves(state))
