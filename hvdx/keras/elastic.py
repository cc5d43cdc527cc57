"""Elastic training with Keras 3: ``hvd.elastic``; see :mod:`hvdx.elastic`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdx import elastic as _elastic
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


def _reset() -> None:
    _elastic.reset()


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``func(state, ...)`` again whenever ranks have failed, left or joined.

    Nothing may communicate between ``hvd.init()`` and the decorated function: ranks that join
    later would wait there for ranks that are training.

    Example:
        >>> state = hvd.elastic.KerasState(model, data=data, batch=0, epoch=0)
        >>> callbacks = [
        ...     hvd.elastic.UpdateBatchStateCallback(state),
        ...     hvd.elastic.UpdateEpochStateCallback(state),
        ...     hvd.elastic.CommitStateCallback(state),
        ... ]
        >>> @hvd.elastic.run
        ... def train(state):
        ...     state.model.fit(state.data, epochs=epochs - state.epoch, callbacks=callbacks)
        >>> train(state)
    """
    return _elastic.run_fn(func, _reset)
