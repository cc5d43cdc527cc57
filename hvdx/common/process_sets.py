"""Process sets, for scripts that import ``horovod.common.process_sets``."""

from __future__ import annotations

from typing import Any

from horovod.common import process_sets as _horovod

from hvdx.world import add_process_set, process_set_class, remove_process_set

ProcessSet = process_set_class()

__all__ = ["ProcessSet", "add_process_set", "remove_process_set"]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
