"""What a checkpoint is made of: how each kind of object tells its state, and takes it back.

A part's state is two trees: what all ranks share, which is written once, and what is each rank's
own. A pipeline's shares are each in one rank's hands: they are written where they are, in
parallel, and are one tree when they are read.
"""

from __future__ import annotations

import abc
import importlib
import random
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hvdx.checkpoints.tree import Stored, Tree, mapped, narrow, wide
from hvdx.comm import in_step
from hvdx.compression.portable import PORTABLE, pooled
from hvdx.compression.state import Leaf
from hvdx.frameworks import kind_of
from hvdx.ops import NumpyOps


class Saved(Protocol):
    """What a checkpoint holds of a part; its tensors are :class:`Stored`."""

    kind: str  # of the part that was saved
    ranks: int  # of the job that has saved it

    @property
    def shared(self) -> Tree:
        """The tree that all ranks shared."""

    def own(self, rank: int) -> Tree:
        """Return the tree of a rank of the job that has saved it."""


class Crew(Protocol):
    """The ranks of this job."""

    rank: int
    size: int

    def first(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""


class Part(abc.ABC):
    """An object, and how it is saved.

    Attributes:
        kind: what files call it. A part is restored from one of its own kind.
        others: kinds that it understands besides.
    """

    kind = ""
    others: tuple[str, ...] = ()

    def __init__(self, value: Any) -> None:
        self.value = value

    def prepare(self) -> None:  # noqa: B027  (most need nothing)
        """Make what the state is to be put into, if that is not there yet."""

    def settle(self) -> None:  # noqa: B027  (most need nothing)
        """Bring ranks to a point at which they can be saved; a collective call."""

    @abc.abstractmethod
    def state(self, rank: int) -> tuple[Tree, Tree]:
        """Return what is shared, or this rank's share of it, and what is this rank's own.

        None for what need not be written. A collective call.
        """

    def about(self) -> Any:  # noqa: B027  (most need nothing)
        """Return what the manifest tells of it, as JSON, on rank 0."""

    def problems(self, saved: Saved) -> list[str]:
        """Say what does not fit; nothing is changed."""
        return []

    @abc.abstractmethod
    def load(self, saved: Saved, crew: Crew) -> None:
        """Take the state; a collective call."""


class Plain(Part):
    """A dictionary of plain data; it is filled in place."""

    kind = "data"

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        return (dict(self.value) if rank == 0 else None), None

    def load(self, saved: Saved, crew: Crew) -> None:
        """See :meth:`Part.load`."""
        self.value.clear()
        self.value.update(mapped(saved.shared))


class Stateful(Part):
    """Anything with ``state_dict`` and ``load_state_dict``, equal on all ranks."""

    kind = "state"

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        return (self.value.state_dict() if rank == 0 else None), None

    def load(self, saved: Saved, crew: Crew) -> None:
        """See :meth:`Part.load`."""
        self.value.load_state_dict(mapped(saved.shared))


class Staged(Part):
    """A pipeline: each rank has a part of the model's state, and of the optimizer's."""

    kind = "pipeline"
    others = ("model",)

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        return self.value.share_of_state(), None

    def about(self) -> Any:
        """See :meth:`Part.about`."""
        return {"plan": self.value.plan.to_json()}

    def problems(self, saved: Saved) -> list[str]:
        """See :meth:`Part.problems`."""
        return self.value.misfits(_staged(saved))  # type: ignore[no-any-return]

    def load(self, saved: Saved, crew: Crew) -> None:
        """See :meth:`Part.load`."""
        self.value.take_state(_staged(saved))


def _staged(saved: Saved) -> Tree:
    return saved.shared if saved.kind == Staged.kind else {"model": saved.shared}


class Generators(Part):
    """The random number generators of this process."""

    kind = "random"

    def __init__(self) -> None:
        super().__init__(None)

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        own = {"python": random.getstate(), "numpy": np.random.get_state()}
        if "torch" in sys.modules:
            own |= _torch().generators()
        return None, own

    def load(self, saved: Saved, crew: Crew) -> None:
        """Take this rank's of then; ranks that there were not keep what they have."""
        if crew.rank >= saved.ranks:
            return
        own = mapped(saved.own(crew.rank))
        random.setstate(own["python"])
        np.random.set_state(own["numpy"])
        if "torch" in sys.modules and "torch" in own:
            _torch().set_generators(own)


def _torch() -> Any:
    return importlib.import_module("hvdx.integrations.pytorch_checkpoint")


_INTEGRATIONS = {
    "torch": "hvdx.integrations.pytorch_checkpoint",
    "keras": "hvdx.integrations.keras3_checkpoint",
}


def part_of(name: str, value: Any) -> Part:
    """Return what saves ``value``.

    Raises:
        TypeError: nothing does; the message says what is saved.
    """
    if hasattr(value, "share_of_state"):
        return Staged(value)
    if isinstance(value, dict):
        return Plain(value)
    library = kind_of(type(value))
    if library in _INTEGRATIONS:
        found = importlib.import_module(_INTEGRATIONS[library]).part_of(value)
        if found is not None:
            return found  # type: ignore[no-any-return]
    both = (getattr(value, method, None) for method in ("state_dict", "load_state_dict"))
    if all(map(callable, both)) and not isinstance(value, type):
        return Stateful(value)
    raise TypeError(
        f"{name}= is a {type(value).__name__}: give models, optimizers, pipelines, what has "
        "state_dict() and load_state_dict(), or a dictionary of numbers and strings"
    )


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], told: Callable[[Any], str]
) -> list[str]:
    """Say by name what a checkpoint lacks, what it has besides, and what has another form.

    Args:
        there: :class:`Stored` by name, or tensors.
        here: tensors or variables by name.
        told: describes one of these as :meth:`Stored.told` does.
    """
    found = [f"{name!r} is not in the checkpoint" for name in here if name not in there]
    found += [f"{name!r} is in the checkpoint only" for name in there if name not in here]
    for name, own in here.items():
        if name not in there:
            continue
        saved = there[name]
        then = saved.told() if isinstance(saved, Stored) else told(saved)
        if then != told(own):
            found.append(f"{name!r} is {then} in the checkpoint, but {told(own)} here")
    return found


# What compressors keep: each rank's own.


def compression_misfit(saved: Saved, now: str) -> list[str]:
    """Say whether a compressor called ``now`` can take the states of the one that has been saved.

    To go on without compression is allowed, with a warning when the state is loaded.
    """
    then = _compression_of(saved.own(0))
    if then is None or now == "none" or then["compressor"] == now:
        return []
    return [
        f"it has the state of compression={then['compressor']}, but the optimizer has "
        f"compression={now}: give it the former"
    ]


def compression_state(saved: Saved, crew: Crew, now: str) -> Tree | None:
    """Return what this rank's compressor goes on from; None if there is nothing.

    As many ranks get each its own, to the last bit. For any other number all that is owed is
    brought together on rank 0, and all get that. A collective call.

    Args:
        saved: of the optimizer.
        crew: the ranks of this job.
        now: the compressor's name.
    """
    then = _compression_of(saved.own(0))
    if then is None:
        return None
    if now == "none":
        if crew.rank == 0:
            warnings.warn(
                f"the checkpoint has what compression={then['compressor']} held back; without "
                "compression= it is lost",
                stacklevel=2,
            )
        return None
    if saved.ranks == crew.size or (then["rank"], then["ranks"]) == PORTABLE:
        return mapped(saved.own(crew.rank if saved.ranks == crew.size else 0)["compression"])
    told = None
    if crew.rank == 0:
        told = brought_together([saved.own(rank)["compression"] for rank in range(saved.ranks)])
    return crew.first(told)


def _compression_of(own: Tree) -> Any:
    return (own or {}).get("compression")


def brought_together(everyone: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make of what every rank's ``compression_state()`` has returned what is portable.

    Args:
        everyone: by rank, with :class:`Stored` for tensors. They are added up in NumPy.
    """
    first, together = everyone[0], {}
    for name, own in first["parameters"].items():
        kinds = first["kinds"]
        kinds = kinds[name] if isinstance(kinds.get(name), dict) else kinds
        held = [
            [Leaf(path, wide(each), kinds[path]) for path, each in rank["parameters"][name].items()]
            for rank in everyone
        ]
        found = in_step([pooled(NumpyOps(), leaves) for leaves in held])[0]
        together[name] = {path: narrow(array, own[path]) for path, array in found.items()}
    portable = {**first, "rank": PORTABLE[0], "ranks": PORTABLE[1], "parameters": together}
    portable.pop("sent", None)  # of parts of parameters, which others have now
    return portable
