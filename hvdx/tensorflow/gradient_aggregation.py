"""Horovod's ``LocalGradientAggregationHelper``, for the optimizers of ``tf.compat.v1``."""

from __future__ import annotations

from typing import Any

from horovod.tensorflow import gradient_aggregation as _horovod
from horovod.tensorflow.gradient_aggregation import LocalGradientAggregationHelper

__all__ = ["LocalGradientAggregationHelper"]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
