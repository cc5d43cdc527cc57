"""Horovod's ``LocalGradientAggregationHelperEager``, for eager loops over ``tf.Variable``."""

from __future__ import annotations

from horovod.tensorflow.gradient_aggregation_eager import LocalGradientAggregationHelperEager

__all__ = ["LocalGradientAggregationHelperEager"]
