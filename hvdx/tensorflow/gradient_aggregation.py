"""Horovod's ``LocalGradientAggregationHelper``, for the optimizers of ``tf.compat.v1``."""

from __future__ import annotations

from horovod.tensorflow.gradient_aggregation import LocalGradientAggregationHelper

__all__ = ["LocalGradientAggregationHelper"]
