"""A Keras model as a line of units, whatever the backend: what a pipeline can cut.

Each call of a layer, or of an operation, is a unit. What Keras passes on beside the tensors is made
a value of its own, which crosses cuts like any other:

* a mask that hangs on a tensor: ``NAME/mask``;
* the sum of the losses that layers add themselves, regularizers' among them: each unit that adds
  one reads the sum so far and makes the next, ``NAME/losses``, so that one value crosses a cut
  however many layers have losses.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras.src.backend import get_keras_mask, set_keras_mask

from hvdx.errors import PlanError
from hvdx.integrations.keras3_masks import MASK, Ahead
from hvdx.integrations.keras_batch_norm import commit
from hvdx.pipeline.abreast import Abreast

LOSSES = "/losses"
lock = threading.RLock()  # of what layers share between threads: seeds, functions to be traced


@dataclass
class Unit:
    """A call of a layer or operation.

    Attributes:
        name: the layer's; a second call's has ``#2``.
        layer: or operation.
        arguments: of the call, from the model's tensors by ``id``.
        reads: values of earlier units, or inputs of the model.
        makes: values that it makes: tensors, then masks, then the sum of the losses.
        tensors: value -> ``id`` of the tensor in the model's graph, of those that are no masks.
        params: name in the model -> variable to train.
        owned: the same as it was at first: what has been frozen since has an optimizer, too.
        generators: of random numbers.
        regularized: those of the variables whose regularizers count here, once for the model.
        adds: by training or not, the losses that a call adds: True for a sum over rows, False for
            a mean.
        before: sum of the losses of earlier units, if there are any.
        norms: layers in it whose running statistics wait for the end of the step.
        cache: for what a backend makes of it.
    """

    name: str
    layer: Any
    arguments: Callable[[dict[int, Any]], tuple[Any, Any]]
    reads: list[str]
    makes: list[str]
    tensors: dict[str, int]
    params: dict[str, Any] = field(default_factory=dict)
    owned: dict[str, Any] = field(default_factory=dict)
    generators: list[Any] = field(default_factory=list)
    regularized: list[Any] = field(default_factory=list)
    adds: dict[bool, list[bool]] = field(default_factory=lambda: {False: [], True: []})
    before: str | None = None
    norms: list[Any] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[Any]:
        """Return the layer and those in it; nothing for an operation."""
        if "parts" not in self.cache:
            layer = isinstance(self.layer, keras.Layer)
            self.cache["parts"] = self.layer._flatten_layers() if layer else []
        return self.cache["parts"]  # type: ignore[no-any-return]  # of Any

    @property
    def variables(self) -> list[Any]:
        """Return all variables of the layer, trained or not."""
        return list(getattr(self.layer, "variables", ()))

    def call(
        self, given: Mapping[str, Any], training: bool, aliases: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the values of :attr:`makes`.

        Args:
            given: those of :attr:`reads`.
            training: mode of the layer.
            aliases: name of a variable -> tensor to use in its place.

        Raises:
            ValueError: the layer adds losses that were not seen on the sample.
        """
        used = {id(self.params[name]): alias for name, alias in (aliases or {}).items()
                if name in self.params}  # fmt: skip
        made, losses = self._called(given, training, used)
        values = dict(zip(self.tensors_made, made, strict=True))
        values.update((n + MASK, get_keras_mask(values[n])) for n in self.tensors_made)
        if len(losses) != len(self.adds[training]):
            raise ValueError(
                f"layer {self.name!r} adds {len(losses)} losses with training={training}, but "
                f"{len(self.adds[training])} on the sample: call add_loss() in the call() of the "
                "layer, as often each time"
            )
        if self.has_losses:
            values[self.name + LOSSES] = self._added(given, training, losses, used)
        return {name: values[name] for name in self.makes}

    @property
    def tensors_made(self) -> list[str]:
        """Return those of :attr:`makes` that the layer returns."""
        return [name for name in self.makes if name in self.tensors]

    @property
    def has_losses(self) -> bool:
        """Tell whether losses are added here."""
        return bool(self.regularized or self.adds[False] or self.adds[True])

    def trial(self, given: Mapping[str, Any], training: bool) -> tuple[list[Any], list[float]]:
        """Call the layer and forget its updates; return tensors and the losses that it adds."""
        made, losses = self._called(given, training, {}, keep=False, collect=True)
        return made, [float(keras.ops.convert_to_numpy(keras.ops.sum(x))) for x in losses]

    def _called(
        self,
        given: Mapping[str, Any],
        training: bool,
        used: Mapping[int, Any],
        keep: bool = True,
        collect: bool = False,
    ) -> tuple[list[Any], list[Any]]:
        """Call the layer; return what it returns, as a list, and the losses that it adds.

        Losses, and aliases, need a scope: Keras keeps losses with the layer, which several stages
        may call at once.
        """
        for name in self.reads:
            if name.endswith(MASK):
                set_keras_mask(given[name.removesuffix(MASK)], given[name])
        args, kwargs = self.arguments({self.tensors[n]: given[n] for n in self.reads
                                       if n in self.tensors})  # fmt: skip
        if isinstance(self.layer, keras.Layer) and _takes_training(self.layer):
            kwargs["training"] = training
        if not (collect or used or any(self.adds.values())):
            made = keras.tree.flatten(self.layer(*args, **kwargs))
            return made, [loss for part in self.parts for loss in part._losses]
        aliases = [(v, used[id(v)]) for v in self.variables if id(v) in used]
        with keras.StatelessScope(aliases, collect_losses=True) as scope:
            made = keras.tree.flatten(self.layer(*args, **kwargs))
        for variable in self.variables if keep else ():
            value = scope.get_current_value(variable)
            if value is not None and id(variable) not in used:
                variable.assign(value)
        return made, scope.losses

    def _added(
        self,
        given: Mapping[str, Any],
        training: bool,
        losses: Sequence[Any],
        used: Mapping[int, Any],
    ) -> Any:
        """Return the sum of the losses so far: (2,), means over rows and sums over rows."""
        penalised = [v for v in self.regularized if v.trainable]
        kinds = [*self.adds[training], *(False for _ in penalised)]
        every = [*losses, *(v.regularizer(used.get(id(v), v)) for v in penalised)]
        sums: list[Any] = [keras.ops.zeros((), keras.config.floatx())] * 2
        for kind, loss in zip(kinds, every, strict=True):
            sums[kind] = sums[kind] + keras.ops.cast(keras.ops.sum(loss), keras.config.floatx())
        total = keras.ops.stack(sums)
        return total if self.before is None else given[self.before] + total

    def settle(self, names: Mapping[int, str]) -> bool:
        """Find :attr:`params` anew if what is trainable has changed; tell whether it has."""
        if not isinstance(self.layer, keras.Layer):
            return False
        flags = [self.layer.trainable, *(v.trainable for v in self.layer.variables)]
        if flags == self.flags:
            return False
        first = not self.flags
        self.flags = flags
        self.params = {names[id(v)]: v for v in self.layer.trainable_variables}
        if first:
            self.owned = dict(self.params)
        self.cache.clear()  # what a layer computes may depend on it
        return True


def _takes_training(layer: Any) -> bool:
    return "training" in inspect.signature(layer.call).parameters


@dataclass
class Graph:
    """The units of a model and the values that pass between them.

    Attributes:
        model: it.
        units: in order.
        inputs: values that the caller gives, in the model's order.
        outputs: values that the model returns, in its order.
        result: structure of what it returns, with anything as leaves.
        names: ``id`` of a variable -> its path in the model, made unique.
        floating: values that may have a gradient.
        smooth: values that have one.
        masks: those of the outputs, where they have one.
        losses: sum of the losses that layers add, if any does.
        line: the units as the planner sees them.
    """

    model: Any
    units: list[Unit]
    inputs: list[str]
    outputs: list[str]
    result: Any
    names: dict[int, str] = field(default_factory=dict)
    floating: set[str] = field(default_factory=set)
    smooth: set[str] = field(default_factory=set)
    masks: list[str] = field(default_factory=list)
    losses: str | None = None
    line: Any = None
    _trained: set[str] = field(default_factory=set)
    _new: list[str] = field(default_factory=list)
    _frozen: int = 0

    @property
    def ends(self) -> list[str]:
        """Return all values that the last stage needs behind its units, each once."""
        losses = [] if self.losses is None else [self.losses]
        return list(dict.fromkeys([*self.outputs, *self.masks, *losses]))

    def bind(self, given: Any) -> dict[str, Any]:
        """Name the inputs of a batch: a list's are in the model's order, a dictionary's by name."""
        if isinstance(given, Mapping):
            if set(given) != set(self.inputs):
                raise TypeError(f"the model takes {self.inputs}, given are {list(given)}")
            return {name: given[name] for name in self.inputs}
        values = list(given) if isinstance(given, (tuple, list)) else [given]
        if len(values) != len(self.inputs):
            raise TypeError(f"the model takes {len(self.inputs)} inputs, given are {len(values)}")
        return dict(zip(self.inputs, values, strict=True))

    def tensors(self, given: Any) -> dict[str, Any]:
        """Name the inputs of a batch and make them tensors, cast as Keras does."""
        types = {tensor.name: tensor.dtype for tensor in self.model.inputs or ()}
        values = {}
        for name, each in self.bind(given).items():
            tensor = keras.ops.convert_to_tensor(each)
            dtype = types.get(name, dtype_of(tensor))
            values[name] = tensor if dtype_of(tensor) == dtype else keras.ops.cast(tensor, dtype)
        return values

    def masks_ahead(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the masks of the outputs for a whole batch, before it is computed."""
        ahead = Ahead(self.units, inputs)
        return {name: ahead.value(name) for name in self.masks}

    def variables(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Return by name all variables that the units use, trained or not."""
        return {self.names[id(v)]: v for unit in units for v in unit.variables}

    def untrained(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Return the variables that the units may change without gradients; no random states."""
        weights = {id(v) for unit in units for part in unit.parts
                   for v in part._trainable_variables}  # frozen or not  # fmt: skip
        return {name: v for name, v in self.variables(units).items()
                if not (id(v) in weights or v.path.endswith("seed_generator_state"))}  # fmt: skip

    def changing(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Return those of :meth:`untrained` that change with each micro-batch."""
        layers = [layer for unit in units for layer in unit.norms]
        waiting = {id(v) for each in layers for v in (each.moving_mean, each.moving_variance)}
        return {n: v for n, v in self.untrained(units).items() if id(v) not in waiting}

    def refresh(self) -> int:
        """Find anew what is trained, where a ``trainable`` has changed since the last time.

        Returns:
            How many variables have been frozen since the first time.

        Raises:
            PlanError: one was frozen then, and is not now.
        """
        changed = [unit.settle(self.names) for unit in self.units]
        if any(changed):
            now = {name for unit in self.units for name in unit.params}
            self._trained = self._trained or now
            self._new = sorted(now - self._trained)
            self._frozen = len(self._trained - now)
            self._find_smooth()
        if self._new:
            raise PlanError(
                f"variable {self._new[0]!r} was frozen when the pipeline was made, so no optimizer "
                "has it: make a new pipeline of the model, as Keras needs a new compile()"
            )
        return self._frozen

    def _find_smooth(self) -> None:
        self.smooth = set()
        for unit in self.units:
            if unit.params or not self.smooth.isdisjoint(unit.reads):
                self.smooth.update(self.floating.intersection(unit.makes))


@dataclass
class Batch:
    """What stages get for a step.

    Attributes:
        step: its number.
        inputs: by micro-batch, the inputs of the model by name.
        targets: by micro-batch, what the loss compares with, and sample weights; none where no
            loss is wanted.
        weights: by micro-batch, its share of the batch in each loss.
        train: whether there will be a backward.
        outputs: whether the outputs are wanted.
        scale: that the loss is multiplied by for backward.
    """

    step: int
    inputs: Sequence[dict[str, Any]]
    targets: Sequence[Any]
    weights: Sequence[Any]
    train: bool
    outputs: bool = False
    scale: float | None = None


class Sums:
    """What batch normalization finds in the micro-batches of a step, until that ends.

    Args:
        units: of the model.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self._found: dict[tuple[int, ...], Any] = {}  # by unit, layer in it, call of that

    def add(self, index: int, found: Sequence[Sequence[Any]]) -> None:
        """Add those of a micro-batch: by layer of ``units[index].norms`` and call."""
        for layer, calls in enumerate(found):
            for call, each in enumerate(calls):
                key = index, layer, call
                self._found[key] = self._found[key] + each if key in self._found else each

    def commit(self, abreast: Abreast | None = None) -> None:
        """Move the running statistics, and forget the sums.

        Args:
            abreast: replicas whose sums count, too.
        """
        found = self._found if abreast is None else abreast.merged(self._found)
        for (index, layer, _), total in sorted(found.items(), key=lambda each: each[0]):
            commit(self._units[index].norms[layer], total)
        self._found.clear()


@contextlib.contextmanager
def drawing(unit: Unit, told: str, needed: bool) -> Iterator[None]:
    """Give a random unit, where ``needed``, seeds of its own: a hash of ``told``.

    Its layer's stay as they would have been.
    """
    if not needed:
        yield
        return
    seeds = np.frombuffer(hashlib.blake2b(told.encode(), digest_size=8).digest(), "<u4") >> 1
    with lock:
        before = [keras.ops.convert_to_numpy(each.state) for each in unit.generators]
        try:
            for number, each in enumerate(unit.generators):
                each.state.assign([int(seeds[0]), int(seeds[1]) ^ number << 20])
            yield
        finally:
            for each, state in zip(unit.generators, before, strict=True):
                each.state.assign(state)


def dtype_of(value: Any) -> str:
    """Return the name of a dtype, as Keras has it."""
    return str(keras.backend.standardize_dtype(value.dtype))


def size(value: Any) -> int:
    """Return the bytes of a tensor or variable."""
    bits = re.search(r"\d+", dtype_of(value))
    return int(np.prod(value.shape)) * (int(bits[0]) // 8 if bits else 1)
