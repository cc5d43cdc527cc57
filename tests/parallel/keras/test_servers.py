"""``sync="parameter_server"``: the same training, with the optimizer's state in parts."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest

import hvdx

TWO, FOUR = pytest.mark.ranks(2), pytest.mark.ranks(4)
TORCH, TENSORFLOW = map(pytest.mark.backend, ("torch", "tensorflow"))
C = hvdx.Compression
PS = {"sync": "parameter_server"}


@pytest.mark.parametrize(
    ("way", "servers"),
    [
        pytest.param("fit", None, marks=TWO),
        pytest.param("eager", [0], marks=TWO),
        pytest.param("graph", [1], marks=[TWO, TENSORFLOW]),
        pytest.param("fit", [0, 2], marks=FOUR),
    ],
)
def test_equals_one_process(
    hvd, way, servers, data, make_model, ways, farthest, exact, assert_equal_replicas, monkeypatch
):
    monkeypatch.setenv("HVDX_BUCKET_MB", "0.0003")  # several buckets
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.Adam(0.01), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **PS, servers=servers)
    if way == "fit":
        ways.fit(together, optimizer, batches.shard)
    else:
        ways.loop(together, optimizer, batches.shard, graph=way == "graph")
    (layout,) = optimizer._averager._layouts.values()
    assert len(layout.buckets) > 1
    assert farthest(alone, together) < exact
    assert farthest(alone, make_model("float64")) > 1e-3
    assert_equal_replicas(together)


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)


@TWO
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("loop", dict(clipnorm=0.05, weight_decay=0.1)),
        ("loop", dict(clipvalue=0.01, learning_rate=SCHEDULE)),
        ("fit", dict(gradient_accumulation_steps=2, global_clipnorm=0.05)),
    ],
    ids=["clipnorm, decay", "clipvalue, schedule", "accumulation, global_clipnorm"],
)
def test_options_of_keras_act_on_the_mean(
    hvd, way, options, data, make_model, ways, farthest, exact
):
    batches = data("float64")
    options = {"learning_rate": 0.1, "momentum": 0.9, **options}
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.SGD(**options), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(**options), **PS)
    getattr(ways, way)(together, optimizer, batches.shard)
    assert farthest(alone, together) < exact


def held(optimizer):
    return sum(
        int(np.prod(variable.shape)) * 4 for variable in optimizer.variables if variable.shape != ()
    )


@pytest.mark.parametrize(
    "servers",
    [
        pytest.param(None, marks=TWO),
        pytest.param([0], marks=[TWO, TORCH]),
        pytest.param([0, 1], marks=[FOUR, TORCH]),
    ],
)
def test_memory_and_embeddings(hvd, servers, farthest, assert_equal_replicas):
    """A model that is one large embedding: what a server keeps is 1/N of the whole."""

    def make():
        keras.utils.set_random_seed(1)
        keras.backend.clear_session(free_memory=False)
        layers = keras.layers
        model = keras.Sequential(
            [keras.Input((2,), dtype="int32"), layers.Embedding(500, 8), layers.Flatten()]
        )
        model.add(layers.Dense(1, kernel_constraint=keras.constraints.MaxNorm(0.5)))
        return model

    random = np.random.default_rng(0)
    # Of rows that occur twice in tf.IndexedSlices Keras adds up squares, not their sum's square.
    words = random.permutation(500)[: hvd.size() * 24].reshape(-1, 2)
    truth = random.normal(size=(hvd.size() * 12, 1)).astype("float32")
    models, optimizers = [make(), make()], [keras.optimizers.Adam(0.01) for _ in range(2)]
    hvd.DistributedOptimizer(optimizers[1], **PS, servers=servers)
    for model, optimizer, part in zip(
        models, optimizers, (slice(None), slice(hvd.rank(), None, hvd.size())), strict=True
    ):
        model.compile(optimizer, "mse")
        rows = words[part], truth[part]
        model.fit(*rows, batch_size=len(rows[0]), epochs=3, shuffle=False, verbose=0)
    assert farthest(*models) < 1e-4
    assert_equal_replicas(models[1])
    whole, own = map(held, optimizers)
    count = hvd.size() if servers is None else len(servers)
    serves = servers is None or hvd.rank() in servers
    assert (0.9 * whole / count < own <= 1.1 * whole / count) if serves else own == 0


@pytest.mark.parametrize(
    ("name", "servers", "way"),
    [
        pytest.param("int8", None, "fit", marks=TWO),
        pytest.param("powersgd", [0], "eager", marks=TWO),
        pytest.param("powersgd", None, "fit", marks=[TWO, TORCH]),
        pytest.param("fp16", [0], "fit", marks=[TWO, TORCH]),
        pytest.param("int8", [0, 1], "eager", marks=[FOUR, TORCH]),
    ],
)
def test_compressed(
    hvd, name, servers, way, data, make_model, ways, farthest, assert_equal_replicas
):
    """Push and pull; after settle() nothing is owed."""
    compression, tolerance = {
        "int8": (C.int8(), 0.02),
        "powersgd": (C.powersgd(2, min_elements=0), 0.2),
        "fp16": (C.fp16, 2e-3),
    }[name]
    batches = data()
    models = [make_model(width=64) for _ in range(2)]
    ways.loop(models[0], keras.optimizers.SGD(0.1, momentum=0.5), batches.whole)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.5)
    hvd.DistributedOptimizer(optimizer, **PS, servers=servers, compression=compression)
    (ways.fit if way == "fit" else ways.loop)(models[1], optimizer, batches.shard)
    assert_equal_replicas(models[1])
    assert 0 < farthest(*models) < tolerance
    before = [weight.copy() for weight in models[1].get_weights()]
    optimizer.settle()
    assert_equal_replicas(models[1])
    owed = max(np.abs(a - b).max() for a, b in zip(before, models[1].get_weights(), strict=True))
    assert 0 < owed < 0.05
    settled = [weight.copy() for weight in models[1].get_weights()]
    optimizer.settle()
    for one, other in zip(settled, models[1].get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@TWO
@pytest.mark.parametrize("servers", [None, pytest.param([0], marks=TORCH)])
def test_checkpoints(hvd, servers, data, make_model, shared, tmp_path):
    """They hold what a plain optimizer would; rank 0 writes, and all go on from it."""
    x, y = (part[:2].reshape(-1, part.shape[-1]) for part in data().shard)

    def train(epochs, directory):
        model, optimizer = make_model(), keras.optimizers.Adam(0.01)
        hvd.DistributedOptimizer(optimizer, **PS, servers=servers)
        model.compile(optimizer, "mse", run_eagerly=True)
        callbacks = [
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.CheckpointCallback(shared / directory),
        ]
        model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
        return model

    straight = train(3, "straight")
    train(2, "broken")
    resumed = train(3, "broken")
    for one, other in zip(straight.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    plain = keras.models.load_model(shared / "straight" / "checkpoint-000002.keras")
    assert [v.shape for v in plain.optimizer.variables[2:4]] == [(6, 8), (6, 8)]
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(), **PS))
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"call optimizer.settle\(\) on all ranks"):
        model.save(tmp_path / "refused.keras")


@TWO
@pytest.mark.parametrize("wrapped", ["inner", "scaler"])
def test_a_scaler_skips_on_all_ranks(hvd, wrapped):
    """An overflow of rank 1 alone."""
    variable = keras.Variable(np.zeros(4, "float32"), name="v")
    inner = keras.optimizers.SGD(1.0)
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    hvd.DistributedOptimizer(inner if wrapped == "inner" else scaler, **PS)
    for step in range(3):
        bad = step == 1 and hvd.rank() == 1
        grad = np.full(4, np.inf if bad else 4.0 * (hvd.rank() + 1), "float32")
        scaler.apply([keras.ops.convert_to_tensor(grad)], [variable])
    steps = 1 + 2  # the scale is 2 after the overflow, and the same gradient twice as much
    np.testing.assert_allclose(variable.numpy(), -steps * (hvd.size() + 1) / 2, rtol=1e-6)


@TWO
def test_gradients_that_only_some_ranks_have(hvd):
    """A variable that no rank uses at first, then one; and one that none ever does."""
    grad = keras.ops.convert_to_tensor(np.arange(1, 6, dtype="float32"))
    found = []
    for wrapped in (False, True):
        variables = [keras.Variable(np.ones(5, "float32"), name=name) for name in "abc"]
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.1)
        if wrapped:
            hvd.DistributedOptimizer(optimizer, **PS)
        share = (grad if hvd.rank() == 0 else None) if wrapped else grad / hvd.size()
        optimizer.apply([grad, None, None], variables)
        optimizer.apply([grad, share, None], variables)
        found.append([variable.numpy() for variable in variables])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@TWO
def test_what_is_refused(hvd, data, make_model, ways):
    def wrap(optimizer, **options):
        return hvd.DistributedOptimizer(optimizer, **{**PS, **options})

    with pytest.raises(ValueError, match=r"servers=\[7\]: rank 7 is not among the 2 that train"):
        wrap(keras.optimizers.SGD(), servers=[7])
    with pytest.raises(ValueError, match=r"servers=\[\] is empty"):
        wrap(keras.optimizers.SGD(), servers=[])
    with pytest.raises(ValueError, match="Adafactor is not known to treat every element alone"):
        wrap(keras.optimizers.Adafactor())
    with pytest.raises(ValueError, match="use_ema=True"):
        wrap(keras.optimizers.SGD(use_ema=True))
    with pytest.raises(ValueError, match=r"with compression=Compression\.local_sgd"):
        wrap(keras.optimizers.SGD(), compression=C.local_sgd)
    with pytest.raises(ValueError, match="it chooses by the time that allreduces take"):
        wrap(keras.optimizers.SGD(), compression=C.auto())
    with pytest.raises(ValueError, match="register_local_var"):
        wrap(keras.optimizers.SGD()).register_local_var(keras.Variable(1.0))
    model, built = make_model(), keras.optimizers.SGD()
    built.build(model.trainable_variables)
    with pytest.raises(ValueError, match="built already"):
        wrap(built)
    optimizer = wrap(keras.optimizers.SGD(0.1), servers=[hvd.rank()])
    with pytest.raises(hvdx.MismatchError, match=r"servers=\[0\]"):
        ways.loop(model, optimizer, data().shard)
    optimizer = wrap(keras.optimizers.SGD(0.1))
    ways.loop(model, optimizer, data().shard)
    model.layers[0].trainable = False
    with pytest.raises(ValueError, match="steps the 6 variables for which"):
        ways.loop(model, optimizer, data().shard)


@TWO
def test_the_guide(hvd, data, make_model):
    """The example of docs/synchronization.md, as it stands there."""
    guide = Path(__file__).resolve().parents[3] / "docs" / "synchronization.md"
    blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "keras.optimizers" in block]
    x, y = (part.reshape(-1, part.shape[-1]) for part in data().shard)
    model = make_model(seed=hvdx.rank())
    exec(block, {"keras": keras, "model": model, "x": x, "y": y})
    assert len(set(hvdx.allgather_object(hvdx.parameter_hash(model)))) == 1
