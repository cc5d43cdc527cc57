"""The Keras face: what it needs, what it takes and what it refuses, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("keras") is None or find_spec("horovod") is None, reason="needs Keras and Horovod"
)


def run(code: str, backend: str) -> str:
    """Run ``code`` on a backend of Keras and return what it prints."""
    environ = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_torch_backend_needs_no_tensorflow():
    if find_spec("torch") is None:
        pytest.skip("needs torch")
    code = """
import sys
sys.modules["tensorflow"] = None  # as if it were not installed
import keras, numpy
import hvdx.keras as hvd
hvd.init()
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam()), "mse")
model.fit(numpy.ones((4, 2)), numpy.ones((4, 1)), verbose=0, callbacks=[
    hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()])
print(float(hvd.allreduce([1.0, 2.0])[1]))
"""
    assert run(code, "torch") == "2.0\n"


def test_other_backends_are_refused():
    code = """
import keras
import hvdx as hvd
keras.backend.backend = lambda: "jax"
try:
    hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
except TypeError as error:
    print(error)
"""
    backend = "tensorflow" if find_spec("tensorflow") else "torch"
    assert "'jax' backend, which Horovod cannot serve" in run(code, backend)


def test_takes_horovods_arguments():
    if find_spec("tensorflow") is None:
        pytest.skip("needs TensorFlow")
    code = """
import inspect
import horovod.keras, horovod.tensorflow.keras
import hvdx.keras.callbacks, hvdx.tensorflow.keras.callbacks
from hvdx.keras.callbacks import MetricAverageCallback
hvdx.keras.init()

def parameters(call):
    simple = (int, float, str, type(None))
    told = inspect.signature(call).parameters.values()
    return [(p.name, int(p.default) if p.name == "op" and p.default else p.default
             if isinstance(p.default, simple) else None) for p in told]

for theirs, ours in (horovod.keras, hvdx.keras), (horovod.tensorflow.keras, hvdx.tensorflow.keras):
    for name in ("DistributedOptimizer", "allgather", "allreduce", "broadcast", "load_model",
                 "reducescatter", "broadcast_global_variables", "PartialDistributedOptimizer"):
        if hasattr(theirs, name):
            wanted = parameters(getattr(theirs, name))
            assert parameters(getattr(ours, name))[:len(wanted)] == wanted, (theirs, name)
    for name in ("BroadcastGlobalVariablesCallback", "MetricAverageCallback",
                 "LearningRateScheduleCallback", "LearningRateWarmupCallback",
                 "BestModelCheckpoint"):
        wanted = parameters(getattr(theirs.callbacks, name))
        assert parameters(getattr(ours.callbacks, name))[:len(wanted)] == wanted, (theirs, name)
    for name, value in vars(theirs).items():
        module = inspect.ismodule(value) and name not in ("callbacks", "elastic")
        if name[0].isalpha() and not module and not hasattr(ours, name):
            print(name)
"""
    assert set(run(code, "tensorflow").split()) <= {"is_version_greater_equal_than"}


def test_values_of_all_kinds():
    code = """
import keras, numpy
import hvdx.keras as hvd
hvd.init()
for value in (3.0, [1, 2], numpy.ones(2, "int64"), keras.Variable([1.0]), keras.ops.ones(2)):
    for result in (hvd.allreduce(value, "a"), hvd.allreduce(value, average=False),
                   hvd.allreduce(value, op=hvd.Sum), hvd.broadcast(value, 0)):
        assert keras.ops.is_tensor(result), result
        numpy.testing.assert_array_equal(keras.ops.convert_to_numpy(result), value)
print(keras.ops.convert_to_numpy(hvd.allgather([[1.0, 2.0]], name="g")).tolist())
"""
    backend = "tensorflow" if find_spec("tensorflow") else "torch"
    assert run(code, backend) == "[[1.0, 2.0]]\n"


def test_one_process_needs_no_launcher_and_sends_nothing():
    backend = "tensorflow" if find_spec("tensorflow") else "torch"
    code = """
import keras, numpy
import hvdx as hvd
keras.Variable(0.0)  # which loads the backend
hvd.init()
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
variable = keras.Variable([1.0])
optimizer.apply([keras.ops.ones(1)], [variable])
print(float(keras.ops.convert_to_numpy(variable)[0]), optimizer.communication_seconds)
"""
    assert run(code, backend) == "0.0 0.0\n"
