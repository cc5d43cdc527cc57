"""``horovod.torch.optimizer``'s name."""

from hvdx.integrations.pytorch_optimizer import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
