"""Broadcasts, for scripts that import ``horovod.tensorflow.functions``."""

from __future__ import annotations

from typing import Any

from horovod.tensorflow import functions as _horovod

from hvdx.tensorflow import (
    allgather_object,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
)

__all__ = ["allgather_object", "broadcast_object", "broadcast_object_fn", "broadcast_variables"]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
