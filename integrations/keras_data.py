"""Share arrays or a ``PyDataset`` between ranks, for ``fit`` on either backend of Keras."""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np

from hvdx import data
from hvdx.data import Place, Progress, Steps


class DistributedDataset(keras.utils.PyDataset):
    """Give each rank its batches: every sample exactly once, the same number of steps everywhere.

    Draws a new order in every epoch, equal on all ranks. No rank waits for another at the end
    of an epoch, however many samples there are: the last batches are smaller. Where ranks then
    have unequally many samples in a step, all batches carry sample weights (1 but in that
    step), with which the mean of the ranks' gradients is that of one process.

    Made to be trained on: all ranks must go through it equally often.

    Args:
        x: an array, or arrays in nested lists, tuples and dictionaries; or another
            ``PyDataset``, whose batches are then shared as they are.
        y: likewise, or None.
        sample_weight: of each sample, or None.
        batch_size: per rank.
        shuffle: draw a new order in every epoch; else that of the data.
        seed: of the orders; equal on all ranks.
        drop_last: leave out the samples that do not fill a batch on every rank.
        process_set: the ranks that share the data; all by default.
        **options: ``workers``, ``use_multiprocessing`` and ``max_queue_size`` of ``PyDataset``.

    Raises:
        ValueError: arrays differ in length, or there is no sample.

    Example:
        >>> data = hvd.DistributedDataset(x_train, y_train, batch_size=32)
        >>> model.fit(data, epochs=5, callbacks=[...])
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        process_set: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self._source = _Batches(x) if isinstance(x, keras.utils.PyDataset) else _Arrays(
            x, y, sample_weight
        )  # fmt: skip
        if isinstance(x, keras.utils.PyDataset) and (y is not None or sample_weight is not None):
            raise ValueError("a PyDataset brings its own targets and sample weights")
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._process_set = process_set
        self._progress = Progress(seed)
        self._planned: tuple[Any, Steps] | None = None

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one."""
        return self._progress.epoch

    @property
    def num_batches(self) -> int:
        """Steps in what is left of the epoch; equal on all ranks."""
        return len(self._steps())

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Any:
        steps = self._steps()
        own, weight = steps[index]
        return self._source.batch(own, None if steps.even or self._drop_last else weight)

    def _steps(self) -> Steps:
        """Return the plan of what is left of the epoch; drawn anew when it or the job changes."""
        place, progress = Place.of(self._process_set), self._progress
        key = (progress.epoch, progress.start, progress.seed, place)
        planned = self._planned  # one read: batches may be fetched in threads
        if planned is None or planned[0] != key:
            samples = len(self._source)
            whole = data.order(samples, progress.epoch, shuffle=self._shuffle, seed=progress.seed)
            left = whole[progress.start :]
            sizes = self._source.sizes(len(left), place.ranks, self._batch_size, self._drop_last)
            planned = self._planned = (key, Steps(left, sizes, place))
        return planned[1]

    def on_epoch_end(self) -> None:
        """Go on to the next epoch's order; Keras calls it, a loop of your own must."""
        frame = sys._getframe(1)
        adapter: Any = frame.f_locals.get("self")
        if getattr(adapter, "py_dataset", None) is not self or frame.f_back is None:
            self._advance()
            return
        # fit would take our batches in an order that each rank draws for itself, and begin with
        # those that workers have fetched ahead before.
        adapter.shuffle = False
        if adapter.enqueuer is not None:
            adapter.enqueuer.shuffle = False
            while not adapter.enqueuer.ready_queue.empty():
                adapter.enqueuer.ready_queue.get()
        if frame.f_back.f_code.co_name == "reset":
            return  # before fit begins, Keras calls this too
        self._advance()
        # It counts the steps of its first epoch for all; after a resumed one that is too few.
        frame.f_back.f_locals["self"]._num_batches = self.num_batches

    def _advance(self) -> None:
        self._source.on_epoch_end()
        self._progress.set_epoch(self._progress.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` next."""
        self._progress.set_epoch(epoch)

    def record_batch(self, batch_idx: int, batch_size: int = 0) -> None:
        """Note that a batch has been trained on; hvdx's elastic callbacks do so.

        Args:
            batch_idx: its number in the epoch under way, from 0.
            batch_size: accepted as the other samplers do, and not needed.
        """
        self._progress.record(self._steps().ends[batch_idx + 1])

    def state_dict(self) -> dict[str, int]:
        """Return where training stands: the epoch, and what was recorded of it."""
        return self._progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken, on any number of ranks."""
        self._progress.load_state_dict(state_dict, len(self._source))


class _Arrays:
    """Samples in arrays."""

    def __init__(self, x: Any, y: Any, sample_weight: Any) -> None:
        if sample_weight is not None and y is None:
            raise ValueError("sample_weight needs y")
        self._parts = [
            None if part is None else keras.tree.map_structure(_array, part)
            for part in (x, y, sample_weight)
        ]
        lengths = {len(array) for array in keras.tree.flatten(self._parts) if array is not None}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"x, y and sample_weight must have equally many samples, and some; they have "
                f"{', '.join(map(str, sorted(lengths)))}"
            )
        self._length = lengths.pop()

    def __len__(self) -> int:
        return self._length

    def sizes(self, samples: int, ranks: int, batch_size: int, drop_last: bool) -> list[int]:
        return data.step_sizes(samples, ranks, batch_size, drop_last)

    def batch(self, own: np.ndarray, weight: float | None) -> tuple[Any, ...]:
        x, y, weights = (
            None if part is None else keras.tree.map_structure(lambda array: array[own], part)
            for part in self._parts
        )
        return _weighted(x, y, weights, weight, len(own))

    def on_epoch_end(self) -> None:
        pass


class _Batches:
    """Batches of another ``PyDataset``, which counts them as samples are counted."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return int(self._inner.num_batches)

    def sizes(self, samples: int, ranks: int, batch_size: int, drop_last: bool) -> list[int]:
        full, rest = divmod(samples, ranks)
        return [ranks] * full + ([rest] if rest and not drop_last else [])

    def batch(self, own: np.ndarray, weight: float | None) -> Any:
        batch = self._inner[int(own[0])]
        if weight is None or not isinstance(batch, (tuple, list)):
            return batch
        x, y, weights = (*batch, None, None)[:3]
        return _weighted(x, y, weights, weight, len(keras.tree.flatten(x)[0]))

    def on_epoch_end(self) -> None:
        self._inner.on_epoch_end()


def _weighted(x: Any, y: Any, weights: Any, weight: float | None, count: int) -> tuple[Any, ...]:
    """Make a batch, with sample weights where there are some or ``weight`` is not None."""
    if y is None:
        return (x,)
    if weight is None:
        return (x, y) if weights is None else (x, y, weights)
    if weights is None:
        return x, y, np.full(count, weight, keras.config.floatx())
    return x, y, keras.tree.map_structure(
        lambda own: (np.asarray(own) * weight).astype(own.dtype), weights
    )  # fmt: skip


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else np.asarray(keras.ops.convert_to_numpy(value))
