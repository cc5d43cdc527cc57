"""What Horovod raises, for scripts that import ``horovod.common.exceptions``."""

from __future__ import annotations

from typing import Any

from horovod.common import exceptions as _horovod


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
