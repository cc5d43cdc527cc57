"""Callbacks for several ranks: ``from hvdx.tensorflow.keras.callbacks import ...``."""

from __future__ import annotations

from typing import Any

from hvdx.integrations.keras_callbacks import *  # noqa: F403
from hvdx.integrations.keras_callbacks import BestModelCheckpoint as _BestModelCheckpoint
from hvdx.integrations.keras_callbacks import __all__ as __all__


class BestModelCheckpoint(_BestModelCheckpoint):  # type: ignore[no-redef]
    """As :class:`hvdx.keras.callbacks.BestModelCheckpoint`, with its arguments in another order.

    The order is that of Horovod's module.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: Any = "epoch",
        filepath: Any = None,
    ) -> None:
        super().__init__(monitor, verbose, mode, save_freq, filepath, save_weights_only)
