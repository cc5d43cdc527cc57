"""``hvd.callbacks.MetricsCallback``: :class:`hvdx.Metrics` under Keras' ``fit``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras

from hvdx.integrations.keras3 import averaging
from hvdx.integrations.keras_sync import RankCallback
from hvdx.metrics import Metrics


class MetricsCallback(RankCallback):
    """Record speed, learning, communication, utilisation, bytes and memory of ``fit``.

    See :class:`hvdx.Metrics` for what is recorded, and for the arguments. Each ``fit`` is a run of
    its own in the file. Nothing is read from the model but when an interval ends: its loss is then
    the mean over the interval, other metrics are those that Keras shows, of the epoch so far. After
    each epoch its validation is recorded, if there is one; that, and what other callbacks do
    between epochs, counts in no speed. Under a pipeline's ``fit``, too.

    Args:
        path: of the file.
        every: steps in an interval; None: about ten seconds.
        target: such as ``"val_accuracy >= 0.95"``.
        tensorboard: folder for TensorBoard.
        options: of the training, for the file.
        unit: what samples are.
        batch_size: of this rank's steps, for models with a ``train_step`` of their own, whose loss
            does not tell it.
        quiet: print nothing.

    Attributes:
        metrics: what records; while ``fit`` runs, and afterwards.

    Example:
        >>> model.fit(x, y, callbacks=[hvd.callbacks.MetricsCallback("run.jsonl")])
    """

    metrics: Any = None

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int | None = None,
        target: str | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
        unit: str = "samples",
        batch_size: int | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        self._path, self._batch_size = path, batch_size
        self._options: dict[str, Any] = {
            "every": every,
            "target": target,
            "tensorboard": tensorboard,
            "options": options,
            "unit": unit,
            "quiet": quiet,
        }

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Open the file; all ranks meet."""
        pipeline = getattr(self.model, "pipeline", None)
        source = pipeline or averaging(self.model.optimizer)
        if self.metrics is not None:  # of the fit before
            start = self.metrics.steps
        else:
            start = pipeline.steps if pipeline else _iterations(self.model.optimizer)
        self.metrics = _Fit(
            self.model, self._batch_size, self._path, source, start=start, **self._options
        )
        self.metrics.pause()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Start the clock."""
        self._done, self._ended = 0, False
        self.metrics.begin_epoch()
        self.metrics.resume()

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Count the batches before this one.

        Not when they end: for a callback that looks then Keras waits after each of them.
        """
        self._count(batch)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Look before validation resets the metrics, and stop the clock."""
        self._end_training()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Record the validation."""
        self._end_training()
        found = {name: value for name, value in (logs or {}).items() if name.startswith("val_")}
        if found:
            self.metrics.evaluated(**{name: float(value) for name, value in found.items()})

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Record the last interval."""
        self.metrics.close()

    def _count(self, batches: int) -> None:
        """Note that so many batches of the epoch are done."""
        fresh, self._done = batches - self._done, batches
        if fresh > 0:
            self.metrics.advance(fresh)

    def _end_training(self) -> None:
        """Count what is left of an epoch's batches, once, and stop the clock."""
        if self._ended:
            return
        self._ended = True
        steps = (self.params or {}).get("steps")
        if steps is None:  # TensorFlow finds the end of the data in a batch that has begun
            steps = self._done + (keras.backend.backend() != "tensorflow")
        self._count(steps)
        self.metrics.end_epoch()
        self.metrics.pause()


class _Fit(Metrics):
    """Takes samples and values from what Keras counts: sums that grow from each epoch's start."""

    def __init__(self, model: Any, batch_size: int | None, *args: Any, **options: Any) -> None:
        self._model, self._batch_size = model, batch_size
        self._loss, self._weight, self._others = 0.0, 0.0, dict[str, tuple[float, float]]()
        self._live = False
        super().__init__(*args, **options)

    def begin_epoch(self) -> None:
        """Begin from nothing, as Keras' metrics do."""
        self._seen, self._live = (0.0, 0.0), True

    def end_epoch(self) -> None:
        """Take what has come, before Keras forgets it."""
        if self._live:
            self._absorb()
        self._live = False

    def advance(self, steps: int) -> None:
        """Count steps."""
        self._samples += (self._batch_size or 0) * steps
        self._advance(steps)

    def _absorb(self) -> None:
        """Add what Keras has summed up since the last look."""
        found = [each for each in self._model.metrics if each.name == "loss"]
        means = [each for each in found if hasattr(each, "total") and hasattr(each, "count")]
        total, count = (sum(map(_number, each)) for each in (
            [mean.total for mean in means], [mean.count for mean in means]))  # fmt: skip
        self._loss += total - self._seen[0]
        self._weight += count - self._seen[1]
        self._seen = total, count
        told = {k: v for k, v in self._model.get_metrics_result().items() if k != "loss"}
        self._others = {name: (_number(value), 1) for name, value in told.items()}

    def _counted(self) -> tuple[int, dict[str, tuple[float, float]]]:
        if self._live:
            self._absorb()
        values = {"loss": (self._loss, self._weight)} if self._weight else {}
        samples = self._samples if self._batch_size else round(self._weight)
        self._loss = self._weight = 0.0
        return samples, {**values, **self._others}


def _number(value: Any) -> float:
    return float(keras.ops.convert_to_numpy(value))


def _iterations(optimizer: Any) -> int:
    """Return how many batches an optimizer has seen; 0 without one."""
    if optimizer is None:
        return 0
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return int(_number(inner._iterations))
