"""The operations, for scripts that import ``horovod.tensorflow.mpi_ops``."""

from __future__ import annotations

from typing import Any

from horovod.tensorflow import mpi_ops as _horovod

from hvdx.tensorflow import (
    ProcessSet,
    add_process_set,
    allgather,
    alltoall,
    broadcast,
    broadcast_,
    global_process_set,
    grouped_allgather,
    init,
    remove_process_set,
    shutdown,
)

__all__ = [
    "ProcessSet",
    "add_process_set",
    "allgather",
    "alltoall",
    "broadcast",
    "broadcast_",
    "global_process_set",
    "grouped_allgather",
    "init",
    "remove_process_set",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
