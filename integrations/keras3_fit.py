"""``fit``, ``evaluate`` and ``predict`` of pipelines: Keras' own, around ``step`` and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from hvdx.pipeline.options import rows_of


class Shuffled(keras.utils.PyDataset):
    """Batches in an order that is equal on all ranks, where Keras' own would differ.

    Args:
        data: arrays of equal length, or containers of some: ``(x, y)``.
        rows: in all of them.
        size: of a batch; the last one has what is left.
        seed: of the order, with the number of the epoch; None: in order.
    """

    def __init__(self, data: Any, rows: int, size: int, seed: int | None) -> None:
        super().__init__()
        self._data, self._rows, self._size, self._seed = data, rows, size, seed
        self._epoch = -1
        self.on_epoch_begin()

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def __getitem__(self, index: int) -> Any:
        """Return batch ``index`` of this epoch."""
        rows = self._order[index * self._size : (index + 1) * self._size]
        return keras.tree.map_structure(lambda each: each[rows], self._data)

    def on_epoch_begin(self) -> None:
        """Draw the next order."""
        self._epoch += 1
        self._order = np.arange(self._rows)
        if self._seed is not None:
            self._order = np.random.default_rng((self._seed, self._epoch)).permutation(self._rows)


def batches(data: tuple[Any, ...], size: int, seed: int | None) -> Any:
    """Make batches of arrays, ``x``, ``y`` and weights; leave datasets as they are.

    ``seed`` is that of the order, as of :class:`Shuffled`.
    """
    while len(data) > 1 and data[-1] is None:
        data = data[:-1]
    arrays = [each for each in keras.tree.flatten(data) if each is not None]
    if not all(hasattr(each, "shape") for each in arrays):
        return data[0]
    data = tuple(tuple(each) if isinstance(each, list) else each for each in data)
    data = keras.tree.map_structure(lambda x: None if x is None else np.asarray(x), data)
    rows = rows_of([np.shape(each) for each in arrays])
    return Shuffled(data, rows, size, seed)


def parts(data: Any) -> tuple[Any, ...]:
    """Take apart ``(x, y)`` or ``(x, y, weights)``; a dataset is one part."""
    return tuple(data) if isinstance(data, (tuple, list)) and len(data) in (2, 3) else (data,)


class Trainer(keras.Model):
    """What callbacks know as the model: its steps are a pipeline's, and it saves as a whole.

    Args:
        model: that is trained in stages.
        train: trains on inputs, targets and sample weights; returns the loss and, if they are
            asked for, the outputs.
        test: computes the same without training; its loss may be None.
        predict: the pipeline, which computes outputs.
        collect: brings rank 0's model up to date; True there.
        settle: raises on every rank the problem that rank 0 tells.
    """

    def __init__(
        self,
        model: Any,
        train: Callable[[Any, Any, Any, bool], tuple[Any, Any]],
        test: Callable[[Any, Any, Any, bool], tuple[Any, Any]],
        predict: Callable[[Any], Any],
        collect: Callable[[], bool],
        settle: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"{model.name}_in_stages")
        self.whole = model
        self._train, self._test, self._call = train, test, predict
        self._collect, self._settle = collect, settle
        self._mean = keras.metrics.Mean(name="loss")
        self.built = True

    @property
    def pipeline(self) -> Any:
        """The pipeline whose steps these are."""
        return self._call

    def prepare(self, optimizer: Any, metrics: Any, weighted_metrics: Any) -> None:
        """Compile: only this wrapper is eager, units stay compiled."""
        self.compile(
            optimizer,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=True,
            auto_scale_loss=False,
        )
        self._measures = bool(metrics or weighted_metrics)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Compute as the whole model does; Keras asks for shapes in this way."""
        return self.whole(x, training=training)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Train on a batch."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        return self._report(x, y, weights, *self._train(x, y, weights, self._measures))

    def test_step(self, data: Any) -> dict[str, Any]:
        """Compute a batch's loss and metrics."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        return self._report(x, y, weights, *self._test(x, y, weights, self._measures))

    def predict_step(self, data: Any) -> Any:
        """Compute the outputs for a batch."""
        return self._call(keras.utils.unpack_x_y_sample_weight(data)[0])

    def _report(self, x: Any, y: Any, weights: Any, loss: Any, outputs: Any) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if loss is not None:
            self._mean.update_state(loss, sample_weight=len(keras.tree.flatten(x)[0]))
            told["loss"] = self._mean.result()
        if self._measures:
            measured = self.compute_metrics(x, y, outputs, sample_weight=weights)
            told.update({name: value for name, value in measured.items() if name != "loss"})
        return told

    # --- what callbacks save

    def save_weights(self, filepath: Any, overwrite: bool = True, **options: Any) -> None:
        """Save the whole model's weights on rank 0; every rank calls it."""
        self._save(lambda: self.whole.save_weights(filepath, overwrite=overwrite, **options))

    def save(self, filepath: Any, overwrite: bool = True, **options: Any) -> None:
        """Save the whole model on rank 0; every rank calls it."""
        self._save(lambda: self.whole.save(filepath, overwrite=overwrite, **options))

    def _save(self, write: Callable[[], None]) -> None:
        problem = ""
        if self._collect():
            try:
                write()
            except (OSError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        self._settle(problem)
