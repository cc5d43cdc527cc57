"""What the verbs do, said once for all frameworks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Ops(Protocol):
    """Verbs on tensors of one framework. They change no argument, but where they say so.

    Results are the same to the last bit on every framework, unless a verb says otherwise.
    Tensors also know ``+ - * /``, comparisons, indexing and ``.shape``, alike everywhere.

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

    def max(self, x: Any, axis: int = -1) -> Any:
        """Return the largest along ``axis``."""

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
