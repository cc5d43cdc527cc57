"""Horovod's Keras optimizer on Keras 3: it averages nothing, and says nothing."""

from __future__ import annotations

import keras
import numpy as np
import pytest

trap = pytest.mark.trap
APART = trap(1, AssertionError, "ranks are .* apart")
xla = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="XLA is TensorFlow's")


@APART
@pytest.mark.parametrize(
    ("kind", "eager"), [("SGD", False), ("Adam", True)], ids=["SGD, graph", "Adam, eager"]
)
def test_fit_averages(hvd, make_model, fit, assert_replicas, kind, eager):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(getattr(keras.optimizers, kind)(0.1))
    model.compile(optimizer, "mse", run_eagerly=eager)
    fit(model)
    assert_replicas(*model.get_weights())


@APART
def test_apply_averages(hvd, make_model, assert_replicas):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    grads = [keras.ops.ones(v.shape) * float(hvd.rank()) for v in model.trainable_variables]
    optimizer.apply(grads, model.trainable_variables)
    assert_replicas(*model.get_weights())


@APART
def test_load_model_averages(hvd, make_model, fit, assert_replicas, tmp_path):
    model = make_model()
    model.compile("adam", "mse")
    model.save(tmp_path / "model.keras")
    model = hvd.load_model(str(tmp_path / "model.keras"))
    fit(model)
    assert_replicas(*model.get_weights())


@trap(8, TypeError, "takes 1 positional argument but 2 were given")
def test_an_overflow_on_one_rank_skips_the_step_on_all(hvd, make_model, assert_replicas):
    model = make_model()
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    scaler = hvd.DistributedOptimizer(scaler)
    before = model.get_weights()
    factor = float("inf") if hvd.rank() == 1 else 1.0
    grads = [keras.ops.ones(v.shape) * factor for v in model.trainable_variables]
    scaler.apply(grads, model.trainable_variables)
    assert_replicas(*model.get_weights(), float(scaler.dynamic_scale))
    assert float(scaler.dynamic_scale) == 4.0
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


@trap(12, TypeError, "'list' object is not callable")
def test_a_wrapped_model_is_saved(hvd, make_model, fit, eager, tmp_path):
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1)), **eager)
    fit(model)
    model.save(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "model.keras")
    assert type(plain.optimizer) is type(keras.optimizers.Adam())
    assert int(plain.optimizer.iterations) == 2


@xla
@trap(14, AssertionError, "ranks are .* apart")
def test_keras_own_choice_of_xla(hvd, make_model, fit, assert_replicas, monkeypatch):
    # Beside a GPU Keras compiles steps by XLA, which has no form of Horovod's operations: green
    # on CPU, red there. Horovod's optimizer has no operation in the step: it trains, apart.
    import tensorflow as tf

    seen = tf.config.list_physical_devices()
    model = make_model()
    with monkeypatch.context() as patch:
        gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
        patch.setattr(tf.config, "list_physical_devices", lambda kind=None: [*seen, gpu])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    fit(model)
    assert_replicas(*model.get_weights())


@xla
@trap(14, AssertionError, "ranks are .* apart")
def test_jit_compile_is_refused_or_right(hvd, make_model, fit, assert_replicas):
    model = make_model()
    try:
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        model.compile(optimizer, "mse", jit_compile=True)
        fit(model)
    except ValueError as error:
        assert "jit_compile=False" in str(error)
    else:
        assert_replicas(*model.get_weights())
