"""Callbacks that keep ranks alike: the same start, the same metrics."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from hvdx import world
from hvdx.consistency import check_consistency
from hvdx.errors import MismatchError
from hvdx.frameworks import framework_of_kind, kind_of
from hvdx.integrations.keras3 import averaging
from hvdx.replicas import allgather_object, broadcast_parameters


class RankCallback(keras.callbacks.Callback):
    """A callback for one of several ranks.

    On the TensorFlow backend it turns XLA off for a model whose optimizer averages gradients:
    Horovod's operations cannot be compiled.
    """

    def set_model(self, model: Any) -> None:
        """Note the model; ``fit`` calls this before it makes its graphs."""
        super().set_model(model)
        if self._needs_no_xla(model) and model.compiled and model.jit_compile:
            warnings.warn(
                "XLA cannot compile Horovod's operations: this model trains with "
                "jit_compile=False, which compile() also takes",
                stacklevel=2,
            )
            model.jit_compile = False

    def _needs_no_xla(self, model: Any) -> bool:
        tensorflow = framework_of_kind("keras") == "tensorflow"
        ours = averaging(getattr(model, "optimizer", None)) is not None
        return tensorflow and world.size() > 1 and ours


class BroadcastGlobalVariablesCallback(RankCallback):
    """Start every rank from the root's weights and optimizer state.

    Both are broadcast when training begins, before the first batch; where the model can only
    be built from a batch, after the first one. Random seeds stay each rank's own.

    On the TensorFlow backend it also turns off the compilation by XLA that Keras chooses where
    it finds a GPU: Horovod's operations cannot be compiled.

    Args:
        root_rank: global rank to copy from.
        device: accepted for Horovod's sake and not needed.
        local_variables: variable or variables of the model that stay each rank's own, with
            what the optimizer keeps for them.

    Raises:
        ValueError: ``local_variables`` holds something else.
        MismatchError: models differ between ranks (raised by ``fit`` on every rank).

    Example:
        >>> model.fit(x, y, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        self._local: list[Any] = []
        several = isinstance(local_variables, (list, tuple, set, frozenset))
        for variable in local_variables if several else [local_variables]:
            if variable is not None or several:
                self.register_local_var(variable)

    def register_local_var(self, var: Any) -> None:
        """Leave ``var`` alone."""
        if not hasattr(var, "assign"):
            raise ValueError(f"local_variables: {var!r} is no variable")
        self._local.append(var)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Broadcast, if there is something to broadcast already."""
        self.broadcast_done = False
        if all(layer.built for layer in self.model._flatten_layers()):
            self._broadcast()
        elif optimizer := averaging(self.model.optimizer):
            optimizer._averager.broadcast_follows = True  # ranks differ in the first step only

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Broadcast what the first batch has built."""
        if not self.broadcast_done:
            self._broadcast()
            if optimizer := averaging(self.model.optimizer):
                optimizer.begin_anew()

    def _needs_no_xla(self, model: Any) -> bool:
        # Whatever the optimizer: a train_step of one's own may use the tape.
        return framework_of_kind("keras") == "tensorflow" and world.size() > 1

    def _broadcast(self) -> None:
        model, optimizer = self.model, self.model.optimizer
        shared = [variable for variable in model.weights if not self._is_local(variable)]
        if shared:
            broadcast_parameters(shared, self.root_rank)
        if optimizer is not None:
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
            if (served := averaging(optimizer)) is not None and served.has_parts:
                shared = served.without_parts(optimizer.variables)
                broadcast_parameters(shared, self.root_rank)
            else:
                state = self._shared_state() if self._local else optimizer
                broadcast_parameters(state, self.root_rank)
        self.broadcast_done = True

    def _is_local(self, variable: Any) -> bool:
        value = variable.value
        return any(
            one is variable or one is value or getattr(one, "value", one) is value
            for one in self._local
        )

    def _shared_state(self) -> list[Any]:
        """Return the optimizer's variables but for those that it keeps for local ones.

        Keras names these after the variable of the model: its path with ``_``, and what it is.
        """
        named = {f"{v.path.replace('/', '_')}_": v for v in self.model.trainable_variables}
        shared = []
        for variable in self.model.optimizer.variables:
            owner = max((n for n in named if variable.name.startswith(n)), key=len, default=None)
            if owner is None or not self._is_local(named[owner]):
                shared.append(variable)
        return shared


class MetricAverageCallback(RankCallback):
    """Replace each epoch's metrics by their means over the ranks, validation's included.

    Ranks count equally, however much data they have, as in Horovod. List it before callbacks
    that read metrics, such as ``ReduceLROnPlateau``: they then decide alike on all ranks.

    Args:
        device: accepted for Horovod's sake and not needed.

    Raises:
        MismatchError: ranks have different metrics, as when only one validates.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average ``logs`` in place."""
        if not logs or world.size() == 1:
            return
        # Names and values in one exchange; a sum of the values alone would pair up wrong names.
        own = {name: _number(value) for name, value in sorted(logs.items())}
        everyone = allgather_object(own)
        if len({tuple(told) for told in everyone}) > 1:
            each = "; ".join(f"rank {rank}: {', '.join(t)}" for rank, t in enumerate(everyone))
            raise MismatchError(f"ranks have different metrics in epoch {epoch + 1}: {each}")
        for name in own:
            mean = np.mean([told[name] for told in everyone], axis=0)
            logs[name] = float(mean) if mean.ndim == 0 else mean


def _number(value: Any) -> Any:
    tensor = kind_of(type(value)) in ("keras", "torch", "tensorflow")
    return np.asarray(keras.ops.convert_to_numpy(value) if tensor else value, np.float64)


class ConsistencyCallback(RankCallback):
    """Stop training where replicas have drifted apart: see :func:`hvdx.check_consistency`.

    Args:
        every: batches from one comparison to the next; equal on all ranks.

    Raises:
        ValueError: ``every`` is no number from 1.
        MismatchError: parameters differ (raised by ``fit`` on every rank).

    Example:
        >>> model.fit(x, y, callbacks=[hvd.callbacks.ConsistencyCallback(every=100)])
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__()
        if type(every) is not int or every < 1:
            raise ValueError(f"ConsistencyCallback(every={every!r}): give a number from 1")
        self.every = every
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Compare, if it is time."""
        self._batches += 1
        if self._batches % self.every == 0:
            check_consistency(self.model)
