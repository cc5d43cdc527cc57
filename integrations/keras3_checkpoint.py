"""How models and optimizers of Keras 3 are saved by ``hvd.Checkpoints``, on both backends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from hvdx.checkpoints import tree
from hvdx.checkpoints.parts import (
    Crew,
    Part,
    Saved,
    compression_misfit,
    compression_state,
    differences,
)
from hvdx.checkpoints.tree import Stored, Tree
from hvdx.integrations.keras3 import averaging

SEED = "seed_generator_state"
_NUMBER = re.compile(r"_\d+(?=[/_]|$)")


def array(value: Any) -> np.ndarray:
    """Copy a variable or tensor to NumPy; bfloat16 as that of ``ml_dtypes``."""
    return np.array(keras.ops.convert_to_numpy(value))


def assign(variable: Any, value: np.ndarray) -> None:
    """Give a variable what an array holds."""
    # Not every backend takes bfloat16 from NumPy; float32 has all of its numbers.
    variable.assign(value.astype(np.float32) if value.dtype.name == "bfloat16" else value)


def told(variable: Any) -> str:
    """Describe a variable as :meth:`Stored.told` does."""
    return f"{variable.dtype} {tuple(variable.shape)}"


def by_path(variables: Iterable[Any]) -> dict[str, Any]:
    """Name variables by their paths, made unique."""
    named: dict[str, Any] = {}
    for variable in variables:
        _name(variable.path, variable, named)
    return named


def slots(optimizer: Any) -> dict[str, Any]:
    """Name an optimizer's variables without its own name, which may be numbered."""
    named: dict[str, Any] = {}
    for variable in optimizer.variables:
        _name(variable.path.partition("/")[2] or variable.path, variable, named)
    return named


def _name(wanted: str, variable: Any, named: dict[str, Any]) -> None:
    name, copy = wanted, 0
    while name in named:
        copy += 1
        name = f"{wanted}#{copy}"
    named[name] = variable


def names_there(there: Iterable[str], here: Iterable[str]) -> dict[str, str]:
    """Return by name of a variable the one that it had when it was saved.

    Keras numbers layers without a name of their own, by what the process has made before. Where
    names differ in such numbers only, and come in the same order, the order decides.
    """
    then, now = list(there), list(here)
    alike = [_NUMBER.sub("", n) for n in then] == [_NUMBER.sub("", n) for n in now]
    if set(then) != set(now) and alike:
        return dict(zip(now, then, strict=True))
    return {name: name for name in now}


def part_of(value: Any) -> Part | None:
    """Return what saves a model, a layer or an optimizer; None if it is none."""
    if isinstance(value, keras.Layer):
        return Model(value)
    if isinstance(value, keras.optimizers.Optimizer):
        return Optimizer(value)
    return None


class Model(Part):
    """A model: rank 0's variables, by path. Random states of its layers are each rank's own."""

    kind = "model"
    others = ("pipeline",)

    def _variables(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what is equal on all ranks, and what is not."""
        if not all(layer.built for layer in self.value._flatten_layers()):
            raise ValueError(
                f"model {self.value.name!r} has no variables yet: give it an Input, or call it on "
                "a batch before"
            )
        named = by_path(self.value.variables)
        seeds = {name: v for name, v in named.items() if v.name == SEED}
        return {name: v for name, v in named.items() if name not in seeds}, seeds

    def prepare(self) -> None:
        """See :meth:`Part.prepare`: make what the optimizer that it is compiled with keeps."""
        optimizer = getattr(self.value, "optimizer", None)
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.value.trainable_variables)

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        optimizer = averaging(getattr(self.value, "optimizer", None))
        if optimizer is not None and optimizer._averager.local:
            raise ValueError(
                "the optimizer has local variables, which differ between ranks, and one model is "
                "saved: save those on each rank by other means"
            )
        shared, seeds = self._variables()
        return (shared if rank == 0 else None), (seeds or None)

    def problems(self, saved: Saved) -> list[str]:
        """See :meth:`Part.problems`."""
        return differences(*self._paired(saved), told)

    def load(self, saved: Saved, crew: Crew) -> None:
        """See :meth:`Part.load`."""
        there, here = self._paired(saved)
        for name, variable in here.items():
            assign(variable, tree.array(there[name]))
        own = (saved.own(crew.rank) if crew.rank < saved.ranks else None) or {}
        seeds = self._variables()[1]
        for name, then in names_there(own, seeds).items():
            if then in own:
                assign(seeds[name], tree.array(own[then]))

    def _paired(self, saved: Saved) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what is saved and what there is, by the names that variables have now."""
        there = saved.shared["model"] if saved.kind == "pipeline" else saved.shared
        there, here = {n: t for n, t in there.items() if SEED not in n}, self._variables()[0]
        now = {then: name for name, then in names_there(there, here).items()}
        return {now.get(name, name): each for name, each in there.items()}, here


class Optimizer(Part):
    """An optimizer, wrapped or not: its variables, by path.

    With parameter servers each rank saves what it owns of them; a job of another number of ranks,
    or a plain optimizer, takes what it needs from all files.
    """

    kind = "optimizer"

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self._averaging = averaging(value)

    @property
    def _compressor(self) -> str:
        one = self._averaging
        return "none" if one is None else one._averager.options.compressor.name

    def _spans(self) -> dict[str, tuple[int, int, tuple[int, ...]]]:
        """Return of which variables this rank has a part: from where to where, of what shape."""
        one = self._averaging
        if one is None or not one.has_parts:
            return {}
        averager: Any = one._averager
        return {
            name: (*averager._spans[place], tuple(averager.wholes[place].shape))
            for name, variable in slots(self.value).items()
            if (place := averager.slots.get(id(variable))) is not None
        }

    def settle(self) -> None:
        """End rounds, and what is accumulated or owed by owners, alike on all ranks."""
        if self._averaging is not None:
            one: Any = self._averaging
            if one.has_parts:
                one._averager.settle([])
            else:
                one.settle()

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        named, spans = slots(self.value), self._spans()
        alone = hasattr(self._averaging, "flush")  # each rank's optimizer has seen its own data
        parts = named if alone else {name: named[name] for name in spans}
        own: dict[str, Any] = {}
        if parts:
            own["part"] = parts
            own["spans"] = {name: spans[name][:2] for name in spans}
        if self._averaging is not None and self._compressor != "none":
            own["compression"] = self._averaging.compression_state()
        shared = None
        if rank == 0:
            shared = {
                "class": type(self.value).__name__,
                "shapes": {name: spans[name][2] if name in spans else tuple(v.shape)
                           for name, v in named.items()},
                "cut": bool(spans),
                "variables": {n: v for n, v in named.items() if n not in parts},
            }  # fmt: skip
        return shared, own or None

    def problems(self, saved: Saved) -> list[str]:
        """See :meth:`Part.problems`."""
        found, spans = [], self._spans()
        if saved.shared["class"] != type(self.value).__name__:
            then = saved.shared["class"]
            found.append(f"it is of {then}, but this is {type(self.value).__name__}")
        here = {n: spans[n][2] if n in spans else tuple(v.shape)
                for n, v in slots(self.value).items()}  # fmt: skip
        now = {then: name for name, then in self._names(saved).items()}
        there = {now.get(name, name): shape for name, shape in saved.shared["shapes"].items()}
        if not self.value.built and len(there) > len(here):
            return [*found, "the optimizer has no variables yet: call "
                    "optimizer.build(model.trainable_variables) before"]  # fmt: skip
        found += [f"{name!r} is not in the checkpoint" for name in here if name not in there]
        found += [f"{name!r} is in the checkpoint only" for name in there if name not in here]
        found += [
            f"{name!r} has shape {tuple(there[name])} in the checkpoint, but {shape} here"
            for name, shape in here.items()
            if name in there and tuple(there[name]) != shape
        ]
        return found + compression_misfit(saved, self._compressor)

    def _names(self, saved: Saved) -> dict[str, str]:
        return names_there(saved.shared["shapes"], slots(self.value))

    def load(self, saved: Saved, crew: Crew) -> None:
        """See :meth:`Part.load`."""
        spans, everyone = self._spans(), [saved.own(rank) for rank in range(saved.ranks)]
        names = self._names(saved)
        for name, variable in slots(self.value).items():
            value = self._value(names[name], saved, everyone, crew)
            if name in spans:
                start, stop, _ = spans[name]
                assign(variable, value.reshape(-1)[start:stop])
            else:
                assign(variable, value.reshape(tuple(variable.shape)))
        kept = compression_state(saved, crew, self._compressor)
        if kept is not None and self._averaging is not None:
            self._averaging.load_compression_state(kept)

    def _value(
        self, name: str, saved: Saved, everyone: list[Mapping[str, Any] | None], crew: Crew
    ) -> np.ndarray:
        """Return the whole of a variable."""
        if name in saved.shared["variables"]:
            return tree.array(saved.shared["variables"][name])
        if not saved.shared["cut"]:  # each rank had its own
            own = everyone[crew.rank % saved.ranks]
            return tree.array(_part(own, name))
        pieces = {own["spans"][name][0]: tree.array(_part(own, name))
                  for own in everyone if own is not None and _part(own, name).nbytes}  # fmt: skip
        empty = tree.array(_part(everyone[0], name))
        return np.concatenate([empty[:0], *(pieces[start] for start in sorted(pieces))])


def _part(own: Any, name: str) -> Stored:
    return own["part"][name]  # type: ignore[no-any-return]
