"""Equal copies of variables, and gradients from a tape."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdx

DTYPES = [tf.bool, tf.bfloat16, tf.float16, tf.float32, tf.float64, tf.int8, tf.int64]


class Pair(tf.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weights = [
            tf.Variable(tf.cast(tf.fill(shape, rank), dtype))
            for dtype in DTYPES
            for shape in ((2, 3), (), (0,))
        ]


def test_broadcast_parameters_of_any_type(hvd):
    module = Pair(hvd.rank())
    root = hvd.size() - 1
    hvd.broadcast_parameters(module, root_rank=root)
    for variable, expected in zip(module.weights, Pair(root).weights, strict=True):
        assert variable.shape == expected.shape
        assert bool(tf.reduce_all(variable == expected))
    assert len(set(hvd.allgather_object(hvd.parameter_hash(module)))) == 1


@pytest.mark.ranks(2)
def test_broadcast_variables_of_equal_names(hvd):
    variables = [tf.Variable([float(hvd.rank() + i)], name="same") for i in range(3)]
    hvd.broadcast_variables(variables, root_rank=1)
    assert [float(v[0]) for v in variables] == [1.0, 2.0, 3.0]


def test_broadcast_of_different_variables_is_an_error(hvd):
    variables = [tf.Variable(tf.zeros([2 + (hvd.rank() == 0)]))]
    with pytest.raises(hvdx.MismatchError, match=r"float32 \(3,\).*float32 \(2,\)"):
        hvd.broadcast_variables(variables, root_rank=0)


@pytest.mark.ranks(2)
def test_tensors_cannot_be_written_to(hvd):
    with pytest.raises(TypeError, match=r"tf\.Variable"):
        hvd.broadcast_parameters({"fixed": tf.zeros(2)})


@pytest.mark.ranks(2)
def test_broadcast_of_keras_variables_among_others(hvd):
    rank, root = hvd.rank(), hvd.size() - 1
    variables: list = [tf.Variable([float(rank)]), tf.Variable([f"rank {rank}"])]
    if keras.backend.backend() == "tensorflow":
        variables.append(keras.Variable([float(rank)]))
    hvd.broadcast_variables(variables, root_rank=root, inplace=True)
    assert variables[1].numpy()[0] == f"rank {root}".encode()
    for variable in variables[::2]:
        np.testing.assert_array_equal(variable, [root])


@pytest.mark.ranks(2)
def test_broadcast_within_a_function(hvd):
    """As Horovod's examples do after the first step: not when traced but whenever it runs."""
    rank = hvd.rank()
    counts = [tf.Variable(tf.fill(shape, rank)) for shape in ((2, 3), (), (0,))]
    others = [tf.Variable(rank == 1), tf.Variable(tf.cast([rank], tf.bfloat16))]

    @tf.function
    def step():
        for count in counts:
            count.assign_add(tf.ones(count.shape, tf.int32))
        hvd.broadcast_variables(counts + others, root_rank=1)

    for steps in (1, 2):
        step()
        for count in counts:
            np.testing.assert_array_equal(count, np.full(count.shape, 1 + steps))
        assert bool(others[0])
        assert float(others[1][0]) == 1.0


@pytest.mark.ranks(2)
def test_broadcast_in_place(hvd):
    rank, root = hvd.rank(), hvd.size() - 1
    for dtypes in ([tf.float32, tf.int64, tf.bool], [tf.bfloat16, tf.float32]):
        variables = [tf.Variable(tf.cast([rank, 1], dtype), name="same") for dtype in dtypes]
        values = hvd.broadcast_(variables, root)
        for variable, value in zip(variables, values, strict=True):
            expected = tf.cast([root, 1], variable.dtype)
            assert bool(tf.reduce_all(variable == expected))
            assert bool(tf.reduce_all(value == expected))


@pytest.mark.ranks(2)
def test_objects_within_a_function_and_functions_for_them(hvd):
    found = []

    @tf.function
    def trace():
        found.append(hvd.broadcast_object({"rank": hvd.rank()}, 1))
        found.append(hvd.allgather_object(hvd.rank()))
        return tf.constant(0)

    trace()
    assert found == [{"rank": 1}, list(range(hvd.size()))]
    send = hvd.broadcast_object_fn(root_rank=1, name="often")
    assert [send(hvd.rank() + i) for i in range(2)] == [1, 2]


@pytest.mark.ranks(2)
def test_optimizers_of_tensorflow_1(hvd):
    rank, size = hvd.rank(), hvd.size()
    with tf.Graph().as_default():
        variable = tf.compat.v1.get_variable("v", initializer=float(rank))
        plain = tf.compat.v1.train.GradientDescentOptimizer(1.0)
        optimizer = hvd.DistributedOptimizer(plain, compression=hvd.Compression.fp16)
        train = optimizer.minimize(variable * (rank + 1.0))
        begin = hvd.broadcast_global_variables(0)
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            session.run(begin)
            session.run(train)
            assert session.run(variable) == -(size + 1) / 2
            assert hvd.broadcast_object(rank, 1, session=session) == 1
    with pytest.raises(ValueError, match="Adasum"):
        hvd.DistributedOptimizer(plain, op=hvd.Adasum)
    with pytest.raises(TypeError, match="no optimizer that hvdx knows"):
        hvd.DistributedOptimizer(variable)


@pytest.mark.ranks(2)
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras runs on torch")
def test_optimizers_of_keras(hvd):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    variable = keras.Variable([0.0])
    optimizer.apply([tf.constant([hvd.rank() + 1.0])], [variable])
    np.testing.assert_allclose(variable, [-(hvd.size() + 1) / 2])
