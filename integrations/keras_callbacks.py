"""Keras callbacks for several ranks: ``hvd.callbacks``. Names and signatures are Horovod's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from hvdx import world
from hvdx.errors import MismatchError
from hvdx.frameworks import framework_of_kind
from hvdx.replicas import allgather_object, broadcast_parameters
from hvdx.reporting import TrainingReport

__all__ = ["BroadcastGlobalVariablesCallback", "MetricAverageCallback", "ProgressCallback"]


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Start every rank from the root's weights and optimizer state.

    Both are broadcast when training begins, before the first batch; where the model can only
    be built from a batch, after the first one. Random seeds stay each rank's own.

    On the TensorFlow backend it also turns off the compilation by XLA that Keras chooses where
    it finds a GPU: Horovod's operations cannot be compiled.

    Args:
        root_rank: global rank to copy from.
        device: accepted for Horovod's sake and not needed.
        local_variables: variables of the model that stay each rank's own.

    Raises:
        MismatchError: models differ between ranks (raised by ``fit`` on every rank).

    Example:
        >>> model.fit(x, y, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    """

    def __init__(
        self, root_rank: int, device: str = "", local_variables: Sequence[Any] | None = None
    ) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.broadcast_done = False
        self._local = {id(variable) for variable in local_variables or ()}

    def set_model(self, model: Any) -> None:
        """Note the model; ``fit`` calls this before it makes its graphs."""
        super().set_model(model)
        if framework_of_kind("keras") == "tensorflow" and model.compiled and model.jit_compile:
            warnings.warn(
                "XLA cannot compile Horovod's operations: this model trains with "
                "jit_compile=False, which compile() also takes",
                stacklevel=2,
            )
            model.jit_compile = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Broadcast, if there is something to broadcast already."""
        self.broadcast_done = False
        if all(layer.built for layer in self.model._flatten_layers()):
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Broadcast what the first batch has built."""
        if not self.broadcast_done:
            self._broadcast()

    def _broadcast(self) -> None:
        model, optimizer = self.model, self.model.optimizer
        shared = [variable for variable in model.weights if id(variable) not in self._local]
        if shared:
            broadcast_parameters(shared, self.root_rank)
        if optimizer is not None:
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
            broadcast_parameters(optimizer, self.root_rank)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
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

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average ``logs`` in place."""
        if not logs or world.size() == 1:
            return
        # Names and values in one exchange; a sum of the values alone would pair up wrong names.
        own = {name: np.asarray(value, np.float64) for name, value in sorted(logs.items())}
        everyone = allgather_object(own)
        if len({tuple(told) for told in everyone}) > 1:
            each = "; ".join(f"rank {rank}: {', '.join(t)}" for rank, t in enumerate(everyone))
            raise MismatchError(f"ranks have different metrics in epoch {epoch + 1}: {each}")
        for name in own:
            mean = np.mean([told[name] for told in everyone], axis=0)
            logs[name] = float(mean) if mean.ndim == 0 else mean


class ProgressCallback(keras.callbacks.Callback):
    """Print a line per epoch on rank 0: metrics, samples/s of all ranks, communication share.

    Use with ``fit(verbose=0)``, and after :class:`MetricAverageCallback` if that is listed.

    Args:
        epochs: how many are planned; those of ``fit`` by default.
    """

    def __init__(self, epochs: int = 0) -> None:
        super().__init__()
        self._epochs = epochs
        self._samples = 0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Start the clock."""
        epochs = self._epochs or int(self.params.get("epochs", 0))
        self._report = TrainingReport(self.model.optimizer, epochs)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Forget the samples of the last epoch."""
        self._samples = 0

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Count before validation resets the counter."""
        self._count()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Print the epoch's line."""
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        if not self._samples:
            self._count()
        self._report.batch(self._samples, metrics.pop("loss", None))
        self._report.epoch(**metrics)

    def _count(self) -> None:
        """Read how many samples Keras has averaged the epoch's loss over."""
        loss = next((metric for metric in self.model.metrics if metric.name == "loss"), None)
        self._samples = int(loss.count) if loss is not None else 0
