"""Data for several ranks: ``hvd.data.shard``; and, as submodules, Horovod's service."""

from __future__ import annotations

from hvdx.integrations.tensorflow_data import shard

__all__ = ["shard"]
