"""hvd.callbacks.MetricsCallback: under compiled fit and under a pipeline's."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdx
from hvdx.metrics.log import read

pytestmark = pytest.mark.ranks(2)
ROWS, BATCH = 24, 8


@pytest.fixture
def path(shared):
    return shared / "run.jsonl"


def lines(path, kind):
    hvdx.barrier()
    return [told for told in read(path) if told["kind"] == kind]


def arrays():
    random = np.random.default_rng(5 + hvdx.rank())
    return random.normal(size=(ROWS, 6)).astype("float32"), np.ones((ROWS, 1), "float32")


def test_fit(hvd, make_model, path):
    at_once = 2 if keras.backend.backend() == "tensorflow" else 1  # torch knows no more
    x, y = arrays()
    model = make_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.0))
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=at_once)
    metrics = hvd.callbacks.MetricsCallback(path, every=2, target="val_mae >= 0", quiet=True)
    model.fit(x, y, BATCH, epochs=2, verbose=0, callbacks=[metrics], validation_data=(x[:4], y[:4]))
    found = lines(path, "interval")
    assert [told["step"] for told in found] == [2, 3 + at_once, 6]
    assert metrics.metrics.steps == 6
    assert sum(told["samples"] for told in found) == 2 * ROWS * hvd.size()
    everyone = hvdx.allgather_object((x, y))
    loss = np.mean([model.evaluate(*each, verbose=0)[0] for each in everyone])
    weights = [told["samples"] for told in found]  # each sample is seen twice, by equal weights
    assert np.average([told["values"]["loss"] for told in found], weights=weights) == pytest.approx(
        loss, rel=1e-5
    )
    assert 0 < found[-1]["values"]["mae"] < 10
    assert all(0 < told["communication"]["mean"] < 1 for told in found[1:])
    elements, ring = model.count_params(), 2 * (hvd.size() - 1) / hvd.size()
    sent = found[1]["megabytes_per_step"]["rank0"] * 1e6
    assert sent == pytest.approx(4 * elements * ring)
    evaluations = lines(path, "evaluation")
    assert [told["step"] for told in evaluations] == [3, 6]
    assert set(evaluations[0]["values"]) == {"val_loss", "val_mae"}
    (target,) = lines(path, "target")
    assert target["step"] == 3


def test_each_fit_is_a_run_that_goes_on(hvd, make_model, path):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse", run_eagerly=True)
    metrics = hvd.callbacks.MetricsCallback(path, batch_size=5, quiet=True)

    def batches():  # of which Keras cannot know how many there are
        for _ in range(2):
            yield np.ones((BATCH, 6), "float32"), np.ones((BATCH, 1), "float32")

    for _ in range(2):
        model.fit(batches(), verbose=0, callbacks=[metrics])
    assert [told["start"] for told in lines(path, "header")] == [0, 2]
    assert lines(path, "interval")[-1]["step"] == 4
    assert sum(told["samples"] for told in lines(path, "interval")) == 4 * 5 * hvd.size()


def test_a_pipelines_fit(hvd, make_model, path):
    model = make_model()
    x, y = np.ones((ROWS, 6), "float32"), np.ones((ROWS, 1), "float32")
    pipe = hvdx.Pipeline(
        model, x[:BATCH], loss="mse", optimizer=keras.optimizers.SGD(0.1), micro_batches=2
    )
    metrics = hvd.callbacks.MetricsCallback(path, every=3, quiet=True)
    history = pipe.fit(x, y, BATCH, verbose=0, callbacks=[metrics]).history
    pipe.close()
    (told,) = lines(path, "interval")
    assert (told["step"], told["samples"]) == (3, ROWS)
    assert told["values"]["loss"] == pytest.approx(history["loss"][0], rel=1e-5)
    assert 0 < told["bubble"]["min"] <= told["bubble"]["max"] < 1
    assert told["megabytes_per_step"]["max"] > 0 and 0 < told["busy"]["min"] < 1
