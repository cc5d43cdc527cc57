"""Elastic training with PyTorch: ``hvd.elastic``; see :mod:`hvdx.elastic`."""

from __future__ import annotations

from hvdx.elastic import run
from hvdx.torch.elastic.sampler import ElasticSampler
from hvdx.torch.elastic.state import TorchState

__all__ = ["ElasticSampler", "TorchState", "run"]
