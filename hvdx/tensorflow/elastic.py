"""Elastic training with TensorFlow: ``hvd.elastic``; see :mod:`hvdx.elastic`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hvdx.elastic import run
from hvdx.integrations.tensorflow_elastic import TensorFlowState

if TYPE_CHECKING:
    from hvdx.integrations.keras_elastic import KerasState as TensorFlowKerasState

__all__ = ["TensorFlowKerasState", "TensorFlowState", "run"]


def __getattr__(name: str) -> Any:
    if name == "TensorFlowKerasState":  # Keras is slow to load, and not every script needs it
        return importlib.import_module("hvdx.integrations.keras_elastic").KerasState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
