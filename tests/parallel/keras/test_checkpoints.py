"""Checkpoints of several ranks, with Keras; and whether replicas are still alike."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdx as hvd
from hvdx.errors import CheckpointError, MismatchError

TWO, TORCH = pytest.mark.ranks(2), pytest.mark.backend("torch")


def compiled(eager=False, **options):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(5, "tanh", name="a"), keras.layers.Dense(3, name="b")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="net")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **options)
    model.compile(optimizer, "mse", run_eagerly=eager)
    return model


def train(model):
    """Train on data of this rank's own, the same each time."""
    draw = np.random.default_rng(hvd.rank())
    x, y = draw.normal(size=(16, 4)), draw.normal(size=(16, 3))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)


def values(model):
    return [keras.ops.convert_to_numpy(v) for v in (*model.weights, *model.optimizer.variables)]


WAYS = {
    "plain": {},
    "topk": {"compression": hvd.Compression.topk(0.3, min_elements=1), "eager": True},
    "servers": {"sync": "parameter_server", "eager": True},
    "local": {"compression": hvd.Compression.diloco(3)},
}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("plain", marks=[TWO, TORCH]),  # the others hold it too
        pytest.param("topk", marks=TWO),
        pytest.param("servers", marks=TWO),
        pytest.param("servers", marks=[pytest.mark.ranks(4), TORCH]),
        pytest.param("local", marks=[TWO, TORCH]),  # on TensorFlow: test_local_sgd.py
    ],
)
def test_as_many_ranks_go_on_to_the_last_bit(way, shared):
    first, again = compiled(**WAYS[way]), compiled(**WAYS[way])
    train(first)
    with hvd.Checkpoints(shared / "saved") as checkpoints:
        checkpoints.save(2, model=first, optimizer=first.optimizer)
    train(first)
    train(again)  # what is restored counts
    assert checkpoints.restore(model=again, optimizer=again.optimizer) == 2
    train(again)
    for one, other in zip(values(first), values(again), strict=True):
        np.testing.assert_array_equal(one, other)


@TWO
def test_other_models_are_refused_and_bfloat16_survives(shared):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16", name="a")])
    checkpoints = hvd.Checkpoints(shared / "saved", asynchronous=False)
    checkpoints.save(0, model=model)
    kernel = keras.ops.convert_to_numpy(keras.ops.cast(model.weights[0], "float32"))
    model.weights[0].assign(kernel * 0)
    assert checkpoints.restore(model=model) == 0
    found = keras.ops.convert_to_numpy(keras.ops.cast(model.weights[0], "float32"))
    np.testing.assert_array_equal(found, kernel)
    with pytest.raises(CheckpointError, match=r"a/kernel' is bfloat16 \(4, 3\) in the check") as e:
        checkpoints.restore(model=keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, name="a")], name=model.name))  # fmt: skip
    assert "a/bias' is bfloat16 (3,) in the checkpoint, but float32 (3,) here" in str(e.value)


class Drift(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1 and hvd.rank() == 1:
            kernel = self.model.get_layer("b").kernel
            kernel.assign(kernel.value * 1.001)


@TWO
def test_fit_stops_where_replicas_drift_apart():
    model = compiled(eager=True)
    x, y = np.ones((12, 4)), np.ones((12, 3))
    fit = {"batch_size": 2, "verbose": 0, "shuffle": False}
    calls = [hvd.callbacks.ConsistencyCallback(every=2)]
    model.fit(x, y, callbacks=calls, **fit)
    hvd.check_consistency(model)
    with pytest.raises(MismatchError, match=r"drifted apart: .*b/kernel', float32 \(5, 3\): ranks"):
        model.fit(x, y, callbacks=[Drift(), *calls], **fit)
    with pytest.raises(ValueError, match=r"ConsistencyCallback\(every=0\)"):
        hvd.callbacks.ConsistencyCallback(0)
