"""Elastic training with Keras 3, on either backend: a model's state, and callbacks that keep it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from hvdx.compression.portable import PORTABLE
from hvdx.elastic import ObjectState, OwedHandler, StateHandler
from hvdx.integrations.keras3 import averaging
from hvdx.integrations.keras3_local import Rounds
from hvdx.integrations.keras_data import DistributedDataset
from hvdx.replicas import broadcast_object, broadcast_parameters
from hvdx.world import rank


class KerasState(ObjectState):
    """The state of a Keras model's training, each part an attribute.

    Weights and optimizer state are shared; states of random numbers (dropout) are saved and
    stay each rank's own. A :class:`DistributedDataset` among the parts is resumed within its
    epoch: no sample is lost or comes twice. What the optimizer's compression holds back is saved
    with it; when ranks have changed, those that are left bring what they owe.

    Args:
        model: built.
        optimizer: the one it is compiled with by default. If it is not built yet, it is built
            for the model's trainable variables.
        backend: accepted for Horovod's sake and not needed.
        conserve: bring together, at every commit, what the optimizer's compression holds back
            on each rank, so that it is not lost with a rank that dies. Costs an allreduce of the
            model's size. Ranks that are taken away as planned lose nothing in any case.
        **kwargs: further parts, such as ``batch=0, epoch=0, data=dataset``.

    Raises:
        ValueError: the model is not built.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        backend: Any = None,
        conserve: bool = False,
        **kwargs: Any,
    ) -> None:
        if not all(layer.built for layer in model._flatten_layers()):
            raise ValueError(
                f"Model {model.name!r} must be built first: model.build(input_shape), or give "
                "its first layer an Input"
            )
        super().__init__(lambda obj: broadcast_object(obj), rank, **kwargs)
        if optimizer is None:
            optimizer = getattr(model, "optimizer", None)
        self.model = model
        self.optimizer = optimizer
        self.backend = backend
        self.conserve = conserve
        self._handlers["model"] = _ModelHandler(model, optimizer)
        self._handlers["owed"] = _OwedHandler(optimizer)

    @property
    def datasets(self) -> list[DistributedDataset]:
        """Those among the parts, which know by themselves where in an epoch they stand."""
        values = [handler.value for handler in self._handlers.values()]
        return [value for value in values if isinstance(value, DistributedDataset)]


class _OwedHandler(OwedHandler):
    """See :class:`hvdx.elastic.OwedHandler`; ``value`` is an optimizer.

    It is brought together in the first step of other ranks
    (:meth:`hvdx.integrations.keras3_state.States.carry`).
    """

    @property
    def _averager(self) -> Any:
        """What averages gradients, if it holds any back; rounds of training alone begin anew."""
        found = getattr(averaging(self.value), "_averager", None)
        return None if found is None or isinstance(found, Rounds) or not found.remembers else found

    def own(self) -> Any:
        return None if self._averager is None else self._averager.saved_state()

    def together(self) -> Any:
        if self._averager is None or not self._averager.started:  # alike on all ranks
            return None
        return self._averager.portable_state()

    def load(self, saved: Any) -> None:
        if (saved["rank"], saved["ranks"]) in (PORTABLE, self._averager.origin):
            self._averager.load_state(saved)  # else it is of ranks that are no more

    def wait(self, saved: Any) -> None:
        self._averager.states.go_back(saved)


class _ModelHandler(StateHandler):
    """Saves and shares a model with its optimizer."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        super().__init__(model)
        self._optimizer = optimizer
        if optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.save()

    def save(self) -> None:
        own = [] if self._optimizer is None else list(self._optimizer.variables)
        self._saved = [
            (variable, np.array(keras.ops.convert_to_numpy(variable)))
            for variable in [*self.value.variables, *own]
        ]

    def restore(self) -> None:
        for variable, saved in self._saved:
            variable.assign(saved)

    def sync(self) -> None:
        if self.value.weights:
            broadcast_parameters(self.value)
        if self._optimizer is not None:
            broadcast_parameters(self._optimizer)

    def reset(self) -> None:
        """Have Keras make its functions anew: they hold what the ranks have agreed upon."""
        self.value.train_function = self.value.test_function = self.value.predict_function = None


class CommitStateCallback(keras.callbacks.Callback):
    """Commit the state every so many batches, and at the end of every epoch.

    List it behind the other callbacks of this module, so that it saves what they have noted.

    Args:
        state: to be committed.
        batches_per_commit: how often.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self.batches_remaining = batches_per_commit

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Count from here on all ranks, those that have joined too."""
        self.batches_remaining = self.batches_per_commit

    def on_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Commit if it is time."""
        datasets = _recorded(self.state, batch)
        self.batches_remaining -= 1
        if self.batches_remaining > 0:
            return
        self.batches_remaining = self.batches_per_commit
        # After the last batch the state is committed with the epoch: between, the data would
        # stand at the next epoch already, and state.epoch not.
        if not any(batch + 1 >= len(dataset) for dataset in datasets):
            self.commit()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Commit."""
        self.commit()

    def commit(self) -> None:
        """Commit the state; for subclasses to change."""
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keep ``state.batch`` at the number of batches that are done in this epoch.

    (Horovod's is the last one's number, so that what starts there trains on it again.) A
    :class:`DistributedDataset` in the state goes on behind them by itself after a change of the
    ranks; with other data, Keras begins the epoch again, and only ``params["steps"]`` says how
    many steps are left of it.

    Args:
        state: with an attribute ``batch``.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self.steps_per_epoch: int | None = None
        self._before = 0  # batches of this epoch before fit was called

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Begin where the state stands."""
        self.steps_per_epoch = None
        self._before = self.state.batch

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Tell other callbacks how many steps are left."""
        steps = (self.params or {}).get("steps")
        if steps and not _datasets(self.state):
            self.steps_per_epoch = self.steps_per_epoch or steps
            self.params["steps"] = self.steps_per_epoch - self.state.batch

    def on_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Count."""
        _recorded(self.state, batch)
        self.state.batch = self._before + batch + 1

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Count from 0 again."""
        self.state.batch = self._before = 0


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keep ``state.epoch`` at the number of epochs that are done, over all calls of ``fit``.

    Args:
        state: with an attribute ``epoch``.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self.initial_epoch = state.epoch

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Keras counts from 0 again, the state does not."""
        self.initial_epoch = self.state.epoch

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Count."""
        self.state.epoch = self.initial_epoch + epoch + 1


def _datasets(state: Any) -> list[DistributedDataset]:
    return state.datasets if isinstance(state, KerasState) else []


def _recorded(state: Any, batch: int) -> list[DistributedDataset]:
    """Tell the state's datasets that they have been trained on so far; return them."""
    datasets = _datasets(state)
    for dataset in datasets:
        dataset.record_batch(batch)
    return datasets
