"""Horovod's helpers, for scripts that import ``horovod.common.util``."""

from __future__ import annotations

from typing import Any

from horovod.common import util as _horovod


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
