"""Gradients through the collectives: Horovod's, eagerly and in graphs, of any float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

FLOATS = [tf.float16, tf.bfloat16, tf.float32, tf.float64]


@pytest.fixture(params=["eager", pytest.param("graph", marks=pytest.mark.ranks(2))])
def run(request):
    return (lambda f: f) if request.param == "eager" else tf.function


@pytest.fixture
def floats(request):
    """All types eagerly; in graphs, which take their time to trace, that of fewest digits."""
    return [tf.bfloat16] if "graph" in request.node.name else FLOATS


def gradients(run: Any, call: Callable[..., Any], *tensors: Any, weights: Any) -> list[Any]:
    """Return d(sum of weights * call(*tensors)) / d(tensors), asked for twice."""

    @run
    def differentiate(*xs: Any) -> tuple[list[Any], list[Any]]:
        with tf.GradientTape(persistent=True) as tape:
            for x in xs:
                tape.watch(x)
            results = call(*xs)
            results = results if isinstance(results, list) else [results]
            losses = [
                tf.reduce_sum(result * tf.cast(weight, result.dtype))
                for result, weight in zip(results, weights, strict=True)
            ]
        return tape.gradient(losses, list(xs)), tape.gradient(losses, list(xs))

    first, second = differentiate(*tensors)
    for one, other, tensor in zip(first, second, tensors, strict=True):
        assert one.dtype == tensor.dtype
        assert one.shape == tensor.shape
        np.testing.assert_array_equal(as_array(one), as_array(other))
    return [as_array(each) for each in first]


def as_array(tensor: Any) -> np.ndarray:
    return tf.cast(tensor, tf.float64).numpy()


def test_allreduce(hvd, run, floats):
    rank, size = hvd.rank(), hvd.size()
    weight = np.array([1.0, 2.0]) * (rank + 1)
    total = np.array([1.0, 2.0]) * sum(range(1, size + 1))
    for dtype in floats:
        x = tf.ones([2], dtype)
        for op, expected in ((hvd.Sum, total), (hvd.Average, total / size)):
            (grad,) = gradients(run, lambda x: hvd.allreduce(x, op=op), x, weights=[weight])  # noqa: B023
            np.testing.assert_allclose(grad, expected, rtol=1e-2)


@pytest.mark.ranks(2)
def test_scale_factors(hvd, run):
    """Horovod keeps them in single precision: wrong by 1e-8 for doubles."""
    size = hvd.size()
    (grad,) = gradients(
        run,
        lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.1, postscale_factor=1 / 3),
        tf.ones([2], tf.float64),
        weights=[np.ones(2)],
    )
    np.testing.assert_allclose(grad, np.full(2, size * 0.1 / 3), rtol=1e-14)


def test_grouped_allreduce_of_several_dtypes(hvd, run):
    rank, size = hvd.rank(), hvd.size()
    tensors = [tf.ones([i + 1], dtype) for i, dtype in enumerate(FLOATS)]
    weights = [np.full(i + 1, rank + i) for i in range(len(FLOATS))]
    grads = gradients(run, lambda *x: hvd.grouped_allreduce(list(x)), *tensors, weights=weights)
    for i, grad in enumerate(grads):
        np.testing.assert_allclose(grad, np.full(i + 1, (size - 1) / 2 + i), rtol=1e-2)


def test_allgather_of_several_lengths(hvd, run, floats):
    rank, size = hvd.rank(), hvd.size()
    whole = np.repeat(np.arange(size), np.arange(size) + 1)[:, None] * [1.0, 2.0]
    expected = np.full([rank + 1, 2], rank) * [1.0, 2.0]  # weights are equal: their mean
    for dtype in floats:
        x = tf.ones([rank + 1, 2], dtype)
        (grad,) = gradients(run, hvd.allgather, x, weights=[whole])
        np.testing.assert_allclose(grad, expected)
        pair = gradients(
            run,
            lambda *x: hvd.grouped_allgather(list(x)),
            x,
            tf.ones([1], tf.float32),
            weights=[whole, np.arange(size)],
        )
        np.testing.assert_allclose(pair[0], expected)
        np.testing.assert_allclose(pair[1], [rank])


def test_broadcast(hvd, run, floats):
    rank, size = hvd.rank(), hvd.size()
    for dtype in floats:
        (grad,) = gradients(
            run, lambda x: hvd.broadcast(x, size - 1), tf.ones([2], dtype), weights=[[rank, 1.0]]
        )
        expected = [(size - 1) / 2, 1.0] if rank == size - 1 else [0.0, 0.0]
        np.testing.assert_allclose(grad, expected)


def test_alltoall(hvd, run, floats):
    rank, size = hvd.rank(), hvd.size()
    for dtype in floats:
        x = tf.ones([size, 3], dtype)
        (grad,) = gradients(run, hvd.alltoall, x, weights=[np.full([size, 3], rank)])
        np.testing.assert_allclose(grad, np.repeat(np.arange(size), 3).reshape(size, 3))
        # Rank r gets r rows of each; the row beyond has no gradient, where Horovod's is too short.
        x = tf.ones([sum(range(size)) + 1], dtype)
        (grad,) = gradients(
            run, lambda x: hvd.alltoall(x, splits=list(range(size)))[0], x, weights=[rank]
        )
        np.testing.assert_allclose(grad, [*np.repeat(np.arange(size), np.arange(size)), 0])


def test_reducescatter(hvd, run, floats):
    rank, size = hvd.rank(), hvd.size()
    rows = 2 * size + 1  # the first rank gets one more
    counts = [3] + [2] * (size - 1)
    for dtype in floats:
        x = tf.ones([rows], dtype)
        for op, factor in ((hvd.Average, 1.0), (hvd.Sum, size)):
            expected = np.repeat(np.arange(size), counts) * factor
            (grad,) = gradients(
                run,
                lambda x: hvd.reducescatter(x, op=op, prescale_factor=0.5, postscale_factor=2.0),  # noqa: B023
                x,
                weights=[rank],
            )
            np.testing.assert_allclose(grad, expected)
            grads = gradients(
                run,
                lambda *x: hvd.grouped_reducescatter(list(x), op=op),  # noqa: B023
                x,
                tf.ones([rows, 2], dtype),
                weights=[rank, rank],
            )
            np.testing.assert_allclose(grads[0], expected)
            np.testing.assert_allclose(grads[1], np.stack([expected] * 2, 1))


def test_in_a_process_set(hvd, run, process_set):
    rank, ranks = hvd.rank(), process_set.ranks
    if rank in ranks:
        weight = np.arange(len(ranks) * 2.0)
        (grad,) = gradients(
            run,
            lambda x: hvd.allgather(x, process_set=process_set),
            tf.ones([2]),
            weights=[weight],
        )
        np.testing.assert_allclose(grad, weight[2 * rank : 2 * rank + 2])
        (grad,) = gradients(
            run,
            lambda x: hvd.reducescatter(x, op=hvd.Sum, process_set=process_set),
            tf.ones([len(ranks)]),
            weights=[rank + 1],
        )
        np.testing.assert_allclose(grad, (np.array(ranks) + 1) * len(ranks))
    hvd.barrier()


@pytest.mark.ranks(2)
def test_of_gradients(hvd):
    """Second derivatives: y = mean of x^3, on ranks that hold the same x."""
    x = tf.Variable([2.0])
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            y = tf.reduce_sum(hvd.allgather(x**3)[:1])
        grad = inner.gradient(y, x)
    share = 1.0 if hvd.rank() == 0 else 0.0
    np.testing.assert_allclose(grad, [12.0 * share])
    np.testing.assert_allclose(outer.gradient(grad, x), [12.0 * share])
