"""Elastic training with TensorFlow: ``hvd.elastic``; see :mod:`hvdx.elastic`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hvdx import elastic as _elastic
from hvdx.integrations.tensorflow_elastic import TensorFlowState

if TYPE_CHECKING:
    from hvdx.integrations.keras_elastic import KerasState as TensorFlowKerasState

__all__ = ["TensorFlowKerasState", "TensorFlowState", "run"]


def __getattr__(name: str) -> Any:
    if name == "TensorFlowKerasState":  # Keras is slow to load, and not every script needs it
        return importlib.import_module("hvdx.integrations.keras_elastic").KerasState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _reset() -> None:
    _elastic.reset()


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``func(state, ...)`` again whenever ranks have failed, left or joined.

    Nothing may communicate between ``hvd.init()`` and the decorated function: ranks that join
    later would wait there for ranks that are training. Every ``tf.function`` is traced anew
    after a change.

    Example:
        >>> @hvd.elastic.run
        ... def train(state):
        ...     for state.epoch in range(state.epoch, epochs):
        ...         ...
        ...         state.commit()
        >>> train(hvd.elastic.TensorFlowKerasState(model, optimizer, epoch=0))
    """
    return _elastic.run_fn(func, _reset)
