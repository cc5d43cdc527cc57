"""What elastic training needs of TensorFlow."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.function.polymorphism.function_cache import FunctionCache

from hvdx.elastic import ObjectState, StateHandler
from hvdx.replicas import broadcast_object, broadcast_parameters
from hvdx.world import rank


def forget_graphs() -> None:
    """Have every ``tf.function`` traced anew at its next call.

    Graphs hold the number of ranks, and what the ranks agreed upon while they traced: those who
    joined since must find the others there when they trace. Keras' train functions are among
    them, and scripts' own, wherever they were made.
    """
    for found in gc.get_objects():
        if type(found) is FunctionCache:
            found.clear()


class TensorFlowState(ObjectState):
    """A state of ``tf.Variable``, and of other objects, which become attributes.

    Args:
        variables: those of TensorFlow's global collection by default, which TensorFlow 2 does
            not fill.
        session: accepted for Horovod's sake; sessions of TensorFlow 1 are not served.
        **kwargs: further objects.

    Raises:
        ValueError: there is no variable, or a session.
    """

    def __init__(
        self, variables: Sequence[Any] | None = None, session: None = None, **kwargs: Any
    ) -> None:
        if session is not None:
            raise ValueError("session: hvdx serves TensorFlow 2, where there are none")
        chosen = list(variables or tf.compat.v1.global_variables())
        if not chosen:
            raise ValueError("TensorFlowState(variables=...): give the variables to keep")
        super().__init__(lambda obj: broadcast_object(obj), rank, **kwargs)
        self.variables = chosen
        self.session = None
        self._handlers["variables"] = _VariablesHandler(chosen)


class _VariablesHandler(StateHandler):
    """Saves and shares a list of variables."""

    def __init__(self, value: list[Any]) -> None:
        super().__init__(value)
        self.save()

    def save(self) -> None:
        self._saved = [np.array(variable.numpy()) for variable in self.value]

    def restore(self) -> None:
        for variable, saved in zip(self.value, self._saved, strict=True):
            variable.assign(saved)

    def sync(self) -> None:
        broadcast_parameters([(str(place), v) for place, v in enumerate(self.value)])
