"""Which samples each rank sees: one plan for torch, TensorFlow and Keras.

Every rank computes the plan by itself from the number of samples and of ranks, the seed and the
epoch; nothing is communicated. An epoch is one order of all samples. Step by step all ranks
together take the next samples of it, and each rank of N every N-th of those:

    order      7 2 9 0 | 4 1 8 3 | 6 5
    rank 0     7   9   | 4   8   | 6        (batches of 2 on 2 ranks)
    rank 1       2   0 |   1   3 |   5

What has been seen after any step is the beginning of the order, whatever the number of ranks.
So training resumes where it stopped on as many ranks as there are then: nothing is lost, and
nothing comes twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hvdx import world

#: What to do where samples do not divide by ranks; see :func:`share`.
UNEVEN = ("pad", "drop", "join")


def order(samples: int, epoch: int, *, shuffle: bool = True, seed: int = 0) -> np.ndarray:
    """Return the order of an epoch: each of 0 to ``samples - 1`` once, int64.

    Equal on all ranks, machines and versions of NumPy: it sorts by Philox's raw words, which
    NumPy promises to keep (it does not promise that of its shuffles).
    """
    if not shuffle:
        return np.arange(samples)
    key = np.array([seed % 2**64, epoch % 2**64], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(samples), kind="stable")


def share(indices: np.ndarray, rank: int, ranks: int, uneven: str = "join") -> np.ndarray:
    """Return every ``ranks``-th of ``indices``, from number ``rank`` on.

    Args:
        indices: what all ranks share.
        rank: this rank's number, from 0.
        ranks: how many there are.
        uneven: where they do not divide, ``"join"`` gives the first ranks one more;
            ``"pad"`` repeats the first indices, so that all get as many; ``"drop"`` leaves the
            last out to the same end.
    """
    rest = len(indices) % ranks
    if rest and uneven == "drop":
        indices = indices[:-rest]
    elif rest and uneven == "pad":
        indices = np.resize(indices, len(indices) - rest + ranks)
    return indices[rank::ranks]


def share_size(samples: int, rank: int, ranks: int, uneven: str = "join") -> int:
    """Return the length of :func:`share`."""
    if uneven == "join":
        return len(range(rank, samples, ranks))
    return samples // ranks if uneven == "drop" else -(-samples // ranks)


def step_sizes(samples: int, ranks: int, batch_size: int, drop_last: bool = False) -> list[int]:
    """Return how many samples all ranks together take in each step; their sum is ``samples``.

    Steps are as many as needed for batches of ``batch_size`` on each rank. All are full but the
    last. Where that would leave a rank without a sample, each rank's last full batch gives it
    one; of batches of 1 some take two in the end. So all ranks make the same number of steps
    without repeating or dropping anything, unless there are fewer samples than ranks.

    Args:
        samples: of all ranks.
        ranks: how many there are.
        batch_size: per rank.
        drop_last: leave out what does not fill a step.
    """
    full, rest = divmod(samples, ranks * batch_size)
    sizes = [ranks * batch_size] * full
    if drop_last or not rest:
        return sizes
    if rest >= ranks or not sizes:
        return [*sizes, rest]
    if batch_size == 1:
        sizes[-1] += rest
        return sizes
    sizes[-1] -= ranks
    return [*sizes, ranks + rest]


def part(step: np.ndarray, rank: int, ranks: int) -> tuple[np.ndarray, float]:
    """Return a rank's indices of a step, and its weight in the mean over the ranks.

    With the weights, the mean of the ranks' means is the mean over all samples of the step:
    1 where ranks have equally many. A rank that has none repeats one, with weight 0.
    """
    own = step[rank::ranks]
    if not len(own):
        return step[[rank % len(step)]], 0.0
    return own, ranks * len(own) / len(step)


class Place(NamedTuple):
    """A rank's number among those that share the data."""

    rank: int
    ranks: int

    @classmethod
    def of(
        cls, process_set: Any = None, rank: int | None = None, ranks: int | None = None
    ) -> Place:
        """Return the place that is given, or that of this process.

        Raises:
            ValueError: the rank is not among the ranks; the message names both.
            NotInitializedError: nothing is given, and ``hvd.init()`` has not been called.
        """
        own = process_set.ranks if process_set is not None else None
        if ranks is None:
            ranks = len(own) if own is not None else world.size()
        if rank is None:
            rank = world.rank()
            if own is not None and rank not in own:
                raise ValueError(f"rank {rank} is not in the process set of ranks {list(own)}")
            rank = own.index(rank) if own is not None else rank
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}: ranks are numbered from 0 to {ranks - 1}")
        return cls(rank, ranks)


class Progress:
    """Where training stands: the epoch, and how many of its samples are done.

    Epochs follow each other by themselves: what has been given out whole is followed by the
    next one. A script that says ``set_epoch`` is obeyed.

    Attributes:
        epoch: of the pass under way, or of the next one.
        start: samples of the epoch, over all ranks, that were done before this pass.
        seed: of the order.
    """

    def __init__(self, seed: int = 0) -> None:
        self.epoch = 0
        self.start = 0
        self.seed = seed
        self._rewind()

    def _rewind(self, loaded: bool = False) -> None:
        self._given = 0
        self._recorded: int | None = None
        self._enough: int | None = None  # of a pass that has begun
        self._ended = False
        self._loaded = loaded

    def begin(self, samples: int, ranks: int, shuffle: bool) -> np.ndarray:
        """Begin a pass over what is left of the epoch, or over the next one; return its order.

        A pass counts as whole when only samples are left that do not make one for each of
        ``ranks``: all ranks see that alike, however they deal with the rest.
        """
        if self.whole:
            self.epoch, self.start = self.epoch + 1, 0
        self._rewind()
        left = order(samples, self.epoch, shuffle=shuffle, seed=self.seed)[self.start :]
        self._enough = len(left) // ranks * ranks
        return left

    def left(self, samples: int) -> int:
        """Return how many samples the pass has that is under way or comes next.

        Where batches are recorded, a pass is under way until the next one begins: batches may be
        fetched ahead, and a script asks behind the last one whether it was that.
        """
        return samples if self._ended and self._recorded is None else samples - self.start

    def end(self) -> None:
        """Note that the pass has been asked for more than there is."""
        self._ended = True

    @property
    def whole(self) -> bool:
        """Tell whether the last pass has given out all there was."""
        return self._enough is not None and self._given >= self._enough

    def give(self, samples: int) -> None:
        """Count samples, over all ranks, that were given out in this pass."""
        self._given += samples

    def record(self, samples: int) -> None:
        """Note how many samples, over all ranks, were trained on in this pass."""
        self._recorded = samples

    def set_epoch(self, epoch: int) -> None:
        """Begin with ``epoch`` next: where it was left, if that is what was loaded."""
        if epoch != self.epoch or not self._loaded:
            self.start = 0
            self._rewind()
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return what :meth:`load_state_dict` takes, on any number of ranks."""
        done = self.start + (self._given if self._recorded is None else self._recorded)
        return {"epoch": self.epoch, "processed_num": done, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int], samples: int) -> None:
        """Go on where :meth:`state_dict` was taken; ``samples`` make an epoch."""
        self.epoch, self.start = state["epoch"], state["processed_num"]
        self.seed = state.get("seed", self.seed)
        if self.start >= samples:
            self.epoch, self.start = self.epoch + 1, 0
        self._rewind(loaded=True)


class Steps:
    """The steps of what is left of an epoch, for one rank.

    Args:
        left: the rest of the epoch's order.
        sizes: samples of all ranks in each step.
        place: of this rank.
    """

    def __init__(self, left: np.ndarray, sizes: Sequence[int], place: Place) -> None:
        self.place = place
        self.ends = [0, *itertools.accumulate(sizes)]
        self._left = left

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, step: int) -> tuple[np.ndarray, float]:
        """Return this rank's indices in a step, and its weight; see :func:`part`."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return part(self._left[self.ends[step] : self.ends[step + 1]], *self.place)

    @property
    def even(self) -> bool:
        """Tell whether all ranks have equally many samples in every step."""
        return self.ends[-1] % self.place.ranks == 0
