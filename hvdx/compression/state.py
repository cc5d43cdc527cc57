"""What a compressor keeps, as a flat list of named tensors: for variables, files, comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(state: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return (path, tensor) for every tensor in ``state``, in an order that is always the same.

    A state is None, a tensor, or a named tuple of states: ``inner.momentum`` is a path.
    """
    if state is None:
        return []
    if not hasattr(state, "_fields"):
        return [(path, state)]
    return [
        leaf
        for field, value in zip(state._fields, state, strict=True)
        for leaf in leaves(value, f"{path}.{field}" if path else field)
    ]


def rebuilt(like: Any, tensors: Iterator[Any]) -> Any:
    """Return a state of the form of ``like``, its leaves taken from ``tensors`` in order."""
    if like is None:
        return None
    if not hasattr(like, "_fields"):
        return next(tensors)
    return type(like)(*(rebuilt(value, tensors) for value in like))
