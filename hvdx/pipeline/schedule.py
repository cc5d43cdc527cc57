"""Schedules as data: which rank does what in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Action(NamedTuple):
    """One piece of work: a stage's forward or (part of its) backward of one micro-batch.

    Kinds: ``F`` forward; ``B`` the whole backward; or in two parts ``I``, the gradient of the
    stage's inputs, and ``W``, that of its weights.
    """

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """One step's work of every rank.

    Attributes:
        rows: by rank, what it does, in order.
        place: by stage, the rank that has it.
        micro_batches: how many a step has.
        name: of the method, such as ``"1f1b"``; ``"text"`` for the user's own.
    """

    rows: tuple[tuple[Action, ...], ...]
    place: tuple[int, ...]
    micro_batches: int
    name: str = "text"

    @property
    def stages(self) -> int:
        """Count the stages."""
        return len(self.place)

    @property
    def ranks(self) -> int:
        """Count the ranks."""
        return len(self.rows)
