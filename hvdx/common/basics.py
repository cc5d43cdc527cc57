"""Horovod's core as its faces see it, for scripts that import ``horovod.common.basics``."""

from __future__ import annotations

from typing import Any

from horovod.common import basics as _horovod


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
