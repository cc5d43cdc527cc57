"""Average Keras gradients on the TensorFlow backend, in graphs and eagerly."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import tensorflow as tf
from keras.src.trainers.trainer import Trainer
from tensorflow.python.ops import control_flow_util

from hvdx import world
from hvdx.collectives import perform
from hvdx.comm import drive
from hvdx.frameworks import Adapter
from hvdx.integrations.keras3 import averaging
from hvdx.integrations.keras3_averager import Averager, Bucket, Layout, Options
from hvdx.ops import TensorFlowOps
from hvdx.reduce_op import ReduceOp


class TensorFlowAverager(Averager):
    """Adds the reductions to the graph being traced; eager calls run a graph of their own.

    In a graph each bucket leaves as soon as its gradients are there, and nothing waits for it
    but the update of its variables.
    """

    def __init__(self, adapter: Adapter, options: Options) -> None:
        super().__init__(adapter, options)
        self.ops = TensorFlowOps()
        # No Keras variable and no attribute of the optimizer: it is neither state nor saved.
        with tf.init_scope(), tf.device("CPU:0"):
            self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self._graphs: dict[int, Any] = {}
        _leave_xla_out()

    def forget(self) -> None:
        """See :meth:`Averager.forget`."""
        super().forget()
        self._graphs.clear()

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
    def everywhere(self, condition: Any) -> Any:
        """See :meth:`Averager.everywhere`."""
        self._refuse_xla()
        return super().everywhere(condition)

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

    def configuration(self, optimizer: Any) -> str:
        """See :meth:`Averager.configuration`; learning rates are read outside the graph."""
        with tf.init_scope():
            return super().configuration(optimizer)

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

    def _trace(self, layout: Layout, grads: list[Any]) -> list[Any]:
        own = [grad.values if place in layout.sparse else grad for place, grad in enumerate(grads)]
        with tf.control_dependencies(own):
            start = tf.timestamp()
        means: list[Any] = [None] * len(grads)
        for bucket in layout.buckets:
            answer = functools.partial(
                perform, self.adapter, name=bucket.name, process_set=self.options.process_set
            )
            work = self.work(bucket, [grads[place] for place in bucket.members])
            for place, mean in zip(bucket.members, drive(work, answer), strict=True):
                means[place] = mean
        for place, name in layout.sparse.items():
            means[place] = self._gathered(grads[place], name)
        arrived = [m.values if isinstance(m, tf.IndexedSlices) else m for m in means]
        with tf.control_dependencies([start, *(m for m in arrived if m is not None)]):
            end = tf.timestamp()
        self._seconds.assign_add(end - start)
        return means

    def _gathered(self, rows: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        """Return all ranks' rows, which the update adds up: so a sum of gradients, or the mean."""
        values, indices = (
            self.adapter.allgather(
                part, name=f"{name}.{word}", process_set=self.options.process_set
            )
            for word, part in (("values", rows.values), ("indices", rows.indices))
        )
        divisor = self.ranks() if self.options.op is ReduceOp.Average else 1
        values = self.ops.scale(values, self.options.times / divisor)
        return tf.IndexedSlices(values, indices, rows.dense_shape)

    def _refuse_xla(self) -> None:
        graph = tf.compat.v1.get_default_graph()
        if self.ranks() > 1 and control_flow_util.GraphOrParentsInXlaContext(graph):
            raise ValueError(
                "XLA cannot compile Horovod's operations, and this step is being compiled by it: "
                "use model.compile(..., jit_compile=False), or "
                "hvd.callbacks.BroadcastGlobalVariablesCallback(0), which turns it off"
            )


def _dense(grad: Any, variable: Any) -> tf.Tensor:
    if grad is None:
        return tf.zeros(variable.shape, variable.dtype)
    return tf.cast(tf.convert_to_tensor(grad), variable.dtype)


def _rows(grad: Any, variable: Any) -> tf.IndexedSlices:
    """Return a gradient as rows of ``variable``: none, those given, or all of them."""
    shape = tuple(variable.shape)
    if isinstance(grad, tf.IndexedSlices):
        values, indices = grad.values, grad.indices
    elif grad is None:
        values, indices = tf.zeros((0, *shape[1:]), variable.dtype), tf.zeros((0,), tf.int64)
    else:
        values, indices = grad, tf.range(shape[0], dtype=tf.int64)
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
