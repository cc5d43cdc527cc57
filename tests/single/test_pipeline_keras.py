"""Pipelines of Keras models in one process: several stages learn what the plain model learns."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("tensorflow")
import numpy as np  # noqa: E402

import hvdx as hvd  # noqa: E402

if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another backend", allow_module_level=True)

layers = keras.layers


def made(build, seed=3):
    keras.utils.set_random_seed(seed)
    keras.backend.clear_session(free_memory=False)  # equal names each time
    return build()


def sequential():
    sizes = (8, 8, 8, 1)
    dense = [layers.Dense(n, "tanh", name=f"dense{i}") for i, n in enumerate(sizes)]
    return keras.Sequential([keras.Input((6,)), *dense])


def residual():
    """A skip over everything, a value with three readers, and a layer called twice."""
    x = keras.Input((6,), name="x")
    tied = layers.Dense(8, "tanh", name="tied")
    a = layers.Dense(8, "tanh", name="enter")(x)
    b = tied(a)
    c = layers.BatchNormalization(name="norm", momentum=0.5)(b + a)
    d = tied(c) + a
    return keras.Model(x, layers.Dense(1, name="leave")(layers.Concatenate()([d, x])))


def dropped():
    x = keras.Input((6,), name="x")
    h = x
    for i in range(3):
        h = layers.Dropout(0.3, name=f"drop{i}")(layers.Dense(6, "tanh", name=f"dense{i}")(h))
    return keras.Model(x, layers.Dense(1, name="leave")(h))


def two_by_two():
    left, right = keras.Input((6,), name="left"), keras.Input((4,), name="right")
    h = layers.Dense(8, name="a")(left) + layers.Dense(8, name="b")(right)
    h = layers.Dense(8, "relu", name="both")(h)
    return keras.Model([left, right], {"one": layers.Dense(2, name="one")(h), "two": h})


def batches(steps=4, rows=12, seed=0):
    draw = np.random.default_rng(seed)
    sizes = rows if isinstance(rows, list) else [rows] * steps
    return [
        (draw.normal(size=(n, 6)).astype("float32"), draw.normal(size=(n, 1)).astype("float32"))
        for n in sizes
    ]


def weights(model):
    return {v.path: v.numpy() for v in model.variables if "seed" not in v.path}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


def pipeline(model, x, **options):
    options = {"micro_batches": 4, "seed": 7, "loss": "mse", **options}
    return hvd.Pipeline(model, x, optimizer=keras.optimizers.Adam(1e-2), **options)


def train(build, data, **options):
    """Return weights and last loss after training in a pipeline."""
    model = made(build)
    pipe = pipeline(model, data[0][0], **options)
    for x, y in data:
        last = pipe.step(x, y)
    pipe.close()
    return weights(model), float(last)


def test_the_plain_model_learns_the_same():
    data = batches()
    learnt, loss = train(sequential, data, place=["cpu"] * 3)
    plain = made(sequential)
    plain.compile(keras.optimizers.Adam(1e-2), "mse")
    for x, y in data:
        last = plain.train_on_batch(x, y, return_dict=True)["loss"]
        plain.reset_metrics()
    assert loss == pytest.approx(float(last), rel=1e-5)
    for name, value in weights(plain).items():
        np.testing.assert_allclose(learnt[name], value, rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("build", [sequential, residual])
def test_cuts_and_schedules_change_no_bit(build):
    data = batches()
    expected, loss = train(build, data, place=["cpu"])
    cases = [(["cpu"] * 2, "gpipe"), (["cpu"] * 3, "1f1b"), (["cpu"] * 2, "zb1p")]
    if build is sequential:
        cases += [(["cpu"] * 4, "1f1b"), (["cpu"] * 2, "interleaved")]
    else:  # both calls of the normalised part stay in one stage
        cases += [(["cpu"] * 4, "gpipe")]
    for place, schedule in cases:
        learnt, last = train(build, data, place=place, schedule=schedule)
        assert last == loss
        assert_same(learnt, expected)
