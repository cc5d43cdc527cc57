"""What else of Horovod's Keras modules fails on Keras 3."""

from __future__ import annotations

import keras
import pytest

trap = pytest.mark.trap


@trap(1, AttributeError, "has no attribute 'ref'")
def test_broadcast_callback(hvd, make_model, fit, eager, assert_replicas):
    model = make_model(seed=hvd.rank())
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1)), **eager)
    fit(model, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert_replicas(*model.get_weights())


@trap(1, AttributeError, "has no attribute 'constant'")
def test_metric_average_callback(hvd, make_model, fit, eager, assert_replicas):
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), **eager)
    history = fit(model, callbacks=[hvd.callbacks.MetricAverageCallback()])
    assert_replicas(history.history["loss"])


@trap(1, AttributeError, "has no attribute 'get_value'")
@pytest.mark.parametrize("kind", ["warm-up", "schedule"])
def test_learning_rate_callbacks(hvd, make_model, fit, eager, kind):
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.4)), **eager)
    if kind == "warm-up":  # from 1/size of the rate to all of it, in two epochs
        callback = hvd.callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2, steps_per_epoch=2)
    else:
        callback = hvd.callbacks.LearningRateScheduleCallback(0.4, lambda epoch: 0.5**epoch)
    fit(model, epochs=2, callbacks=[callback])
    rate = float(model.optimizer.learning_rate)
    assert rate == pytest.approx(0.2 if kind == "schedule" else 0.4, rel=0.3)


@trap(1, TypeError, "'list' object is not callable")
def test_variables_of_a_wrapped_optimizer(hvd, make_model):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())
    optimizer.build(make_model().trainable_variables)
    names = [variable.name for variable in optimizer.variables]
    assert "iteration" in names and len(names) == 6


@trap(1, AttributeError, "has no attribute 'ref'")
def test_all_but_local_layers_are_averaged(hvd, make_model, fit, everyone, assert_replicas):
    model = make_model(layers=2)
    first, last = model.layers
    optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.1), local_layers=[last])
    model.compile(optimizer, "mse")
    fit(model)
    assert_replicas(*first.get_weights())
    one, other = everyone(last.get_weights())
    assert (one[0] != other[0]).all()


@trap(12, TypeError, "'list' object is not callable")
def test_elastic_state_of_a_wrapped_model(hvd, make_model, assert_replicas):
    model = make_model(seed=hvd.rank())
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1)), "mse")
    state = hvd.elastic.KerasState(model, epoch=hvd.rank())
    state.sync()
    assert_replicas(*model.get_weights())
    assert state.epoch == 0
