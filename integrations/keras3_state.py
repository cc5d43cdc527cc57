"""What compressors keep from step to step under Keras, by parameter."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from hvdx.comm import drive, in_step, together
from hvdx.compression import CompressionError, Compressor, Spec
from hvdx.compression.portable import (
    PORTABLE,
    Origin,
    carried,
    check_saved,
    moved,
    pooled,
    restored,
    shared_alike,
    shares,
)
from hvdx.compression.state import Leaf, leaves
from hvdx.ops import NumpyOps, Ops


class Kept(NamedTuple):
    """One parameter's."""

    spec: Spec
    compressor: Compressor
    device: str  # the parameter's, as far as it is known
    state: Any  # a tree whose leaves are tensors, or whatever the backend keeps them in


class States:
    """What the compressors of an optimizer keep, in plain tensors.

    Args:
        ops: the verbs of the tensors.
        compressor: what the user has asked for.

    Attributes:
        step: how many steps with finite means there were; equal on all ranks.
        origin: this rank's place among those that share the states; None before they meet.
        left: whose the states are that wait for their parameters, which were loaded or are left
            of a job that has ended (elastic training); None if there are none.
    """

    step: Any
    origin: Origin | None = None
    left: Origin | None = None

    def __init__(self, ops: Ops, compressor: Compressor) -> None:
        self.ops = ops
        self.step = 0
        self._asked = compressor
        self._kept: dict[str, Kept] = {}
        self._loaded: dict[str, list[Leaf]] = {}  # of parameters not met yet

    def forget(self) -> None:
        """Begin anew with other ranks, but for the step."""
        self._kept.clear()
        self._loaded.clear()
        self.left = self.origin = None

    def leave(self) -> None:
        """Keep what there is for the next ranks."""
        if self._kept:  # what still waits in a job that has gone on is of an older one
            held = {name: leaves(self[name]) for name in self._kept}
            self._loaded = {name: own for name, own in held.items() if own}
            self.left = self.origin
        self._kept.clear()
        self.origin = None

    def carry(
        self,
        parameters: Sequence[tuple[Spec, Compressor, str]],
        origins: Sequence[Origin | None],
        place: int,
        answer: Callable[[Any], Any],
    ) -> None:
        """Bring together what waits on all ranks; each old rank's counts once. A collective call.

        Args:
            parameters: those that are met next, with their compressors and devices.
            origins: what :attr:`left` is on every rank.
            place: this rank's among them.
            answer: carries out requests of :mod:`hvdx.comm`.
        """
        known = [origin for origin in origins if origin is not None]
        mine = self.left is not None and origins.index(self.left) == place
        lead = bool(known) and origins.index(known[0]) == place
        works = []
        for spec, compressor, device in parameters:
            kept = Kept(spec, compressor, device, None)
            with self.beside(kept):
                held = self._tensors(self._loaded.pop(spec.name, ()))
                given = shares(self.ops, held, *self.left) if mine and self.left else {}
                works.append(carried(self.ops, compressor.init(self.ops, spec), given, lead))
        found = drive(together(works, self.ops), answer)
        for (spec, *_), state in zip(parameters, found, strict=True):
            if own := leaves(state):
                self._loaded[spec.name] = own

    def fits(self, parameters: Sequence[tuple[Spec, Compressor, str]]) -> bool:
        """Tell whether what waits for parameters is right for hosts as they are now."""
        if self.left in (None, PORTABLE):
            return True
        return all(
            shared_alike(compressor.init(self.ops, spec), self._loaded.get(spec.name, ()))
            for spec, compressor, _ in parameters
        )

    def meet(self, spec: Spec, compressor: Compressor, device: str) -> None:
        """Make the first state of a parameter that has none yet, or take the one loaded."""
        if spec.name not in self._kept:
            kept = Kept(spec, compressor, device, None)
            loaded, origin = self._loaded.pop(spec.name, ()), self.left
            if not self._loaded:
                self.left = None
            try:
                state = self._fresh(kept, loaded)
            except CompressionError as error:
                if self._asked.prepare is None or origin is None:
                    raise
                state = self._moved(kept, loaded, origin, error)  # it has measured anew
            self._kept[spec.name] = kept._replace(state=self.hold(kept, state))

    def __getitem__(self, name: str) -> Any:
        """Return a parameter's state as a tree of tensors."""
        return self._kept[name].state

    def knows(self, name: str) -> bool:
        """Tell whether a parameter has been met."""
        return name in self._kept

    def settle(self, finite: Any, states: Mapping[str, Any]) -> None:
        """Keep new states and count the step, if its means are finite.

        Loss scaling skips a step that is not, on all ranks, and what was sent in it is not
        applied: error feedback must not count it as delivered.
        """
        if finite:
            for name, state in states.items():
                self.replace(name, state)
            self.step += 1

    # -- saved and loaded

    def saved(self, origin: Origin) -> dict[str, Any]:
        """Return what this rank, which is ``origin``, keeps, as numbers and NumPy arrays."""
        held = self._held()
        if not self._kept and self.left is not None:
            origin = self.left
        return self._spelt(origin, {name: _by_path(own) for name, own in held.items()})

    def portable(self, answer: Callable[[Any], Any]) -> dict[str, Any]:
        """Return what any number of ranks can go on from; a collective call.

        Args:
            answer: carries out requests of :mod:`hvdx.comm`.
        """
        held = self._held()
        works = [pooled(self.ops, self._tensors(own)) for own in held.values()]
        found = drive(together(works, self.ops), answer)
        return self._spelt(PORTABLE, dict(zip(held, found, strict=True)))

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Have what :meth:`saved` or :meth:`portable` returned wait for the next ranks.

        For a rank that leaves these; whatever number of ranks it was saved among.
        """
        self._kept.clear()
        self._loaded = leaves_of(saved)
        self.left = (saved["rank"], saved["ranks"]) if self._loaded else None
        self.count_from(int(saved["step"]))

    def load(self, saved: Any, origin: Origin) -> None:
        """Go on from what :meth:`saved` or :meth:`portable` has returned.

        Raises:
            CompressionError: it is of another compressor, model or number of ranks, or nothing
                of the kind.
        """
        check_saved(saved, self._asked.name, origin)
        given = leaves_of(saved)
        fresh = {name: self._fresh(kept, given.pop(name, ())) for name, kept in self._kept.items()}
        for name, state in fresh.items():
            self.replace(name, state)
        self._loaded = given
        self.left = (saved["rank"], saved["ranks"])
        self.count_from(int(saved["step"]))

    def _held(self) -> dict[str, list[Leaf]]:
        """Return the leaves of all states, those that wait for their parameters among them."""
        held = {**self._loaded, **{name: leaves(self[name]) for name in self._kept}}
        return {name: held[name] for name in sorted(held) if held[name]}

    def _spelt(self, origin: Origin, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "compressor": self._asked.name,
            "step": int(self.step),
            "rank": origin[0],
            "ranks": origin[1],
            "kinds": {leaf.path: leaf.kind for own in self._held().values() for leaf in own},
            "parameters": {
                name: {path: np.array(keras.ops.convert_to_numpy(t)) for path, t in own.items()}
                for name, own in found.items()
            },
        }

    def _tensors(self, held: Iterable[Leaf]) -> list[Leaf]:
        """Return leaves with tensors instead of NumPy arrays."""
        return [
            leaf._replace(tensor=self.ops.constant(np.array(leaf.tensor), leaf.tensor.dtype.name))
            if isinstance(leaf.tensor, np.ndarray)
            else leaf
            for leaf in held
        ]

    def _fresh(self, kept: Kept, loaded: Sequence[Leaf]) -> Any:
        """Return a first state, or the one loaded."""
        with self.beside(kept):
            first = kept.compressor.init(self.ops, kept.spec)
            if not loaded:
                return first
            try:
                return restored(first, _by_path(self._tensors(loaded)))
            except CompressionError as error:
                raise CompressionError(f"parameter {kept.spec.name!r}: {error}") from None

    def _moved(
        self, kept: Kept, loaded: Sequence[Leaf], origin: Origin, error: CompressionError
    ) -> Any:
        """Return a first state with what is owed in the one loaded, which is of another form."""
        with self.beside(kept):
            first = kept.compressor.init(self.ops, kept.spec)
            state, lost = moved(self.ops, first, self._tensors(loaded), origin)
        if lost:
            warnings.warn(
                f"{self._asked.name} has chosen another method than when its state was saved, and "
                f"{' and '.join(lost)} is lost: {error}",
                stacklevel=3,
            )
        return state

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


def leaves_of(saved: Mapping[str, Any]) -> dict[str, list[Leaf]]:
    """Return the leaves of all states in what :meth:`States.saved` has returned."""
    return {
        name: [Leaf(path, array, saved["kinds"][path]) for path, array in own.items()]
        for name, own in saved["parameters"].items()
    }


def brought_together(everyone: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make of what :meth:`States.saved` has returned on every rank what is portable."""
    ops, told = NumpyOps(), [leaves_of(saved) for saved in everyone]
    found = {name: in_step([pooled(ops, own[name]) for own in told])[0] for name in told[0]}
    return {**everyone[0], "rank": PORTABLE[0], "ranks": PORTABLE[1], "parameters": found}


def _by_path(held: Iterable[Leaf]) -> dict[str, Any]:
    return {leaf.path: leaf.tensor for leaf in held}
