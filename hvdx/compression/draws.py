"""Random numbers that all ranks and frameworks draw alike, and that touch no global generator.

One number of 31 bits per parameter goes from step to step (the "minimal standard" generator of
Park and Miller, whose products stay far below 2^63). It is part of a compressor's state, so that a
job that goes on from a checkpoint draws what it would have drawn.
"""

from __future__ import annotations

from typing import Any

from hvdx.compression.base import name_hash
from hvdx.ops import Ops

_MULTIPLIER, _MODULUS = 48271, 2**31 - 1


def first(ops: Ops, seed: int, name: str) -> Any:
    """Return the first number of the parameter ``name``: int64 without dimensions."""
    return ops.constant(name_hash(seed, name) % (_MODULUS - 1) + 1, "int64")


def following(draw: Any) -> Any:
    """Return the next step's number."""
    return draw * _MULTIPLIER % _MODULUS


def key(ops: Ops, draw: Any, stream: int) -> Any:
    """Return a key for :meth:`Ops.noise`, another for each ``stream`` (rank, phase) of a step."""
    return ops.cast((draw + stream * 65537) % _MODULUS * _MULTIPLIER % _MODULUS, "int32")
