"""Meshes of stages and replicas of Keras models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from pipelines import learnt, models, with_weights

import hvdx as hvd
from hvdx.errors import PipelineError, PlanError

FOUR, TWO = pytest.mark.ranks(4), pytest.mark.ranks(2)


@pytest.mark.parametrize(
    ("place", "micro_batches"),
    [
        pytest.param([[0, 2], [3, 1]], 2, marks=[FOUR, pytest.mark.backend("torch")]),
        pytest.param([[3, 1, 0], [2]], 3, marks=FOUR),
        pytest.param([[1, 0]], 2, marks=TWO),
    ],
)
def test_a_micro_batch_for_each_replica_gives_the_bits_of_one_process(place, micro_batches, shared):
    data = models.batches(rows=[12, 7, 1])
    options = {"micro_batches": micro_batches, "clip_norm": 0.5}
    expected, loss = models.train(models.dropped, data, place=["cpu"], **options)
    model = models.made(models.dropped, seed=3 + hvd.rank())  # they begin with rank 0's weights
    pipe = models.pipeline(model, data[0][0], place=place, **options)
    for x, y in data:
        last = pipe.step(x, y)
    assert float(last) == loss
    models.assert_same(learnt(pipe, shared / "state.safetensors"), expected)
    plain = with_weights(models.dropped, expected)
    for x, _ in data:
        expected_output = keras.ops.convert_to_numpy(plain(x))
        np.testing.assert_allclose(pipe(x), expected_output, rtol=1e-5, atol=1e-5)
    pipe.close()


def normed():
    """A norm in a layer that holds others, and one by itself; no bias that they undo."""
    dense = [keras.layers.Dense(8, use_bias=False, name=f"dense{i}") for i in range(2)]
    norms = [keras.layers.BatchNormalization(momentum=0.5, name=f"norm{i}") for i in range(2)]
    inner = keras.Sequential([keras.Input((6,)), dense[0], norms[0]], name="inner")
    stack = [keras.layers.Activation("tanh"), dense[1], norms[1], keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((6,)), inner, *stack])


@pytest.mark.parametrize(
    ("place", "micro_batches", "rows", "options"),
    [
        pytest.param([[0, 2], [3, 1]], 4, (12, 12), {"checkpoint": "always"}, marks=FOUR),
        pytest.param([[1, 0]], 2, (12, 7, 1), {"schedule": "zb1p"}, marks=TWO),
    ],
)
def test_replicas_normalize_together(place, micro_batches, rows, options, shared):
    """As one process does with the micro-batches of a turn in one, the whole batch at most."""
    data = [(x + 5, y) for x, y in models.batches(rows=list(rows))]
    if micro_batches > len(place[0]):
        turns = micro_batches // len(place[0])
        expected, _ = models.train(normed, data, place=["cpu"], micro_batches=turns)
    else:
        plain = models.made(normed)
        plain.compile(keras.optimizers.Adam(1e-2), "mse")
        for x, y in data:
            plain.train_on_batch(x, y)
        expected = models.weights(plain)
    options |= {"micro_batches": micro_batches, "place": place, "batchnorm": "sync"}
    pipe = models.pipeline(models.made(normed), data[0][0], **options)
    for x, y in data:
        pipe.step(x, y)
    found = learnt(pipe, shared / "state.safetensors")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=4e-5, err_msg=name)
    units = [unit for _, first, stop in pipe._own_stages()
             for unit in pipe._graph.units[first:stop]]  # fmt: skip
    own = {n: keras.ops.convert_to_numpy(v) for n, v in pipe._graph.variables(units).items()}
    for name, value in hvd.allgather_object(own)[pipe._row.ranks[0]].items():
        np.testing.assert_array_equal(own[name], value, err_msg=name)
    pipe.close()


class Breaks(keras.layers.Layer):
    """Fails on the last rank."""

    def call(self, x, training=False):
        if training and hvd.rank() == hvd.size() - 1:
            raise RuntimeError("out of order")
        return x


@TWO
def test_a_replica_that_fails_is_told_to_those_who_wait_in_a_norm():
    x, y = models.batches(1)[0]
    stack = [Breaks(name="breaks"), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model, place = keras.Sequential([keras.Input((6,)), *stack]), [list(range(hvd.size()))]
    pipe = models.pipeline(model, x, place=place, batchnorm="sync")
    with pytest.raises(PipelineError, match=r"rank 1, stage 0, unit 'breaks', [\s\S]*out of order"):
        pipe.step(x, y)
    pipe.close()


def test_replicas_fit_with_compression_and_go_on_from_a_checkpoint(shared):
    place = [[1, 0]] if hvd.size() == 2 else [[3, 1, 0], [2]]
    x, y = (np.concatenate(parts) for parts in zip(*models.batches(3), strict=True))
    options = {"place": place, "compression": hvd.Compression.topk(0.5, min_elements=1)}
    pipe = models.pipeline(models.made(models.sequential), x[:4], **options)
    told = pipe.fit(x, y, batch_size=12, epochs=2, verbose=0, metrics=["mae"]).history
    assert len(set(hvd.allgather_object(str(told)))) == 1
    assert told["loss"][1] < told["loss"][0]
    pipe.save(shared / "state.safetensors")
    kept = pipe._sums.saved(99)
    hvd.barrier()
    pipe.close()
    again = models.pipeline(models.made(models.sequential), x[:4], **options)
    again.load(shared / "state.safetensors")
    assert again._sums.steps == 6 and any(hvd.allgather_object(bool(kept)))
    found = again._sums.saved(99)
    for name, tensors in kept.items():
        for path, tensor in tensors.items():
            np.testing.assert_allclose(found[name][path], tensor, rtol=1e-6)
    again.close()
    with pytest.raises(PlanError, match="row 1 has no rank"):
        models.pipeline(models.made(models.sequential), x, place=[list(range(hvd.size())), []])
