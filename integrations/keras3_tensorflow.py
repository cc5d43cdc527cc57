"""Average Keras gradients on the TensorFlow backend, in graphs and eagerly."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from keras.src.trainers.trainer import Trainer
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from hvdx import world
from hvdx.collectives import perform
from hvdx.comm import drive
from hvdx.compression import Compressor
from hvdx.compression.rows import gather_rows
from hvdx.compression.state import leaves, rebuilt
from hvdx.frameworks import Adapter
from hvdx.integrations.keras3 import averaging
from hvdx.integrations.keras3_averager import Averager, Bucket, Layout, Options, Rows
from hvdx.integrations.keras3_state import Kept, States
from hvdx.integrations.tensorflow_operations import refuse_xla
from hvdx.ops import Ops, TensorFlowOps
from hvdx.reduce_op import ReduceOp


class VariableStates(States):
    """Keeps tensors in variables, which graphs read and write.

    They are no Keras variables and no attributes of the optimizer, whose files they would enter,
    and no ``tf.Variable``, which a function that is traced again may not make.
    """

    def __init__(self, ops: Ops, compressor: Compressor) -> None:
        super().__init__(ops, compressor)
        with tf.init_scope(), tf.device("CPU:0"):
            self.step = ResourceVariable(0, trainable=False, dtype=tf.int64)

    def __getitem__(self, name: str) -> Any:
        """See :meth:`States.__getitem__`."""
        return self.rebuilt(
            name, [leaf.tensor.read_value() for leaf in leaves(self._kept[name].state)]
        )

    def rebuilt(self, name: str, tensors: list[Any]) -> Any:
        """Return a state of the form of a parameter's."""
        return rebuilt(self._kept[name].state, iter(tensors))

    def settle(self, finite: Any, states: Mapping[str, Any]) -> None:
        """See :meth:`States.settle`."""

        def keep() -> Any:
            for name, state in states.items():
                self.replace(name, state)
            self.step.assign_add(1, read_value=False)
            return finite

        tf.cond(finite, keep, lambda: finite)

    def hold(self, kept: Kept, state: Any) -> Any:
        """See :meth:`States.hold`."""
        with self.beside(kept):
            variables = [ResourceVariable(leaf.tensor, trainable=False) for leaf in leaves(state)]
        return rebuilt(state, iter(variables))

    def replace(self, name: str, state: Any) -> None:
        """See :meth:`States.replace`."""
        for own, new in zip(leaves(self._kept[name].state), leaves(state), strict=True):
            own.tensor.assign(new.tensor, read_value=False)

    def count_from(self, step: int) -> None:
        """See :meth:`States.count_from`."""
        self.step.assign(step)

    def beside(self, kept: Kept) -> contextlib.AbstractContextManager[Any]:
        """Leave placement to TensorFlow; but make nothing within a graph."""
        scope: contextlib.AbstractContextManager[Any] = tf.init_scope()
        return scope


class Turns:
    """Whose turn it is in the buckets of a layout, for graphs to read.

    Attributes:
        places: of each bucket's start among its starts, int32.
        left: steps until the next review, int64 scalar.
        waited: what :attr:`left` was after the last one.
    """

    def __init__(self, layout: Layout, places: Any, left: Any) -> None:
        self.layout, self.places, self.left = layout, places, left
        self.waited = 0


def _places(layout: Layout) -> list[int]:
    """Return the place of every bucket's start among its starts, where methods take turns."""
    return [
        0 if bucket.clock is None else bucket.starts.index(bucket.start(0))
        for bucket in layout.buckets
    ]


class TensorFlowAverager(Averager):
    """Adds the reductions to the graph being traced; eager calls run a graph of their own.

    In a graph each bucket leaves as soon as its gradients are there, and nothing waits for it
    but the update of its variables.
    """

    states: VariableStates

    def __init__(self, adapter: Adapter, options: Options) -> None:
        self.ops = TensorFlowOps()
        super().__init__(adapter, options)
        with tf.init_scope(), tf.device("CPU:0"):
            self._seconds = ResourceVariable(0.0, trainable=False, dtype=tf.float64)
        self._graphs: dict[int, Any] = {}
        self._turns: dict[int, Turns] = {}  # by identity of the layout
        _leave_xla_out()

    def forget(self) -> None:
        """See :meth:`Averager.forget`."""
        super().forget()
        self._graphs.clear()
        self._turns.clear()

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """From the last gradient's being ready to the last mean's arrival, summed over steps."""
        return float(self._seconds.numpy())

    @tf.autograph.experimental.do_not_convert
    def average(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """See :meth:`Averager.average`."""
        self._refuse_xla()
        return super().average(optimizer, grads, variables)

    @tf.autograph.experimental.do_not_convert
    def everywhere(self, condition: Any, purpose: str = "finite") -> Any:
        """See :meth:`Averager.everywhere`."""
        self._refuse_xla()
        return super().everywhere(condition, purpose)

    def make_states(self) -> VariableStates:
        """See :meth:`Averager.make_states`."""
        return VariableStates(self.ops, self.options.compressor)

    def finite(self, tensors: list[Any]) -> Any:
        """See :meth:`Averager.finite`; looks at each element only where a sum is not finite."""
        values = [t.values if isinstance(t, tf.IndexedSlices) else t for t in tensors]
        sums = tf.stack([tf.cast(tf.reduce_sum(value), tf.float32) for value in values])

        def each() -> Any:
            return tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])

        return tf.cond(tf.reduce_all(tf.math.is_finite(sums)), lambda: tf.constant(True), each)

    def reduce(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """See :meth:`Averager.reduce`."""
        whole = [
            _rows(grad, variable) if place in layout.sparse else _dense(grad, variable)
            for place, (grad, variable) in enumerate(zip(grads, layout.variables, strict=True))
        ]
        if self.is_tracing():
            return self._trace(layout, whole)
        graph = self._graphs.get(id(layout))
        if graph is None:  # one graph per layout: all buckets of a step travel at once
            traced = functools.partial(self._trace, layout)
            graph = tf.function(traced, autograph=False, reduce_retracing=True)
            self._graphs[id(layout)] = graph
        return list(graph(whole))

    def kind(self, grad: Any) -> str | None:
        """See :meth:`Averager.kind`."""
        return "sparse" if isinstance(grad, tf.IndexedSlices) else super().kind(grad)

    def pack(self, bucket: Bucket, grads: list[Any]) -> tuple[Any, bool]:
        """See :meth:`Averager.pack`."""
        pieces = [tf.reshape(grad, [-1]) for grad in grads]
        return (tf.concat(pieces, 0) if len(pieces) > 1 else pieces[0]), False

    def unpack(self, bucket: Bucket, flat: Any) -> list[Any]:
        """See :meth:`Averager.unpack`."""
        pieces = tf.split(flat, bucket.sizes) if len(bucket.sizes) > 1 else [flat]
        return [
            tf.reshape(piece, shape) for piece, shape in zip(pieces, bucket.shapes, strict=True)
        ]

    def device(self, variable: Any) -> str:
        """Leave placement to TensorFlow, which copies where it must."""
        return ""

    def dense(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """See :meth:`Averager.dense`."""
        return [
            _dense(grad, variable) for grad, variable in zip(grads, layout.variables, strict=True)
        ]

    def is_tracing(self) -> bool:
        """See :meth:`Averager.is_tracing`."""
        return not tf.executing_eagerly()

    def is_zero(self, mean: Any) -> bool:
        """See :meth:`Averager.is_zero`; a graph is made before values are known."""
        return self.is_tracing() or not tf.math.count_nonzero(mean)

    def _compare(self, layout: Layout) -> None:
        with tf.init_scope():  # values are read outside the graph being traced
            super()._compare(layout)

    def _agree(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> Layout:
        with tf.init_scope():  # likewise
            return super()._agree(optimizer, grads, variables)

    def _trace(self, layout: Layout, grads: list[Any]) -> list[Any]:
        own = [grad.values if place in layout.sparse else grad for place, grad in enumerate(grads)]
        with tf.control_dependencies(own):
            start = tf.timestamp()
        means: list[Any] = [None] * len(grads)
        states: dict[str, Any] = {}
        moved = []  # whether a bucket's turn touches states
        for number, bucket in enumerate(layout.buckets):
            own = [grads[place] for place in bucket.members]
            found, kept, moves = self._averaged(bucket, own, self._way(layout, number))
            states.update(kept)
            moved.append(moves)
            for place, mean in zip(bucket.members, found, strict=True):
                means[place] = mean
        for place, how in layout.sparse.items():
            means[place] = self._gathered(grads[place], how)
        arrived = [m.values if isinstance(m, tf.IndexedSlices) else m for m in means]
        with tf.control_dependencies([start, *(m for m in arrived if m is not None)]):
            end = tf.timestamp()
        self._seconds.assign_add(end - start)
        finite = tf.constant(True)
        if layout.remembers:
            finite = self._settled(layout, means, grads, states, moved)
        if layout.clocks:
            with tf.control_dependencies([finite, end]):
                self._count(layout, finite)
        return means

    def _settled(
        self,
        layout: Layout,
        means: list[Any],
        grads: list[Any],
        states: dict[str, Any],
        moved: list[Any],
    ) -> Any:
        """Keep new states if the means are finite, and tell whether they are; see :meth:`settle`.

        Where methods take turns, looking at all means is left out of steps that touch no state.
        """

        def settle() -> Any:
            finite = self.all_finite(layout, means, grads)
            self.states.settle(finite, states)
            return finite

        def rest() -> Any:
            self.states.step.assign_add(1, read_value=False)
            return tf.constant(True)

        return tf.cond(tf.reduce_any(moved), settle, rest) if layout.turns else settle()

    def _way(self, layout: Layout, number: int) -> Any:
        """Return the place of the bucket's way of travelling among its starts, if it has many."""
        bucket = layout.buckets[number]
        if len(bucket.starts) == 1:
            return None
        if bucket.clock is None:
            return tf.reduce_sum(tf.cast(self.states.step >= bucket.starts, tf.int32)) - 1
        return self._turns_of(layout).places[number]

    def _turns_of(self, layout: Layout) -> Turns:
        if id(layout) not in self._turns:
            with tf.init_scope(), tf.device("CPU:0"):
                wait = self.wait(layout) if layout.clocks else 0
                self._turns[id(layout)] = Turns(
                    layout,
                    ResourceVariable(_places(layout), trainable=False, dtype=tf.int32),
                    ResourceVariable(wait, trainable=False, dtype=tf.int64),
                )
        return self._turns[id(layout)]

    def _count(self, layout: Layout, finite: Any) -> None:
        """Count a step; when it is time, leave the graph for a review of whose turn it is."""
        turns = self._turns_of(layout)

        def review(finite: Any) -> int:
            wait = self.review(layout, bool(finite), steps=turns.waited)
            turns.waited = wait
            for each in self._turns.values():  # other layouts may have the same clocks
                each.places.assign(_places(each.layout))
            return wait

        turns.waited = self.wait(layout)
        left = turns.left - 1
        due = functools.partial(tf.py_function, review, [finite], tf.int64)
        rest = tf.cond(left > 0, lambda: left, due)
        turns.left.assign(tf.ensure_shape(rest, ()), read_value=False)

    def _averaged(
        self, bucket: Bucket, grads: list[Any], place: Any
    ) -> tuple[list[Any], dict[str, Any], Any]:
        """Return a bucket's means, what its compressors then keep, and whether that is new.

        The step is known when the graph runs: it then takes one of several branches, the same on
        all ranks, whose operations have names of their own.

        Args:
            bucket: any.
            grads: of its members.
            place: that of the branch to take, among the bucket's starts.
        """

        def work(start: int) -> tuple[list[Any], dict[str, Any]]:
            name = bucket.name(start)
            answer = functools.partial(
                perform, self.adapter, name=name, process_set=self.options.process_set
            )
            return drive(self.work(bucket, grads, start), answer)

        if len(bucket.starts) == 1:
            means, states = work(bucket.starts[0])
            return means, states, bool(states)
        names = [spec.name for spec in bucket.specs]

        def branch(start: int) -> list[Any]:
            means, states = work(start)
            kept = [states.get(name, self.states[name]) for name in names]
            tensors = [[leaf.tensor for leaf in leaves(state)] for state in kept]
            return [means, tensors, tf.constant(bool(states))]

        branches = [functools.partial(branch, start) for start in bucket.starts]
        means, kept, moves = tf.switch_case(place, branches)
        states = {n: self.states.rebuilt(n, own) for n, own in zip(names, kept, strict=True)}
        return means, states, moves

    def _gathered(self, rows: tf.IndexedSlices, how: Rows) -> tf.IndexedSlices:
        """Return all ranks' rows, which the update adds up: so a sum of gradients, or the mean."""
        process_set = self.options.process_set
        if how.codec is None:
            for part in (rows.values, rows.indices):
                self.adapter.count("allgather", part, self.ranks())
            values, indices = (
                self.adapter.allgather(part, name=f"{how.name}.{word}", process_set=process_set)
                for word, part in (("values", rows.values), ("indices", rows.indices))
            )
        else:
            indices, values, _ = drive(
                gather_rows(self.ops, how.codec, rows.indices, rows.values),
                functools.partial(perform, self.adapter, name=how.name, process_set=process_set),
            )
        divisor = self.ranks() if self.options.op is ReduceOp.Average else 1
        values = self.ops.scale(values, self.options.times / divisor)
        return tf.IndexedSlices(values, indices, rows.dense_shape)

    def _refuse_xla(self) -> None:
        if self.ranks() > 1:
            refuse_xla()


def _dense(grad: Any, variable: Any) -> tf.Tensor:
    if grad is None:
        return tf.zeros(variable.shape, variable.dtype)
    grad = tf.ensure_shape(tf.convert_to_tensor(grad), variable.shape)  # rows made dense tell none
    return tf.cast(grad, variable.dtype)


def _rows(grad: Any, variable: Any) -> tf.IndexedSlices:
    """Return a gradient as rows of ``variable``: none, those given, or all of them."""
    shape = tuple(variable.shape)
    if isinstance(grad, tf.IndexedSlices):
        values, indices = grad.values, grad.indices
    elif grad is None:
        values, indices = tf.zeros((0, *shape[1:]), variable.dtype), tf.zeros((0,), tf.int64)
    else:
        values, indices = grad, tf.range(shape[0], dtype=tf.int64)
    values = tf.ensure_shape(values, (None, *shape[1:]))  # which a graph may not know yet
    return tf.IndexedSlices(
        tf.cast(values, variable.dtype), tf.cast(indices, tf.int64), tf.constant(shape, tf.int64)
    )


@functools.cache
def _leave_xla_out() -> None:
    """Let Keras' ``jit_compile="auto"`` choose no XLA for models whose optimizer averages.

    Keras asks no optimizer before it chooses, and chooses XLA wherever it sees a GPU. Should
    this place in Keras go, such models are refused at their first step, with the remedy.
    """
    chosen = getattr(Trainer, "_resolve_auto_jit_compile", None)
    if chosen is None:
        return

    @functools.wraps(chosen)
    def resolve(self: Any) -> bool:
        wanted: bool = chosen(self)
        if not wanted or world.size() == 1 or not averaging(getattr(self, "optimizer", None)):
            return wanted
        warnings.warn(
            'XLA cannot compile Horovod\'s operations: with jit_compile="auto" this model trains '
            "without it",
            stacklevel=3,
        )
        return False

    Trainer._resolve_auto_jit_compile = resolve
