"""``horovod.torch.sync_batch_norm``'s name."""

from hvdx.integrations.pytorch_sync_batch_norm import SyncBatchNorm

__all__ = ["SyncBatchNorm"]
