"""What compressors keep from step to step under Keras, by parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from hvdx import world
from hvdx.comm import Work, drive, together
from hvdx.compression import CompressionError, Compressor, Spec
from hvdx.compression.portable import portable, restored
from hvdx.compression.state import leaves
from hvdx.ops import Ops


class Kept(NamedTuple):
    """One parameter's."""

    spec: Spec
    compressor: Compressor
    device: str  # the parameter's, as far as it is known
    state: Any  # a tree whose leaves are tensors, or whatever the backend keeps them in


class States:
    """What the compressors of an optimizer keep, in plain tensors.

    Attributes:
        step: how many steps with finite means there were; equal on all ranks.
    """

    step: Any

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.step = 0
        self._kept: dict[str, Kept] = {}
        self._loaded: dict[str, Mapping[str, Any]] = {}  # of parameters not met yet

    def forget(self) -> None:
        """Begin anew with other ranks, but for the step."""
        self._kept.clear()
        self._loaded.clear()

    def meet(self, spec: Spec, compressor: Compressor, device: str) -> None:
        """Make the first state of a parameter that has none yet, or take the one loaded."""
        if spec.name not in self._kept:
            kept = Kept(spec, compressor, device, None)
            state = self._fresh(kept, self._loaded.pop(spec.name, {}))
            self._kept[spec.name] = kept._replace(state=self.hold(kept, state))

    def __getitem__(self, name: str) -> Any:
        """Return a parameter's state as a tree of tensors."""
        return self._kept[name].state

    def settle(self, finite: Any, states: Mapping[str, Any]) -> None:
        """Keep new states and count the step, if its means are finite.

        Loss scaling skips a step that is not, on all ranks, and what was sent in it is not
        applied: error feedback must not count it as delivered.
        """
        if finite:
            for name, state in states.items():
                self.replace(name, state)
            self.step += 1

    def told(self) -> dict[str, Any]:
        """Return all there is to save, as numbers and NumPy arrays."""
        return self._told({name: leaves(self[name]) for name in self._kept})

    def portable(self, answer: Callable[[Any], Any]) -> dict[str, Any]:
        """Return what any number of ranks can go on from; a collective call.

        Args:
            answer: carries out requests of :mod:`hvdx.comm`.
        """
        works = [portable(self.ops, self[name]) for name in self._kept]
        everyone: Work[list[Any]] = together(works, self.ops)
        tensors = [each.items() for each in drive(everyone, answer)]
        return self._told(dict(zip(self._kept, tensors, strict=True)))

    def _told(self, states: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {
            name: {path: keras.ops.convert_to_numpy(tensor) for path, tensor, *_ in found}
            for name, found in states.items()
        }
        kept = {name: found for name, found in arrays.items() if found}
        return {"step": int(self.step), "parameters": kept}

    def load(self, told: Mapping[str, Any]) -> None:
        """Go on from what :meth:`told` or :meth:`portable` returned.

        Raises:
            ValueError: it is nothing of the kind.
            CompressionError: a state is not such as the compressor keeps.
        """
        if set(told) != {"step", "parameters"}:
            raise ValueError(
                f"no compression state: it has {sorted(told)} rather than 'step' and 'parameters'; "
                "give what compression_state() returned"
            )
        fresh = {
            name: self._fresh(kept, told["parameters"].get(name, {}))
            for name, kept in self._kept.items()
        }
        for name, state in fresh.items():
            self.replace(name, state)
        self._loaded = {n: found for n, found in told["parameters"].items() if n not in fresh}
        self.count_from(int(told["step"]))

    def _fresh(self, kept: Kept, arrays: Mapping[str, Any]) -> Any:
        """Return a first state, or the one saved in ``arrays``."""
        with self.beside(kept):
            first = kept.compressor.init(self.ops, kept.spec)
            if not arrays:
                return first
            tensors = {p: self.ops.constant(np.array(a), a.dtype.name) for p, a in arrays.items()}
            try:
                return restored(first, tensors)
            except CompressionError as error:
                told = f"rank {world.rank()}, parameter {kept.spec.name!r}: {error}"
                raise CompressionError(told) from None

    # -- how a backend keeps them

    def hold(self, kept: Kept, state: Any) -> Any:
        """Return ``state``, its leaves put where the backend keeps them."""
        return state

    def replace(self, name: str, state: Any) -> None:
        """Keep ``state`` in the place of a parameter's former one."""
        self._kept[name] = self._kept[name]._replace(state=state)

    def count_from(self, step: int) -> None:
        """Set the step."""
        self.step = step

    def beside(self, kept: Kept) -> contextlib.AbstractContextManager[Any]:
        """Have tensors made where the parameter is."""
        return contextlib.nullcontext()
