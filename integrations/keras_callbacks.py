"""Keras callbacks for several ranks: ``hvd.callbacks``. Names and signatures are Horovod's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from hvdx.integrations.keras3 import averaging
from hvdx.integrations.keras_checkpoint import BestModelCheckpoint, CheckpointCallback
from hvdx.integrations.keras_metrics import MetricsCallback
from hvdx.integrations.keras_schedules import (
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
)
from hvdx.integrations.keras_sync import (
    BroadcastGlobalVariablesCallback,
    MetricAverageCallback,
    RankCallback,
)
from hvdx.preemption import Preemption
from hvdx.reporting import TrainingReport

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "CheckpointCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "MetricsCallback",
    "PreemptionCallback",
    "ProgressCallback",
]


class PreemptionCallback(RankCallback):
    """Save and leave, on all ranks after the same batch, once SIGTERM has come to any of them.

    See :class:`hvdx.Preemption`. ``fit`` then raises ``SystemExit`` with status 143. List it last.

    Args:
        save: writes the checkpoint; called without arguments on every rank, between batches.

    Example:
        >>> hvd.callbacks.PreemptionCallback(lambda: hvd.rank() or model.save("last.keras"))
    """

    def __init__(self, save: Callable[[], Any]) -> None:
        super().__init__()
        self._save = save

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Begin to watch for SIGTERM."""
        self._preemption = Preemption(self._save)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Leave if SIGTERM has come."""
        self._preemption.check()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Have SIGTERM end the process again."""
        self._preemption.close()


class ProgressCallback(RankCallback):
    """Print a line per epoch on rank 0: metrics, samples/s of all ranks, communication share.

    Speed is that of training alone: validation, and what other callbacks do between epochs,
    do not count. Use with ``fit(verbose=0)``, and after :class:`MetricAverageCallback` if that
    is listed.

    Args:
        epochs: how many are planned; those of ``fit`` by default.
    """

    def __init__(self, epochs: int = 0) -> None:
        super().__init__()
        self._epochs = epochs
        self._samples = 0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Make the report."""
        epochs = self._epochs or int(self.params.get("epochs", 0))
        optimizer = averaging(self.model.optimizer) or SimpleNamespace(communication_seconds=0.0)
        self._report = TrainingReport(optimizer, epochs)
        self._report.pause()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Forget the samples of the last epoch and start the clock."""
        self._samples = 0
        self._report.resume()

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Count before validation resets the counter, and stop the clock."""
        self._count()
        self._report.pause()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Print the epoch's line."""
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        if not self._samples:
            self._count()
        self._report.batch(self._samples, metrics.pop("loss", None))
        self._report.epoch(**metrics)
        self._report.pause()

    def _count(self) -> None:
        """Read how many samples Keras has averaged the epoch's loss over."""
        loss = next((metric for metric in self.model.metrics if metric.name == "loss"), None)
        self._samples = int(loss.count) if loss is not None else 0
