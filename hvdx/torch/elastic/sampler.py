"""A sampler that shares out what is left of an epoch when ranks change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.utils.data

from hvdx import data
from hvdx.world import rank, size


class ElasticSampler(torch.utils.data.Sampler[int]):
    """Give each rank its share of a dataset, and after a change of the ranks its share of the rest.

    Put it into the ``TorchState``; call ``record_batch`` after every batch, before
    ``state.commit()``; call ``set_epoch`` at the *end* of every epoch. Then no sample is lost,
    and none is trained on twice in an epoch but those that make up for unequal shares: fewer
    than one per rank, where what is left does not divide.

    Args:
        dataset: anything with a length, which does not change.
        shuffle: draw a new order in every epoch; else that of the dataset.
        seed: of the orders; equal on all ranks.
    """

    def __init__(self, dataset: Any, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.processed_indices: set[int] = set()  # Horovod has it, and does not use it either
        self.processed_num = 0
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``, with nothing of it processed."""
        self.epoch = epoch
        self.processed_num = 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Note that every rank has trained on ``batch_size`` samples."""
        self.processed_num += batch_size * self.num_replicas

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many samples of it all ranks have processed."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch = state_dict["epoch"]
        self.processed_num = state_dict["processed_num"]
        self.reset()

    def reset(self) -> None:
        """Share out what is not processed yet among the ranks that there are now."""
        self.num_replicas = size()
        self.rank = rank()
        order = data.order(len(self.dataset), self.epoch, shuffle=self.shuffle, seed=self.seed)
        self.remaining_indices = order[self.processed_num :].tolist()
        self.num_samples = -(-len(self.remaining_indices) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        left = np.array(self.remaining_indices, int)
        self.indices = data.share(left, self.rank, self.num_replicas, "pad").tolist()
        return iter(self.indices)

    def __len__(self) -> int:
        return self.num_samples
