"""Pipelines of Keras models in one process: several stages learn what the plain model learns."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip(os.environ["KERAS_BACKEND"])
import numpy as np  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PipelineError, PlanError  # noqa: E402

layers = keras.layers
backend = keras.backend.backend()


def made(build, seed=3):
    keras.utils.set_random_seed(seed)
    keras.backend.clear_session(free_memory=False)  # equal names each time
    return build()


def sequential():
    sizes = (8, 8, 8, 1)
    dense = [layers.Dense(n, "tanh", name=f"dense{i}") for i, n in enumerate(sizes)]
    return keras.Sequential([keras.Input((6,)), *dense])


def deep():
    """Units for two stages on each of 4 ranks."""
    dense = [layers.Dense(6, "tanh", name=f"dense{i}") for i in range(7)]
    return keras.Sequential([keras.Input((6,)), *dense, layers.Dense(1, name="leave")])


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


def reversible():
    """An embedding that is also the last layer, tied over all stages."""
    x = keras.Input((None,), dtype="int32", name="x")
    embed = layers.ReversibleEmbedding(11, 6, name="embed")
    h = embed(x)
    for i in range(2):
        h = h + layers.Dense(6, "tanh", name=f"dense{i}")(layers.LayerNormalization()(h))
    return keras.Model(x, embed(h, reverse=True))


def sentences(shapes, seed=0):
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(0, 11, (2, *shape)).astype("int32")) for shape in shapes]


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


def values(tensor):
    return keras.ops.convert_to_numpy(tensor)


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


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [("float32", 1e-5, 4e-5), ("float64", 1e-10, 1e-10)]
)
def test_the_plain_model_learns_the_same(request, dtype, rtol, atol):
    request.addfinalizer(lambda: keras.config.set_floatx("float32"))
    keras.config.set_floatx(dtype)
    data = [(x.astype(dtype), y.astype(dtype)) for x, y in batches(20)]
    learnt, loss = train(sequential, data, place=["cpu"] * 3)
    plain = made(sequential)
    plain.compile(keras.optimizers.Adam(1e-2), "mse")
    for x, y in data:
        last = plain.train_on_batch(x, y, return_dict=True)["loss"]
        plain.reset_metrics()
    assert loss == pytest.approx(float(last), rel=1e-5)  # Keras' own is of float32
    for name, value in weights(plain).items():
        assert value.dtype == dtype
        np.testing.assert_allclose(learnt[name], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("build", [sequential, residual])
def test_cuts_and_schedules_change_no_bit(build):
    data = batches(20 if build is sequential else 4)
    expected, loss = train(build, data, place=["cpu"])
    cases = [(["cpu"] * 2, "gpipe"), (["cpu"] * 3, "1f1b"), (["cpu"] * 2, "zb1p")]
    if build is sequential:
        cases += [(["cpu"] * 4, "1f1b"), (["cpu"] * 2, "interleaved"), (["cpu"] * 2, "zbv")]
    else:  # both calls of the normalised part stay in one stage
        cases += [(["cpu"] * 4, "gpipe")]
    for place, schedule in cases:
        checkpoint = {"gpipe": "always", "zb1p": "except_last"}.get(schedule, "never")
        learnt, last = train(build, data, place=place, schedule=schedule, checkpoint=checkpoint)
        assert last == loss
        assert_same(learnt, expected)


def language():
    """A causal transformer whose head shares the weight of the embedding."""
    text = keras.Input((5,), dtype="int64", name="text")
    symbols = layers.ReversibleEmbedding(9, 8, name="symbols")
    x = symbols(text)
    y = layers.LayerNormalization(name="norm")(x)
    x = x + layers.MultiHeadAttention(2, 4, name="look")(y, y, use_causal_mask=True)
    return keras.Model(text, symbols(layers.Dense(8, "gelu", name="think")(x), reverse=True))


@pytest.mark.skipif(
    not hasattr(layers, "ReversibleEmbedding"), reason="this Keras has no such layer"
)
def test_a_language_model_with_a_tied_head():
    draw, loss = np.random.default_rng(0), keras.losses.SparseCategoricalCrossentropy(True)
    data = [(t[:, :-1], t[:, 1:]) for t in draw.integers(9, size=(2, 8, 6))]
    one, value = train(language, data, place=["cpu"], loss=loss)
    other, last = train(language, data, place=["cpu"] * 3, loss=loss, schedule="gpipe")
    assert_same(one, other)
    plain = made(language)
    plain.compile(keras.optimizers.Adam(1e-2), loss)
    found = plain.fit(
        np.concatenate([x for x, _ in data]), np.concatenate([y for _, y in data]),
        batch_size=8, shuffle=False, verbose=0,
    )  # fmt: skip
    assert value == last and np.isfinite(found.history["loss"][0])
    for name, expected in weights(plain).items():
        np.testing.assert_allclose(one[name], expected, rtol=1e-4, atol=4e-5)


def test_clipping_as_the_optimizer_of_the_plain_model():
    data = batches()

    def learn(place, **options):
        model = made(residual)
        sgd = keras.optimizers.SGD(0.1)
        pipe = hvd.Pipeline(
            model, data[0][0], "mse", sgd, micro_batches=1, place=place, seed=7, **options
        )
        for x, y in data:
            pipe.step(x, y)
        pipe.close()
        return weights(model), pipe.gradient_norm

    expected, norm = learn(["cpu"], clip_norm=0.05)
    other, same = learn(["cpu"] * 3, clip_norm=0.05)
    assert norm == same > 0.05
    assert_same(other, expected)
    assert learn(["cpu"])[1] is None
    plain = made(residual)
    plain.compile(keras.optimizers.SGD(0.1, global_clipnorm=0.05), "mse")
    for x, y in data:
        plain.train_on_batch(x, y)
    for name, value in weights(plain).items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_auto_measures_and_the_timeline_shows_it(tmp_path):
    x, y = batches(rows=[64])[0]
    model = made(residual)
    before = weights(model)
    pipe = pipeline(model, x, schedule="auto", place=["cpu"] * 2)
    assert_same(weights(model), before)
    assert pipe.plan.step > 0
    line = pipe._graph.line
    assert line.inputs == {"x": 16 * 6 * 4}  # of a micro-batch
    dense = line.units[line.find("leave")]
    assert dense.forward > 0 and dense.inputs > 0 and dense.makes == {"leave": 16 * 4}
    pipe.step(x, y)
    pipe.timeline(tmp_path / "run.html")
    pipe.close()
    page = (tmp_path / "run.html").read_text()
    assert f"predicted: {pipe.plan.schedule}" in page
    assert "step 0: " in page


def test_dropout_and_uneven_batches_depend_on_no_cut():
    data = batches(rows=[12, 7, 1])
    expected, loss = train(dropped, data, place=["cpu"])
    learnt, last = train(dropped, data, place=["cpu"] * 4, schedule="gpipe")
    assert last == loss
    assert_same(learnt, expected)
    assert train(dropped, data, place=["cpu"], seed=8)[1] != loss


def test_a_tied_embedding_and_shapes_that_change_every_step():
    data = sentences([(8, 5), (6, 3), (7, 4)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    expected, last = train(reversible, data, place=["cpu"], loss=loss)
    learnt, same = train(reversible, data, place=["cpu"] * 3, loss=loss)
    assert same == last
    assert_same(learnt, expected)
    plain = made(reversible)
    plain.compile(keras.optimizers.Adam(1e-2), loss)
    for x, y in data:
        plain.train_on_batch(x, y)
    for name, value in weights(plain).items():
        np.testing.assert_allclose(learnt[name], value, rtol=1e-5, atol=4e-5, err_msg=name)


def test_two_inputs_and_two_outputs():
    model = made(two_by_two)
    draw = np.random.default_rng(0)
    x = {
        name: draw.normal(size=(8, n)).astype("float32") for name, n in (("left", 6), ("right", 4))
    }
    y = {name: draw.normal(size=(8, n)).astype("float32") for name, n in (("one", 2), ("two", 8))}
    expected = model(x)
    pipe = pipeline(model, x, place=["cpu"] * 3)
    found = pipe(x)
    loss = float(pipe.step(x, y))
    again = pipe.step([x["left"], x["right"]], y)
    pipe.close()
    for name in y:
        np.testing.assert_allclose(
            values(found[name]), values(expected[name]), rtol=1e-5, atol=1e-6
        )
    plain = sum(np.mean((values(expected[name]) - y[name]) ** 2) for name in y)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert float(again) < loss


def test_masks_travel_with_their_tensors():
    parts = [
        keras.Input((5,), dtype="int32"),
        layers.Embedding(9, 4, mask_zero=True, name="embed"),
        layers.Dense(4, "tanh", name="dense"),
        layers.GRU(3, name="gru"),
        layers.Dense(1, name="leave"),
    ]
    x = np.random.default_rng(0).integers(0, 9, (8, 5)).astype("int32")
    x[:, 3:] = 0
    y = np.ones((8, 1), "float32")
    model = made(lambda: keras.Sequential(parts))
    expected = np.mean((values(model(x)) - y) ** 2)
    pipe = pipeline(model, x, place=["cpu"] * 4, stages=[1, 1, 1, 1])
    assert float(pipe.step(x, y)) == pytest.approx(expected, rel=1e-5)
    pipe.close()


def test_fit_learns_digits_as_the_plain_model_does(tmp_path):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    told = {}

    def build():
        hidden = [layers.Dense(64, "relu", name=f"hidden{i}") for i in range(2)]
        return keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10, name="leave")])

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain = made(build)
    plain.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])
    slower = keras.callbacks.LearningRateScheduler(lambda epoch: 5e-3 if epoch < 3 else 4e-3)
    options = {"batch_size": 100, "epochs": 4, "shuffle": False, "verbose": 0}
    plain_history = plain.fit(x[:1400], y[:1400], callbacks=[slower], **options).history
    told["plain"] = plain.evaluate(x[1400:], y[1400:], verbose=0)[1]
    model = made(build)
    pipe = hvd.Pipeline(
        model, x[:8], loss, keras.optimizers.Adam(5e-3), place=["cpu"] * 2, micro_batches=4, seed=1
    )
    keep = keras.callbacks.ModelCheckpoint(tmp_path / "m.weights.h5", save_weights_only=True)
    history = pipe.fit(
        x[:1400], y[:1400], metrics=["accuracy"], validation_data=(x[1400:], y[1400:]),
        callbacks=[keep, slower], **options,
    ).history  # fmt: skip
    found = pipe.evaluate(x[1400:], y[1400:], metrics=["accuracy"], verbose=0, return_dict=True)
    outputs = pipe.predict(x[1400:], verbose=0)
    pipe.close()
    np.testing.assert_allclose(history["loss"], plain_history["loss"], rtol=1e-3)
    assert found["accuracy"] == pytest.approx(told["plain"], abs=0.01)
    assert told["plain"] > 0.8  # it has learnt, in four epochs
    assert history["val_accuracy"][-1] == pytest.approx(found["accuracy"])
    assert history["accuracy"][-1] > history["accuracy"][0]
    assert float(pipe.optimizer.learning_rate) == pytest.approx(4e-3)
    again = made(build, seed=5)
    again.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_allclose(outputs, values(again(x[1400:])), rtol=1e-4, atol=1e-4)


def normed():
    stack = [layers.BatchNormalization(name="first", momentum=0.5), layers.Dense(6, name="dense")]
    stack += [layers.BatchNormalization(name="second"), layers.Dense(1, name="leave")]
    return keras.Sequential([keras.Input((6,)), *stack])


def test_running_statistics_are_those_of_whole_batches():
    data = [(x + 100, y) for x, y in batches(rows=[12, 7])]
    plain = made(normed)
    plain.compile(keras.optimizers.Adam(1e-2), "mse")
    for x, y in data:
        plain.train_on_batch(x, y)
    expected = {name: v for name, v in weights(plain).items() if "first/moving" in name}
    assert len(expected) == 2
    learnt, _ = train(normed, data, place=["cpu"])
    for name, value in expected.items():
        near = 1e-5 if backend == "tensorflow" else 1e-2  # on torch Keras subtracts large squares
        np.testing.assert_allclose(learnt[name], value, rtol=near, err_msg=name)
    micro, _ = train(normed, data, place=["cpu"], batchnorm="micro")
    assert all(not np.allclose(micro[n], expected[n], rtol=1e-3) for n in expected)


def test_a_masked_norm_counts_what_it_sees():
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype("float32") + 5
    x[:, 3:] = x[0, 1] = 0

    def build():
        stack = [layers.Masking(name="mask"), layers.BatchNormalization(name="norm", momentum=0.0)]
        return keras.Sequential([keras.Input((5, 3)), *stack, layers.GRU(1, name="gru")])

    model = made(build)
    pipe = pipeline(model, x, place=["cpu"] * 2)
    pipe.step(x, np.ones((8, 1), "float32"))
    pipe.close()
    seen = x[(x != 0).any(-1)]
    np.testing.assert_allclose(model.layers[1].moving_mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.layers[1].moving_variance, seen.var(0), rtol=1e-4)


def in_precision(policy, build):
    """Build under a policy, which clearing the session would have set back."""

    def made_so():
        keras.config.set_dtype_policy(policy)
        try:
            return build()
        finally:
            keras.config.set_dtype_policy("float32")

    return made_so


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_depends_on_no_cut(name):
    """In float16 the first scales are too large: all stages skip those steps, as Keras does."""
    data, build = batches(6), in_precision(name, sequential)

    def optimizer():
        sgd = keras.optimizers.SGD(0.1, momentum=0.9)
        scaled = keras.optimizers.LossScaleOptimizer(sgd, 2.0**20, dynamic_growth_steps=3)
        return scaled if name == "mixed_float16" else sgd

    def learn(place):
        model, own, skipped = made(build), optimizer(), []
        pipe = hvd.Pipeline(model, data[0][0], "mse", own, place=place, micro_batches=2, seed=7)
        for x, y in data:
            pipe.step(x, y)
            skipped.append(pipe.skipped)
        pipe.close()
        return weights(model), skipped, own

    expected, skipped, own = learn(["cpu"])
    other, same, _ = learn(["cpu"] * 3)
    assert_same(other, expected)
    plain = made(build)
    plain.compile(scaled := optimizer(), "mse")
    for x, y in data:
        plain.train_on_batch(x, y)
    for path, value in weights(plain).items():
        np.testing.assert_allclose(expected[path], value, rtol=2e-2, atol=2e-2, err_msg=path)
    assert skipped == same
    if name == "mixed_float16":
        assert skipped[0] and not skipped[-1]
        assert float(own.dynamic_scale) == float(scaled.dynamic_scale)
        assert int(own.step_counter) == int(scaled.step_counter)
        pipe = pipeline(made(build), data[0][0], place=["cpu"])
        pipe.close()
        assert isinstance(pipe.optimizer, keras.optimizers.LossScaleOptimizer)  # as compile() does


def test_layers_frozen_and_freed_while_training():
    data = batches(4)
    frozen = [set(), {"norm", "tied"}, {"norm", "enter"}, {"norm"}]

    def learn(**options):
        model = made(residual)
        pipe = pipeline(model, data[0][0], **options)
        for (x, y), names in zip(data, frozen, strict=True):
            for name in ("norm", "tied", "enter"):
                model.get_layer(name).trainable = name not in names
            before = weights(model)
            pipe.step(x, y)
            after = weights(model)
            assert names == {n.split("/")[0] for n in before if (before[n] == after[n]).all()}
        pipe.close()
        return weights(model)

    assert_same(learn(place=["cpu"] * 4, checkpoint="always"), learn(place=["cpu"]))


def test_what_was_frozen_needs_a_new_pipeline():
    x, y = batches(1)[0]
    model = made(residual)
    enter, tied = model.get_layer("enter"), model.get_layer("tied")
    enter.trainable = tied.trainable = False
    pipe = pipeline(model, x, place=["cpu"] * 2, stages=["tied#2"])  # a stage for each call
    before = weights(model)
    pipe.step(x, y)
    assert (weights(model)["tied/kernel"] == before["tied/kernel"]).all()
    enter.trainable = True
    for _ in range(2):
        with pytest.raises(PlanError, match=r"'enter/bias' was frozen when .* a new pipeline"):
            pipe.step(x, y)
    pipe.close()


def test_wrong_use_is_told():
    (x, y), *_ = batches(1)
    with pytest.raises(PlanError, match="batchnorm='none': use one of deferred, micro, sync"):
        pipeline(made(sequential), x, batchnorm="none")

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(PlanError, match=r"Own 'own' is a subclassed model.*keras\.Sequential"):
        hvd.Pipeline(Own(), x)
    for stages, told in {
        9: "9 stages, but the model has 4 units: use at most 4",
        ("dense9",): "no unit is named 'dense9'; did you mean 'dense",
    }.items():
        with pytest.raises(PlanError, match=told):
            pipeline(made(sequential), x, stages=stages)
    with pytest.raises(
        PlanError, match="begin at 'inner': it is inside 'block', which is one unit"
    ):
        inner = [keras.Input((6,)), layers.Dense(6, name="inner")]
        block = keras.Sequential(inner, name="block")
        pipeline(keras.Sequential([keras.Input((6,)), block, layers.Dense(1)]), x, stages=["inner"])
    with pytest.raises(PlanError, match="channel='nccl': use one of zmq, horovod"):
        pipeline(made(sequential), x, channel="nccl")
    there = "but TensorFlow has CPU:0" if backend == "tensorflow" else "which cannot be used"
    with pytest.raises(PlanError, match=f"place has 'tpu', {there}"):
        pipeline(made(sequential), x, place=["tpu"])
    with pytest.raises(PlanError, match="reduction='none', no scalar"):
        pipeline(made(sequential), x, loss=keras.losses.MeanSquaredError(reduction="none"))
    for option, told in {
        "memory": 1e9,
        "leaves": [layers.Dense],
        "by": "memory",
    }.items():
        with pytest.raises(PlanError, match=f"{option}=.* is for PyTorch models only: "):
            pipeline(made(sequential), x, place=["cpu"], **{option: told})
    with pytest.raises(TypeError, match="unexpected keyword argument 'micro_batch'"):
        pipeline(made(sequential), x, place=["cpu"], micro_batch=2)
    with pytest.raises(TypeError, match="cannot be planned without ranks yet"):
        hvd.plan(made(sequential), x, 2)
    with pytest.raises(PlanError, match=r"'norm/moving_mean', .* stages 0 and 1: cut so"):
        norm = layers.BatchNormalization(name="norm")
        given = keras.Input((6,))
        pipeline(keras.Model(given, norm(norm(given))), x, place=["cpu"] * 2, stages=[1, 1])
    pipe = pipeline(made(sequential), x, place=["cpu"])
    with pytest.raises(ValueError, match="the same first dimension"):
        pipe.step(x, y[:3])
    with pytest.raises(ValueError, match="y has 2 parts, the model 1 outputs"):
        pipe.step(x, [y, y])
    pipe.close()
    detached = [
        keras.Input((6,)),
        layers.Dense(6, name="first"),
        layers.Lambda(keras.ops.stop_gradient, name="stop"),
        layers.Dense(1, name="last"),
    ]
    for stages in ([1, 2], [2, 1]):
        model = keras.Sequential(detached)
        pipe = pipeline(model, x, place=["cpu"] * 2, stages=stages)
        with pytest.raises(PipelineError, match=r"stage 0, .*no gradient reaches .*first/kernel'"):
            pipe.step(x, y)
        pipe.close()

    class ByRow(keras.losses.Loss):
        def __call__(self, y, out, sample_weight=None):
            return (y - out) ** 2

    pipe = pipeline(made(sequential), x, place=["cpu"], loss=ByRow())
    with pytest.raises(PipelineError, match=r"returns shape \(.*\), no scalar: take the mean"):
        pipe.step(x, y)
    pipe.close()
