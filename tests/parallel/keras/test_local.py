"""What does not travel: local variables and layers, ranks outside a process set."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdx


def value(variable):
    return keras.ops.convert_to_numpy(variable.value)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("way", "scale"),
    [
        ("apply", True),
        ("apply", False),
        pytest.param("graph", True, marks=pytest.mark.backend("tensorflow")),
    ],
)
def test_register_local_var(hvd, way, scale):
    shared, local = (keras.Variable(np.zeros(2), name=name) for name in ("shared", "local"))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), scale_local_gradients=scale)
    optimizer.register_local_var(local)
    optimizer.build([shared, local])
    grads = [keras.ops.ones(2) * (hvd.rank() + 1.0)] * 2
    if way == "graph":
        import tensorflow as tf

        tf.function(lambda: optimizer.apply(grads, [shared, local]))()
    else:
        optimizer.apply(grads, [shared, local])
    np.testing.assert_allclose(value(shared), -(hvd.size() + 1) / 2)
    own = (hvd.rank() + 1.0) / (hvd.size() if scale else 1)
    np.testing.assert_allclose(value(local), -own, rtol=1e-6)
    with pytest.raises(ValueError, match="after the first step"):
        optimizer.register_local_var(shared)


@pytest.mark.ranks(2)
def test_partial_optimizer(hvd, data, make_model, ways, assert_equal_replicas):
    """Local layers may differ in shape; the broadcast leaves them and their momentum alone."""
    rank = hvd.rank()
    keras.utils.set_random_seed(rank)
    local = keras.layers.Dense(3 + rank, activation="tanh", name="own")
    model = keras.Sequential([local, keras.layers.Dense(1, name="narrow")])
    shared = keras.layers.Dense(6, name="shared")
    whole = keras.Sequential([shared, model])
    optimizer = hvd.PartialDistributedOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9), local_layers=[model]
    )
    whole.build((None, 6))
    mine = value(local.kernel)
    whole.compile(optimizer, "mse")
    x, y = (part.reshape(-1, part.shape[-1]) for part in data().shard)
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(
        0, local_variables=model.trainable_variables
    )
    whole.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    assert_equal_replicas(shared)
    assert value(local.kernel).shape == (6, 3 + rank)
    assert (value(local.kernel) != mine).any()


@pytest.mark.ranks(2)
def test_overflow_of_a_local_gradient_reaches_all(hvd):
    shared, local = (keras.Variable(np.zeros(1), name=name) for name in ("shared", "local"))
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer = hvd.DistributedOptimizer(scaler)
    optimizer.register_local_var(local)
    bad = float("inf") if hvd.rank() == 0 else 1.0
    optimizer.apply([keras.ops.ones(1), keras.ops.ones(1) * bad], [shared, local])
    assert float(value(shared)[0]) == 0.0
    assert float(optimizer.dynamic_scale) == 2.0


def test_process_set(hvd, process_set):
    """Ranks of the set average among themselves; the last rank trains alone."""
    variable = keras.Variable(np.zeros(1))
    optimizer = keras.optimizers.SGD(1.0)
    inside = hvd.rank() < hvd.size() - 1
    if inside:
        hvd.DistributedOptimizer(optimizer, process_set=process_set)
    optimizer.apply([keras.ops.ones(1) * hvd.rank()], [variable])
    expected = (hvd.size() - 2) / 2 if inside else hvd.rank()
    np.testing.assert_allclose(value(variable), -expected)


def different_start(hvd, make_model):
    model = make_model(seed=hvd.rank())
    return model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["fit", "loop"])
def test_forgotten_broadcast_is_told(hvd, way, data, make_model, ways):
    model, optimizer = different_start(hvd, make_model)
    with pytest.warns(UserWarning, match=r"'sequential/dense/kernel'.*BroadcastGlobal"):
        getattr(ways, way)(model, optimizer, data().shard)


@pytest.mark.ranks(2)
@pytest.mark.filterwarnings("error:ranks train")
def test_broadcast_before_or_after_the_first_step_is_not_told(hvd, data, make_model, ways):
    x, y = data().shard
    model, optimizer = different_start(hvd, make_model)
    model.compile(optimizer, "mse", run_eagerly=True)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    model.fit(x[0], y[0], verbose=0, callbacks=callbacks)
    model, optimizer = different_start(hvd, make_model)
    ways.loop(model, optimizer, (x[:1], y[:1]))
    hvdx.broadcast_parameters(model)
    hvdx.broadcast_parameters(optimizer.variables())  # called, as Horovod's examples do
    ways.loop(model, optimizer, (x[1:], y[1:]))
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.layers.Dense(1)])  # has no weights before its first batch
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    model.fit(x[0], y[0], batch_size=2, verbose=0, callbacks=callbacks)
