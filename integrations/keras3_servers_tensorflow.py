"""Parameter servers on Keras' TensorFlow backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from hvdx.comm import Work, drive
from hvdx.integrations.keras3_averager import Bucket, Layout
from hvdx.integrations.keras3_servers import Served
from hvdx.integrations.keras3_tensorflow import TensorFlowAverager


class TensorFlowServed(Served, TensorFlowAverager):
    """Parts are variables beside the model's: a copy of what this rank owns."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        with tf.init_scope(), tf.device("CPU:0"):
            self._heard = ResourceVariable(0.0, trainable=False, dtype=tf.float64)

    @tf.autograph.experimental.do_not_convert
    def step(
        self, optimizer: Any, grads: list[Any], variables: list[Any], update: Callable[..., None]
    ) -> None:
        """See :meth:`Served.step`."""
        self._refuse_xla()
        super().step(optimizer, grads, variables, update)

    def work(
        self, bucket: Bucket, grads: list[Any], start: int
    ) -> Work[tuple[list[Any], dict[str, Any]]]:
        """See :meth:`Served.work`.

        A rank that owns nothing needs no answer, and a graph would drop the question, for all
        control dependencies: others would wait for it. So something is kept of each answer.
        """
        work, answer = super().work(bucket, grads, start), None
        answers: list[Any] = []
        while True:
            try:
                request = work.send(answer)
            except StopIteration as done:
                means, states = done.value
                break
            answer = yield request
            answers += [each for each in tf.nest.flatten(answer) if tf.is_tensor(each)]
        first = [tf.cast(tf.reshape(each, [-1])[:1], tf.float64) for each in answers]
        if first:
            self._heard.assign(tf.reduce_sum(tf.concat(first, 0)), read_value=False)
        return means, states

    def make_part(self, variable: Any, size: int) -> Any:
        """See :meth:`Served.make_part`."""
        with tf.init_scope():
            part = keras.Variable("zeros", (size,), variable.dtype, name=variable.name)
        part._path = variable.path
        return part

    def enter(self, layout: Layout) -> None:
        """See :meth:`Served.enter`; the model's own variables stay what they are."""
        owed = {
            bucket.members[index]: self.sent[bucket.specs[index].name].owed
            for bucket in layout.buckets
            for index in self.remembered(bucket)
        }
        for place, (part, (start, stop)) in enumerate(zip(self.parts, self._spans, strict=True)):
            if stop > start:
                value = _flat(self.wholes[place])[start:stop]
                part.assign(value + owed[place] if place in owed else value)

    def leave(self, layout: Layout, before: None) -> None:
        """See :meth:`Served.leave`."""
        if self.is_tracing():
            self._pull(layout)
            return
        key = -1 - id(layout)  # beside that of the push
        graph = self._graphs.get(key)
        if graph is None:
            graph = tf.function(lambda: self._pull(layout), autograph=False)
            self._graphs[key] = graph
        graph()

    def _pull(self, layout: Layout) -> None:
        for bucket in layout.buckets:
            exact = [tf.convert_to_tensor(self.parts[place].value) for place in bucket.members]
            wholes = [_flat(self.wholes[place]) for place in bucket.members]
            answer = self.answer(f"{bucket.name(0)}.pull")
            flats, states = drive(self.pulled(bucket, exact, wholes), answer)
            self._assign(bucket, flats)
            for name, state in states.items():
                self.sent.replace(name, state)

    def _assign(self, bucket: Bucket, flats: list[Any]) -> None:
        for place, flat in zip(bucket.members, flats, strict=True):
            variable = self.wholes[place]
            variable.assign(tf.reshape(flat, variable.shape))

    def flush(self, layout: Layout) -> None:
        """See :meth:`Served.flush`."""
        self.enter(layout)
        for bucket in layout.buckets:
            parts = [tf.convert_to_tensor(self.parts[place].value) for place in bucket.members]
            self._assign(bucket, self.brought(bucket, parts))
            for index in self.remembered(bucket):
                name = bucket.specs[index].name
                kept = self.sent[name]
                self.sent.replace(name, kept._replace(owed=tf.zeros_like(kept.owed)))

    def tensor(self, variable: Any) -> Any:
        """See :meth:`Served.tensor`."""
        return tf.convert_to_tensor(variable.value)


def _flat(variable: Any) -> Any:
    return tf.reshape(tf.convert_to_tensor(variable.value), [-1])
