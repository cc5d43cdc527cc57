"""SyncBatchNormalization: every rank computes what one process with all batches would."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import hvdx

CHANNELS = 3
GRAPH = [pytest.mark.ranks(2), pytest.mark.backend("tensorflow")]


def run(layer: Any, x: np.ndarray, weight: np.ndarray, mask: Any, graph: bool) -> list[np.ndarray]:
    """Return outputs, and gradients of sum(weight * outputs**2), of a training step."""
    if keras.backend.backend() == "torch":
        import torch

        given = torch.tensor(x, requires_grad=True)
        outputs = layer(given, training=True, mask=None if mask is None else torch.tensor(mask))
        (torch.tensor(weight) * outputs**2).sum().backward()
        found = [outputs, given.grad, *(v.value.grad for v in layer.trainable_variables)]
        return [each.detach().numpy().copy() for each in found]
    import tensorflow as tf

    def step(given: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(given)
            outputs = layer(given, training=True, mask=mask)
            loss = tf.reduce_sum(weight * outputs**2)
        return [outputs, *tape.gradient(loss, [given, *layer.trainable_variables])]

    call = tf.function(step) if graph else step
    return [each.numpy() for each in call(tf.constant(x))]


def rows(rank: int, uneven: bool) -> int:
    return 2 + rank * uneven


@pytest.mark.parametrize(
    ("axis", "masked", "graph"),  # masks are for channels last
    [
        pytest.param(-1, False, False, marks=pytest.mark.ranks(2)),
        (-1, True, False),
        pytest.param(1, False, False, marks=[pytest.mark.ranks(2), pytest.mark.backend("torch")]),
        pytest.param(1, False, True, marks=GRAPH),
        pytest.param(-1, True, True, marks=GRAPH),
    ],
)
def test_equals_one_process(hvd, graph, masked, axis):
    rank, size = hvdx.rank(), hvdx.size()
    counts = [rows(each, True) for each in range(size)]
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    random = np.random.default_rng(5)
    shape = (sum(counts), 4, CHANNELS) if axis == -1 else (sum(counts), CHANNELS, 4)
    # Where the mean is far from zero, E[x^2] - E[x]^2 loses digits: so it does in Keras on torch.
    far = 3 if keras.backend.backend() == "torch" else 300
    x = (random.normal(size=shape) + far).astype("float32")
    weight = random.normal(size=shape).astype("float32")
    mask = random.random(shape[:2]) < 0.6 if masked else None
    sync = hvd.SyncBatchNormalization(axis=axis, momentum=0.8, name="bn")
    plain = keras.layers.BatchNormalization(axis=axis, momentum=0.8, name="bn")
    for layer in (sync, plain):
        layer.build(shape)
        layer.set_weights([np.full(CHANNELS, value, "float32") for value in (1.5, 0.5, 0.1, 2.0)])
    mine = run(sync, x[own], weight[own], mask[own] if masked else None, graph)
    whole = run(plain, x, weight, mask, False)
    np.testing.assert_allclose(mine[0], whole[0][own], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(mine[1], whole[1][own], rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(mine[2:], whole[2:], strict=True):
        total = sum(hvdx.allgather_object(ours))  # each rank has its part of the sum
        np.testing.assert_allclose(total, theirs, rtol=1e-3, atol=1e-2)
    for ours, theirs in zip(sync.get_weights()[2:], plain.get_weights()[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    inferred = (keras.ops.convert_to_numpy(layer(x)) for layer in (sync, plain))
    np.testing.assert_allclose(*inferred, rtol=1e-4, atol=1e-4)


@pytest.mark.ranks(2)
def test_trains_in_fit_and_loads(hvd, tmp_path, data, assert_equal_replicas):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4, name="first"),
            hvd.SyncBatchNormalization(name="bn"),
            keras.layers.Dense(1, name="last"),
        ],
        name="model",
    )
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse", jit_compile=False)
    x, y = (part.reshape(-1, part.shape[-1]) for part in data().shard)
    model.fit(x, y, batch_size=4, verbose=0)
    assert_equal_replicas(model)  # moving statistics included
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert type(loaded.layers[1]) is hvd.SyncBatchNormalization
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-6)


@pytest.mark.ranks(2)
def test_fused_is_refused(hvd):
    for fused in (True, None):
        with pytest.raises(ValueError, match=f"fused={fused}"):
            hvd.SyncBatchNormalization(fused=fused)


def test_in_a_process_set(hvd, process_set):
    if hvdx.rank() in process_set.ranks:
        layer = hvd.SyncBatchNormalization(process_set=process_set, momentum=0.0)
        layer(np.full([2, 1], hvdx.rank(), "float32"), training=True)
        ranks = np.array(process_set.ranks)
        np.testing.assert_allclose(layer.moving_mean, [ranks.mean()], atol=1e-6)
        np.testing.assert_allclose(layer.moving_variance, [ranks.var()], atol=1e-6)
    hvdx.barrier()
