"""Several steps per update: communicated once, and equal to one process with all the data."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest


@contextlib.contextmanager
def counted(optimizer):
    """Count how often gradients travel; in graphs, how often that is traced."""
    engine, times = optimizer._averager, []
    reduce = engine.reduce
    engine.reduce = lambda *given: times.append(1) or reduce(*given)
    yield times


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["fit", "loop"])
def test_equals_one_process(hvd, way, data, make_model, ways, farthest, exact):
    batches = data("float64")
    options = dict(momentum=0.9, gradient_accumulation_steps=2, clipnorm=0.05, weight_decay=0.01)
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.SGD(0.1, **options), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, **options))
    with counted(optimizer) as times:
        getattr(ways, way)(together, optimizer, batches.shard)
    graph = way == "fit" and keras.backend.backend() == "tensorflow"
    assert graph or len(times) == 2  # 5 steps, 2 updates
    assert int(optimizer.iterations) == 2
    assert farthest(alone, together) < exact


@pytest.mark.ranks(2)
def test_backward_passes_per_step(hvd, data, make_model, ways, farthest, exact):
    """Horovod's argument, with Horovod's sum; upstream's test asks for the mean."""
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.SGD(0.2, gradient_accumulation_steps=2), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=2)
    ways.loop(together, optimizer, batches.shard)
    assert farthest(alone, together) < exact


def test_one_rank_has_no_gradient_in_some_steps(hvd):
    variables = [keras.Variable(np.zeros(2), name="used"), keras.Variable(np.zeros(2), name="rare")]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
    for step in range(4):
        rare = keras.ops.ones(2) if hvd.rank() == 0 and step == 2 else None
        optimizer.apply([keras.ops.ones(2), rare], variables)
    np.testing.assert_allclose(variables[0].numpy(), -2.0)
    np.testing.assert_allclose(variables[1].numpy(), -0.5 / hvd.size(), rtol=1e-6)


@pytest.mark.ranks(2)
def test_inside_a_loss_scaler(hvd, data, make_model, ways, farthest):
    batches = data()
    alone, together = make_model(), make_model()

    def make():
        inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0)

    ways.loop(alone, make(), batches.whole)
    ways.fit(together, hvd.DistributedOptimizer(make()), batches.shard)
    assert farthest(alone, together) < 1e-6


def test_upstreams_test_of_gradient_aggregation(hvd):
    """Horovod's own test, with a variable of the backend's in the place of Keras 2's."""

    class Adds(keras.optimizers.Optimizer):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_add(variable, gradient)

    variable = keras.Variable([0.0])
    optimizer = hvd.DistributedOptimizer(
        Adds(1.0), backward_passes_per_step=4, average_aggregated_gradients=True
    )
    mean = sum(range(hvd.size())) / hvd.size()
    for step in range(10):
        optimizer.apply_gradients(
            zip([keras.ops.convert_to_tensor([float(hvd.rank())])], [variable], strict=True)
        )
        assert float(variable.numpy()[0]) == pytest.approx((step + 1) // 4 * mean)
