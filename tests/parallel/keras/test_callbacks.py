"""Callbacks of ``fit``."""

from __future__ import annotations

import re
import time

import keras
import numpy as np
import pytest

import hvdx

pytestmark = pytest.mark.ranks(2)
TORCH = pytest.mark.backend("torch")


def short_fit(model, *callbacks, **options):
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")
    return model.fit(x, y, batch_size=4, verbose=0, callbacks=list(callbacks), **options)


class FirstWeights(keras.callbacks.Callback):
    """Remembers the weights that the first batch meets."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.weights = self.model.get_weights()
            self.optimizer = [keras.ops.convert_to_numpy(v) for v in self.model.optimizer.variables]


def test_broadcast_comes_before_the_first_batch(hvd, make_model, assert_equal_replicas):
    model = make_model(seed=hvd.rank())
    expected = make_model(seed=1 % hvd.size()).get_weights()
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    optimizer.iterations.assign(10 + hvd.rank())
    optimizer.learning_rate = 0.01 * (1 + hvd.rank())
    model.compile(hvd.DistributedOptimizer(optimizer), "mse", run_eagerly=True)
    seen = FirstWeights()
    root = 1 % hvd.size()
    short_fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(root), seen)
    for one, other in zip(seen.weights, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(seen.optimizer[0]) == 10 + root
    assert float(seen.optimizer[1]) == pytest.approx(0.01 * (1 + root))
    assert_equal_replicas(model)
    assert_equal_replicas(model.optimizer)


def test_broadcast_of_a_model_built_by_its_first_batch(hvd, assert_equal_replicas):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    short_fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(0, device=""))
    assert_equal_replicas(model)


def test_broadcast_leaves_local_variables(hvd, make_model):
    model = make_model(seed=hvd.rank())
    local = model.layers[0].trainable_variables[0]
    before = keras.ops.convert_to_numpy(local)
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
    short_fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=[local]))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(local), before)


def test_broadcast_of_different_models_is_an_error(hvd, make_model):
    model = make_model(width=8 + (hvd.rank() == 0))
    model.compile("sgd", "mse")
    with pytest.raises(hvdx.MismatchError, match="parameters to broadcast"):
        short_fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(0))


@pytest.mark.backend("tensorflow")
def test_broadcast_turns_xla_off(hvd, make_model):
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=True)
    with pytest.warns(UserWarning, match="jit_compile=False"):
        short_fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(0))


def test_metrics_are_averaged_with_validation(hvd):
    callback = hvd.callbacks.MetricAverageCallback(device="")
    logs = {"loss": float(hvd.rank()), "val_loss": np.float32(2 * hvd.rank())}
    callback.on_epoch_end(0, logs)
    middle = (hvd.size() - 1) / 2
    assert logs == {"loss": middle, "val_loss": 2 * middle}
    assert list(logs) == ["loss", "val_loss"]


def test_metrics_in_the_history(hvd, make_model):
    model = make_model(seed=hvd.rank())
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
    own = short_fit(model, validation_data=(np.zeros((4, 6)), np.ones((4, 1)))).history
    everyone = hvdx.allgather_object(own)
    seen = short_fit(
        model,
        hvd.callbacks.MetricAverageCallback(),
        validation_data=(np.zeros((4, 6)), np.ones((4, 1))),
    ).history
    assert set(seen) == {"loss", "val_loss"}
    for name in seen:
        mean = np.mean([told[name][0] for told in everyone])
        assert seen[name][0] == pytest.approx(mean, rel=1e-6)


def test_metrics_of_one_rank_only_are_an_error(hvd):
    logs = {"loss": 1.0, **({"val_loss": 2.0} if hvd.rank() == 0 else {})}
    with pytest.raises(hvdx.MismatchError, match=r"rank 0: loss, val_loss; rank 1: loss"):
        hvd.callbacks.MetricAverageCallback().on_epoch_end(0, logs)


@pytest.mark.parametrize("validate", [pytest.param(False, marks=TORCH), True])
def test_progress(hvd, validate, make_model, capsys):
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", run_eagerly=True)
    callback = hvd.callbacks.ProgressCallback()
    counted, walls = [], []
    options = {"validation_data": (np.ones((3, 6)), np.ones((3, 1)))} if validate else {}

    class Count(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_test_begin(self, logs=None):
            time.sleep(0.5)

        def on_epoch_end(self, epoch, logs=None):
            counted.append(callback._samples)
            walls.append(time.perf_counter() - self.start)
            time.sleep(0.1)  # as long as it takes to write a checkpoint

    short_fit(model, callback, Count(), epochs=2, **options)
    assert counted == [8, 8]
    lines = capsys.readouterr().out.splitlines()
    if hvd.rank() == 0:
        assert len(lines) == 2
        assert lines[0].startswith("epoch 1/2  loss ")
        assert f"samples/s on {hvd.size()} ranks" in lines[1]
        assert "communication" in lines[1]
        assert ("val_loss" in lines[0]) == validate
        speed = float(re.search(r"([\d,]+) samples/s", lines[1])[1].replace(",", ""))
        assert speed > 8 * hvd.size() / (walls[1] - 0.5 * validate + 0.25) - 1
    else:
        assert not lines


def test_a_script_for_horovod(hvd, make_model, assert_equal_replicas):
    """All of Horovod's callbacks at once, in the order of its examples; first without an epoch."""
    model = make_model(seed=hvd.rank())
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.RMSprop(0.01 * hvd.size(), momentum=0.9), num_groups=2, device_dense=""
    )
    assert optimizer.__class__.from_config(optimizer.get_config()).get_config() == (
        optimizer.get_config()
    )
    model.compile(optimizer, "mse", metrics=["mae"])
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(0.01 * hvd.size(), warmup_epochs=1),
        hvd.callbacks.LearningRateScheduleCallback(0.01 * hvd.size(), 0.1, start_epoch=1),
        keras.callbacks.ReduceLROnPlateau(patience=10),
    ]
    short_fit(model, *callbacks, epochs=0, initial_epoch=1)
    history = short_fit(model, *callbacks, epochs=2, validation_split=0.5).history
    assert len(set(map(str, hvdx.allgather_object(history)))) == 1
    assert {"loss", "mae", "lr", "val_loss"} < set(history)
    assert_equal_replicas(model)
    assert_equal_replicas(model.optimizer.variables())
