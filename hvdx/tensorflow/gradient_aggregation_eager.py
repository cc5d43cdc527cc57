"""Horovod's ``LocalGradientAggregationHelperEager``, for eager loops over ``tf.Variable``."""

from __future__ import annotations

from typing import Any

from horovod.tensorflow import gradient_aggregation_eager as _horovod
from horovod.tensorflow.gradient_aggregation_eager import LocalGradientAggregationHelperEager

__all__ = ["LocalGradientAggregationHelperEager"]


def __getattr__(name: str) -> Any:
    return getattr(_horovod, name)
