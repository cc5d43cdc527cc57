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


def test_broadcast_variables_of_equal_names(hvd):
    variables = [tf.Variable([float(hvd.rank() + i)], name="same") for i in range(3)]
    hvd.broadcast_variables(variables, root_rank=1)
    assert [float(v[0]) for v in variables] == [1.0, 2.0, 3.0]


def test_broadcast_of_different_variables_is_an_error(hvd):
    variables = [tf.Variable(tf.zeros([2 + (hvd.rank() == 0)]))]
    with pytest.raises(hvdx.MismatchError, match=r"float32 \(3,\).*float32 \(2,\)"):
        hvd.broadcast_variables(variables, root_rank=0)


def test_tensors_cannot_be_written_to(hvd):
    with pytest.raises(TypeError, match=r"tf\.Variable"):
        hvd.broadcast_parameters({"fixed": tf.zeros(2)})


@pytest.mark.parametrize("kind", ["tensorflow", "keras"])
@pytest.mark.parametrize("graph", [False, True])
def test_tape_averages(hvd, kind, graph):
    if kind == "keras" and keras.backend.backend() != "tensorflow":
        pytest.skip("Keras runs on torch")
    make = tf.Variable if kind == "tensorflow" else keras.Variable
    variables = [make(np.float32([1.0, 2.0])), make(np.float32(3.0))]

    def gradients(factor):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variables[0] * variables[1]) * factor
        tape = hvd.DistributedGradientTape(tape, compression=hvd.Compression.none)
        return tape.gradient(loss, variables)

    call = tf.function(gradients) if graph else gradients
    grads = call(tf.constant(hvd.rank() + 1.0))
    mean = (hvd.size() + 1) / 2
    np.testing.assert_allclose(grads[0], [3 * mean, 3 * mean], rtol=1e-6)
    np.testing.assert_allclose(grads[1], 3 * mean, rtol=1e-6)


def test_tape_of_one_source(hvd):
    variable = tf.Variable(2.0)
    with tf.GradientTape() as tape:
        loss = variable * variable * (hvd.rank() + 1.0)
    gradient = hvd.DistributedGradientTape(tape, compression=hvd.Compression.fp16).gradient(
        loss, variable
    )
    np.testing.assert_allclose(gradient, 4 * (hvd.size() + 1) / 2)
