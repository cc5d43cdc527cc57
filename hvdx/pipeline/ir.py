"""A model as a line of units, and what crosses a cut between two of them.

A stage is an interval of that line. All values that units before a cut make and units after it
read cross the cut: its live set. So a skip over several stages is relayed by those between, and
never sent past them; several inputs and outputs are nothing special.

    unit     a        b        c        d          cut  1     2        3
    reads    x        a        b        c, a       live a     a, b     a, c
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdx.errors import PlanError


@dataclass(frozen=True)
class Unit:
    """The smallest piece of a model that a cut leaves whole.

    Attributes:
        name: as in the model, such as ``"encoder.block3"``.
        reads: values of earlier units, or inputs of the model.
        makes: value -> bytes per micro-batch, of those that others may read.
        parameters: name in the model -> bytes. A name in two units is a tied parameter.
        kept_bytes: what a micro-batch keeps from forward to backward.
        forward: seconds per micro-batch; so are the next two.
        inputs: for the gradients of what it reads; 0 if none is needed.
        weights: for those of its parameters; 0 if they are frozen.
        apart: more, under schedules that split backward into these two.
        adding: of ``weights``, for adding gradients to those of earlier micro-batches.
        uses_rng: whether it draws random numbers.
        joined: whether it must be in the stage of the unit before it (it changes a value of
            that stage in place, say).
        run: the framework's own.
    """

    name: str
    reads: tuple[str, ...] = ()
    makes: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    kept_bytes: int = 0
    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    apart: float = 0.0
    adding: float = 0.0
    uses_rng: bool = False
    joined: bool = False
    run: Any = None


@dataclass(frozen=True)
class Graph:
    """The units of a model in an order in which each reads what earlier ones make.

    Attributes:
        units: in that order.
        inputs: of the model: value -> bytes per micro-batch.
        outputs: values that the model returns.
        inside: what is no unit, or one that is joined, and has a name of the model's -> why no
            stage can begin there.

    Raises:
        PlanError: two units or values share a name, or one is read before it is made.
    """

    units: tuple[Unit, ...]
    inputs: Mapping[str, int]
    outputs: tuple[str, ...]
    inside: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.units:
            raise PlanError("a model without units: it has no layer that could be a stage")
        names: set[str] = set()
        made = set(self.inputs)
        for unit in self.units:
            if unit.name in names:
                raise PlanError(f"two units are named {unit.name!r}")
            names.add(unit.name)
            self._check(unit.reads, made, f"unit {unit.name!r} reads")
            for value in unit.makes:
                if value in made:
                    raise PlanError(f"unit {unit.name!r} makes {value!r}, which is made before it")
                made.add(value)
        self._check(self.outputs, made, "the model returns")

    @staticmethod
    def _check(values: Iterable[str], made: set[str], who: str) -> None:
        for value in values:
            if value not in made:
                raise PlanError(f"{who} {value!r}, which no unit before makes")

    @classmethod
    def chain(cls, units: Sequence[Unit], input_bytes: int = 0) -> Graph:
        """Connect units one after the other; each makes one value, named like it."""
        line, last = [], "input"
        for unit in units:
            size = next(iter(unit.makes.values()), 0)
            attributes = {**vars(unit), "reads": (last,), "makes": {unit.name: size}}
            line.append(Unit(**attributes))
            last = unit.name
        return cls(tuple(line), {"input": input_bytes}, (last,))

    def live(self, cut: int) -> tuple[str, ...]:
        """Return the values that cross a cut, in the order in which they are made.

        Args:
            cut: the unit that comes after it; 0: what the model's inputs bring.

        Returns:
            Nothing after the last unit.
        """
        if cut >= len(self.units):
            return ()
        later = {value for unit in self.units[cut:] for value in unit.reads} | set(self.outputs)
        made = [*self.inputs, *(value for unit in self.units[:cut] for value in unit.makes)]
        return tuple(value for value in made if value in later)

    def live_bytes(self) -> list[int]:
        """Return per cut, 0 to the number of units, how many bytes cross it per micro-batch."""
        count = len(self.units)
        until = dict.fromkeys(self.outputs, count)  # the last cut that a value crosses
        for index, unit in enumerate(self.units):
            until.update({value: max(until.get(value, 0), index) for value in unit.reads})
        steps = [0] * (count + 1)
        for start, made in enumerate([self.inputs, *(unit.makes for unit in self.units)]):
            for value, size in made.items():
                if until.get(value, -1) >= start:
                    steps[start] += size
                    steps[min(until[value] + 1, count)] -= size
        total, sizes = 0, []
        for step in steps[:count]:
            total += step
            sizes.append(total)
        return [*sizes, 0]

    def tied(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters that several units use: name -> those units, in order."""
        owners: dict[str, list[int]] = {}
        for index, unit in enumerate(self.units):
            for name in unit.parameters:
                owners.setdefault(name, []).append(index)
        return {name: tuple(units) for name, units in owners.items() if len(units) > 1}

    def parameter_bytes(self, start: int, stop: int) -> int:
        """Return the size of the parameters of ``units[start:stop]``; tied ones count once."""
        owned = {k: v for unit in self.units[start:stop] for k, v in unit.parameters.items()}
        return sum(owned.values())

    @property
    def solid(self) -> frozenset[int]:
        """Return the cuts that must not be made."""
        return frozenset(index for index, unit in enumerate(self.units) if index and unit.joined)

    def find(self, name: str) -> int:
        """Return the unit ``name``, or the first one inside the module of that name.

        Raises:
            PlanError: there is none; the message says where it is, or suggests similar names.
        """
        names = [unit.name for unit in self.units]
        if name in names:
            return names.index(name)
        for index, each in enumerate(names):
            if each.startswith((f"{name}.", f"{name}/")):
                return index
        if name in self.inside:
            raise PlanError(f"no stage can begin at {name!r}: {self.inside[name]}")
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        told = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise PlanError(f"no unit is named {name!r}{hint or f'; there are {told}'}")
