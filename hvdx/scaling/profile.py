"""What a model and its methods cost on one rank: measured, or given as JSON."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hvdx.compression.base import Compressor, Spec
from hvdx.compression.local import Local
from hvdx.compression.plans import Form
from hvdx.errors import PlanError
from hvdx.link import Line, watch
from hvdx.pipeline.ir import Graph, Unit
from hvdx.planner.facts import faster

_VERSION = 1
#: Between how many ranks methods are timed: two have an exchange of their own, and what grows
#: with the ranks is seen from four to sixteen.
RANKS = 2, 4, 16
_MOST = 2**22  # elements of the matrix that methods are timed on

Costs: TypeAlias = tuple[tuple[int, float], ...]
"""(ranks, seconds per element) in ascending order."""


class Parameter(NamedTuple):
    """A parameter of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def form(self) -> Form:
        """Return shape and dtype."""
        return Form(self.shape, self.dtype)


@dataclass(frozen=True, eq=False)
class Profile:
    """What one rank needs for a step, alone.

    Attributes:
        name: of the model.
        about: where and how it was measured.
        batch: samples of a rank's step.
        forward: seconds; so are the next two.
        backward: of the whole model.
        update: of the optimizer.
        parameters: in the order of the model; gradients become ready from the last to the first.
        slots: numbers that the optimizer keeps for each element; Adam's are 2.
        kept: bytes that a step keeps from forward to backward.
        jitter: standard deviation of a rank's computing over its mean.
        software: kind of collective -> what it costs where the network costs nothing.
        codecs: method -> what it computes, each as ``(ranks, seconds per element)``.
        graph: the model's units, with times per whole batch; None: it cannot be staged.
    """

    name: str
    batch: int
    forward: float
    backward: float
    update: float
    parameters: tuple[Parameter, ...]
    about: str = ""
    slots: float = 2.0
    kept: float = 0.0
    jitter: float = 0.0
    software: Mapping[str, Line] = field(default_factory=dict)
    codecs: Mapping[str, Costs] = field(default_factory=dict)
    graph: Graph | None = None

    @property
    def alone(self) -> float:
        """Return the seconds of a step of one rank by itself."""
        return self.forward + self.backward + self.update

    @cached_property
    def bytes(self) -> int:
        """Return the bytes of the parameters."""
        return sum(each.form.bytes for each in self.parameters)

    @property
    def specs(self) -> list[Spec]:
        """Return the parameters in the order in which gradients become ready."""
        return [Spec(*each) for each in reversed(self.parameters)]

    def codec(self, method: str, ranks: int) -> float:
        """Return the seconds for each element that ``method`` computes between so many ranks.

        Between measured numbers of ranks, and beyond, it is taken to lie on a line.

        Raises:
            PlanError: the profile does not have it.
        """
        if method not in self.codecs:
            known = ", ".join(self.codecs) or "none"
            raise PlanError(
                f"profile {self.name!r} does not tell what {method!r} computes, only: {known}; "
                "measure it: hvdx plan SCRIPT --ways ... --save FILE"
            )
        return _interpolated(self.codecs[method], ranks)

    def paced(self, computing: float = 1.0, software: float = 1.0) -> Profile:
        """Return the same where computing, and operations, take so many times as long."""
        graph = self.graph and faster(self.graph, 1 / computing)
        return replace(
            self,
            forward=computing * self.forward,
            backward=computing * self.backward,
            update=computing * self.update,
            codecs={
                name: tuple((ranks, computing * cost) for ranks, cost in costs)
                for name, costs in self.codecs.items()
            },
            software={
                kind: Line(software * line.alpha, software * line.beta)
                for kind, line in self.software.items()
            },
            graph=graph,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        told["graph"] = self.graph and {
            "units": [_lean(unit) for unit in self.graph.units],
            "inputs": dict(self.graph.inputs),
            "outputs": list(self.graph.outputs),
        }
        told["software"] = {kind: line._asdict() for kind, line in self.software.items()}
        text = json.dumps({"hvdx_profile": _VERSION, **told}, indent=1)
        Path(path).write_text(text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`save` wrote, or somebody by hand.

        Raises:
            PlanError: it is no such thing; the message names file and key.
        """
        try:
            told = json.loads(Path(path).read_text())
            return _read(told)
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PlanError(f"{path}: no text") from None
        except json.JSONDecodeError as error:
            raise PlanError(f"{path}: no JSON: {error}") from None
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None


def _interpolated(costs: Costs, ranks: int) -> float:
    place = bisect_left(costs, (ranks, 0.0))
    if place < len(costs) and (costs[place][0] == ranks or place == 0):
        return costs[place][1]
    if len(costs) == 1:
        return costs[0][1]
    (few, low), (many, high) = costs[place - 2 : place] if place == len(costs) else (
        costs[place - 1 : place + 1])  # fmt: skip
    slope = (high - low) / (many - few)
    if place == len(costs):  # beyond what was measured noise must not make it cost less and less
        return high + max(0.0, slope) * (ranks - many)
    return low + slope * (ranks - few)


def _lean(unit: Unit) -> dict[str, Any]:
    told = asdict(replace(unit, run=None))
    return {name: value for name, value in told.items() if value or name == "name"}


_NUMBERS = {"forward": 0.0, "backward": 0.0, "update": 0.0, "slots": 2.0, "kept": 0.0,
            "jitter": 0.0}  # fmt: skip
_REQUIRED = ("name", "batch", "forward", "backward", "update", "parameters")


def _read(told: Any) -> Profile:
    if not isinstance(told, dict) or "hvdx_profile" not in told:
        raise PlanError("no profile: it has no key 'hvdx_profile'")
    told = dict(told)
    if told.pop("hvdx_profile") != _VERSION:
        raise PlanError(f"a profile of another version than {_VERSION}: measure it anew")
    for name in _REQUIRED:
        if name not in told:
            raise PlanError(f"the profile has no {name!r}; it needs {', '.join(_REQUIRED)}")
    known = [each.name for each in fields(Profile)]
    for name in told:
        if name not in known:
            raise PlanError(f"a profile has no {name!r}; it has {', '.join(known)}")
    for name in _NUMBERS:
        _number(told.get(name, 0.0), name)
    if type(told["batch"]) is not int or told["batch"] < 1:
        raise PlanError(f"batch={told['batch']!r}: give a whole number from 1")
    if told["forward"] + told["backward"] <= 0:
        raise PlanError("forward and backward are 0: a step must take time")
    parts: dict[str, Callable[[Any], Any]] = {
        "parameters": _parameters, "software": _software, "codecs": _codecs, "graph": _graph,
    }  # fmt: skip
    for name, read in parts.items():
        if name in told:
            try:
                told[name] = read(told[name])
            except (TypeError, ValueError, AttributeError, KeyError) as error:
                if isinstance(error, PlanError):
                    raise
                raise PlanError(f"{name} cannot be read: {error}; see docs/scaling.md") from None
    return Profile(**told)


def _number(value: Any, name: str) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not 0 <= value < math.inf:
        raise PlanError(f"{name}={value!r}: give a number from 0")
    return float(value)


def _parameters(told: Any) -> tuple[Parameter, ...]:
    found = []
    for each in told:
        name, shape, *dtype = each
        if not all(type(side) is int and side > 0 for side in shape):
            raise PlanError(f"parameter {name!r} has shape {shape!r}: give whole numbers")
        found.append(Parameter(str(name), tuple(shape), *map(str, dtype)))
    if not found:
        raise PlanError("parameters are empty: there is nothing to train")
    return tuple(found)


def _software(told: Any) -> dict[str, Line]:
    return {
        str(kind): Line(_number(line["alpha"], f"software {kind!r}, alpha"),
                        _number(line["beta"], f"software {kind!r}, beta"))
        for kind, line in told.items()
    }  # fmt: skip


def _codecs(told: Any) -> dict[str, Costs]:
    found = {}
    for name, costs in told.items():
        pairs = sorted((int(ranks), _number(cost, f"codecs {name!r}")) for ranks, cost in costs)
        if not pairs:
            raise PlanError(f"codecs {name!r} are empty: give [ranks, seconds per element]")
        found[str(name)] = tuple(pairs)
    return found


def _graph(told: Any) -> Graph | None:
    if told is None:
        return None
    units = tuple(Unit(**{**unit, "reads": tuple(unit.get("reads", ()))}) for unit in told["units"])
    return Graph(units, told["inputs"], tuple(told["outputs"]))


def timed(adapter: Any, method: Compressor | Local, parameters: Sequence[Parameter]) -> Costs:
    """Measure what a method computes, without other ranks.

    Args:
        adapter: of which ``from_numpy`` and ``to_numpy`` are used.
        method: how gradients are averaged, or parameters once in a while.
        parameters: of the model; the largest matrix of up to 4 million elements is taken.
    """
    shapes = [each.shape for each in parameters if each.form.compressible]
    fitting = [shape for shape in shapes if math.prod(shape) <= _MOST]
    shape = max(fitting, key=math.prod) if fitting else (2048, 2048)

    def start(spec: Spec) -> Any:
        import numpy as np

        return adapter.from_numpy(np.zeros(spec.shape, spec.dtype))

    compressor = method.outer(start) if isinstance(method, Local) else method
    seconds = [
        watch(adapter, compressor, Spec("gradient", shape, "float32", ranks)).seconds
        for ranks in RANKS
    ]
    return tuple(
        (ranks, each / math.prod(shape)) for ranks, each in zip(RANKS, seconds, strict=True)
    )
