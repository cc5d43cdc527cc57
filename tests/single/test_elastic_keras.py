"""Keras' elastic state and callbacks, in one process, on each backend."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

CODE = """
import keras
import numpy as np
import hvdx.keras as hvd
from horovod.common.exceptions import HorovodInternalError

hvd.init()

def weights(model):
    return [w.copy() for w in model.get_weights()]

def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

# An optimizer that is not built yet, and changes that are undone.
model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)])
optimizer = keras.optimizers.Adam(0.1)
state = hvd.elastic.KerasState(model, optimizer, batch=20, epoch=10)
state.sync()
first = weights(model)
model.set_weights([w + 1 for w in first])
state.batch = 21
state.restore()
assert same(weights(model), first) and state.batch == 20
model.set_weights([w + 1 for w in first])
state.batch = 21
state.commit()
model.set_weights(first)
state.restore()
assert same(weights(model), [w + 1 for w in first]) and state.batch == 21

# Moments and step counts too.
optimizer.apply([keras.ops.ones_like(v) for v in model.trainable_variables])
state.commit()
saved = [np.array(keras.ops.convert_to_numpy(v)) for v in optimizer.variables]
optimizer.apply([keras.ops.ones_like(v) for v in model.trainable_variables])
state.restore()
assert same([keras.ops.convert_to_numpy(v) for v in optimizer.variables], saved)

# A model without variables yet.
try:
    hvd.elastic.KerasState(keras.Sequential([keras.layers.Dense(1)]), optimizer)
except ValueError as error:
    assert "built" in str(error)
else:
    raise SystemExit("took a model that is not built")

# A fit that fails goes on behind the last commit, in the data too.
class Fail(keras.callbacks.Callback):
    left = 5
    def on_train_batch_end(self, batch, logs=None):
        Fail.left -= 1
        seen.append((state.data.epoch, state.data[batch][0][:, 0].astype(int).tolist()))
        if Fail.left == 0:
            raise HorovodInternalError("a rank is gone")
        committed.extend(seen[len(committed):])

x = np.arange(24.0)[:, None].repeat(2, 1)
data = hvd.DistributedDataset(x, x, batch_size=8)
model.compile(optimizer, "mse")
state = hvd.elastic.KerasState(model, data=data, batch=0, epoch=0)
seen, committed = [], []
calls = []

@hvd.elastic.run
def train(state):
    calls.append((state.epoch, state.batch, len(state.data)))
    state.model.fit(state.data, epochs=3 - state.epoch, verbose=0, callbacks=[
        Fail(),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.UpdateEpochStateCallback(state),
        hvd.elastic.CommitStateCallback(state),
    ])

train(state)
assert calls == [(0, 0, 3), (1, 1, 2)], calls
del seen[4]  # failed, and trained on again
for epoch in range(3):
    own = sorted(i for e, part in seen if e == epoch for i in part)
    assert own == list(range(24)), (epoch, own)
assert (state.epoch, state.batch) == (3, 0)

# What callbacks do with any state, as Horovod's.
class State:
    batch, epoch, commits = 0, 4, 0
    def commit(self):
        self.commits += 1

state = State()
commit = hvd.elastic.CommitStateCallback(state, batches_per_commit=2)
for batch in range(5):
    commit.on_batch_end(batch)
assert state.commits == 2
commit.on_epoch_end(0)
assert state.commits == 3
batches = hvd.elastic.UpdateBatchStateCallback(state)
batches.set_params({"steps": 10})
state.batch = 3
batches.on_train_begin()
batches.on_epoch_begin(0)
assert batches.params["steps"] == 7
batches.on_batch_end(0)
assert state.batch == 4
batches.on_epoch_end(0)
batches.on_epoch_begin(1)
assert (state.batch, batches.params["steps"]) == (0, 10)
epochs = hvd.elastic.UpdateEpochStateCallback(state)
epochs.on_train_begin()
epochs.on_epoch_end(1)
assert state.epoch == 6
"""

TENSORFLOW = """
import tensorflow as tf
from hvdx.integrations.tensorflow_elastic import forget_graphs
import hvdx.tensorflow

variables = [tf.Variable([1.0, 2.0]), tf.Variable(3)]
state = hvdx.tensorflow.elastic.TensorFlowState(variables, batch=1)
state.sync()
variables[0].assign([5.0, 5.0])
state.restore()
assert variables[0].numpy().tolist() == [1.0, 2.0]
variables[1].assign(4)
state.commit()
variables[1].assign(5)
state.restore()
assert int(variables[1]) == 4
try:
    hvdx.tensorflow.elastic.TensorFlowState()
except ValueError as error:
    assert "variables" in str(error)
assert hvdx.tensorflow.elastic.TensorFlowKerasState is hvd.elastic.KerasState

traces = []
@tf.function
def traced(value):
    traces.append(1)
    return value + 1
for _ in range(2):
    traced(tf.constant(1))
forget_graphs()
for _ in range(2):
    assert int(traced(tf.constant(1))) == 2
assert len(traces) == 2
"""


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_state_and_callbacks(backend):
    if any(find_spec(package) is None for package in ("horovod", "keras", backend)):
        pytest.skip(f"needs Horovod, Keras and {backend}")
    done = subprocess.run(
        [sys.executable, "-c", CODE + (TENSORFLOW if backend == "tensorflow" else "")],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
