"""How an owner tells all ranks what its part of a parameter has become (:mod:`hvdx.servers`).

Not parameters travel but their changes, which bear rounding: the owner keeps the exact value, and
what the others' lacks goes with the next change. That is error feedback on the way back, in one
number per element of the owner's part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from hvdx.buckets import width
from hvdx.compression.codecs import Codec
from hvdx.ops import Ops

if TYPE_CHECKING:
    from hvdx.compression.base import Spec


class Messenger(NamedTuple):
    """A way of writing the change of elements ``start`` to ``stop`` of a parameter as bytes.

    Changes are float32 of shape (stop - start,), in the parameter's row-major order.
    """

    name: str
    size: Callable[[Spec, int, int], int | None]
    """``(spec, start, stop)`` -> how many bytes; None: send the values as they are."""
    first: Callable[[Ops, Spec], Any]
    """``(ops, spec)`` -> the owner's first state."""
    write: Callable[[Ops, Any, Spec, int, Any], tuple[Any, Any]]
    """``(ops, change, spec, start, state)`` -> uint8 (size,), and the next state."""
    read: Callable[[Ops, Any, Spec, int, int], Any]
    """``(ops, data, spec, start, stop)`` -> the change, as all ranks read it."""


def coded(codec: Codec) -> Messenger:
    """Return the messenger that writes changes by ``codec``, which must not be noisy."""

    def columns(length: int) -> int:
        return -(-length // codec.block) * codec.block

    def size(spec: Spec, start: int, stop: int) -> int | None:
        written = codec.row_bytes(columns(stop - start))
        return written if written < (stop - start) * width(spec.dtype) else None

    def write(ops: Ops, change: Any, spec: Spec, start: int, state: Any) -> tuple[Any, Any]:
        length = change.shape[0]
        padding = columns(length) - length
        if padding:
            change = ops.concat([change, ops.zeros((padding,), "float32")])
        data = codec.encode(ops, ops.reshape(change, (1, columns(length))), length)
        return ops.reshape(data, (-1,)), state

    def read(ops: Ops, data: Any, spec: Spec, start: int, stop: int) -> Any:
        rows = codec.decode(ops, ops.reshape(data, (1, -1)), columns(stop - start))
        return rows[0][: stop - start]

    return Messenger(codec.name, size, lambda ops, spec: None, write, read)
