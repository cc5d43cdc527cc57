"""Batch normalization over the batches of all ranks, for Keras 3 on either backend."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.src.backend.common import symbolic_scope

from hvdx import collectives
from hvdx.integrations.keras_batch_norm import moments, sums
from hvdx.reduce_op import ReduceOp


@keras.saving.register_keras_serializable(package="hvdx")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Keras' ``BatchNormalization`` whose moments in training are those of all ranks' batches.

    Outputs, moving statistics and gradients are those that one process would have with the
    whole batch. Ranks count by the elements that they have, so that batches may differ in size
    and masks in what they leave out. One small allreduce a call, and one in its gradient.

    Files load as they are where hvdx is imported; ``process_set`` is not saved. In a process
    without hvdx a plain layer of the same name takes its place (for files name their weights by
    their layers' classes), by this argument of ``keras.models.load_model``::

        class SyncBatchNormalization(keras.layers.BatchNormalization): ...

        custom_objects = {"hvdx>SyncBatchNormalization": SyncBatchNormalization}

    Args:
        fused: accepted for Horovod's sake; must be False.
        process_set: the ranks whose batches count; all by default.
        **options: of ``keras.layers.BatchNormalization``, by name.

    Raises:
        ValueError: ``fused`` is not False, or ``hvd.init()`` has not been called at the first
            training step.

    Example:
        >>> model.add(hvd.SyncBatchNormalization(momentum=0.9))
    """

    def __init__(self, fused: bool = False, process_set: Any = None, **options: Any) -> None:
        if fused is not False:
            raise ValueError(f"SyncBatchNormalization(fused={fused}): only False is possible")
        super().__init__(**options)
        self.process_set = process_set

    def _moments(self, inputs: Any, mask: Any) -> Any:
        """Return mean and variance, each of shape (channels,), over all ranks."""
        mean, variance = (ops.reshape(each, (-1,)) for each in super()._moments(inputs, mask))
        if symbolic_scope.in_symbolic_scope():  # shapes are looked for, there is nothing to send
            return mean, variance
        own = sums(self, inputs, mask, mean, variance)
        total = collectives.allreduce(own, op=ReduceOp.Sum, process_set=self.process_set)
        return moments(total, inputs.dtype)
