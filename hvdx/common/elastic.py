"""States of elastic training, for scripts that import ``horovod.common.elastic``."""

from __future__ import annotations

from typing import Any

from horovod.common import elastic as _horovod

from hvdx.elastic import ObjectState, State, run_fn

__all__ = ["ObjectState", "State", "run_fn"]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
