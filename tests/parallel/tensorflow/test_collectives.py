"""Collectives on TensorFlow's tensors and variables, eagerly and in graphs."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import tensorflow as tf

import hvdx
from hvdx.integrations.tensorflow2 import TensorFlowAdapter

FLOATS = [tf.float16, tf.bfloat16, tf.float32, tf.float64]
INTEGERS = [tf.uint8, tf.int8, tf.int16, tf.int32, tf.int64]
MOVED = [tf.bool, tf.bfloat16, tf.uint32, tf.float32, tf.complex64]


@pytest.fixture(params=["eager", pytest.param("graph", marks=pytest.mark.ranks(2))])
def run(request):
    """Call a function as it is, and inside a ``tf.function``."""
    return (lambda f: f) if request.param == "eager" else tf.function


def test_allreduce(hvd, run):
    """Of any type; graphs take their time to trace, so all are in one."""
    rank, size, dtypes = hvd.rank(), hvd.size(), FLOATS + INTEGERS
    whole = tf.reshape(tf.range(6), (2, 3)) + rank
    reduce = run(lambda *xs: [hvd.allreduce(x, op=hvd.Sum, name=f"sum.{x.dtype.name}") for x in xs])
    expected = np.arange(6).reshape(2, 3) * size + sum(range(size))
    for dtype, result in zip(dtypes, reduce(*(tf.cast(whole, d) for d in dtypes)), strict=True):
        assert result.dtype == dtype
        np.testing.assert_array_equal(tf.cast(result, tf.float64), expected, err_msg=str(dtype))


def test_operators(hvd, run):
    values = np.arange(hvd.size()) + 1.5
    expected = {"Average": values.mean(), "Min": 1.5, "Max": values[-1], "Product": values.prod()}
    reduce = run(lambda x: [hvd.allreduce(x, op=getattr(hvd, o), name=o) for o in expected])
    results = reduce(tf.constant([values[hvd.rank()]]))
    for (op, one), result in zip(expected.items(), results, strict=True):
        np.testing.assert_allclose(result, [one], rtol=1e-12, err_msg=op)


@pytest.mark.ranks(2)
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


@pytest.mark.ranks(2)
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


@pytest.mark.parametrize("method", ["none", "fp16", "topk"])
def test_indexed_slices(hvd, run, monkeypatch, method):
    """Rows are gathered; under a method they travel in 2 bytes a number, or 1, and a scale."""
    rank, size = hvd.rank(), hvd.size()
    sent, gather = [], TensorFlowAdapter.allgather

    def watched(self, tensor, **options):
        sent.append((tensor.dtype, tensor.shape[1:].num_elements()))
        return gather(self, tensor, **options)

    monkeypatch.setattr(TensorFlowAdapter, "allgather", watched)

    def mean(values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([size + 1, 2]))
        chosen = getattr(hvd.Compression, method)
        reduced = hvd.allreduce(slices, name=f"sparse.{method}", compression=chosen)
        assert isinstance(reduced, tf.IndexedSlices)
        return tf.convert_to_tensor(reduced)

    values = tf.fill([2, 2], float(rank + 1))
    result = run(mean)(values, tf.constant([rank, size], tf.int64))
    expected = [*[(r + 1) / size for r in range(size)], (size + 1) / 2]
    np.testing.assert_allclose(result[:, 0], expected, rtol=1e-6)
    told = {"fp16": [(tf.uint8, 4 + 2 * 2)], "topk": [(tf.uint8, 4 + 2 + 1)]}
    assert sent == told.get(method, [(tf.float32, 2), (tf.int64, 1)])


@pytest.mark.ranks(2)
def test_moves_any_type(hvd, run):
    rank, size = hvd.rank(), hvd.size()
    gather = run(lambda *xs: [hvd.allgather(x, name=f"g.{x.dtype.name}") for x in xs])
    send = run(lambda *xs: [hvd.broadcast(x, size - 1, name=f"b.{x.dtype.name}") for x in xs])
    gathered = gather(*(tf.cast(tf.fill([rank + 1, 2], rank), dtype) for dtype in MOVED))
    sent = send(*(tf.cast([rank, 1], dtype) for dtype in MOVED))
    for dtype, rows, pair in zip(MOVED, gathered, sent, strict=True):
        assert rows.dtype == pair.dtype == dtype
        assert rows.shape[0] in (None, size * (size + 1) // 2)
        expected = tf.cast(np.repeat(np.arange(size), np.arange(size) + 1), dtype)
        assert bool(tf.reduce_all(rows[:, 0] == expected)), dtype
        assert bool(tf.reduce_all(pair == tf.cast([size - 1, 1], dtype))), dtype


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


def test_objects_and_barrier(hvd):
    assert hvd.broadcast_object({"rank": hvd.rank()}, 1) == {"rank": 1}
    assert hvd.allgather_object(hvd.rank() * "x") == ["x" * r for r in range(hvd.size())]
    hvd.barrier()


def test_mismatch_names_what_each_rank_has(hvd):
    odd = hvd.rank() == 0
    pair = tf.ones([2])
    wrong = {
        "allreduce": lambda: hvd.allreduce(tf.ones([2 + odd]), name="odd"),
        "grouped_allreduce": lambda: hvd.grouped_allreduce([pair, tf.ones([2 + odd])]),
        "allgather": lambda: hvd.allgather(tf.ones([2, 2 + odd])),
        "broadcast": lambda: hvd.broadcast(pair, 0 if odd else 1),
        "alltoall": lambda: hvd.alltoall(tf.ones([hvd.size(), 2 + odd])),
        "reducescatter": lambda: hvd.reducescatter(tf.ones([4 + odd])),
    }
    other = tf.cast(pair, tf.float64) if odd else pair
    wrong["allreduce of "] = lambda: hvd.allreduce(other)
    for operation, call in wrong.items():
        told = rf"rank 0: {operation}.*rank 1: {operation}"
        with pytest.raises(hvdx.MismatchError, match=told) as error:
            call()
        assert isinstance(error.value, tf.errors.FailedPreconditionError)  # what Horovod raises
        assert float(hvd.allreduce(1.0, op=hvd.Sum)) == hvd.size()  # and work goes on
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value)


@pytest.mark.ranks(2)
def test_mismatch_in_a_graph(hvd):
    step = tf.function(lambda x: hvd.allreduce(x, name="odd.in.graph"))
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"Mismatched(.|\n)*odd\.in\.graph"):
        step(tf.ones([2 + (hvd.rank() == 0)]))


def test_wrong_splits(hvd):
    size = hvd.size()
    for tensor, splits in (
        (tf.ones([size - 1]), [2] * size),  # more than there is
        (tf.ones([size]), [1] * (size + 1)),  # for more ranks than there are
        (tf.ones([size]), tf.ones([size])),  # no integers
        (tf.ones([size]), [-1] * size),  # Horovod takes these, and crashes
        (tf.ones([size + 1]), None),  # not even
    ):
        with pytest.raises(tf.errors.InvalidArgumentError):
            hvd.alltoall(tensor, splits)


def test_average_of_halves_does_not_overflow(hvd, run):
    """Horovod sums first: the mean of 60000 and 60000 is inf."""
    tensor = tf.constant([60000.0, 6e-8, hvd.rank()], tf.float16)
    result = run(lambda x: hvd.allreduce(x, name="halves"))(tensor)
    assert result.dtype == tf.float16
    expected = [60000.0, 6e-8, (hvd.size() - 1) / 2]
    np.testing.assert_allclose(tf.cast(result, tf.float64), expected, rtol=1e-3, atol=7e-8)


def test_grouped_reducescatter(hvd, run):
    size, rank = hvd.size(), hvd.rank()
    tensors = [tf.cast(tf.range(2 * size), dtype) for dtype in (tf.float32, tf.int8, tf.bfloat16)]
    tensors.append(tf.ones([size + 1, 2], tf.float64))
    results = run(lambda *x: hvd.grouped_reducescatter(list(x), op=hvd.Sum))(*tensors)
    for tensor, result in zip(tensors[:3], results[:3], strict=True):
        assert result.dtype == tensor.dtype
        own = tf.cast(result, tf.float32)
        np.testing.assert_array_equal(own, [2 * rank * size, (2 * rank + 1) * size])
    np.testing.assert_array_equal(results[3], np.full([1 + (rank == 0), 2], size))
    assert hvd.grouped_reducescatter([]) == []


def test_indexed_slices_in_a_group(hvd, run):
    rank, size = hvd.rank(), hvd.size()

    def reduce(values, dense):
        slices = tf.IndexedSlices(values, tf.constant([rank]), tf.constant([size, 1]))
        sparse, result = hvd.grouped_allreduce([slices, dense], op=hvd.Sum)
        return tf.convert_to_tensor(sparse), result

    sparse, dense = run(reduce)(tf.fill([1, 1], rank + 1.0), tf.ones([2]))
    np.testing.assert_array_equal(sparse[:, 0], np.arange(size) + 1)
    np.testing.assert_array_equal(dense, [size, size])
    slices = tf.IndexedSlices(tf.ones([1, 1]), tf.constant([0]), tf.constant([2, 1]))
    with pytest.raises(NotImplementedError, match="IndexedSlices"):
        hvd.allreduce(slices, op=hvd.Max)


@pytest.mark.ranks(2)
def test_names_and_scopes(hvd):
    """The same name in two scopes is two operations, as in Horovod, unless scopes are ignored."""

    @tf.function
    def step(x):
        results = []
        for scope in ("one", "two"):
            with tf.name_scope(scope):
                results.append(hvd.allreduce(x * (len(results) + 1.0), op=hvd.Sum, name="same"))
        with tf.name_scope(f"rank{hvd.rank()}"):
            results.append(hvd.allreduce(x, op=hvd.Sum, name="other", ignore_name_scope=True))
        return results

    for one, expected in zip(step(tf.ones([1])), (1, 2, 1), strict=True):
        np.testing.assert_array_equal(one, [expected * hvd.size()])


def test_process_sets(hvd, run, process_set):
    ranks = process_set.ranks
    if hvd.rank() in ranks:
        size = len(ranks)
        x = tf.fill([size], float(hvd.rank()))
        call = run(
            lambda x: (
                hvd.allreduce(x, process_set=process_set),
                hvd.allgather(x[:1], process_set=process_set),
                hvd.broadcast(x, ranks[-1], process_set=process_set),
                hvd.alltoall(x, process_set=process_set),
                hvd.reducescatter(x, op=hvd.Sum, process_set=process_set),
            )
        )
        mean, rows, sent, exchanged, own = call(x)
        np.testing.assert_allclose(mean, [sum(ranks) / size] * size)
        np.testing.assert_array_equal(rows, ranks)
        np.testing.assert_array_equal(sent, [ranks[-1]] * size)
        np.testing.assert_array_equal(exchanged, ranks)
        np.testing.assert_array_equal(own, [sum(ranks)])
    hvd.barrier()


def test_join(hvd):
    """The last rank has the most batches; the others add zeros to what is left of its sums."""
    for step in range(hvd.rank() + 1):
        result = hvd.allreduce(tf.ones([2]), op=hvd.Sum, name="uneven")
        np.testing.assert_array_equal(result, [hvd.size() - step] * 2)
    last = hvd.join()
    assert int(last.numpy()) == hvd.size() - 1


@pytest.mark.ranks(2)
def test_refuses_what_cannot_be_reduced(hvd):
    with pytest.raises(ValueError, match="cannot reduce bool"):
        hvd.allreduce(tf.constant([True]))


@pytest.mark.ranks(2)
def test_takes_horovods_arguments(hvd):
    import horovod.tensorflow as horovod

    for name, theirs in vars(horovod).items():
        if name.startswith("_") or name == "init" or not inspect.isfunction(theirs):
            continue  # Horovod's init takes anything
        wanted = inspect.signature(theirs).parameters
        taken = inspect.signature(getattr(hvd, name)).parameters
        assert list(wanted) == list(taken)[: len(wanted)], name
        for key, parameter in wanted.items():
            if key not in ("process_set", "compression"):  # None is all ranks; ours are our own
                assert taken[key].default == parameter.default, (name, key)


@pytest.mark.ranks(2)
def test_the_rest_is_horovods(hvd):
    import horovod.tensorflow as horovod

    assert hvd.size_op is horovod.size_op
    assert [int(op()) for op in (hvd.rank_op, hvd.size_op)] == [hvd.rank(), hvd.size()]
    assert int(hvd.process_set_included_op()) == 1
    assert hvd.check_num_rank_power_of_2(4)
    assert hvd.Sum == horovod.Sum
    with pytest.raises(AttributeError):
        _ = hvd.nonsense
