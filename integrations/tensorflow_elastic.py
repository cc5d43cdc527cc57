"""What elastic training needs of TensorFlow."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.function.polymorphism.function_cache import FunctionCache

from hvdx.compression.portable import PORTABLE
from hvdx.elastic import ObjectState, OwedHandler, StateHandler
from hvdx.integrations.tensorflow_tape import averagers
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
        conserve: bring together, at every commit, what tapes' compression holds back on each
            rank, so that it is not lost with a rank that dies. Costs an allreduce of the model's
            size. Ranks that are taken away as planned lose nothing in any case.
        **kwargs: further objects.

    Raises:
        ValueError: there is no variable, or a session.
    """

    def __init__(
        self,
        variables: Sequence[Any] | None = None,
        session: None = None,
        conserve: bool = False,
        **kwargs: Any,
    ) -> None:
        if session is not None:
            raise ValueError("session: hvdx serves TensorFlow 2, where there are none")
        chosen = list(variables or tf.compat.v1.global_variables())
        if not chosen:
            raise ValueError("TensorFlowState(variables=...): give the variables to keep")
        super().__init__(lambda obj: broadcast_object(obj), rank, **kwargs)
        self.variables = chosen
        self.session = None
        self.conserve = conserve
        self._handlers["variables"] = _VariablesHandler(chosen)
        self._handlers["owed"] = _OwedHandler(None)


class _OwedHandler(OwedHandler):
    """See :class:`hvdx.elastic.OwedHandler`, for all tapes.

    It is brought together when their functions are traced with other ranks.
    """

    def own(self) -> Any:
        return [(averager, averager.saved_state()) for averager in averagers()]

    def together(self) -> Any:
        met = [averager for averager in averagers(before=False) if averager.started]
        if len(met) < len(averagers()):  # what is left of others waits, and is saved so
            return None
        return [(averager, averager.portable_state()) for averager in met]

    def load(self, saved: Any) -> None:
        for averager, own in saved:
            if (own["rank"], own["ranks"]) in (PORTABLE, averager.origin):
                averager.load_state(own)  # else it is of ranks that are no more

    def wait(self, saved: Any) -> None:
        for averager, own in saved:
            averager.states.go_back(own)


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
