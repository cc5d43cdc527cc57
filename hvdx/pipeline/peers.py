"""What the ranks of a pipeline tell each other through Horovod, besides what a step sends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from hvdx import watchdog, world
from hvdx.agreement import check_same, next_name
from hvdx.errors import CheckpointError, MismatchError, PlanError
from hvdx.frameworks import Adapter

_DISK_SECONDS = 3600.0  # for which the other ranks wait for rank 0 while it reads or writes


class Peers:
    """The ranks that have stages of one model; or this process alone, which asks nobody.

    All of them call the methods, in the same order.

    Args:
        framework: whose Horovod core serves the job.
        job: whether the pipeline is spread over the job's ranks.

    Attributes:
        several: whether there are any but this one.
        size: how many there are.
        rank: of this one.
    """

    def __init__(self, framework: str, job: bool) -> None:
        self._framework = framework
        self.size = world.size() if job and world.is_initialized(framework) else 1
        self.several = self.size > 1
        self.rank = world.rank() if self.several else 0

    @property
    def core(self) -> Adapter:
        """Return the adapter of Horovod's core."""
        return world.core(self._framework)

    def gathered(self, value: Any) -> list[Any]:
        """Return what all ranks have, by rank, on each of them."""
        if not self.several:
            return [value]
        return list(self.core.allgather_object(value, next_name("pipeline"), None))

    def of_first(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""
        if not self.several:
            return value
        return self.core.broadcast_object(value, 0, next_name("pipeline"), None)

    @contextlib.contextmanager
    def alike(self, what: str = "make the pipeline") -> Iterator[None]:
        """Raise on every rank what one of them raises inside, where it does ``what``.

        Raises:
            PlanError: another rank has raised something.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            if not self.several:
                raise
            problem = error
        everyone = self.gathered(f"{type(problem).__name__}: {problem}" if problem else "")
        if problem is not None:
            raise problem
        for rank, each in enumerate(everyone):
            if each:
                raise PlanError(f"rank {rank} cannot {what}: {each}")

    def check_same(self, entries: dict[str, str], what: str = "pipeline") -> None:
        """Compare what the ranks have, by name.

        Raises:
            MismatchError: they differ; raised on every rank.
        """
        if self.several:
            check_same(self.core, what, entries, next_name("pipeline"))

    def check_optimizers(self, told: str) -> None:
        """Compare the ranks' optimizers; a rank without parameters has nothing to tell.

        Raises:
            MismatchError: they differ; raised on every rank.
        """
        everyone = self.gathered(told)
        if len({each for each in everyone if each}) > 1:
            each = ", ".join(f"rank {rank}: {made}" for rank, made in enumerate(everyone) if made)
            raise MismatchError(
                f"ranks disagree about the optimizer: {each}. All must make the same one; to treat "
                "parameters differently, decide by the parameters, not by the rank"
            )

    def done_by_first(
        self, what: str, path: str | os.PathLike[str], work: Callable[[], Any]
    ) -> Any:
        """Return on every rank what ``work`` does on rank 0.

        Raises:
            CheckpointError: it has failed; ``what`` and ``path`` say at what.
        """
        result, problem = None, ""
        if self.rank == 0:
            with watchdog.patience(_DISK_SECONDS):
                try:
                    result = work()
                except (OSError, ValueError, TypeError) as error:
                    problem = str(error) or type(error).__name__
        result, problem = self.of_first((result, problem))
        if problem:
            told = f"the pipeline cannot be {what} {os.fspath(path)!r}: {problem}"
            raise CheckpointError(told)
        return result
