"""The layer, for scripts that import ``horovod.tensorflow.sync_batch_norm``."""

from __future__ import annotations

from hvdx.integrations.keras_sync_batch_norm import SyncBatchNormalization

__all__ = ["SyncBatchNormalization"]
