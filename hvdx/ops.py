"""The tensor verbs that compressors need, one class per framework.

An algorithm written against :class:`Ops` names no framework. The class is picked by the
tensor's type, among frameworks that are imported already. NumPy is the reference.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

from hvdx.frameworks import framework_of_kind, kind_of


class Ops(Protocol):
    """Verbs on tensors of one framework. Nothing here changes its arguments."""

    def dtype(self, x: Any) -> str:
        """Name the dtype as NumPy does: ``float32``."""

    def cast(self, x: Any, dtype: str) -> Any:
        """Convert to ``dtype``, rounding to nearest even; no copy where it is that already."""

    def clip(self, x: Any, low: float, high: float) -> Any:
        """Limit every finite element to [low, high]; infinities and NaN stay what they are."""

    def scale(self, x: Any, factor: float) -> Any:
        """Multiply by a Python number in the dtype of ``x``."""


class NumpyOps:
    """The verbs of :class:`Ops` for ``numpy.ndarray``."""

    def __init__(self) -> None:
        import numpy

        self._np = numpy

    def dtype(self, x: Any) -> str:
        """See :meth:`Ops.dtype`."""
        return str(x.dtype)

    def cast(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.cast`."""
        return self._np.asarray(x).astype(dtype, copy=False)

    def clip(self, x: Any, low: float, high: float) -> Any:
        """See :meth:`Ops.clip`."""
        return self._np.where(self._np.isfinite(x), self._np.clip(x, low, high), x)

    def scale(self, x: Any, factor: float) -> Any:
        """See :meth:`Ops.scale`."""
        return self._np.asarray(x * self._np.asarray(factor, x.dtype))


class TorchOps:
    """The verbs of :class:`Ops` for ``torch.Tensor``."""

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]

    def dtype(self, x: Any) -> str:
        """See :meth:`Ops.dtype`."""
        return str(x.dtype).removeprefix("torch.")

    def cast(self, x: Any, dtype: str) -> Any:
        """See :meth:`Ops.cast`."""
        return x.to(getattr(self._torch, dtype))

    def clip(self, x: Any, low: float, high: float) -> Any:
        """See :meth:`Ops.clip`."""
        return self._torch.where(self._torch.isfinite(x), x.clamp(low, high), x)

    def scale(self, x: Any, factor: float) -> Any:
        """See :meth:`Ops.scale`."""
        return x * factor


class TensorFlowOps:
    """The verbs of :class:`Ops` for ``tf.Tensor``, eager and while tracing."""

    def __init__(self) -> None:
        self._tf = sys.modules["tensorflow"]

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

    def scale(self, x: Any, factor: float) -> Any:
        """See :meth:`Ops.scale`."""
        exact = self._tf.constant(factor, self._tf.float64)  # float32 unless told
        return x * self._tf.cast(exact, x.dtype)


_CLASSES: dict[str, type[Any]] = {
    "numpy": NumpyOps,
    "torch": TorchOps,
    "tensorflow": TensorFlowOps,
}


_made: dict[type, Ops] = {}


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
