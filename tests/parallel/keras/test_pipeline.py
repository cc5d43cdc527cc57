"""Pipelines of Keras models over ranks: they learn, bit for bit, what one process learns."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from pipelines import learnt, load_single, models, with_weights

import hvdx as hvd
from hvdx.errors import MismatchError, PipelineError, PlanError
from hvdx.keras import SyncBatchNormalization

counted = load_single("test_pipeline_keras_losses")
TWO, TORCH = pytest.mark.ranks(2), pytest.mark.backend("torch")
DEEP = models.batches(8)


@functools.cache
def learnt_alone():
    """What one process learns of a model for 8 stages."""
    return models.train(models.deep, DEEP, place=["cpu"])


@pytest.mark.parametrize(
    ("schedule", "channel"),
    [
        pytest.param("gpipe", "zmq", marks=[TWO, TORCH]),
        pytest.param("1f1b", "zmq", marks=[TWO, TORCH]),
        pytest.param("zb1p", "horovod", marks=TWO),
        pytest.param("zbv", "horovod", marks=[TWO, TORCH]),
        ("interleaved", "horovod"),
    ],
)
def test_schedules_and_channels_change_no_bit(schedule, channel, shared):
    expected, loss = learnt_alone()
    pipe = models.pipeline(models.made(models.deep), DEEP[0][0], schedule=schedule, channel=channel)
    for x, y in DEEP:
        last = pipe.step(x, y)
    assert float(last) == loss
    models.assert_same(learnt(pipe, shared / "state.safetensors"), expected)
    pipe.close()


@pytest.mark.parametrize(
    ("build", "schedule", "rows"),
    [
        pytest.param(models.sequential, "gpipe", [12, 7, 3, 1], marks=[TWO, TORCH]),
        (models.residual, "1f1b", [12, 7, 3, 1]),
        pytest.param(models.dropped, "1f1b", [12, 7], marks=TWO),
    ],
)
def test_ranks_learn_what_one_process_learns(build, schedule, rows, shared):
    data = models.batches(rows=rows)
    expected, loss = models.train(build, data, place=["cpu"])
    model = models.made(build, seed=3 + hvd.rank())  # they begin with rank 0's weights
    pipe = models.pipeline(model, data[0][0], schedule=schedule)
    for x, y in data:
        last = pipe.step(x, y)
    assert float(last) == loss
    models.assert_same(learnt(pipe, shared / "state.safetensors"), expected)
    plain = with_weights(build, expected)
    for x, _ in data:
        outputs = models.values(pipe(x)), models.values(plain(x))
        np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    if build is models.dropped:
        _go_on(pipe, data, shared / "state.safetensors")
    pipe.close()


@TWO
@pytest.mark.parametrize("build", [counted.penalised, counted.tagger])
def test_losses_and_masks_cross_ranks(build):
    x, y, weight = counted.batch(build)
    loss = "mse" if build is counted.penalised else counted.entropy()
    told = []
    for place in (["cpu"], None):
        pipe = models.pipeline(models.made(build), x, loss=loss, micro_batches=5, place=place)
        told.append([float(pipe.step(x, y, weight)) for _ in range(2)])
        told[-1] += list(models.values(pipe(x)).ravel())
        pipe.close()
    assert told[0] == told[1]


@TWO
def test_ranks_clip_alike_and_show_why_they_wait(shared):
    data = models.batches(2)
    options = {"clip_norm": 0.05, "schedule": "auto", "checkpoint": "except_last"}
    expected, loss = models.train(models.residual, data, place=["cpu"], clip_norm=0.05)
    pipe = models.pipeline(models.made(models.residual), data[0][0], **options)
    assert len(set(hvd.allgather_object(pipe.plan))) == 1
    for x, y in data:
        last = pipe.step(x, y)
    assert float(last) == loss
    assert pipe.gradient_norm > 0.05
    assert len(set(hvd.allgather_object(pipe.gradient_norm))) == 1
    models.assert_same(learnt(pipe, shared / "clipped.safetensors"), expected)
    pipe.timeline(shared / "run.html")
    pipe.close()
    assert "step 1: " in (shared / "run.html").read_text()


def _go_on(pipe, data, path):
    """A checkpoint of ranks goes on in one process, and in ranks, as if nothing had happened."""
    following = [float(pipe.step(x, y)) for x, y in data]
    places = [["cpu"] * 2, None] if keras.backend.backend() == "torch" else [["cpu"] * 2]
    for place in places:  # TensorFlow traces each anew; the mesh's test goes on in ranks
        again = models.pipeline(models.made(models.dropped, seed=9), data[0][0], place=place)
        again.load(path)
        for x, _ in data:  # counts the calls that were made meanwhile
            again(x)
        assert [float(again.step(x, y)) for x, y in data] == following
        again.close()


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_bfloat16", marks=[TWO, TORCH]), "mixed_float16"]
)
def test_low_precision_over_ranks(policy, shared):
    """The last rank has no variables, but scales the loss; what overflows anywhere is skipped."""
    data, size = models.batches(4), hvd.size()

    def build():
        dense = [keras.layers.Dense(6, "tanh", name=f"dense{i}") for i in range(4)]
        leave = keras.layers.Activation("linear", dtype="float32", name="leave")
        return keras.Sequential([keras.Input((6,)), *dense, leave])

    def learn(**options):
        sgd = keras.optimizers.SGD(0.1, momentum=0.9)
        scaled = keras.optimizers.LossScaleOptimizer(sgd, 2.0**20, dynamic_growth_steps=2)
        own = scaled if policy == "mixed_float16" else sgd
        model, skipped = models.made(models.in_precision(policy, build)), []
        pipe = hvd.Pipeline(model, data[0][0], "mse", own, micro_batches=2, seed=7, **options)
        for x, _ in data:
            pipe.step(x, x)
            skipped.append(pipe.skipped)
        return pipe, own, (models.weights(model), skipped)

    pipe, _, (expected, skipped) = learn(place=["cpu"])
    pipe.close()
    pipe, own, (_, same) = learn(stages=[6 - size] + [1] * (size - 1))
    assert same == skipped
    models.assert_same(learnt(pipe, shared / "state.safetensors"), expected)
    if policy == "mixed_float16":
        assert skipped[0] and not all(skipped)
        assert len(set(hvd.allgather_object(float(own.dynamic_scale)))) == 1
        pipe.load(shared / "state.safetensors")
    pipe.close()


class Failing(keras.layers.Layer):
    def call(self, x, training=None):
        if training:
            raise ArithmeticError("no such luck")
        return x


@pytest.mark.parametrize("channel", [pytest.param("zmq", marks=TORCH), "horovod"])
def test_an_error_reaches_all_ranks(channel):
    size = hvd.size()
    model = keras.Sequential(
        [keras.Input((6,)), *(keras.layers.Dense(6) for _ in range(size - 1)), Failing(name="bad")]
    )
    x, _ = models.batches(1)[0]
    pipe = models.pipeline(model, x, stages=[1] * size, channel=channel)
    told = f"rank {size - 1}, stage {size - 1}, unit 'bad', forward of micro-batch 0 in step 0"
    with pytest.raises(PipelineError, match=told):
        pipe.step(x, x)
    with pytest.raises(PipelineError, match="of no more use"):
        pipe.step(x, x)
    pipe.close()


@TWO
def test_ranks_that_differ_are_told():
    x, _ = models.batches(1)[0]
    with pytest.raises(MismatchError, match="micro_batches"):
        models.pipeline(models.made(models.sequential), x, micro_batches=2 + hvd.rank())
    with pytest.raises(PlanError, match="no unit is named 'nowhere'"):
        models.pipeline(models.made(models.sequential), x, stages=["nowhere"])
    with pytest.raises(MismatchError, match="'stages'"):
        stages = None if hvd.rank() else ["dense1"]
        models.pipeline(models.made(models.sequential), x, stages=stages)
    with pytest.raises(MismatchError, match=r"about the optimizer: rank 0: Adam .*, rank 1: SGD"):
        optimizer = keras.optimizers.SGD() if hvd.rank() == 1 else keras.optimizers.Adam()
        hvd.Pipeline(models.made(models.sequential), x, "mse", optimizer)
    with pytest.raises(MismatchError, match="clip_norm"):
        models.pipeline(models.made(models.sequential), x, clip_norm=1.0 + hvd.rank())
    with pytest.raises(PlanError, match=r"'sync' is a SyncBatchNorm.*with batchnorm='sync' if"):
        dense = [keras.layers.Dense(6) for _ in range(3)]  # on each of up to four ranks a unit
        stack = [keras.Input((6,)), SyncBatchNormalization(name="sync"), *dense]
        models.pipeline(keras.Sequential(stack), x)
    with pytest.raises(PlanError, match=r"global_clipnorm=1\.0 .* as clip_norm=1\.0"):
        hvd.Pipeline(
            models.made(models.sequential), x, "mse", keras.optimizers.SGD(global_clipnorm=1.0)
        )


@TWO
def test_fit_is_the_same_on_every_rank():
    x, y = (np.concatenate(parts) for parts in zip(*models.batches(3), strict=True))
    losses = []
    for place in (["cpu"], None):
        pipe = models.pipeline(models.made(models.sequential), x[:4], place=place)
        keras.utils.set_random_seed(hvd.rank())  # an order of Keras' own would differ by rank
        told = pipe.fit(x, y, batch_size=8, epochs=2, verbose=0, metrics=["mae"])
        losses.append(told.history)
        pipe.close()
    assert losses[0] == losses[1]
