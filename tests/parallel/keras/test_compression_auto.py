"""``Compression.auto`` under Keras' optimizer while networks change, compiled or not."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdx
from hvdx.compression import review

SHAPES = {"large": (96, 64), "bias": (96,)}
SIZES = [int(np.prod(shape)) for shape in SHAPES.values()]
GRAPHS = keras.backend.backend() == "tensorflow"
PATH = "sequential/given"
SLOW, FAST = 0.1, 1e9
STEPS = 5 + 4 + 1 + 4 + 4  # looks after 5, 9, 14, 18; one step delivers what was owed


class Given(keras.layers.Layer):
    """Its weights' gradients are what it is called on."""

    def build(self, shape):
        make = self.add_weight
        self.own = [make(shape=s, initializer="zeros", name=n) for n, s in SHAPES.items()]

    def call(self, x):
        flat = keras.ops.concatenate([keras.ops.reshape(w, (-1,)) for w in self.own])
        return keras.ops.sum(x * flat, axis=-1, keepdims=True)


class Watch(keras.callbacks.Callback):
    """After each step: whose turn it is, and whether all is applied or owed."""

    def __init__(self, means):
        super().__init__()
        self.true = np.cumsum(means, axis=0, dtype="f8")
        self.turns, self.owing = [], []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        layout = next(iter(optimizer._averager._layouts.values()))
        self.turns.append({bucket.clock.turn(bucket.specs) for bucket in layout.buckets})
        states = optimizer.portable_compression_state()["parameters"]
        owed = states[f"{PATH}/large"]["residual"]
        self.owing.append(bool(owed.any()))
        applied = -np.concatenate([v.numpy().ravel() for v in self.model.trainable_variables])
        applied[: owed.size] += owed.ravel()
        np.testing.assert_allclose(applied, self.true[batch], atol=1e-4)


def total(y, output):
    return keras.ops.sum(output)


WAYS = [{}, {"steps_per_execution": 3}] if GRAPHS else [{}]  # torch's is the eager one


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way), "plain"))
def test_no_update_is_lost_when_the_network_changes(hvd, links, way):
    """The link is slow, then fast, then slow again; a raw step in between delivers."""
    links(SLOW, FAST, SLOW)
    keras.backend.clear_session(free_memory=False)
    everyone = [
        np.random.default_rng(rank).normal(size=(STEPS, sum(SIZES))).astype("f4")
        for rank in range(hvd.size())
    ]
    auto = hvdx.Compression.auto(methods=["int8", "onebit"], verbose=False, every=4)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=auto)
    model = keras.Sequential([keras.Input((sum(SIZES),)), Given()])
    model.compile(optimizer, total, **way)
    watch, own = Watch(np.mean(everyone, axis=0)), everyone[hvd.rank()]
    model.fit(own, own[:, :1], batch_size=1, shuffle=False, verbose=0, callbacks=[watch])
    raw, all_of_it, some = {review.RAW}, {review.RAW - 1}, watch.turns[0]
    turns = [some] * 8 + [all_of_it] + [raw] * 4 + [some] * 5
    owing = [True] * 9 + [False] * 5 + [True] * 4
    seen = slice(2, None, 3) if "steps_per_execution" in way else slice(None)
    assert watch.turns == turns[seen] and some.isdisjoint(raw | all_of_it)
    assert watch.owing == owing[seen]
    assert len(set(hvd.allgather_object(hvd.parameter_hash(model)))) == 1


@pytest.mark.ranks(2)
def test_it_really_measures_in_training(hvd, links):
    """Collectives of its own, between the steps of a compiled function."""
    measured = links(SLOW, None)  # a slow one at first, so that there is something to choose
    keras.backend.clear_session(free_memory=False)
    auto = hvdx.Compression.auto("safe", seconds=0.05, verbose=False, every=2)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), compression=auto)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(96)])
    model.compile(optimizer, "mse")
    x = np.random.default_rng(hvd.rank()).normal(size=(14, 64)).astype("f4")
    hvd.broadcast_parameters(model)
    for _ in range(4):  # how many steps there are between two looks depends on what it finds
        model.fit(x, np.zeros((14, 96)), batch_size=1, verbose=0)
        if len(measured) >= 3:  # alike on all ranks
            break
    assert len(measured) >= 3
    assert hvd.allgather_object(measured) == [measured] * hvd.size()
    assert len(set(hvd.allgather_object(hvd.parameter_hash(model)))) == 1
