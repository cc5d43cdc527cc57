"""Callbacks for several ranks: ``from hvdx.keras.callbacks import ...``, as in Horovod."""

from __future__ import annotations

from hvdx.integrations.keras_callbacks import *  # noqa: F403
from hvdx.integrations.keras_callbacks import __all__ as __all__
