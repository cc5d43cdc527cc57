"""What an optimizer's compressor keeps from step to step: made, settled, saved, loaded, moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hvdx.comm import Work
from hvdx.compression import CompressionError, Compressor, Spec
from hvdx.compression.portable import (
    PORTABLE,
    Origin,
    carried,
    check_saved,
    in_order,
    pooled,
    restored,
    shared_alike,
    shares,
    warn_of_lost,
)
from hvdx.compression.state import Leaf, leaves
from hvdx.compression.turns import Clock
from hvdx.compression.updates import Messenger
from hvdx.errors import MismatchError
from hvdx.frameworks import Adapter
from hvdx.integrations.pytorch_engine import Flight
from hvdx.ops import Ops, ops_for

_OPS = ops_for(torch.Tensor)


class Taken(NamedTuple):
    """What reduces parameters that travel side by side."""

    methods: list[Compressor]
    turn: str  # tells it from what does so at other times; empty where that never changes

    @property
    def shared(self) -> Compressor | None:
        """What may treat all these gradients as one flat tensor, if anything."""
        first, *others = self.methods
        alike = first.elementwise and all(each is first for each in others)
        return first if alike else None


class Kept:
    """The states of a compressor, by parameter name.

    Those that were loaded, and those left of a job that has ended (elastic training), wait until
    ranks meet. Where every rank has its own, of the same number of ranks, or all have a portable
    one, they are taken as they are; else what there is is brought together, so that it is owed
    by the ranks there are now.

    Args:
        compressor: what the user has asked for.
    """

    def __init__(self, compressor: Compressor) -> None:
        self._asked = self.compressor = compressor
        self.steps = 0  # that the optimizer has taken
        self.states: dict[str, Any] = {}
        self._coming: dict[str, Any] = {}  # what they become if the means are finite
        self._chosen: dict[str, Compressor] = {}
        self._specs: dict[str, Spec] = {}
        self._clocks: dict[Clock, int] = {}  # steps until the next review of each
        self._delivered = True  # whether the means of the last states that came were finite
        self._waiting: dict[str, list[Leaf]] = {}  # for their parameters' ranks to meet
        self._origin: Origin | None = None  # of the states and what waits; None at the start
        self._loaded = False
        self._met = False
        self._home = torch.device("cpu")
        self._adapter: Adapter | None = None
        self._place, self.ranks = PORTABLE
        self._savings = 0

    # -- places in a job

    def join(self, adapter: Adapter, process_set: Any, name: str) -> None:
        """Take a place among ranks, which have not met yet."""
        self._adapter, self._process_set, self._name = adapter, process_set, name
        self._place, self.ranks = adapter.place(process_set), adapter.ranks(process_set)
        self._met = False
        self._savings = 0

    def leave(self) -> None:
        """Keep what there is for the next ranks."""
        self._waiting = self._held()
        self.states, self._chosen, self._coming = {}, {}, {}
        self._specs, self._clocks = {}, {}
        self.compressor = self._asked

    def meet(self, specs: Sequence[Spec], parameters: Mapping[str, torch.Tensor]) -> None:
        """Make the states of parameters that are averaged from now on; on all ranks at once.

        Args:
            specs: of the parameters.
            parameters: by name; states lie on their devices.

        Raises:
            MismatchError: ranks have loaded states of different steps.
        """
        assert self._adapter is not None
        first = not self._met
        if first and self._asked.prepare is not None:
            self._home = next((each.device for each in parameters.values()), self._home)
            with self._at_home():
                self.compressor = self._asked.prepare(self._adapter, list(specs), self._process_set)
        self._chosen.update({spec.name: self.compressor.of(spec) for spec in specs})
        self._specs.update({spec.name: spec for spec in specs})
        for chosen in self._chosen.values():
            if chosen.clock is not None:
                self._clocks.setdefault(chosen.clock, chosen.clock.wait)
        fresh = [spec for spec in specs if spec.name not in self.states]
        made = {
            spec.name: self._chosen[spec.name].init(_OPS.beside(parameters[spec.name]), spec)
            for spec in fresh
        }
        if first and (self._asked.phases or not self._asked.elementwise):
            made = self._agreed(made)
        waiting = {name: self._waiting.pop(name) for name in made if name in self._waiting}
        self.states.update({name: _filled(made[name], waiting.get(name)) for name in made})
        self._met = True

    def _at_home(self) -> contextlib.AbstractContextManager[Any]:
        """Have what is measured be made where the first parameter is."""
        return self._home if self._home.type != "cpu" else contextlib.nullcontext()

    def _agreed(self, made: dict[str, Any]) -> dict[str, Any]:
        """Return ``made``, with what waits in it if that does not fit ranks as they are now."""
        assert self._adapter is not None
        alike = self._origin == PORTABLE
        fits = all(
            _fits(made[name], held) and (alike or shared_alike(made[name], held))
            for name, held in self._waiting.items()
            if name in made
        )
        told = (self._origin, self.steps, self._loaded, fits)
        everyone = self._adapter.allgather_object(told, f"{self._name}.states", self._process_set)
        loaded = {rank: steps for rank, (_, steps, own, _) in enumerate(everyone) if own}
        if len(set(loaded.values())) > 1:
            each = ", ".join(f"rank {rank}: {steps}" for rank, steps in loaded.items())
            raise MismatchError(
                f"ranks have loaded compression states of different steps ({each}); load those "
                "of one checkpoint"
            )
        self.steps = max(steps for _, steps, _, _ in everyone)
        self._loaded = False
        origins = [origin for origin, _, _, _ in everyone]
        if in_order(origins) and all(fits for _, _, _, fits in everyone):
            return made
        return self._carried(made, origins)

    def _carried(self, made: dict[str, Any], origins: list[Origin | None]) -> dict[str, Any]:
        """Bring together what ranks have; each old rank's counts once."""
        known = [origin for origin in origins if origin is not None]
        if self._place == 0:
            warn_of_lost(origins)
        mine = self._origin is not None and origins.index(self._origin) == self._place
        lead = bool(known) and origins.index(known[0]) == self._place
        works = {}
        for name, like in made.items():
            held = _moved(self._waiting.get(name, []), like)
            ops = _beside(leaves(like))
            given = shares(ops, held, *self._origin) if mine and self._origin else {}
            works[name] = carried(ops, like, given, lead)
        moved = self._flown(works, f"{self._name}.carried")
        self._waiting, self._origin = {}, PORTABLE  # all have all of it
        return moved

    def _flown(self, works: Mapping[str, Work[Any]], name: str) -> dict[str, Any]:
        """Run collectives for many parameters at once; Horovod fuses them."""
        assert self._adapter is not None
        flights = {
            each: Flight(self._adapter, work, f"{name}.{index}", self._process_set)
            for index, (each, work) in enumerate(works.items())
        }
        return {each: flight.finish() for each, flight in flights.items()}

    # -- in training

    def taken(self, names: Sequence[str]) -> Taken:
        """Return what reduces these parameters, side by side, until :meth:`review` says so."""
        chosen = [self._chosen[name] for name in names]
        turns: dict[Clock, int] = {}
        for clock in dict.fromkeys(each.clock for each in chosen if each.clock is not None):
            own = [self._specs[n] for n, c in zip(names, chosen, strict=True) if c.clock is clock]
            turns[clock] = clock.turn(own)
        methods = [each.at(turns[each.clock]) if each.clock else each for each in chosen]
        return Taken(methods, ".".join(map(str, turns.values())))

    def review(self) -> bool:
        """Count a step, and have clocks think turns over when it is time; a collective call.

        Returns:
            Whether turns may have changed.
        """
        due = []
        for clock in self._clocks:
            self._clocks[clock] -= 1
            if not self._clocks[clock]:
                with self._at_home():
                    self._clocks[clock] = clock.review(self._delivered)
                due.append(clock)
        return bool(due)

    def reduce(self, name: str, grad: torch.Tensor, method: Compressor | None = None) -> Work[Any]:
        """Start to reduce a parameter's gradient from the state it has.

        By ``method``, of :meth:`taken`, where parameters travel side by side.
        """
        method = method or self.taken([name]).methods[0]
        return method.at(self.steps).reduce(_OPS.beside(grad), grad, self.states[name])

    def messenger(self, name: str) -> Messenger | None:
        """Return how parameter servers send back what they have made of a parameter."""
        return self.taken([name]).methods[0].at(self.steps).updates

    def await_settling(self, name: str, state: Any) -> None:
        """Note what the state becomes unless the step is skipped."""
        if state is not self.states[name]:
            self._coming[name] = state

    def settle(self, delivered: bool) -> None:
        """Take the new states; or not, if what they count as delivered will not be applied."""
        if self._coming:
            self._delivered = delivered
        if self._coming and delivered:
            self.states.update(self._coming)
            self._origin = (self._place, self.ranks)
        self._coming = {}

    @property
    def unsettled(self) -> bool:
        """Whether there are new states."""
        return bool(self._coming)

    # -- saved and loaded

    def saved(self) -> dict[str, Any]:
        """Return this rank's state: see ``DistributedOptimizer``."""
        tensors = {name: {leaf.path: leaf.tensor for leaf in own}
                   for name, own in self._held().items()}  # fmt: skip
        return self._spelt(tensors, self._origin or (self._place, self.ranks))

    def portable(self) -> dict[str, Any]:
        """Return the state that any number of ranks can start from; on all ranks at once.

        Raises:
            CompressionError: ranks have not met since some have loaded a state, or since their
                number has changed.
        """
        if self._adapter is None or not (self._asked.phases or not self._asked.elementwise):
            return {**self.saved(), "rank": PORTABLE[0], "ranks": PORTABLE[1]}
        self._savings += 1
        name = f"{self._name}.portable{self._savings}"
        origins = self._adapter.allgather_object(self._origin, name, self._process_set)
        if not in_order(origins):
            raise CompressionError(
                f"ranks hold compression states of other ranks ({origins}, as rank and ranks): "
                "call portable_compression_state() after the next step"
            )
        works = {each: pooled(_beside(held), held) for each, held in sorted(self._held().items())}
        return self._spelt(self._flown(works, name), PORTABLE)

    def _held(self) -> dict[str, list[Leaf]]:
        states = {name: leaves(state) for name, state in self.states.items()}
        return {name: own for name, own in {**self._waiting, **states}.items() if own}

    def _spelt(self, tensors: dict[str, dict[str, Any]], origin: Origin) -> dict[str, Any]:
        return {
            "compressor": self._asked.name,
            "step": self.steps,
            "rank": origin[0],
            "ranks": origin[1],
            "kinds": {
                name: {leaf.path: leaf.kind for leaf in own} for name, own in self._held().items()
            },
            "parameters": {
                name: {path: tensor.detach().clone() for path, tensor in own.items()}
                for name, own in tensors.items()
            },
        }

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Have what :meth:`saved` or :meth:`portable` returned wait for the next ranks.

        For a rank that leaves these; whatever number of ranks it was saved among.
        """
        self.states, self._coming = {}, {}
        self._waiting = waiting_of(saved, copy=True)
        self.steps = saved["step"]
        self._origin = (saved["rank"], saved["ranks"]) if self._waiting else None

    def load(
        self,
        saved: Mapping[str, Any],
        specs: Iterable[Spec],
        parameters: Mapping[str, torch.Tensor],
    ) -> None:
        """Go on from ``saved``; ``specs`` and ``parameters`` are all the optimizer's.

        Raises:
            CompressionError: it is of another compressor, model or number of ranks.
        """
        known = {spec.name: spec for spec in specs}
        self._refuse(saved, known)
        waiting = waiting_of(saved)
        made = {}
        for name, spec in known.items():
            if self._asked.prepare is None or name in self.states:
                like = self._chosen.get(name, self._asked.of(spec)).init(
                    _OPS.beside(parameters[name]), spec
                )
                made[name] = _named(name, like, waiting.get(name))
        self.states = {name: made[name] for name in self.states}
        self._waiting = {name: own for name, own in waiting.items() if name not in self.states}
        self._coming = {}
        self.steps = saved["step"]
        self._origin = (saved["rank"], saved["ranks"])
        self._loaded = True

    def _refuse(self, saved: Any, known: Mapping[str, Spec]) -> None:
        check_saved(saved, self._asked.name, (self._place, self.ranks))
        for name in saved["parameters"]:
            if name not in known:
                raise CompressionError(
                    f"the saved state has parameter {name!r}, which this optimizer has not: it "
                    "is that of another model"
                )


def waiting_of(saved: Mapping[str, Any], copy: bool = False) -> dict[str, list[Leaf]]:
    """Return the leaves in what :meth:`Kept.saved` has returned, copies if asked for."""
    kinds = saved["kinds"]
    return {
        name: [
            Leaf(path, tensor.clone() if copy else tensor, kinds[name][path])
            for path, tensor in own.items()
        ]
        for name, own in saved["parameters"].items()
    }


def _beside(held: Sequence[Leaf]) -> Ops:
    """Return the verbs for the device of a state."""
    return _OPS.beside(held[0].tensor) if held else _OPS


def _moved(held: Sequence[Leaf], like: Any) -> list[Leaf]:
    """Return ``held`` on the device of ``like``."""
    first = leaves(like)
    return [leaf._replace(tensor=leaf.tensor.to(first[0].tensor.device)) for leaf in held if first]


def _filled(like: Any, held: Sequence[Leaf] | None) -> Any:
    if held is None:
        return like
    return restored(like, {leaf.path: leaf.tensor for leaf in _moved(held, like)})


def _fits(like: Any, held: Sequence[Leaf]) -> bool:
    try:
        _filled(like, held)
    except CompressionError:
        return False
    return True


def _named(name: str, like: Any, held: Sequence[Leaf] | None) -> Any:
    try:
        return _filled(like, held)
    except CompressionError as error:
        raise CompressionError(f"parameter {name!r}: {error}") from None
