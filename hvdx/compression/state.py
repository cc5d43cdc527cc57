"""What a compressor keeps, as a flat list of named tensors: for variables, files, comparison.

A state is None, a tensor, or a named tuple of states. Its tensors are equal on all ranks, unless
the named tuple declares the field as one of the three kinds below, by its annotation. That is all
that :mod:`hvdx.compression.portable` needs to know of a method.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, TypeAlias, get_type_hints

Owed: TypeAlias = Annotated[Any, "owed"]
"""What this rank has still to deliver, in the parameter's shape: its mean over ranks counts."""

Averaged: TypeAlias = Annotated[Any, "averaged"]
"""This rank's part of something else of which the mean over ranks counts."""

OwedPiece: TypeAlias = Annotated[Any, "piece"]
"""Rank r's is piece r of a tensor, flat and padded, that is owed to the mean itself."""


class Leaf(NamedTuple):
    """A tensor of a state."""

    path: str  # inner.momentum; empty where the state is the tensor
    tensor: Any
    kind: str = "same"  # on all ranks; or "owed", "averaged", "piece"; see :func:`plain`


def plain(kind: str) -> str:
    """Return the kind of which every rank has its own, for one that some ranks have together.

    ``"owed*2"`` is equal on ranks 0 and 1, on 2 and 3, and so on: see :func:`in_common`.
    """
    return kind.partition("*")[0]


def sharers(kind: str) -> int:
    """Return how many ranks, which follow each other, have a leaf of this kind in common."""
    return int(kind.partition("*")[2] or 1)


class InCommon(NamedTuple):
    """A state that several ranks, which follow each other, have in common; see :func:`in_common`.

    In files it looks like the state in it, but for the kinds of its leaves.
    """

    inner: Any


@functools.cache
def in_common(ranks: int) -> Any:
    """Return the :class:`InCommon` of so many ranks."""
    return type("InCommon", (InCommon,), {"__slots__": (), "sharers": ranks})


def leaves(state: Any, path: str = "", kind: str = "same") -> list[Leaf]:
    """Return every tensor in ``state``, in an order that is always the same."""
    if state is None:
        return []
    if not hasattr(state, "_fields"):
        return [Leaf(path, state, kind)]
    if (ranks := getattr(type(state), "sharers", 1)) > 1:
        found = leaves(state.inner, path, kind)
        return [each._replace(kind=_together(each.kind, ranks)) for each in found]
    kinds = _kinds(type(state))
    return [
        leaf
        for field, value in zip(state._fields, state, strict=True)
        for leaf in leaves(value, f"{path}.{field}" if path else field, kinds[field])
    ]


def _together(kind: str, ranks: int) -> str:
    return kind if kind == "same" else f"{kind}*{ranks}"


def _kinds(state: type) -> dict[str, str]:
    """Return what each field's annotation says, "same" by default."""
    hints = get_type_hints(state, include_extras=True)
    return {field: getattr(hint, "__metadata__", ("same",))[0] for field, hint in hints.items()}


def rebuilt(like: Any, tensors: Iterator[Any]) -> Any:
    """Return a state of the form of ``like``, its leaves taken from ``tensors`` in order."""
    if like is None:
        return None
    if not hasattr(like, "_fields"):
        return next(tensors)
    return type(like)(*(rebuilt(value, tensors) for value in like))
