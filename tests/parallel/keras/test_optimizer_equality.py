"""Several ranks train as one process with all the data does."""

from __future__ import annotations

import keras
import numpy as np
import pytest

TWO = pytest.mark.ranks(2)
TORCH, TENSORFLOW = map(pytest.mark.backend, ("torch", "tensorflow"))
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.02),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("adam", "float64"),
        pytest.param("sgd", "float64", marks=[TWO, TORCH]),
        pytest.param("adamw", "float64", marks=[TWO, TORCH]),
        pytest.param("adam", "float32", marks=[TWO, TORCH]),
    ],
)
def test_ranks_equal_one_process(
    hvd, kind, dtype, data, make_model, ways, farthest, exact, assert_equal_replicas
):
    batches = data(dtype)
    alone, together = make_model(dtype), make_model(dtype)
    ways.loop(alone, OPTIMIZERS[kind](), batches.whole)
    ways.fit(together, hvd.DistributedOptimizer(OPTIMIZERS[kind]()), batches.shard)
    assert farthest(alone, together) < (exact if dtype == "float64" else 1e-6)
    assert_equal_replicas(together)
    assert farthest(alone, make_model(dtype)) > 1e-3  # and they did train


# What Keras does to gradients must happen after they are averaged. Some of it is in the tests of
# accumulation too.
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
OPTIONS = {
    "clipnorm, decay": dict(clipnorm=0.05, weight_decay=0.01),
    "global_clipnorm, schedule": dict(global_clipnorm=0.05, learning_rate=SCHEDULE),
    "clipvalue, moving average": dict(clipvalue=0.01, use_ema=True, ema_overwrite_frequency=2),
}


@TWO
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[TORCH] * ("average" not in n)) for n in OPTIONS],
)
def test_options_of_keras_act_on_the_mean(hvd, name, data, make_model, ways, farthest, exact):
    batches = data("float64")
    options = {"learning_rate": 0.1, "momentum": 0.9, **OPTIONS[name]}
    alone, together = make_model("float64"), make_model("float64")
    for model, optimizer, own in (
        (alone, keras.optimizers.SGD(**options), batches.whole),
        (together, hvd.DistributedOptimizer(keras.optimizers.SGD(**options)), batches.shard),
    ):
        ways.fit(model, optimizer, own)  # averages of weights are taken at an epoch's end too
    assert farthest(alone, together) < exact


@TENSORFLOW  # all of torch's are
@TWO
def test_eager_fit(hvd, data, make_model, ways, farthest, exact):
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.Adam(), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())
    ways.fit(together, optimizer, batches.shard, run_eagerly=True)
    assert farthest(alone, together) < exact


@TENSORFLOW
@TWO
def test_loop_in_a_graph(hvd, data, make_model, ways, farthest, exact):
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.Adam(), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())
    ways.loop(together, optimizer, batches.shard, graph=True)
    assert farthest(alone, together) < exact


@TWO
@pytest.mark.parametrize("megabytes", ["0.0001", pytest.param("16", marks=TORCH)])
def test_size_of_buckets_changes_nothing(
    hvd, megabytes, monkeypatch, ways, data, make_model, farthest, exact
):
    monkeypatch.setenv("HVDX_BUCKET_MB", megabytes)
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.SGD(0.1), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    ways.loop(together, optimizer, batches.shard)
    (layout,) = optimizer._averager._layouts.values()
    assert len(layout.buckets) == (1 if megabytes == "16" else 4)
    assert farthest(alone, together) < exact


@TWO
def test_models_of_two_types(hvd, data, ways, farthest, exact):
    batches = data("float64")

    def make():
        keras.config.set_floatx("float64")
        keras.utils.set_random_seed(1)
        keras.backend.clear_session(free_memory=False)
        return keras.Sequential(
            [
                keras.Input((6,), dtype="float64"),
                keras.layers.Dense(4, dtype="float32"),
                keras.layers.Dense(1, dtype="float64"),
            ]
        )

    alone, together = make(), make()
    ways.loop(alone, keras.optimizers.SGD(0.1), batches.whole)
    ways.loop(together, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), batches.shard)
    assert farthest(alone, together) < 1e-6


@TWO
@TORCH
def test_sum(hvd, data, make_model, ways, farthest, exact):
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.SGD(0.01 * hvd.size()), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), op=hvd.Sum)
    ways.loop(together, optimizer, batches.shard)
    assert farthest(alone, together) < exact


@TWO
def test_predivide(hvd, data, make_model, ways, farthest, exact):
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.SGD(0.1), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), gradient_predivide_factor=3.0)
    ways.loop(together, optimizer, batches.shard)
    assert farthest(alone, together) < exact


class Halves:
    """A compressor as Horovod's users write them: not elementwise to hvdx."""

    @staticmethod
    def compress(tensor):
        return keras.ops.cast(tensor, "float16"), keras.backend.standardize_dtype(tensor.dtype)

    @staticmethod
    def decompress(tensor, dtype):
        return keras.ops.cast(tensor, dtype)


@TWO
@pytest.mark.parametrize(("kind", "op"), [("fp16", "Average"), ("class", "Sum")])
def test_compression(hvd, kind, op, ways, data, make_model, farthest, assert_equal_replicas):
    batches = data("float32")
    rate = 0.1 if op == "Average" else 0.1 / hvd.size()
    alone, together = make_model(), make_model()
    ways.loop(alone, keras.optimizers.SGD(0.1), batches.whole)
    compression = hvd.Compression.fp16 if kind == "fp16" else Halves
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(rate), compression=compression, op=getattr(hvd, op)
    )
    ways.loop(together, optimizer, batches.shard, graph=op == "Sum")
    assert 0 < farthest(alone, together) < 2e-3
    assert_equal_replicas(together)


@TWO
@pytest.mark.parametrize(("way", "dense"), [("fit", False), ("loop", True)])
def test_embeddings(hvd, way, dense, ways, farthest, exact):
    """Their gradients are tf.IndexedSlices on TensorFlow: gathered, or sent dense."""
    rank, size = hvd.rank(), hvd.size()
    random = np.random.default_rng(0)
    words = random.integers(0, 20, (3, size * 3, 5))
    truth = random.normal(size=(3, size * 3, 1))

    def make():
        keras.config.set_floatx("float64")
        keras.utils.set_random_seed(1)
        keras.backend.clear_session(free_memory=False)
        return keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                keras.layers.Embedding(20, 3, dtype="float64"),
                keras.layers.Flatten(),
                keras.layers.Dense(1, dtype="float64"),
            ]
        )

    alone, together = make(), make()
    train = ways.fit if way == "fit" else ways.loop
    # Of slices with equal rows Keras takes another norm than of dense gradients.
    options = dict(momentum=0.9, global_clipnorm=None if dense else 0.5)
    ways.loop(alone, keras.optimizers.SGD(0.1, **options), (words, truth))
    own = slice(rank * 3, rank * 3 + 3)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1, **options), sparse_as_dense=dense
    )
    train(together, optimizer, (words[:, own], truth[:, own]))
    (layout,) = optimizer._averager._layouts.values()
    sparse = keras.backend.backend() == "tensorflow" and not dense
    assert len(layout.sparse) == sparse
    assert farthest(alone, together) < exact


@TENSORFLOW
@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_sparse_gradients_of_some_ranks(hvd, op):
    """Rows that are there, none, or a dense gradient: what other ranks have is understood."""
    import tensorflow as tf

    table = keras.Variable(np.zeros((4, 2)), name="table")
    rows = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1 + hvd.rank()]), (4, 2))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), op=getattr(hvd, op))
    ranks = hvd.size() if op == "Average" else 1
    last = hvd.rank() == hvd.size() - 1
    expected = np.zeros((4, 2))
    optimizer.apply([None if last else rows], [table])
    for rank in range(hvd.size() - 1):
        expected[1] -= 1 / ranks
        expected[1 + rank] -= 1 / ranks
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-6)
    if last:  # no gradient before, a dense one now
        optimizer.apply([tf.ones((4, 2))], [table])
    else:
        optimizer.apply([None], [table])
    np.testing.assert_allclose(table.numpy(), expected - 1 / ranks, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_apply_averages_each_type(hvd, dtype):
    """Without a model between: exact for halves and floats that have room, rounded else."""
    variables = [
        keras.Variable(np.zeros(shape), dtype=dtype, name=name)
        for name, shape in (("matrix", (3, 4)), ("scalar", ()), ("empty", (0, 2)))
    ]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    grads = [
        keras.ops.full(variable.shape, hvd.rank() + 0.5, dtype=dtype) for variable in variables
    ]
    optimizer.apply(grads, variables)
    for variable in variables:
        value = keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float64"))
        np.testing.assert_allclose(value, np.full(variable.shape, -hvd.size() / 2), rtol=1e-12)


def test_float64_is_averaged_in_float64(hvd):
    random = np.random.default_rng(0)
    whole = random.normal(size=(hvd.size(), 50))
    variable = keras.Variable(np.zeros(50), dtype="float64", name="weights")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.apply([keras.ops.convert_to_tensor(whole[hvd.rank()], "float64")], [variable])
    value = keras.ops.convert_to_numpy(variable.value)
    np.testing.assert_allclose(value, -whole.mean(0), rtol=0, atol=1e-15)
