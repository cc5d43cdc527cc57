"""Groups of ranks that train independently of each other in one job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from hvdx import world

_SIZES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # the last two under MPI


class Groups:
    """Cut a job's ranks into groups, each with a process set: for trials side by side.

    Make them before ``hvd.init``, alike on all ranks, and give them to it. What trains then takes
    ``process_set=groups.mine``, and broadcasts begin at ``groups.ranks[0]``. Ranks may be left
    over; these have no group.

    Args:
        groups: how many, of as equal sizes as can be and of ranks that follow each other, which
            lie on one host if that is possible; or the ranks of each.

    Raises:
        ValueError: groups have ranks in common, are empty or are more than there are ranks: on
            every rank, here or in ``hvd.init``.

    Example:
        >>> groups = hvd.Groups(2)
        >>> hvd.init(process_sets=groups)
        >>> rate = (0.1, 0.01)[groups.index]
        >>> hvd.DistributedOptimizer(optimizer, model, process_set=groups.mine)
    """

    def __init__(self, groups: int | Sequence[Sequence[int]]) -> None:
        self._asked = groups
        self._sets: list[Any] | None = None
        if isinstance(groups, int):
            if groups < 1:
                raise ValueError(f"groups={groups}: give a number of groups, from 1")
        else:
            _check([list(ranks) for ranks in groups])

    def __len__(self) -> int:
        return self._asked if isinstance(self._asked, int) else len(self._asked)

    def __iter__(self) -> Iterator[Any]:
        """Yield the process sets for ``hvd.init``; all ranks need none of their own."""
        return (each for each in self._made() if each is not None)

    @property
    def every(self) -> list[tuple[int, ...]]:
        """The ranks of each group."""
        size = _size()
        if not isinstance(self._asked, int):
            return _within([tuple(sorted(ranks)) for ranks in self._asked], size)
        if self._asked > size:
            raise ValueError(f"{self._asked} groups of {size} ranks: give fewer, or start more")
        edges = [size * i // self._asked for i in range(self._asked + 1)]
        return [tuple(range(*edges[i : i + 2])) for i in range(self._asked)]

    @property
    def index(self) -> int | None:
        """Which group is this rank's, from 0; None if it has none."""
        own = [i for i, ranks in enumerate(self.every) if world.rank() in ranks]
        return own[0] if own else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of this rank's group; none if it has none."""
        return () if self.index is None else self.every[self.index]

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its group."""
        return world.rank() in self.ranks[:1]

    @property
    def mine(self) -> Any:
        """The process set of this rank's group; None stands for all ranks.

        Raises:
            ValueError: this rank has no group.
        """
        if self.index is None:
            raise ValueError(f"rank {world.rank()} is in none of the groups {self.every}")
        return self._made()[self.index]

    def _made(self) -> list[Any]:
        if self._sets is None:
            kind, size = world.process_set_class(), _size()
            # Horovod refuses a set of all ranks: it has one.
            self._sets = [None if len(each) == size else kind(list(each)) for each in self.every]
        return self._sets


def _size() -> int:
    """Return how many ranks the job has; before they meet, as the environment says."""
    if world.is_initialized():
        return world.size()
    return next((int(os.environ[name]) for name in _SIZES if os.environ.get(name)), 1)


def _check(groups: list[list[int]]) -> None:
    owner: dict[int, int] = {}
    if not groups:
        raise ValueError("no groups: give how many, or the ranks of each")
    for number, ranks in enumerate(groups):
        if not ranks:
            raise ValueError(f"group {number} of {groups} has no ranks")
        for rank in ranks:
            if type(rank) is not int or rank < 0:
                raise ValueError(f"group {number} has {rank!r}, which is no rank")
            if rank in owner:
                where = f"groups {owner[rank]} and {number}"
                where = f"group {number} twice" if owner[rank] == number else where
                raise ValueError(
                    f"rank {rank} is in {where} of {groups}: groups train at the same time, so "
                    "that none may have another's ranks"
                )
            owner[rank] = number


def _within(groups: list[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    for number, ranks in enumerate(groups):
        if ranks[-1] >= size:
            raise ValueError(f"group {number} has rank {ranks[-1]}, but the job has {size} ranks")
    return groups
