"""Keras' side of a pipeline, on TensorFlow: a model's layers as units, forward and backward.

Each call of a layer, or of an operation, is a unit. It is compiled alone, and has a gradient tape
of its own, so that no optimisation reaches over a cut. However a model is cut, placed and
scheduled, the same is computed to the last bit: gradients of a value are added from its last
reader to its first, those of a weight by micro-batch, then by unit; random layers draw from a hash
of seed, step, micro-batch and unit.

A mask that Keras hangs on a tensor is a value of its own here: it travels with the tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend import get_keras_mask, set_keras_mask

from hvdx.errors import PlanError
from hvdx.pipeline import ir
from hvdx.pipeline.zmq_channel import Packed

_LOSS = "the loss"
_MASK = "/mask"
_lock = threading.RLock()  # of the seed generators, which layers may share


class TensorFlowCodec:
    """Tensors as bytes, with dtype and shape; see :class:`zmq_channel.Codec`."""

    def pack(self, tensor: Any) -> Packed:
        """Copy to the host's memory."""
        array = np.ascontiguousarray(tensor.numpy())
        data = array.reshape(-1).view(np.uint8).data
        return Packed(tensor.dtype.name, tuple(tensor.shape), None, data)

    def unpack(self, packed: Packed) -> Any:
        """Build a tensor of the bytes given."""
        try:
            dtype = np.dtype(tf.as_dtype(packed.dtype).as_numpy_dtype)
            array = np.frombuffer(packed.data, dtype).reshape(packed.shape)
        except TypeError as error:
            raise ValueError(f"no tensor is {packed[:3]}: {error}") from None
        return tf.convert_to_tensor(array)


@dataclass
class Unit:
    """A call of a layer or operation.

    Attributes:
        name: the layer's; a second call's has ``#2``.
        layer: or operation.
        arguments: of the call, from the model's tensors by ``id``.
        reads: values of earlier units, or inputs of the model.
        makes: values that it makes; masks come after tensors.
        params: name in the model -> variable to train.
        tensors: value -> ``id`` of the tensor in the model's graph, of those that are no masks.
        generators: of random numbers.
    """

    name: str
    layer: Any
    arguments: Callable[[dict[int, Any]], tuple[Any, Any]]
    reads: list[str]
    makes: list[str]
    tensors: dict[str, int]
    params: dict[str, Any] = field(default_factory=dict)
    generators: list[Any] = field(default_factory=list)
    _compiled: dict[bool, Any] = field(default_factory=dict)

    def call(self, given: Mapping[str, Any], training: bool) -> list[Any]:
        """Return tensors of ``makes``, then one mask or None for each of those."""
        for name in self.reads:
            if _is_mask(name):
                set_keras_mask(given[name.removesuffix(_MASK)], given[name])
        held = {self.tensors[name]: value for name, value in given.items() if not _is_mask(name)}
        args, kwargs = self.arguments(held)
        if isinstance(self.layer, keras.Layer) and _takes_training(self.layer):
            kwargs["training"] = training
        made = keras.tree.flatten(self.layer(*args, **kwargs))
        return [*made, *(get_keras_mask(each) for each in made)]

    def compiled(self, training: bool) -> Any:
        """Return :meth:`call` as a function of TensorFlow that gives the values of ``makes``."""
        if training not in self._compiled:

            def call(given: dict[str, Any]) -> list[Any]:
                # Distinct tensors, since masks are hung on them.
                fresh = {name: tf.identity(value) for name, value in given.items()}
                made = self.call(fresh, training)
                tensors = [name for name in self.makes if not _is_mask(name)]
                both = dict(zip([*tensors, *(t + _MASK for t in tensors)], made, strict=True))
                return [both[name] for name in self.makes]

            with _lock:
                function = tf.function(call, reduce_retracing=True, autograph=False)
                self._compiled.setdefault(training, function)
        return self._compiled[training]


def _is_mask(name: str) -> bool:
    return name.endswith(_MASK)


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
        smooth: values that have a gradient.
        line: the units as the planner sees them.
    """

    model: Any
    units: list[Unit]
    inputs: list[str]
    outputs: list[str]
    result: Any
    names: dict[int, str] = field(default_factory=dict)
    smooth: set[str] = field(default_factory=set)
    line: Any = None

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

    def variables(self, first: int, stop: int) -> dict[str, Any]:
        """Return by name all variables that the units use, trained or not."""
        layers = [unit.layer for unit in self.units[first:stop]]
        held = [v for layer in layers for v in getattr(layer, "variables", ())]
        return {self.names[id(v)]: v for v in held}

    def untrained(self, first: int, stop: int) -> list[Any]:
        """Return the variables that the units may change without gradients; no random states."""
        trained = {name for unit in self.units[first:stop] for name in unit.params}
        return [v for name, v in self.variables(first, stop).items()
                if name not in trained and not v.path.endswith("seed_generator_state")]  # fmt: skip


def traced(model: Any, sample: Any) -> Graph:
    """Find the units of a built or unbuilt model; compute ``sample`` once.

    Raises:
        PlanError: it is neither Sequential nor functional, or does what a pipeline cannot.
    """
    if not isinstance(model, keras.Model):
        raise PlanError(f"{type(model).__name__} is a layer; give a keras.Model")
    if isinstance(model, keras.Sequential):
        given = sample[0] if isinstance(sample, (tuple, list)) and len(sample) == 1 else sample
        if not model.built:
            model(tf.convert_to_tensor(given))
        graph = _of_layers(model)
    elif hasattr(model, "_nodes_by_depth"):
        graph = _of_nodes(model)
    else:
        raise PlanError(
            f"{type(model).__name__} {model.name!r} is a subclassed model, whose calls Keras does "
            "not record: build it as keras.Sequential or keras.Model(inputs, outputs), of which it "
            "may be one layer"
        )
    _measure(graph, graph.bind(sample))
    return graph


def _of_layers(model: Any) -> Graph:
    """Take the layers of a Sequential one after the other."""
    last = first = model.inputs[0].name if model.inputs else "input"
    units: list[Unit] = []
    for index, layer in enumerate(model.layers):

        def arguments(held: dict[int, Any], index: int = index) -> tuple[Any, Any]:
            return (held[index],), {}

        tensors = {last: index, layer.name: index + 1}
        units.append(Unit(layer.name, layer, arguments, [last], [layer.name], tensors))
        last = layer.name
    return Graph(model, units, [first], [last], 0)


def _of_nodes(model: Any) -> Graph:
    """Take the recorded calls of a functional model, from its inputs on."""
    values = {id(tensor): tensor.name for tensor in model.inputs}
    nodes = [node for _, level in sorted(model._nodes_by_depth.items(), reverse=True)
             for node in level]  # fmt: skip
    units: list[Unit] = []
    calls: dict[str, int] = {}
    for node in nodes:
        if not node.operation or node.is_input:
            continue
        name = node.operation.name
        calls[name] = calls.get(name, 0) + 1
        name += f"#{calls[name]}" if calls[name] > 1 else ""
        several = len(node.output_tensors) > 1
        for i, tensor in enumerate(node.output_tensors):
            values[id(tensor)] = f"{name}/{i}" if several else name
        reads = list(dict.fromkeys(values[id(tensor)] for tensor in node.input_tensors))
        makes = [values[id(tensor)] for tensor in node.output_tensors]
        tensors = {values[id(t)]: id(t) for t in [*node.input_tensors, *node.output_tensors]}
        units.append(Unit(name, node.operation, node.arguments.fill_in, reads, makes, tensors))
    inputs = [values[id(tensor)] for tensor in model.inputs]
    outputs = [values[id(tensor)] for tensor in model.outputs]
    return Graph(model, units, inputs, outputs, model._outputs_struct)


def _measure(graph: Graph, given: Mapping[str, Any]) -> None:
    """Run the units once: find masks, sizes, variables and what has gradients."""
    _name_variables(graph)
    values = {name: tf.convert_to_tensor(value) for name, value in given.items()}
    values = {name: as_input(graph, name, value) for name, value in values.items()}
    for unit in graph.units:
        unit.reads += [name + _MASK for name in unit.reads if name + _MASK in values]
        made = unit.call({name: values[name] for name in unit.reads}, False)
        tensors = list(unit.makes)
        for name, value, mask in zip(tensors, made, made[len(tensors) :], strict=False):
            values[name] = tf.identity(value)
            if mask is not None:
                unit.makes.append(name + _MASK)
                values[name + _MASK] = mask
        held = getattr(unit.layer, "trainable_variables", [])
        unit.params = {graph.names[id(v)]: v for v in held}
        unit.generators = _generators(unit.layer)
        if unit.params or not graph.smooth.isdisjoint(unit.reads):
            graph.smooth.update(name for name in unit.makes if values[name].dtype.is_floating)
        if getattr(unit.layer, "losses", ()):
            raise PlanError(
                f"layer {unit.name!r} adds a loss of its own (a regularizer, say), which pipelines "
                "leave out: take it away, or use the optimizer's weight_decay"
            )
    for name in graph.outputs:
        if name + _MASK in values:
            raise PlanError(
                f"output {name!r} has a mask, which a loss by micro-batches cannot follow: end the "
                "model with a layer that uses it up"
            )
    graph.line = _line(graph, values)


def as_input(graph: Graph, name: str, value: Any) -> Any:
    """Cast an input as Keras does."""
    for tensor in graph.model.inputs or ():
        if tensor.name == name and value.dtype != tensor.dtype:
            return tf.cast(value, tensor.dtype)
    return value


def _name_variables(graph: Graph) -> None:
    taken: set[str] = set()
    for variable in graph.model.variables:
        name, copy = variable.path, 0
        while name in taken:
            copy += 1
            name = f"{variable.path}#{copy}"
        taken.add(name)
        graph.names[id(variable)] = name


def _generators(layer: Any) -> list[Any]:
    if not isinstance(layer, keras.Layer):
        return []
    found = [each for sub in layer._flatten_layers() for each in sub._seed_generators]
    return list({id(each): each for each in found}.values())


def _line(graph: Graph, values: Mapping[str, Any]) -> ir.Graph:
    def size(name: str) -> int:
        return int(np.prod(values[name].shape)) * values[name].dtype.size

    units = tuple(
        ir.Unit(
            unit.name,
            tuple(unit.reads),
            {name: size(name) for name in unit.makes},
            {n: int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for n, v in unit.params.items()},
            uses_rng=bool(unit.generators),
        )
        for unit in graph.units
    )
    return ir.Graph(units, {name: size(name) for name in graph.inputs}, tuple(graph.outputs))


@dataclass
class Batch:
    """What stages get for a step.

    Attributes:
        step: its number.
        inputs: by micro-batch, the inputs of the model by name.
        targets: by micro-batch, what the loss compares with.
        weights: by micro-batch, its share of the batch.
        train: whether there will be a backward.
        outputs: whether a training step returns the outputs, too.
    """

    step: int
    inputs: Sequence[dict[str, Any]]
    targets: Sequence[Any]
    weights: Sequence[float]
    train: bool
    outputs: bool = False


@dataclass
class _Pass:
    """What a unit's forward leaves for its backward; ``index`` is -1 for the loss."""

    index: int
    tape: Any
    entered: dict[str, Any]
    made: dict[str, Any]


class KerasStage:
    """Units ``first`` to ``stop - 1`` of a graph; see :class:`hvdx.pipeline.run.Stage`.

    Args:
        graph: of the model.
        first: unit.
        stop: unit behind the last.
        loss: function of targets and outputs, both lists of tensors.
        device: name of TensorFlow's to compute on; None: its choice.
        seed: of random units; equal on all ranks.

    Attributes:
        unit: name of the unit at work.
        gradients: (unit, weight) -> sum over micro-batches.
    """

    def __init__(
        self,
        graph: Graph,
        first: int,
        stop: int,
        *,
        loss: Callable[[Any, Any], Any] | None,
        device: str | None,
        seed: int,
    ) -> None:
        self._graph, self._device, self.seed = graph, device, seed
        self._first, self._stop, self._last = first, stop, stop == len(graph.units)
        self._entering, self._leaving = (
            list(graph.line.live(cut)) if cut else list(graph.inputs) for cut in (first, stop)
        )
        self._changing = graph.untrained(first, stop)
        self._loss = None
        if loss is not None:  # named, or the closure would change with the attribute
            compare = loss
            self._loss = tf.function(
                lambda targets, outputs, weight: _scalar(compare(targets, outputs)) * weight,
                reduce_retracing=True,
                autograph=False,
            )
        self.unit: str | None = None

    def begin(self, batch: Batch, again: frozenset[int] = frozenset()) -> None:
        """Forget the last step and take the batch of the next.

        Args:
            batch: of the step.
            again: micro-batches of which only the inputs are kept; their backward begins with
                their forward.
        """
        self._batch, self._again = batch, again
        self._inputs: dict[int, tuple[dict[str, Any], list[Any]]] = {}
        self._kept: dict[int, list[_Pass]] = {}
        self._pending: dict[int, list[tuple[tuple[int, str], Any]]] = {}
        self._results: dict[int, list[Any]] = {}
        self.gradients: dict[tuple[int, str], Any] = {}

    def found(self) -> dict[int, list[Any]]:
        """Return by micro-batch the weighted loss, if training, and outputs that are asked for."""
        return self._results

    def forward(self, micro_batch: int, inputs: Sequence[Any] | None) -> list[Any]:
        """See :meth:`Stage.forward`."""
        with self._placed():
            if inputs is None:
                given = self._batch.inputs[micro_batch]
                values = {n: as_input(self._graph, n, x) for n, x in given.items()}
            else:
                values = dict(zip(self._entering, inputs, strict=True))
            if self._batch.train and micro_batch in self._again:
                self._skim(values, micro_batch)
            else:
                passes = self._walk(values, micro_batch)
                if self._batch.train:
                    self._kept[micro_batch] = passes
        return [] if self._last else [values[name] for name in self._leaving]

    def backward(self, micro_batch: int, gradients: Sequence[Any] | None) -> list[Any]:
        """See :meth:`Stage.backward`."""
        passed = self.input_gradient(micro_batch, gradients)
        self.weight_gradient(micro_batch)
        return passed

    def input_gradient(self, micro_batch: int, gradients: Sequence[Any] | None) -> list[Any]:
        """See :meth:`Stage.input_gradient`; the weights' are found on the way."""
        if gradients is None:
            found: dict[str, Any] = {_LOSS: None}
        else:
            returned = zip(self._leaving, gradients, strict=True)
            found = {name: gradient for name, gradient in returned if gradient is not None}
        self._pending[micro_batch] = []
        with self._placed():
            self._recall(micro_batch)
            for done in reversed(self._kept.pop(micro_batch)):
                self._differentiate(done, found, self._pending[micro_batch])
        return [found.get(name) for name in self._entering]

    def weight_gradient(self, micro_batch: int) -> None:
        """See :meth:`Stage.weight_gradient`."""
        with self._placed():
            for key, gradient in self._pending.pop(micro_batch):
                before = self.gradients.get(key)
                self.gradients[key] = gradient if before is None else before + gradient

    # --- the parts

    def _placed(self) -> Any:
        return tf.device(self._device) if self._device else contextlib.nullcontext()

    def _walk(self, values: dict[str, Any], micro_batch: int) -> list[_Pass]:
        """Compute all units and the loss; what they make goes to ``values``."""
        units = range(self._first, self._stop)
        passes = [self._compute(index, values, micro_batch) for index in units]
        self.unit = None
        return passes + (self._finish(values, micro_batch) if self._last else [])

    def _skim(self, values: dict[str, Any], micro_batch: int) -> None:
        """Compute what the next stage needs, and keep only what :meth:`_recall` does.

        The last stage, whose results nobody waits for, leaves all to its backward. The others
        compute under tapes nevertheless: without them TensorFlow may round differently.
        """
        self._inputs[micro_batch] = dict(values), [] if self._last else self._state()
        if not self._last:
            self._walk(values, micro_batch)

    def _recall(self, micro_batch: int) -> None:
        """Make what was not kept of a micro-batch: by the same numbers, so the same to the bit."""
        if micro_batch not in self._inputs:
            return
        values, before = self._inputs.pop(micro_batch)
        now = self._state() if before else []
        self._set_state(before)
        try:
            self._kept[micro_batch] = self._walk(values, micro_batch)
        finally:
            self._set_state(now)

    def _state(self) -> list[Any]:
        """Copy what computing changes: running statistics and the like."""
        return [tf.identity(each.value) for each in self._changing]

    def _set_state(self, values: Sequence[Any]) -> None:
        if values:
            for each, value in zip(self._changing, values, strict=True):
                each.assign(value)

    def _compute(self, index: int, values: dict[str, Any], micro_batch: int) -> _Pass:
        """Compute a unit; what it makes goes to ``values``."""
        unit = self._graph.units[index]
        self.unit = unit.name
        given = {name: values[name] for name in unit.reads}
        entered = {name: x for name, x in given.items() if name in self._graph.smooth}
        train = self._batch.train
        with self._random(unit, index, micro_batch), _tape(train) as tape:
            if train:
                tape.watch([*entered.values(), *(v.value for v in unit.params.values())])
            made = dict(zip(unit.makes, unit.compiled(train)(given), strict=True))
        values.update(made)
        return _Pass(index, tape, entered, made)

    def _finish(self, values: Mapping[str, Any], micro_batch: int) -> list[_Pass]:
        """Compute the loss, or keep the outputs."""
        outputs = [values[name] for name in self._graph.outputs]
        if not self._batch.train:
            self._results[micro_batch] = outputs
            return []
        assert self._loss is not None
        entered = {name: values[name] for name in self._graph.outputs if name in self._graph.smooth}
        targets = keras.tree.flatten(self._batch.targets[micro_batch])
        with _tape(True) as tape:
            tape.watch(list(entered.values()))
            weighted = self._loss(targets, outputs, self._batch.weights[micro_batch])
        self._results[micro_batch] = [weighted, *(outputs if self._batch.outputs else ())]
        return [_Pass(-1, tape, entered, {_LOSS: weighted})]

    def _differentiate(self, done: _Pass, found: dict[str, Any], weights: list[Any]) -> None:
        """Find the gradients of what a unit reads, and of its weights, from those in ``found``.

        Units come from the last to the first, so those of a value's later readers are in
        ``found`` when an earlier one adds its own.
        """
        names = [name for name in done.made if name in found]
        gradients = [found.pop(name) for name in names]
        unit = self._graph.units[done.index] if done.index >= 0 else None
        self.unit = unit.name if unit else None
        params = unit.params if unit else {}
        wanted = [*done.entered.values(), *(v.value for v in params.values())]
        if not names or not wanted:
            return
        results = done.tape.gradient(
            [done.made[name] for name in names],
            wanted,
            output_gradients=None if gradients[0] is None else gradients,
        )
        for (name, _), gradient in zip(done.entered.items(), results, strict=False):
            if gradient is not None:
                gradient = tf.convert_to_tensor(gradient)
                found[name] = found[name] + gradient if name in found else gradient
        for name, gradient in zip(params, results[len(done.entered) :], strict=True):
            if gradient is not None:
                weights.append(((done.index, name), tf.convert_to_tensor(gradient)))

    @contextlib.contextmanager
    def _random(self, unit: Unit, index: int, micro_batch: int) -> Iterator[None]:
        """Give a random unit its own seeds; the layer's stay as they would have been."""
        if not unit.generators or not self._batch.train:
            yield
            return
        told = f"{self.seed} {self._batch.step} {micro_batch} {index}".encode()
        seeds = np.frombuffer(hashlib.blake2b(told, digest_size=8).digest(), "<u4") >> 1
        with _lock:
            before = [each.state.numpy() for each in unit.generators]
            try:
                for number, each in enumerate(unit.generators):
                    each.state.assign([int(seeds[0]), int(seeds[1]) ^ number << 20])
                yield
            finally:
                for each, state in zip(unit.generators, before, strict=True):
                    each.state.assign(state)


def _tape(train: bool) -> Any:
    if not train:
        return contextlib.nullcontext()
    return tf.GradientTape(watch_accessed_variables=False)


def _scalar(loss: Any) -> Any:
    if loss.shape.rank:
        raise ValueError(
            f"loss(y_true, y_pred) returns shape {tuple(loss.shape)}, no scalar: take the mean "
            "over the micro-batch"
        )
    return loss
