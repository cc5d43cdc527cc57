"""Process sets that know the cores they belong to; needs Horovod, loads no framework.

Each core numbers its sets itself, but Horovod's ``ProcessSet`` holds one number, and asks the
core that was initialised last about it. With both cores in a process that is the wrong one
half of the time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

from horovod.common import process_sets as horovod_sets

from hvdx.frameworks import Adapter


class ProcessSet(horovod_sets.ProcessSet):
    """Ranks that run collectives among themselves.

    Give it to ``hvd.init(process_sets=[...])``, or to ``hvd.add_process_set()`` while the job
    runs, on every rank in the same order; then pass it to collectives. A set declared to
    ``hvd.init`` serves every core that this starts; one added through ``hvdx.torch`` or
    ``hvdx.tensorflow`` serves that core alone.

    Args:
        ranks_or_comm: global ranks, or an mpi4py communicator.
    """

    def __init__(self, ranks_or_comm: Any) -> None:
        super().__init__(ranks_or_comm)
        self._known: dict[str, Any] = {}  # framework: the set as its core numbers it

    def unnumbered(self: Any) -> Any:
        """Return a set of Horovod's own with these ranks, for a core to number."""
        return horovod_sets.ProcessSet(self.mpi_comm if self.ranks is None else self.ranks)

    def register(self, framework: str, known: Any) -> None:
        """Note that the core of ``framework`` knows this set as ``known``."""
        self._known[framework] = known
        self.ranks, self.process_set_id = known.ranks, known.process_set_id

    def forget(self, framework: str) -> Any:
        """Leave a core; return what it knew this set as, or None."""
        known = self._known.pop(framework, None)
        if known is not None:
            left = next(iter(self._known.values()), None)
            self.process_set_id = left and left.process_set_id
        return known

    def of(self, framework: str) -> Any:
        """Return the set as the core of ``framework`` numbers it.

        Raises:
            ValueError: that core does not know it.
        """
        known = self._known.get(framework)
        if known is not None:
            return known
        if self._known:
            others = " and ".join(self._known)
            raise ValueError(
                f"{self} belongs to Horovod's core for {others}; the one for {framework} does "
                f"not know it. Add it there with hvdx.{framework}.add_process_set(), or declare "
                "it to hvd.init(), which tells every core that it starts"
            )
        if self.process_set_id is None:
            raise ValueError(
                f"{self} is not registered (any more): give it to hvd.init(process_sets=[...]) "
                "or hvd.add_process_set(), on every rank"
            )
        return self  # Horovod's own init() numbered it

    def size(self) -> int | None:
        """Return the number of ranks, or None before the set is registered."""
        return None if self.process_set_id is None else len(self.ranks)

    def rank(self) -> int | None:
        """Return this process's number within the set, or None before it is registered.

        Raises:
            ValueError: this process is not part of it.
        """
        if self.process_set_id is None:
            return None
        if not self.included():
            raise ValueError(f"rank {_rank()} is not part of {self}")
        return int(self.ranks.index(_rank()))

    def included(self) -> bool | None:
        """Tell whether this process is part of the set; None if the ranks are not known yet."""
        return None if self.ranks is None else _rank() in self.ranks

    def __str__(self) -> str:
        return f"ProcessSet({self.mpi_comm if self.ranks is None else self.ranks})"

    __repr__ = __str__


class Everyone(ProcessSet):
    """The set of all ranks, as one framework's core has it; ranks are known after ``init``."""

    def __init__(self, framework: str) -> None:
        self._known = {}
        self.process_set_id = 0
        self._framework = framework

    @property
    def ranks(self) -> list[int]:
        """All ranks; none before ``init``."""
        horovod = importlib.import_module(f"horovod.{self._framework}")
        return list(range(horovod.size())) if horovod.is_initialized() else []


@functools.cache
def everyone(framework: str) -> Everyone:
    """Return the global process set of ``framework``."""
    return Everyone(framework)


def point_at(adapter: Adapter) -> Any:
    """Have Horovod's functions for process sets ask the core of ``adapter``; whom they asked."""
    before = horovod_sets._basics
    horovod_sets._setup(importlib.import_module(f"horovod.{adapter.framework}.mpi_ops")._basics)
    return before


def number(sets: list[Any]) -> None:
    """Number sets of Horovod's that the core asked (see :func:`point_at`) knows already.

    Raises:
        ValueError: it does not know one.
    """
    for each in sets:
        try:
            horovod_sets._init_process_sets([each])
        except KeyError:
            raise ValueError(
                f"Horovod runs already, without {ProcessSet(each.ranks)}: declare it to the first "
                "hvd.init(), or add it with hvd.add_process_set()"
            ) from None


def known(adapter: Adapter) -> dict[tuple[int, ...], Any]:
    """Return the sets that the core of ``adapter`` knows, but that of all ranks, by their ranks."""
    found = {}
    with asking(adapter):
        for ranks in horovod_sets._basics._get_process_set_ids_and_ranks().values():
            if len(ranks) < adapter.ranks(None):
                number([own := horovod_sets.ProcessSet(list(ranks))])
                found[tuple(ranks)] = own
    return found


@contextlib.contextmanager
def asking(adapter: Adapter) -> Iterator[None]:
    """:func:`point_at` a core for a while."""
    before = point_at(adapter)
    try:
        yield
    finally:
        horovod_sets._setup(before)


def _rank() -> int:
    from hvdx import world

    return world.rank()
