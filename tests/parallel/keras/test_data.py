"""``DistributedDataset`` in every rank, on both backends."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest

import hvdx
import hvdx.keras as hvd

TWO, TORCH = pytest.mark.ranks(2), pytest.mark.backend("torch")


def seen_by_all(dataset) -> list[list[int]]:
    """Return the first column of all ranks' batches, by rank."""
    return hvdx.allgather_object([[int(v) for v in batch[0][:, 0]] for batch in dataset])


@pytest.mark.parametrize("extra", [pytest.param(0, marks=TWO), 1])
def test_every_sample_once_in_equally_many_steps(extra):
    samples = 12 * hvd.size() + extra
    x = np.arange(samples, dtype="float32")[:, None]
    dataset = hvd.DistributedDataset(x, 2 * x, batch_size=4)
    orders = []
    for epoch in range(2):
        assert dataset.epoch == epoch
        ranks = seen_by_all(dataset)
        assert {len(batches) for batches in ranks} == {len(dataset)} == {3 + extra}
        orders.append([i for batches in ranks for batch in batches for i in batch])
        assert sorted(orders[-1]) == list(range(samples))
        dataset.on_epoch_end()
    assert orders[0] != orders[1]
    batch = dataset[0]
    assert len(batch) == (3 if extra else 2)
    np.testing.assert_array_equal(batch[1], 2 * batch[0])


@pytest.mark.parametrize(
    ("extra", "workers", "eager"),
    [
        pytest.param(0, 1, True, marks=[TWO, TORCH]),
        pytest.param(1, 2, False, marks=TWO),
        pytest.param(1, 1, True, marks=[TWO, TORCH]),
        (-1, 1, True),
    ],
)
def test_fit_on_ranks_equals_fit_in_one_process(extra, workers, eager, make_model, farthest, exact):
    samples = 8 * hvd.size() + extra
    random = np.random.default_rng(0)
    x, y = random.normal(size=(samples, 6)), random.normal(size=(samples, 1))
    plain, replica = make_model("float64"), make_model("float64")
    replica.set_weights(plain.get_weights())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    replica.compile(optimizer, "mse", run_eagerly=eager)
    dataset = hvd.DistributedDataset(x, y, batch_size=4, shuffle=False, workers=workers)
    replica.fit(dataset, epochs=2, verbose=0)
    plain.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
    sizes = [0, *np.cumsum(hvdx.data.step_sizes(samples, hvd.size(), 4))]
    for _ in range(2):
        for start, stop in itertools.pairwise(sizes):
            plain.train_on_batch(x[start:stop], y[start:stop])
    tolerance = max(exact, 1e-6)  # Keras computes losses in float32 where it is told nothing
    assert farthest(plain, replica) <= tolerance
    assert dataset.epoch == 2


@pytest.mark.ranks(2)
def test_an_epoch_is_resumed_and_the_next_ones_are_whole(make_model):
    steps = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append((dataset.epoch, batch))

    model = make_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse", run_eagerly=True)
    x = np.zeros((8 * hvd.size(), 6), "float32")
    dataset = hvd.DistributedDataset(x, x[:, :1], batch_size=4)
    dataset.record_batch(0)
    dataset.load_state_dict(dataset.state_dict())
    model.fit(dataset, epochs=2, verbose=0, callbacks=[Look()])
    assert steps == [(0, 0), (1, 0), (1, 1)]


class Batches(keras.utils.PyDataset):
    """Batches of one's own making, of 2 samples each."""

    def __len__(self):
        return 2 * hvd.size() + 1

    def __getitem__(self, index):
        return np.full((2, 1), index, "float32"), np.zeros((2, 1), "float32")


def test_another_datasets_batches_are_shared():
    dataset = hvd.DistributedDataset(Batches())
    ranks = hvdx.allgather_object([(int(x[0, 0]), float(w[0])) for x, _, w in dataset])
    assert {len(own) for own in ranks} == {3}
    real = [index for own in ranks for index, weight in own if weight]
    assert sorted(real) == list(range(2 * hvd.size() + 1))
    assert sorted(own[2][1] for own in ranks) == [0.0] * (hvd.size() - 1) + [hvd.size()]


def test_sample_weights_and_nested_arrays():
    samples = 4 * hvd.size() + 1
    x = {"a": np.arange(samples), "b": np.ones((samples, 2))}
    weights = np.full(samples, 3.0)
    dataset = hvd.DistributedDataset(x, np.arange(samples), weights, batch_size=4)
    for _, _, factors in dataset:  # the last step's differ between ranks, not their mean
        np.testing.assert_allclose(hvdx.allreduce(factors.mean()), 3.0)
    inputs, targets, _ = dataset[0]
    np.testing.assert_array_equal(inputs["a"], targets)


@pytest.mark.ranks(2)
def test_wrong_data():
    with pytest.raises(ValueError, match="equally many samples, and some; they have 3, 4"):
        hvd.DistributedDataset(np.zeros(4), np.zeros(3))
    with pytest.raises(ValueError, match="batch_size=0"):
        hvd.DistributedDataset(np.zeros(4), batch_size=0)
