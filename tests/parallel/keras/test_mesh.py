"""Meshes of stages and replicas of Keras models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from pipelines import learnt, models, with_weights

import hvdx as hvd
from hvdx.errors import PlanError

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
