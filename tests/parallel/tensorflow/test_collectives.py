"""Collectives on TensorFlow's tensors and variables, eagerly and in graphs."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import tensorflow as tf

import hvdx

FLOATS = [tf.float16, tf.bfloat16, tf.float32, tf.float64]
INTEGERS = [tf.uint8, tf.int8, tf.int16, tf.int32, tf.int64]


@pytest.fixture(params=["eager", "graph"])
def run(request):
    """Call a function as it is, and inside a ``tf.function``."""
    return (lambda f: f) if request.param == "eager" else tf.function


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_allreduce(hvd, run, dtype):
    rank, size = hvd.rank(), hvd.size()
    tensor = tf.cast(tf.reshape(tf.range(6), (2, 3)), dtype) + tf.cast(rank, dtype)
    result = run(lambda x: hvd.allreduce(x, op=hvd.Sum, name="sum"))(tensor)
    assert result.dtype == dtype
    expected = np.arange(6).reshape(2, 3) * size + sum(range(size))
    np.testing.assert_array_equal(tf.cast(result, tf.float64), expected)


@pytest.mark.parametrize("op", ["Average", "Min", "Max", "Product"])
def test_operators(hvd, run, op):
    values = np.arange(hvd.size()) + 1.5
    expected = {"Average": values.mean(), "Min": 1.5, "Max": values[-1], "Product": values.prod()}
    tensor = tf.constant([values[hvd.rank()]])
    result = run(lambda x: hvd.allreduce(x, op=getattr(hvd, op), name=f"op.{op}"))(tensor)
    np.testing.assert_allclose(result, [expected[op]], rtol=1e-12)


def test_variables_arrays_and_numbers(hvd):
    import keras

    rank, mean = float(hvd.rank()), (hvd.size() - 1) / 2
    for value in (tf.Variable(rank), np.float32(rank), np.array(rank), rank):
        result = hvd.allreduce(value)
        assert isinstance(result, tf.Tensor)
        assert float(result) == mean
    if keras.backend.backend() == "tensorflow":
        assert float(hvd.allreduce(keras.Variable(rank))) == mean


def test_many_in_one_graph(hvd):
    """Names with slashes once were cut to their last part, and all were the same."""

    @tf.function
    def step(x):
        return [hvd.allreduce(x * i, name=f"part{i}/mean") for i in range(5)]

    for _ in range(3):
        for i, result in enumerate(step(tf.ones(3))):
            np.testing.assert_array_equal(result, np.full(3, i))


def test_constants_in_a_graph(hvd):
    """TensorFlow computed them once on the rank that had constants, and merged equal ones."""
    rank, size = hvd.rank(), hvd.size()

    @tf.function
    def step(given):
        first, second = (given, given + 1) if rank == 0 else (tf.zeros([2]), tf.zeros([2]))
        return (
            hvd.allreduce(first, op=hvd.Sum, name="constant.first"),
            hvd.allreduce(second, op=hvd.Sum, name="constant.second"),
            hvd.allgather(first, name="constant.third"),
        )

    for i in range(3):
        first, second, rows = step(tf.fill([2], float(i)))
        np.testing.assert_array_equal(first, [i, i])
        np.testing.assert_array_equal(second, [i + 1, i + 1])
        np.testing.assert_array_equal(rows, [i, i] + [0, 0] * (size - 1))


def test_grouped(hvd, run):
    tensors = [tf.fill([i + 1], float(hvd.rank() * i)) for i in range(4)]
    results = run(lambda *x: hvd.grouped_allreduce(list(x), name="group"))(*tensors)
    for i, result in enumerate(results):
        np.testing.assert_allclose(result, np.full(i + 1, i * (hvd.size() - 1) / 2))
    gathered = hvd.grouped_allgather([tf.fill([1, 2], hvd.rank()), tf.fill([2], hvd.rank())])
    assert [each.shape[0] for each in gathered] == [hvd.size(), 2 * hvd.size()]


def test_scale_factors(hvd, run):
    result = run(
        lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.25, name="s")
    )(tf.ones(2, tf.float64))
    np.testing.assert_allclose(result, np.full(2, hvd.size() / 2))


def test_compression(hvd, run):
    tensor = tf.constant([1.0, 60000.0, -60000.0]) * 0.999
    result = run(lambda x: hvd.allreduce(x, compression=hvd.Compression.fp16, name="half"))(tensor)
    np.testing.assert_allclose(result, tensor, rtol=1e-3)


def test_indexed_slices(hvd, run):
    rank, size = hvd.rank(), hvd.size()

    def mean(values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([size + 1, 2]))
        reduced = hvd.allreduce(slices, name="sparse")
        assert isinstance(reduced, tf.IndexedSlices)
        return tf.convert_to_tensor(reduced)

    values = tf.fill([2, 2], float(rank + 1))
    result = run(mean)(values, tf.constant([rank, size], tf.int64))
    expected = [*[(r + 1) / size for r in range(size)], (size + 1) / 2]
    np.testing.assert_allclose(result[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [tf.bool, tf.bfloat16, tf.uint32, tf.float32, tf.complex64])
def test_moves_any_type(hvd, run, dtype):
    rank, size = hvd.rank(), hvd.size()
    tensor = tf.cast(tf.fill([rank + 1, 2], rank), dtype)
    gathered = run(lambda x: hvd.allgather(x, name="g"))(tensor)
    assert gathered.dtype == dtype
    assert gathered.shape[0] in (None, size * (size + 1) // 2)
    expected = tf.cast(np.repeat(np.arange(size), np.arange(size) + 1), dtype)
    assert bool(tf.reduce_all(gathered[:, 0] == expected))
    sent = run(lambda x: hvd.broadcast(x, size - 1, name="b"))(tf.cast([rank, 1], dtype))
    assert bool(tf.reduce_all(sent == tf.cast([size - 1, 1], dtype)))


def test_alltoall(hvd, run):
    rank, size = hvd.rank(), hvd.size()
    tensor = tf.range(size) + 10 * rank
    result = run(lambda x: hvd.alltoall(x, name="even"))(tensor)
    np.testing.assert_array_equal(result, np.arange(size) * 10 + rank)
    splits = list(range(1, size + 1))
    whole = tf.fill([sum(splits)], rank)
    received, counts = hvd.alltoall(whole, splits=splits, name="uneven")
    np.testing.assert_array_equal(counts, [rank + 1] * size)
    np.testing.assert_array_equal(received, np.repeat(np.arange(size), rank + 1))


def test_reducescatter(hvd, run):
    size = hvd.size()
    tensor = tf.cast(tf.range(2 * size), tf.float32)
    result = run(lambda x: hvd.reducescatter(x, op=hvd.Sum, name="rs"))(tensor)
    own = 2 * hvd.rank()
    np.testing.assert_array_equal(result, [own * size, (own + 1) * size])


def test_gradients_flow_through(hvd):
    x = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(hvd.allreduce(x, op=hvd.Sum, name="flow") * (hvd.rank() + 1.0))
    total = sum(range(1, hvd.size() + 1))
    np.testing.assert_allclose(tape.gradient(loss, x), [total, total])


def test_objects_and_barrier(hvd):
    assert hvd.broadcast_object({"rank": hvd.rank()}, 1) == {"rank": 1}
    assert hvd.allgather_object(hvd.rank() * "x") == ["x" * r for r in range(hvd.size())]
    hvd.barrier()


@pytest.mark.parametrize("different", ["shape", "dtype"])
def test_mismatch_names_what_each_rank_has(hvd, different):
    odd = hvd.rank() == 0
    tensor = tf.ones([2 + (odd and different == "shape")])
    if odd and different == "dtype":
        tensor = tf.cast(tensor, tf.float64)
    with pytest.raises(hvdx.MismatchError, match=r"rank 0: allreduce of .*rank 1: allreduce of"):
        hvd.allreduce(tensor, name="odd")
    assert float(hvd.allreduce(1.0, op=hvd.Sum)) == hvd.size()  # and work goes on


def test_refuses_what_cannot_be_reduced(hvd):
    with pytest.raises(ValueError, match="cannot reduce bool"):
        hvd.allreduce(tf.constant([True]))


REPLACED = [
    "DistributedGradientTape",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "broadcast",
    "broadcast_object",
    "broadcast_variables",
    "grouped_allgather",
    "grouped_allreduce",
    "reducescatter",
]


@pytest.mark.parametrize("name", REPLACED)
def test_takes_horovods_arguments(hvd, name):
    import horovod.tensorflow as horovod

    theirs = inspect.signature(getattr(horovod, name)).parameters
    ours = inspect.signature(getattr(hvd, name)).parameters
    assert list(theirs) == list(ours)[: len(theirs)]


def test_the_rest_is_horovods(hvd):
    import horovod.tensorflow as horovod

    assert hvd.size_op is horovod.size_op
    assert hvd.Sum == horovod.Sum
    with pytest.raises(AttributeError):
        _ = hvd.nonsense
