"""Elastic training with Keras 3: ``hvd.elastic``; see :mod:`hvdx.elastic`.

Example:
    >>> data = hvd.DistributedDataset(x, y, batch_size=32)
    >>> state = hvd.elastic.KerasState(model, data=data, batch=0, epoch=0)
    >>> callbacks = [
    ...     hvd.elastic.UpdateBatchStateCallback(state),
    ...     hvd.elastic.UpdateEpochStateCallback(state),
    ...     hvd.elastic.CommitStateCallback(state, batches_per_commit=10),
    ... ]
    >>> @hvd.elastic.run
    ... def train(state):
    ...     state.model.fit(state.data, epochs=epochs - state.epoch, callbacks=callbacks)
    >>> train(state)
"""

from __future__ import annotations

from hvdx.elastic import run
from hvdx.integrations.keras_elastic import (
    CommitStateCallback,
    KerasState,
    UpdateBatchStateCallback,
    UpdateEpochStateCallback,
)

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]
