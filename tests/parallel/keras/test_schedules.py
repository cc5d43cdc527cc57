"""Learning rates over a training: warm-up, schedule, momentum."""

from __future__ import annotations

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.ranks(2)


class Rates(keras.callbacks.Callback):
    """Notes the learning rate that each batch meets; ``on_train_batch_end`` makes Keras wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    def on_train_batch_end(self, batch, logs=None):
        pass


def rates(model, *callbacks, epochs=1, **options):
    seen = Rates()
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")
    history = model.fit(
        x, y, batch_size=2, epochs=epochs, verbose=0, callbacks=[*callbacks, seen], **options
    )
    return seen.seen, history.history


@pytest.fixture
def model(make_model, hvd):
    made = make_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.7, momentum=0.5))
    made.compile(optimizer, "mse", run_eagerly=True)  # tracing takes longer
    return made


def test_warmup(hvd, model, capsys):
    size, goal = hvd.size(), 0.1 * hvd.size()
    callback = hvd.callbacks.LearningRateWarmupCallback(goal, warmup_epochs=2, verbose=1)
    seen, history = rates(model, callback, epochs=3)
    parts = [min(1, (batch + 1) / 8) for batch in range(12)]
    np.testing.assert_allclose(seen, [goal * (1 + p * (size - 1)) / size for p in parts], rtol=1e-6)
    np.testing.assert_allclose(history["lr"][1:], goal, rtol=1e-6)
    assert capsys.readouterr().out.count("warmed up") == (hvd.rank() == 0)


@pytest.mark.backend("tensorflow")  # Keras has it there only
def test_warmup_with_many_steps_at_once(hvd, make_model):
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.7)), "mse", steps_per_execution=3)
    seen, history = rates(model, hvd.callbacks.LearningRateWarmupCallback(0.4, 1), epochs=2)
    assert len(seen) == 4
    assert seen[0] < seen[1]
    np.testing.assert_allclose(history["lr"], 0.4, rtol=1e-6)  # reached all the same


def test_schedule(hvd, model):
    """As in Horovod's example for ImageNet: pieces, each with its epochs."""
    schedule = hvd.callbacks.LearningRateScheduleCallback
    pieces = (
        schedule(0.8, 0.5, end_epoch=2),  # a number: its powers
        schedule(0.8, lambda epoch: 0.1 * epoch, start_epoch=2, end_epoch=3),
        schedule(0.8, lambda epoch: epoch, start_epoch=3, end_epoch=4, staircase=False),
    )
    seen, history = rates(model, *pieces, epochs=5)
    by_epoch = np.reshape(seen, (5, 4))
    np.testing.assert_allclose(by_epoch[:3], np.repeat([[0.8], [0.4], [0.16]], 4, 1), rtol=1e-6)
    np.testing.assert_allclose(by_epoch[3], [0.8 * (3 + i / 4) for i in range(4)], rtol=1e-6)
    np.testing.assert_allclose(by_epoch[4], 0.8 * 3.75, rtol=1e-6)
    assert list(history) == ["loss", "lr"]


@pytest.mark.parametrize("correct", [True, False])
def test_momentum_correction(hvd, model, correct):
    """One step of v = 0.5 v - lr * g, where v belongs to another learning rate."""
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    for buffer in optimizer.momentums:
        buffer.assign(keras.ops.ones_like(buffer))
    frozen = hvd.callbacks.LearningRateScheduleCallback(1.4, 1.0, momentum_correction=correct)
    before = model.get_weights()
    model.fit(np.ones((2, 6)), np.ones((2, 1)), sample_weight=np.zeros(2), verbose=0,
              callbacks=[frozen])  # fmt: skip
    step = 0.5 * (2.0 if correct else 1.0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(new, old + step, rtol=1e-5)
    assert optimizer.momentum == 0.5


def test_refuses(hvd, model):
    callbacks = hvd.callbacks
    with pytest.raises(ValueError, match="initial_lr=None"):
        callbacks.LearningRateScheduleCallback(None, 0.1)
    with pytest.raises(ValueError, match="multiplier='slow'"):
        callbacks.LearningRateScheduleCallback(0.1, "slow")
    smooth = callbacks.LearningRateWarmupCallback(0.1)
    smooth.set_model(model)
    smooth.set_params({"steps": None})
    with pytest.raises(ValueError, match="steps_per_epoch="):
        smooth.on_train_begin()
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(schedule)), "mse")
    with pytest.raises(ValueError, match="schedule or function of its own"):
        rates(model, callbacks.LearningRateWarmupCallback(0.1))
