"""Share a dataset between ranks: samplers for ``torch.utils.data.DataLoader``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
import torch.utils.data.distributed

from hvdx import data, world
from hvdx.agreement import next_name
from hvdx.data import Place, Progress, Steps
from hvdx.integrations.pytorch_engine import wait
from hvdx.reduce_op import ReduceOp


class DistributedSampler(torch.utils.data.distributed.DistributedSampler[Any]):
    """Give each rank its share of a dataset, shuffled anew in every epoch.

    Takes the place of torch's class of this name and needs no ``torch.distributed``. Unlike
    that one it comes to the next epoch's order by itself where ``set_epoch`` is forgotten, and
    it can be saved and resumed in the middle of an epoch, on another number of ranks too.

    By default all ranks get equally many samples (``uneven="pad"``: fewer than one per rank come
    twice), so that a plain loop cannot hang. For every sample exactly once use
    :class:`DistributedBatchSampler`, which needs nothing else, or ``uneven="join"`` in a loop
    over :class:`uneven`.

    Args:
        dataset: anything with a length.
        num_replicas: ranks that share it; those of the process set by default.
        rank: this rank's number among them.
        shuffle: draw a new order in every epoch; else that of the dataset.
        seed: of the orders; equal on all ranks.
        drop_last: the same as ``uneven="drop"``.
        uneven: where samples do not divide by ranks: ``"pad"`` repeats some, ``"drop"`` leaves
            some out, ``"join"`` gives some ranks one more.
        process_set: the ranks that share the dataset; all by default.

    Raises:
        ValueError: an option has no meaning; the message names it.

    Example:
        >>> sampler = hvd.DistributedSampler(dataset)
        >>> loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        uneven: str = "pad",
        process_set: Any = None,
    ) -> None:
        if uneven not in data.UNEVEN:
            raise ValueError(f"uneven={uneven!r} must be one of {', '.join(data.UNEVEN)}")
        self.dataset: Any = dataset
        self.shuffle = shuffle
        self.drop_last = drop_last or uneven == "drop"
        self._uneven = "drop" if self.drop_last else uneven
        self._given_place = (process_set, rank, num_replicas)
        self._progress = Progress(seed)
        self._trained = 0  # samples of all ranks, in this pass, that were recorded
        Place.of(*self._given_place)  # what is wrong with it shall show now

    # torch's class has these as attributes; here they follow the job as it is now.
    @property
    def rank(self) -> int:  # type: ignore[override]
        """This rank's number among those that share the dataset."""
        return Place.of(*self._given_place).rank

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """How many ranks share the dataset."""
        return Place.of(*self._given_place).ranks

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """The epoch under way; before an epoch's first sample, the one before it."""
        return self._progress.epoch

    @property
    def seed(self) -> int:  # type: ignore[override]
        """Of the orders."""
        return self._progress.seed

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """This rank's samples in the pass that is under way or comes next."""
        rank, ranks = Place.of(*self._given_place)
        return data.share_size(self._progress.left(len(self.dataset)), rank, ranks, self._uneven)

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """All ranks' samples, with those that come twice and without those left out."""
        return sum(
            data.share_size(len(self.dataset), rank, self.num_replicas, self._uneven)
            for rank in range(self.num_replicas)
        )

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        rank, ranks = Place.of(*self._given_place)
        left = self._progress.begin(len(self.dataset), ranks, self.shuffle)
        self._trained = 0
        for index in data.share(left, rank, ranks, self._uneven).tolist():
            self._progress.give(ranks)
            yield index
        self._progress.end()

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` next."""
        self._progress.set_epoch(epoch)

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Note that a batch has been trained on; needed where a loader's workers fetch ahead.

        Args:
            batch_idx: accepted as Horovod's elastic sampler does, and not needed.
            batch_size: this rank's samples in it.
        """
        self._trained += batch_size * self.num_replicas
        self._progress.record(self._trained)

    def state_dict(self) -> dict[str, int]:
        """Return where training stands; equal on all ranks after the same number of steps.

        What counts is what was recorded, or where nothing was, what has been given out.
        """
        return self._progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken, on any number of ranks."""
        self._progress.load_state_dict(state_dict, len(self.dataset))


class DistributedBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Give each rank its batches: every sample exactly once, the same number of steps everywhere.

    No rank waits for another at the end of an epoch, however many samples there are: the last
    batches are smaller, and of ranks' batches in one step the largest has at most one sample
    more than the smallest. (Fewer samples than ranks cannot be shared so; then some repeat one.)

    Args:
        dataset: anything with a length.
        batch_size: per rank.
        shuffle: draw a new order in every epoch; else that of the dataset.
        seed: of the orders; equal on all ranks.
        drop_last: leave out the samples that do not fill a batch on every rank.
        process_set: the ranks that share the dataset; all by default.

    Example:
        >>> batches = hvd.DistributedBatchSampler(dataset, batch_size=32)
        >>> loader = DataLoader(dataset, batch_sampler=batches)
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        process_set: Any = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.dataset: Any = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._process_set = process_set
        self._progress = Progress(seed)
        self._steps: Steps | None = None  # of the pass under way

    def __len__(self) -> int:
        left, ranks = self._progress.left(len(self.dataset)), Place.of(self._process_set).ranks
        return len(data.step_sizes(left, ranks, self.batch_size, self.drop_last))

    def __iter__(self) -> Iterator[list[int]]:
        place = Place.of(self._process_set)
        left = self._progress.begin(len(self.dataset), place.ranks, self.shuffle)
        sizes = data.step_sizes(len(left), place.ranks, self.batch_size, self.drop_last)
        self._steps = steps = Steps(left, sizes, place)
        for step, size in enumerate(sizes):
            own, _ = steps[step]
            self._progress.give(size)
            yield own.tolist()
        self._progress.end()

    @property
    def epoch(self) -> int:
        """The epoch under way; before an epoch's first batch, the one before it."""
        return self._progress.epoch

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` next."""
        self._progress.set_epoch(epoch)

    def record_batch(self, batch_idx: int, batch_size: int = 0) -> None:
        """Note that a batch has been trained on; needed where a loader's workers fetch ahead.

        Args:
            batch_idx: its number in the loop over the loader, from 0.
            batch_size: accepted as Horovod's elastic sampler does, and not needed.
        """
        assert self._steps is not None, "no batch has been given out yet"
        self._progress.record(self._steps.ends[batch_idx + 1])

    def state_dict(self) -> dict[str, int]:
        """Return where training stands; see :meth:`DistributedSampler.state_dict`."""
        return self._progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken, on any number of ranks."""
        self._progress.load_state_dict(state_dict, len(self.dataset))


class uneven(Iterable[Any]):
    """Iterate over ranks' loaders of unequal lengths: all make as many steps as the longest.

    For data that no sampler shares, such as one file per rank, or for samplers with
    ``uneven="join"``. A rank that has run out repeats its last batch with weight 0, so that it
    does all that the others do: averages, clipping, schedules, metrics over all ranks. In each
    step gradients are weighted by the ranks' numbers of samples: their mean is that over all
    samples of the step, as in one process. (Horovod's ``join`` divides the sum of those who have
    data by the number of all, lets replicas differ afterwards and refuses all but allreduce.)

    Costs a sum of one number per step, under way while the step before is computed.

    Args:
        loader: this rank's batches.
        *optimizers: wrapped by ``hvd.DistributedOptimizer``, which average with ``hvd.Average``.
            Without any, nothing is weighted; see ``weight``.
        samples: counts a batch, to weight it; its first tensor's length by default.
        process_set: the ranks that go together; all by default.

    Attributes:
        weight: of this rank's batch in the step under way: 0 where it is repeated, 1 where
            all ranks have equally many samples.

    Example:
        >>> for x, y in hvd.uneven(loader, optimizer):
        ...     optimizer.zero_grad()
        ...     loss_of(model(x), y).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *optimizers: torch.optim.Optimizer,
        samples: Callable[[Any], int] | None = None,
        process_set: Any = None,
    ) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"{type(optimizer).__name__} is no torch.optim.Optimizer")
        self.weight = 1.0
        self._loader = loader
        self._optimizers = optimizers
        self._samples = samples or samples_of
        self._process_set = process_set

    def __iter__(self) -> Iterator[Any]:
        adapter = world.core("torch")
        everyone = self._process_set or adapter.horovod.global_process_set
        ranks = adapter.ranks(self._process_set)
        name = next_name("uneven", self._process_set)
        batches = iter(self._loader)

        def fetch() -> tuple[Any, int, Callable[[], float]]:
            """Take the next batch, count it, and begin to add up all ranks' counts."""
            batch = next(batches, None)
            count = 0 if batch is None else self._samples(batch)
            told = torch.tensor([float(count)], dtype=torch.float64)
            handle = adapter.horovod.allreduce_async_(
                told, name=name, op=int(ReduceOp.Sum), process_set=everyone
            )
            return batch, count, lambda: float(wait(adapter.horovod, handle, name))

        batch, count, total = fetch()
        shown = self._borrowed(adapter, batch, count, name)
        while (all_samples := total()) > 0:
            shown = batch if count else shown
            self.weight = ranks * count / all_samples
            batch, count, total = fetch()  # before the step: its sum travels meanwhile
            hooks = [] if self.weight == 1.0 else self._hooks()
            try:
                yield shown
            finally:
                for hook in hooks:
                    hook.remove()

    def _borrowed(self, adapter: Any, batch: Any, count: int, name: str) -> Any:
        """Give a rank that has no batch at all another's to repeat."""
        counts = adapter.allgather_object(count, f"{name}.first", self._process_set)
        if all(counts) or not any(counts):
            return batch
        lender = next(rank for rank, own in enumerate(counts) if own)
        if self._process_set is not None:
            lender = self._process_set.ranks[lender]
        return adapter.broadcast_object(batch, lender, f"{name}.lent", self._process_set)

    def _hooks(self) -> list[Any]:
        """Have gradients weighted on their way to the parameters, before they are averaged."""
        weight = self.weight
        parameters = {
            id(parameter): parameter
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        }

        def scaled(grad: torch.Tensor) -> torch.Tensor:
            # Not 0 * grad: where a repeated batch overflows, that is not a number.
            return grad * weight if weight else torch.zeros_like(grad)

        return [parameter.register_hook(scaled) for parameter in parameters.values()]


def samples_of(batch: Any) -> int:
    """Return the length of the first tensor in nested dictionaries, lists and tuples."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return samples_of(batch[0]) if batch else 0
    return 1
