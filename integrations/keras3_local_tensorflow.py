"""Local SGD and DiLoCo on Keras' TensorFlow backend."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from hvdx.integrations.keras3_local import Rounds
from hvdx.integrations.keras3_tensorflow import TensorFlowAverager


class TensorFlowRounds(Rounds, TensorFlowAverager):
    """Takes outer steps in the graph being traced, and eagerly."""

    @tf.autograph.experimental.do_not_convert
    def before_step(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """See :meth:`Rounds.before_step`."""
        self._refuse_xla()
        return super().before_step(optimizer, grads, variables)

    @tf.autograph.experimental.do_not_convert
    def after_step(self, optimizer: Any) -> None:
        """See :meth:`Rounds.after_step`."""
        super().after_step(optimizer)

    def snapshot(self, variable: Any) -> Any:
        """See :meth:`Rounds.snapshot`."""
        return tf.convert_to_tensor(variable.value)

    def counter(self, value: int) -> Any:
        """See :meth:`Rounds.counter`."""
        with tf.init_scope(), tf.device("CPU:0"):
            return ResourceVariable(value, trainable=False, dtype=tf.int64)

    def count(self, counter: Any) -> Any:
        """See :meth:`Rounds.count`."""
        return counter.read_value()

    def set_count(self, counter: Any, value: Any) -> None:
        """See :meth:`Rounds.set_count`."""
        counter.assign(value, read_value=False)
