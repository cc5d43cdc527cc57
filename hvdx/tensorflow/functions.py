"""Broadcasts, for scripts that import ``horovod.tensorflow.functions``."""

from __future__ import annotations

from hvdx.tensorflow import (
    allgather_object,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
)

__all__ = ["allgather_object", "broadcast_object", "broadcast_object_fn", "broadcast_variables"]
