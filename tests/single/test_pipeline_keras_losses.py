"""What pipelines of Keras models count: layers' losses, sample weights, masks, several outputs.

Each test compares with Keras' own ``train_on_batch`` on the whole batch.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip(os.environ["KERAS_BACKEND"])
import numpy as np  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PlanError  # noqa: E402

layers, ops = keras.layers, keras.ops


class Spread(layers.Layer):
    """Adds a loss, a mean or a sum over the rows, in both modes or in training only."""

    def __init__(self, kind, always=True, **options):
        super().__init__(**options)
        self._reduce, self._always = getattr(ops, kind), always

    def call(self, x, training=None):
        if training or self._always:
            self.add_loss(0.01 * self._reduce(ops.square(x)))
        return x


def penalised():
    """A regularized layer called twice, one of activities, and losses of layers' own."""
    x = keras.Input((6,), name="x")
    tied = layers.Dense(6, "tanh", name="tied", kernel_regularizer="l2")
    h = tied(layers.Dense(6, "tanh", name="enter", activity_regularizer="l1")(x))
    h = Spread("mean", name="mean")(tied(h) + h)
    h = Spread("sum", always=False, name="sum")(h)
    return keras.Model(x, layers.Dense(1, name="leave", bias_regularizer="l2")(h))


def tagger():
    """A mask from the first layer to the output."""
    x = keras.Input((5,), dtype="int32", name="x")
    h = layers.Embedding(9, 4, mask_zero=True, name="embed")(x)
    h = layers.Add(name="skip")([h, layers.Dense(4, "tanh", name="dense")(h)])
    return keras.Model(x, layers.Dense(3, name="leave")(layers.LSTM(4, return_sequences=True)(h)))


def two_outputs():
    x = keras.Input((6,), name="x")
    h = layers.Dense(6, "tanh", name="enter")(x)
    return keras.Model(x, [layers.Dense(1, name="one")(h), layers.Dense(2, name="two")(h)])


def made(build):
    keras.utils.set_random_seed(3)
    keras.backend.clear_session(free_memory=False)  # equal names each time
    return build()


def batch(build, rows=12):
    draw = np.random.default_rng(0)
    if build is tagger:
        x = draw.integers(1, 9, (rows, 5)).astype("int32")
        x[np.arange(5) >= draw.integers(1, 6, rows)[:, None]] = 0  # as long as their rows are
        return x, draw.integers(0, 3, (rows, 5)), draw.uniform(size=(rows, 5))
    x = draw.normal(size=(rows, 6)).astype("float32")
    if build is two_outputs:
        return x, [draw.normal(size=(rows, n)) for n in (1, 2)], draw.uniform(size=rows)
    return x, draw.normal(size=(rows, 1)), draw.uniform(size=rows)


def entropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


CASES = {
    "layers' losses": (penalised, "mse", None),
    "nothing but those": (penalised, None, None),
    "a sum": (two_outputs, keras.losses.MeanSquaredError(reduction="sum"), None),
    "mask": (tagger, entropy(), None),
    "mask and ignored class": (tagger, entropy(ignore_class=1), None),
    "mean by weights": (tagger, entropy(reduction="mean_with_sample_weight"), None),
    "by name": (two_outputs, {"one": "mse", "two": "mae"}, {"one": 0.5, "two": 2.0}),
    "one of two": (two_outputs, [None, "mse"], None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_what_keras_has(case):
    build, loss, factors = CASES[case]
    x, y, weight = batch(build)
    y = None if loss is None else y
    plain = made(build)
    plain.compile(keras.optimizers.SGD(0.1), loss, loss_weights=factors)
    model = made(build)
    place = ["cpu"] * 2
    pipe = hvd.Pipeline(
        model, x, loss, keras.optimizers.SGD(0.1), loss_weights=factors, micro_batches=5,
        place=place,
    )  # fmt: skip
    weights = [None] if "nothing" in case else [None, weight]
    for each in weights:  # uneven micro-batches, and masks that leave unequal parts of them
        expected = plain.train_on_batch(x, y, each, return_dict=True)["loss"]
        plain.reset_metrics()
        assert float(pipe.step(x, y, each)) == pytest.approx(float(expected), rel=1e-5)
    data = {"x": x, "y": y, "sample_weight": weights[-1], "batch_size": 12}
    expected, found = (
        each.evaluate(**data, verbose=0, return_dict=True)["loss"] for each in (plain, pipe)
    )
    pipe.close()
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_cuts_change_no_bit_of_losses_on_the_way():
    x, y, weight = batch(penalised)
    learnt = []
    for stages in (1, [2, 2, 2, 1]):
        model = made(penalised)
        place = ["cpu"] * (stages if isinstance(stages, int) else len(stages))
        pipe = hvd.Pipeline(
            model, x, "mse", keras.optimizers.Adam(0.01), stages=stages, place=place
        )
        losses = [float(pipe.step(x, y, weight)) for _ in range(3)]
        pipe.close()
        learnt.append([losses, *model.get_weights()])
    for one, other in zip(*learnt, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fit_weighs_samples_classes_and_metrics_as_keras_does():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 6)).astype("float32")
    y = draw.integers(0, 3, 40)
    weight = draw.uniform(size=40)

    def build():
        return keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(3)])

    options = {"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0}
    for weights in ({"sample_weight": weight}, {"class_weight": {0: 1.0, 1: 2.0, 2: 0.5}}):
        told = {"metrics": ["accuracy"], "weighted_metrics": ["accuracy"]}
        plain = made(build)
        plain.compile(keras.optimizers.SGD(0.1), entropy(), **told)
        expected = plain.fit(x, y, validation_data=(x, y, weight), **weights, **options).history
        model = made(build)
        pipe = hvd.Pipeline(
            model, x, entropy(), keras.optimizers.SGD(0.1), micro_batches=3, place=["cpu"] * 2
        )
        found = pipe.fit(x, y, validation_data=(x, y, weight), **weights, **told, **options)
        pipe.close()
        assert found.history.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found.history[name], values, rtol=1e-5, err_msg=name)


def test_what_cannot_be_counted_is_named():
    x = np.ones((8, 6), "float32")

    class Odd(layers.Layer):
        def call(self, x):
            self.add_loss(ops.sum(x) ** 2)
            return x

    given = keras.Input((6,))
    with pytest.raises(PlanError, match="'odd' adds a loss that is neither a mean nor a sum"):
        hvd.Pipeline(keras.Model(given, Odd(name="odd")(given)), x)
    given = keras.Input((4, 6))
    masked = layers.Masking(name="masking")(layers.Dense(6, name="before")(given))
    with pytest.raises(PlanError, match="the mask of an output depends on what layer 'before'"):
        hvd.Pipeline(keras.Model(given, masked), np.ones((8, 4, 6), "float32"))
    model = made(two_outputs)
    for loss, told in (
        (["mse"] * 3, "loss has 3 parts, the model 2 outputs"),
        ({"three": "mse"}, r"loss names \['three'\], the model's outputs are \['one', 'two'\]"),
    ):
        with pytest.raises(PlanError, match=told):
            hvd.Pipeline(model, x, loss)
    pipe = hvd.Pipeline(model, x, "mse", "sgd", place=["cpu"])
    with pytest.raises(ValueError, match="sample_weight has 3 parts"):
        pipe.step(x, [x[:, :1], x[:, :2]], [np.ones(8)] * 3)
    pipe.close()
