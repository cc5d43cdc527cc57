"""Files written by rank 0: resumed training is training that was never interrupted."""

from __future__ import annotations

import os
import zipfile

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.ranks(2)
TORCH = pytest.mark.backend("torch")  # the file is Keras' own, and so is what is read


@pytest.fixture
def shard(data):
    """Data of this rank's own: an odd number of steps, so that gradients wait at an epoch's end."""
    return [part[:3] for part in data().shard]


def make(hvd, kind="sgd"):
    """Make a model with random numbers of its own and an optimizer with much state."""
    keras.utils.set_random_seed(hvd.rank())
    inner = keras.optimizers.Adam(0.05, gradient_accumulation_steps=2, use_ema=True)
    if kind == "sgd":
        inner = keras.optimizers.SGD(0.05, momentum=0.9)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.4),
            keras.layers.Dense(1),
        ]
    )
    model.compile(hvd.DistributedOptimizer(inner), "mse", run_eagerly=True)  # tracing takes longer
    return model


class Decides(keras.callbacks.Callback):
    """Has a state of its own, which says how fast to learn."""

    def __init__(self, slower=0.5):
        super().__init__()
        self.slower, self.past = slower, []

    def on_train_begin(self, logs=None):
        self.past = []  # as Keras' own callbacks do

    def on_epoch_end(self, epoch, logs=None):
        self.past.append(np.float32(epoch))
        self.model.optimizer.learning_rate = 0.05 * self.slower ** len(self.past)


def train(hvd, model, folder, epochs, data, *others, **options):
    x, y = (part.reshape(-1, part.shape[-1]) for part in data)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), *others]
    options = {"keep": 2, **options}
    callbacks.append(hvd.callbacks.CheckpointCallback(folder, callbacks=callbacks, **options))
    model.fit(
        x, y, batch_size=4, epochs=epochs, shuffle=keras.backend.backend() == "torch", verbose=0,
        callbacks=callbacks,
    )  # fmt: skip
    return model


def test_resumed_equals_never_interrupted(hvd, shard, shared):
    straight = train(hvd, make(hvd, "adam"), f"{shared}-straight", 3, shard, Decides())
    train(hvd, make(hvd, "adam"), shared, 2, shard, Decides(), keep=1)
    if hvd.rank() == 0:
        assert sorted(os.listdir(shared)) == ["checkpoint-000002.keras"]
    resumed = make(hvd, "adam")
    keras.utils.set_random_seed(100 + hvd.rank())  # a new process has other random numbers
    decides = Decides()
    train(hvd, resumed, shared, 3, shard, decides)
    assert decides.past == [0.0, 1.0, 2.0]
    for one, other in zip(straight.variables, resumed.variables, strict=True):
        own = "moving_" in one.path and hvd.rank() > 0  # statistics of a rank's own data
        if "loss" not in one.path and not own:
            np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)
    for one, other in zip(straight.optimizer.variables, resumed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)
    assert train(hvd, resumed, shared, 3, shard).history.epoch == []  # done already


@TORCH
def test_damaged_files_are_passed_over(hvd, shard, shared):
    model = train(hvd, make(hvd), shared, 2, shard)
    if hvd.rank() == 0:
        newest = f"{shared}/checkpoint-000002.keras"
        os.truncate(newest, os.path.getsize(newest) // 2)
        with open(f"{shared}/.checkpoint-000009.keras", "w"):
            pass
    hvd.barrier()
    again = make(hvd)
    if hvd.rank() == 0:
        with pytest.warns(UserWarning, match=r"checkpoint-000002\.keras is damaged"):
            train(hvd, again, shared, 2, shard)
        assert not os.path.exists(f"{shared}/.checkpoint-000009.keras")
    else:
        train(hvd, again, shared, 2, shard)
    assert again.history.epoch == [1]
    assert int(again.optimizer.iterations) == int(model.optimizer.iterations) == 6


@TORCH
def test_errors_reach_every_rank(hvd, shard, shared):
    train(hvd, make(hvd), shared, 1, shard)
    with pytest.raises(ValueError, match=r"rank 0 cannot load a checkpoint: .*does not fit"):
        train(hvd, make(hvd, "adam"), shared, 2, shard)
    file = f"{shared}/file"
    if hvd.rank() == 0:
        with open(file, "w"):
            pass
    hvd.barrier()
    with pytest.raises(OSError, match="rank 0 cannot write a checkpoint"):
        train(hvd, make(hvd), f"{file}/below", 1, shard)
    with pytest.raises(ValueError, match="keep=0"):
        hvd.callbacks.CheckpointCallback(shared, keep=0)


@pytest.mark.backend("tensorflow")  # torch's fit builds it before
def test_a_model_without_weights_cannot_resume(hvd, shard, shared):
    train(hvd, make(hvd), shared, 1, shard)
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    unbuilt.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    with pytest.raises(ValueError, match="no weights yet"):
        train(hvd, unbuilt, shared, 2, shard)


@TORCH
def test_a_model_that_keras_cannot_describe(hvd, shard, shared):
    class Odd(keras.Model):
        def __init__(self, callable_not_saved):
            super().__init__()
            self.layer = keras.layers.Dense(1)

        def call(self, x):
            return self.layer(x)

        def get_config(self):
            raise NotImplementedError("no")

    def odd():
        model = Odd(len)
        model(np.ones((1, 6)))
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", run_eagerly=True)
        return model

    first, second = odd(), odd()
    train(hvd, first, shared, 1, shard)
    train(hvd, second, shared, 1, shard)
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@TORCH
def test_best_model(hvd, make_model, shard, tmp_path):
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse")
    x, y = (part.reshape(-1, part.shape[-1]) for part in shard)
    with pytest.raises(ValueError, match="no filepath"):
        model.fit(x, y, verbose=0, callbacks=[hvd.callbacks.BestModelCheckpoint("loss")])
    callback = hvd.callbacks.BestModelCheckpoint("loss")
    callback.filepath = tmp_path / "{epoch}.keras"
    model.fit(x, y, verbose=0, epochs=2, callbacks=[callback])
    names = [path.name for path in tmp_path.iterdir()]
    assert names == (["1.keras"] if hvd.rank() == 0 else [])  # 2 is no better
    if names:
        with zipfile.ZipFile(tmp_path / names[0]) as archive:
            assert archive.testzip() is None
