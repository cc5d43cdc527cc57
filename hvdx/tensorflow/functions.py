"""Broadcasts, for scripts that import ``horovod.tensorflow.functions``."""

from __future__ import annotations

from hvdx.tensorflow import (
    ProcessSet,
    allgather_object,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
    global_process_set,
)

__all__ = [
    "ProcessSet",
    "allgather_object",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "global_process_set",
]
