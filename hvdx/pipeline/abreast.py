"""What replicas of a stage tell each other while each of them computes a micro-batch.

Micro-batch k of a step is replica k mod r's. Those of one turn, k // r, are under way at the same
time, and what they have in common, such as the mean of all their rows, is found here:

    turn        0      1      2
    replica 0   F0     F2     F4        F4 is alone: five micro-batches for two replicas
    replica 1   F1     F3

Nobody can wait for ever: replicas have the same row of the schedule but for these numbers (see
:func:`hvdx.pipeline.schedule.dealt`), so the others of a turn come to the same point; and if one
of them fails instead, the channel says so.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

from hvdx.pipeline.channel import Key
from hvdx.pipeline.replicas import Row


class Abreast:
    """Swaps numbers between the replicas of a stage, in one step.

    Args:
        row: of the replicas.
        step: of the channel.
        stage: that they are replicas of.
        micro_batches: of the step.
    """

    def __init__(self, row: Row, step: int, stage: int, micro_batches: int) -> None:
        self._row, self._step, self._stage, self._count = row, step, stage, micro_batches
        self._known: dict[tuple[str, int], list[Any]] = {}

    def gathered(self, own: Any, name: str, micro_batch: int) -> list[Any]:
        """Return what the replicas of a turn have, in the order of the row.

        Asked again, it sends nothing and returns the same: to a forward that is computed again,
        and to the second half of a backward that is split.

        Args:
            own: a tensor, of the same shape on all of them.
            name: of it, once in a micro-batch.
            micro_batch: that this replica is at.
        """
        if (name, micro_batch) not in self._known:
            replicas = len(self._row.ranks)
            turn = micro_batch // replicas
            working = min(replicas, self._count - turn * replicas)
            key = Key(name, self._step, self._stage, turn)
            self._known[name, micro_batch] = self._row.swap([own] * working, key)()
        return self._known[name, micro_batch]

    def summed(self, own: Any, name: str, micro_batch: int) -> Any:
        """Return the sum of what :meth:`gathered` returns."""
        return functools.reduce(operator.add, self.gathered(own, name, micro_batch))

    def merged(self, own: Mapping[tuple[int, ...], Any]) -> dict[tuple[int, ...], Any]:
        """Return what all replicas have found in the step, added up in the order of the row.

        All of them call it, once; with the same bits for a result, in host memory.

        Args:
            own: tensors by some numbers, as many on all ranks; replicas may lack entries.
        """
        row, key = self._row, Key("found", self._step, self._stage, 0)
        numbers = [number for entry in own for number in entry]
        told = row.ops.constant([len(own), *numbers], "int64")
        mine = [told, *own.values()]
        for place in range(len(row.ranks)):
            if place != row.place:
                row.send(place, key, mine)
        total: dict[tuple[int, ...], Any] = {}
        for place in range(len(row.ranks)):
            index, *tensors = mine if place == row.place else row.receive(place, key)
            for entry, tensor in zip(_entries(index.numpy().tolist()), tensors, strict=True):
                here = row.beside(tensor, told)
                total[entry] = total[entry] + here if entry in total else here
        return total


def _entries(index: list[int]) -> list[tuple[int, ...]]:
    count, *numbers = index
    width = len(numbers) // max(count, 1)
    return [tuple(numbers[width * i : width * (i + 1)]) for i in range(count)]
