"""Average Keras gradients on the TensorFlow backend, in graphs and eagerly."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from hvdx.collectives import perform
from hvdx.comm import drive
from hvdx.frameworks import Adapter
from hvdx.integrations.keras3 import Averager, Bucket, Layout, Options
from hvdx.ops import TensorFlowOps


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

    def forget(self) -> None:
        """See :meth:`Averager.forget`."""
        super().forget()
        self._graphs.clear()

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """From the last gradient's being ready to the last mean's arrival, summed over steps."""
        return float(self._seconds.numpy())

    def reduce(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """See :meth:`Averager.reduce`."""
        if tf.executing_eagerly():
            graph = self._graphs.get(id(layout))
            if graph is None:  # one graph per layout: all buckets of a step travel at once
                traced = functools.partial(self._trace, layout)
                graph = self._graphs[id(layout)] = tf.function(traced, autograph=False)
            means = graph(self._dense(layout, grads))
        else:
            _refuse_xla()
            means = self._trace(layout, self._dense(layout, grads))
        for place in layout.idle:
            if grads[place] is None and not (
                tf.executing_eagerly() and tf.math.count_nonzero(means[place])
            ):
                means[place] = None
        return means

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

    def _dense(self, layout: Layout, grads: list[Any]) -> list[Any]:
        return [
            tf.zeros(variable.shape, variable.dtype)
            if grad is None
            else tf.cast(tf.convert_to_tensor(grad), variable.dtype)
            for grad, variable in zip(grads, layout.variables, strict=True)
        ]

    def _trace(self, layout: Layout, grads: list[Any]) -> list[Any]:
        with tf.control_dependencies(grads):
            start = tf.timestamp()
        means: list[Any] = [None] * len(grads)
        for bucket in layout.buckets:
            answer = functools.partial(
                perform, self.adapter, name=bucket.name, process_set=self.options.process_set
            )
            own = [grads[place] for place in bucket.members]
            for place, mean in zip(bucket.members, drive(self.work(bucket, own), answer)):  # noqa: B905
                means[place] = mean
        with tf.control_dependencies([start, *means]):
            end = tf.timestamp()
        self._seconds.assign_add(end - start)
        return means


def _refuse_xla() -> None:
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ValueError(
            "XLA cannot compile Horovod's operations, and this step is being compiled by it (Keras "
            "does so by default where it finds a GPU): use model.compile(..., jit_compile=False)"
        )
