"""TensorFlow's side of a pipeline of Keras layers: compute units, forward and backward.

Each unit is compiled alone, and has a gradient tape of its own, so that no optimisation reaches
over a cut. However a model is cut, placed and scheduled, the same is computed to the last bit:
gradients of a value are added from its last reader to its first, those of a weight by micro-batch,
then by unit; random layers draw from a hash of seed, step, micro-batch and unit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from hvdx.errors import PlanError
from hvdx.integrations.keras3_graph import Batch, Graph, Sums, Unit, drawing, lock
from hvdx.integrations.keras3_losses import Objective
from hvdx.integrations.keras_batch_norm import Add, gathering, over_replicas
from hvdx.pipeline.abreast import Abreast
from hvdx.pipeline.post import Packed
from hvdx.pipeline.run import unreached

FRAMEWORK = "tensorflow"
_LOSS = "the loss"


def device(told: str) -> str:
    """Return a device that exists.

    Raises:
        PlanError: it does not.
    """
    names = {d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()}
    plain = str(told).upper().removeprefix("/").removeprefix("DEVICE:")
    name = plain if ":" in plain else f"{plain}:0"
    if name not in names:
        raise PlanError(f"place has {told!r}, but TensorFlow has {', '.join(sorted(names))}")
    return f"/device:{name}"


def numbers(told: Sequence[float]) -> Any:
    """Return them as a tensor of float64 in host memory."""
    return tf.constant(told, tf.float64)


def norms(gradients: Sequence[Any]) -> list[float]:
    """Return the 2-norm of each."""
    wide = [tf.cast(each, tf.float32) if each.dtype.size < 4 else each for each in gradients]
    return [float(tf.norm(each)) for each in wide]


def apply(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Step the optimizer."""
    optimizer.apply(gradients, variables)


def finite(gradients: Sequence[Any]) -> bool:
    """Tell whether all numbers in them are finite."""
    return all(bool(tf.reduce_all(tf.math.is_finite(each))) for each in gradients)


def arrived(gradient: Any, _: Any) -> Any:
    """Return another rank's gradient; TensorFlow copies to devices by itself."""
    return gradient


class Codec:
    """Tensors as bytes, with dtype and shape; see :class:`post.Codec`."""

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
        loss: of the outputs.
        device: name of TensorFlow's to compute on; None: its choice.
        seed: of random units; equal on all ranks.
        split: whether schedules have I and W; TensorFlow finds both at once.

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
        loss: Objective,
        device: str | None,
        seed: int,
        split: bool,
    ) -> None:
        self._graph, self._device, self.seed = graph, device, seed
        self._first, self._stop, self._last = first, stop, stop == len(graph.units)
        self._entering, self._leaving = (
            list(graph.line.live(cut)) if cut else list(graph.inputs) for cut in (first, stop)
        )
        self._changing = list(graph.changing(graph.units[first:stop]).values())
        self._loss = tf.function(loss.__call__, reduce_retracing=True, autograph=False)
        self._in_thread = not tf.config.list_logical_devices("GPU")
        self.unit: str | None = None

    def begin(
        self,
        batch: Batch,
        again: frozenset[int] = frozenset(),
        abreast: Abreast | None = None,
    ) -> None:
        """Forget the last step and take the batch of the next.

        Args:
            batch: of the step.
            again: micro-batches of which only the inputs are kept; their backward begins with
                their forward.
            abreast: the replicas whose micro-batches are normalized together.
        """
        self._batch, self._again, self._abreast = batch, again, abreast
        self._inputs: dict[int, tuple[dict[str, Any], list[Any]]] = {}
        self._kept: dict[int, list[_Pass]] = {}
        self._pending: dict[int, list[tuple[tuple[int, str], Any]]] = {}
        self._results: dict[int, list[Any]] = {}
        self.gradients: dict[tuple[int, str], Any] = {}
        self._sums = Sums(self._graph.units)
        returns = self._last or not self._graph.smooth.isdisjoint(self._leaving)
        self._trains = batch.train and returns

    def commit(self) -> None:
        """Move the running statistics of batch normalization that were put off in this step."""
        with self._placed():
            self._sums.commit(self._abreast)

    def found(self) -> dict[int, list[Any]]:
        """Return by micro-batch the weighted loss, if training, and outputs that are asked for."""
        return self._results

    def forward(self, micro_batch: int, inputs: Sequence[Any] | None) -> list[Any]:
        """See :meth:`Stage.forward`."""
        with self._placed():
            if inputs is None:
                values = dict(self._batch.inputs[micro_batch])
            else:
                values = dict(zip(self._entering, inputs, strict=True))
            if self._trains and micro_batch in self._again:
                self._skim(values, micro_batch)
            else:  # without a gradient to come, all that is below frozen units keeps nothing
                passes = self._walk(values, micro_batch)
                self._kept[micro_batch] = passes if self._trains else []
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
        trained = [n for unit in self._graph.units[self._first : self._stop] for n in unit.params]
        if trained and not self._pending[micro_batch]:
            self.unit = None
            raise ValueError(unreached(trained[0]))
        return [found.get(name) for name in self._entering]

    def weight_gradient(self, micro_batch: int) -> None:
        """See :meth:`Stage.weight_gradient`."""
        with self._placed():
            for key, gradient in self._pending.pop(micro_batch):
                before = self.gradients.get(key)
                self.gradients[key] = gradient if before is None else before + gradient

    # --- the parts

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """Compute on this stage's device.

        On CPUs in this very thread: most units are a few kernels one after the other, and handing
        each unit to TensorFlow's threads takes longer than many units do. What is parallel within
        a kernel stays so.
        """
        with contextlib.ExitStack() as stack:
            if self._device:
                stack.enter_context(tf.device(self._device))
            if self._in_thread:
                stack.enter_context(context.function_executor_type("SINGLE_THREADED_EXECUTOR"))
            yield

    def _walk(self, values: dict[str, Any], micro_batch: int, again: bool = False) -> list[_Pass]:
        """Compute all units and the loss, for the first time or ``again``; fill ``values``."""
        units = range(self._first, self._stop)
        passes = [self._compute(index, values, micro_batch, again) for index in units]
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
            self._kept[micro_batch] = self._walk(values, micro_batch, again=not self._last)
        finally:
            self._set_state(now)

    def _state(self) -> list[Any]:
        """Copy what computing changes: running statistics and the like."""
        return [tf.identity(each.value) for each in self._changing]

    def _set_state(self, values: Sequence[Any]) -> None:
        if values:
            for each, value in zip(self._changing, values, strict=True):
                each.assign(value)

    def _compute(self, index: int, values: dict[str, Any], micro_batch: int, again: bool) -> _Pass:
        """Compute a unit; what it makes goes to ``values``."""
        unit = self._graph.units[index]
        self.unit = unit.name
        given = {name: values[name] for name in unit.reads}
        entered = {name: x for name, x in given.items() if name in self._graph.smooth}
        train = self._batch.train
        with self._random(unit, index, micro_batch), _tape(train) as tape:
            if train:
                tape.watch([*entered.values(), *(v.value for v in unit.params.values())])
            made, sums = self._function(index, micro_batch)(given)
        if not again:
            self._sums.add(index, sums)
        values.update(made)
        return _Pass(index, tape, entered, made)

    def _function(self, index: int, micro_batch: int) -> Callable[[dict[str, Any]], Any]:
        """Return :meth:`Unit.call`, compiled unless layers in it talk to other ranks."""
        unit, train = self._graph.units[index], self._batch.train
        if self._abreast is None or not unit.norms:
            return compiled(unit, train)  # type: ignore[no-any-return]  # of TensorFlow
        add = over_replicas(self._abreast, _with_gradient, index, micro_batch)
        return functools.partial(_called, unit, train, add=add)

    def _finish(self, values: Mapping[str, Any], micro_batch: int) -> list[_Pass]:
        """Compute the loss, and keep the outputs."""
        batch, graph = self._batch, self._graph
        outputs = [values[name] for name in (*graph.outputs, *graph.masks)] if batch.outputs else []
        self._results[micro_batch] = outputs
        if not batch.targets:
            return []
        ends = {name: values[name] for name in graph.ends}
        entered = {name: value for name, value in ends.items() if name in graph.smooth}
        with _tape(batch.train) as tape:
            if batch.train:
                tape.watch(list(entered.values()))
            told = self._loss(*batch.targets[micro_batch], batch.weights[micro_batch], ends)
            scaled = told if batch.scale is None else told * batch.scale
        self._results[micro_batch] = [told, *outputs]
        return [_Pass(-1, tape, entered, {_LOSS: scaled})] if batch.train else []

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

    def _random(self, unit: Unit, index: int, micro_batch: int) -> Any:
        """Give a random unit its own seeds; the layer's stay as they would have been."""
        told = f"{self.seed} {self._batch.step} {micro_batch} {index}"
        return drawing(unit, told, bool(unit.generators) and self._batch.train)


def compiled(unit: Unit, training: bool) -> Any:
    """Return :meth:`Unit.call` in this mode as a function of TensorFlow.

    It gives the values made and, in training, sums by layer of :attr:`Unit.norms` and call.
    """
    if training not in unit.cache:
        call = functools.partial(_called, unit, training)
        with lock:
            function = tf.function(call, reduce_retracing=True, autograph=False)
            unit.cache.setdefault(training, function)
    return unit.cache[training]


def _called(
    unit: Unit, training: bool, given: dict[str, Any], add: Add | None = None
) -> tuple[dict[str, Any], list[list[Any]]]:
    with gathering(unit.norms if training else [], add) as sums:
        made = unit.call(given, training)
    return made, sums


def _with_gradient(
    tensor: Any, forward: Callable[[Any], Any], backward: Callable[[Any], Any]
) -> Any:
    """Apply ``forward``, and ``backward`` to the gradient."""
    return tf.custom_gradient(lambda x: (forward(x), backward))(tensor)


def _tape(train: bool) -> Any:
    if not train:
        return contextlib.nullcontext()
    return tf.GradientTape(watch_accessed_variables=False)
