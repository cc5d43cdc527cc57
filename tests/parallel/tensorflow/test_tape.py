"""DistributedGradientTape: means of gradients, in graphs and eagerly, of all that may be asked."""

from __future__ import annotations

import gc
import traceback
import weakref
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdx
from hvdx.integrations import tensorflow_tape

KINDS = ["tensorflow"] + ["keras"] * (keras.backend.backend() == "tensorflow")


@pytest.fixture(params=["eager", pytest.param("graph", marks=pytest.mark.ranks(2))])
def run(request):
    return (lambda f: f) if request.param == "eager" else tf.function


def mean(hvd: Any) -> float:
    """Return the mean over the ranks of rank + 1."""
    return (hvd.size() + 1) / 2


def recorded(compute: Any, persistent: bool = False) -> tuple[tf.GradientTape, Any]:
    with tf.GradientTape(persistent=persistent) as tape:
        target = compute()
    return tape, target


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_structures_and_missing_gradients(hvd, run, kind):
    make = tf.Variable if kind == "tensorflow" else keras.Variable
    a, b, unused, partly = (make(np.float32([i + 1.0, 2.0])) for i in range(4))
    here = hvd.rank() == 0

    @run
    def gradients(factor):
        tape, target = recorded(
            lambda: (
                factor * tf.reduce_sum(a * b) + (tf.reduce_sum(partly) * factor if here else 0.0)
            )
        )
        return hvd.DistributedGradientTape(tape).gradient(
            target, {"a": a, "rest": [b, (unused, partly)]}
        )

    for _ in range(2):
        grads = gradients(tf.constant(hvd.rank() + 1.0))
        np.testing.assert_allclose(grads["a"], mean(hvd) * np.array([2.0, 2.0]), rtol=1e-6)
        np.testing.assert_allclose(grads["rest"][0], mean(hvd) * np.array([1.0, 2.0]), rtol=1e-6)
        assert grads["rest"][1][0] is None
        np.testing.assert_allclose(grads["rest"][1][1], [1 / hvd.size()] * 2, rtol=1e-6)


@pytest.mark.ranks(2)
def test_the_tape_given_stays_local(hvd):
    x = tf.Variable(2.0)
    factor = hvd.rank() + 1.0
    tape, target = recorded(lambda: x * x * factor, persistent=True)
    averaging = hvd.DistributedGradientTape(tape)
    for _ in range(2):
        np.testing.assert_allclose(averaging.gradient(target, x), 4 * mean(hvd))
        np.testing.assert_allclose(tape.gradient(target, x), 4 * factor)
    assert float(averaging.jacobian(target, x)) == 4 * factor
    assert type(averaging).__name__ == "GradientTape"
    with pytest.raises(TypeError, match="already"):
        hvd.DistributedGradientTape(averaging)
    with pytest.raises(TypeError, match="is no tf"):
        hvd.DistributedGradientTape(x)


@pytest.mark.ranks(2)
def test_wrapped_before_and_while_recording(hvd):
    class Own(tf.GradientTape):
        def gradient(self, *args: Any, **options: Any) -> Any:
            return tf.nest.map_structure(lambda g: g * 2, super().gradient(*args, **options))

    x = tf.Variable(3.0)
    factor = hvd.rank() + 1.0
    with hvd.DistributedGradientTape(Own()) as before:
        target = x * factor
    np.testing.assert_allclose(before.gradient(target, x), 2 * mean(hvd))
    assert isinstance(before, Own)
    with tf.GradientTape() as tape:
        target = x * factor
        grads = hvd.DistributedGradientTape(tape).gradient(target, [x])
    np.testing.assert_allclose(grads, [mean(hvd)])
    with tf.GradientTape() as tape:
        watched = tf.constant([1.0, 2.0])
        tape.watch(watched)
        target = tf.reduce_sum(watched * factor)
    np.testing.assert_allclose(
        hvd.DistributedGradientTape(tape).gradient(target, watched), [mean(hvd)] * 2
    )


@pytest.mark.parametrize("as_dense", [False, True])
def test_sparse_gradients(hvd, run, as_dense):
    rank, size = hvd.rank(), hvd.size()
    table, dense = tf.Variable(tf.ones([size + 1, 2])), tf.Variable([1.0])
    absent = tf.Variable(tf.ones([2, 2]))  # its gradient is sparse, and only rank 0 has one

    @run
    def gradients():
        def compute():
            rows = tf.reduce_sum(tf.gather(table, [rank, size]) * (rank + 1.0))
            some = tf.reduce_sum(tf.gather(absent, [0])) if rank == 0 else 0.0
            return rows + tf.reduce_sum(dense) * rank + some

        tape, target = recorded(compute)
        tape = hvd.DistributedGradientTape(tape, sparse_as_dense=as_dense)
        grads = tape.gradient(target, [table, dense, absent])
        assert isinstance(grads[0], tf.IndexedSlices) is not as_dense
        return [tf.convert_to_tensor(grad) for grad in grads]

    for _ in range(2):
        grads = gradients()
        expected = [*((r + 1) / size for r in range(size)), mean(hvd)]
        np.testing.assert_allclose(grads[0], np.stack([expected] * 2, 1), rtol=1e-6)
        np.testing.assert_allclose(grads[1], [(size - 1) / 2])
        np.testing.assert_allclose(grads[2], [[1 / size] * 2, [0.0] * 2], rtol=1e-6)


class Doubling:
    """A compressor as written for Horovod."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        return tf.cast(tensor, tf.float64) * 2, tensor.dtype

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        return tf.cast(tensor / 2, ctx)


def test_options(hvd, run, process_set):
    x, y = tf.Variable([1.0, 2.0]), tf.Variable(tf.zeros([3], tf.bfloat16))
    factor = hvd.rank() + 1.0
    total = mean(hvd) * hvd.size()

    def gradients(**options: Any) -> Any:
        @run
        def step():
            tape, target = recorded(
                lambda: tf.reduce_sum(x * factor) + tf.reduce_sum(tf.cast(y, tf.float32) * factor)
            )
            return hvd.DistributedGradientTape(tape, **options).gradient(target, [x, y])

        x_grad, y_grad = step()
        assert y_grad.dtype == tf.bfloat16
        np.testing.assert_allclose(tf.cast(y_grad, tf.float32), np.full(3, x_grad[0]), rtol=1e-2)
        return x_grad

    np.testing.assert_allclose(gradients(op=hvd.Sum), [total] * 2)
    np.testing.assert_allclose(gradients(gradient_predivide_factor=3.0), [mean(hvd)] * 2, rtol=1e-6)
    for compression in (hvd.Compression.fp16, Doubling):
        grads = gradients(compression=compression)
        np.testing.assert_allclose(grads, [mean(hvd)] * 2, rtol=1e-3)
        known = len(tensorflow_tape._plans)
        gradients(compression=compression)
        assert len(tensorflow_tape._plans) == known  # another tape, but nothing new
    np.testing.assert_allclose(gradients(groups=2), [mean(hvd)] * 2)
    np.testing.assert_allclose(gradients(groups=[[x, y]]), [mean(hvd)] * 2)
    np.testing.assert_allclose(gradients(op=hvd.Max), [hvd.size()] * 2)
    own = gradients(process_set=process_set)
    members = len(process_set.ranks)
    expected = (members + 1) / 2 if hvd.rank() in process_set.ranks else factor
    np.testing.assert_allclose(own, [expected] * 2, rtol=1e-6)


@pytest.mark.ranks(2)
def test_options_that_have_no_meaning(hvd):
    with tf.GradientTape() as tape:
        x = tf.Variable(1.0)
        target = x * 2.0
    with pytest.raises(ValueError, match="gradient_predivide_factor needs"):
        hvd.DistributedGradientTape(tape, op=hvd.Sum, gradient_predivide_factor=2.0)
    with pytest.raises(ValueError, match="groups=0"):
        hvd.DistributedGradientTape(tape, groups=0)
    with pytest.raises(ValueError, match="unknown compression"):
        hvd.DistributedGradientTape(tape, compression="fp16")
    with pytest.raises(ValueError, match="local_layers"):
        hvd.PartialDistributedGradientTape(tape, local_layers=[1])
    if not hvd.mpi_enabled():
        adasum = hvd.DistributedGradientTape(tape, op=hvd.Adasum)
        with pytest.raises(NotImplementedError, match="Adasum needs MPI"):
            adasum.gradient(target, x)


def test_sources_that_differ_between_ranks(hvd, run):
    x = tf.Variable(tf.ones([2 + (hvd.rank() == 0)]))

    def step():
        tape, target = recorded(lambda: tf.reduce_sum(x))
        return hvd.DistributedGradientTape(tape).gradient(target, x)

    with pytest.raises(hvdx.MismatchError, match=r"float32 \(3,\).*float32 \(2,\)"):
        run(step)()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras runs on torch")
@pytest.mark.parametrize("scale", [True, False])
def test_partial_tape(hvd, run, scale):
    factor = hvd.rank() + 1.0
    shared, local = (keras.layers.Dense(1, kernel_initializer="ones") for _ in range(2))
    x = tf.ones([1, 2])
    local(shared(x))
    variables = [*shared.trainable_variables, *local.trainable_variables]

    @run
    def gradients():
        tape, target = recorded(lambda: tf.reduce_sum(local(shared(x))) * factor)
        tape = hvd.PartialDistributedGradientTape(
            tape, local_layers=local, scale_local_gradients=scale
        )
        ours, theirs = tape.get_local_and_global_gradients(target, variables)
        assert [id(v) for v, _ in [*theirs, *ours]] == [id(v) for v in variables]
        return [grad for _, grad in theirs], [grad for _, grad in ours]

    theirs, ours = gradients()
    np.testing.assert_allclose(theirs[0], np.full([2, 1], mean(hvd)), rtol=1e-6)
    np.testing.assert_allclose(theirs[1], [mean(hvd)], rtol=1e-6)
    divisor = hvd.size() if scale else 1
    np.testing.assert_allclose(ours[0], [[2.0 * factor / divisor]], rtol=1e-6)
    np.testing.assert_allclose(ours[1], [factor / divisor], rtol=1e-6)


@pytest.mark.ranks(2)
def test_local_sources_that_are_sparse_or_missing(hvd):
    table, other = tf.Variable(tf.ones([3, 1])), tf.Variable(1.0)
    tape, target = recorded(lambda: tf.reduce_sum(tf.gather(table, [1])) * hvd.size())
    tape = hvd.DistributedGradientTape(tape)
    tape.register_local_source(table)
    tape.register_local_source(other)
    grads = tape.gradient(target, [table, other])
    assert isinstance(grads[0], tf.IndexedSlices)
    np.testing.assert_allclose(tf.convert_to_tensor(grads[0]), [[0.0], [1.0], [0.0]])
    assert grads[1] is None


@pytest.mark.ranks(2)
def test_training_equals_one_process(hvd, run):
    """Two layers, uneven buckets, double precision: N ranks with b rows are one with N * b."""
    random = np.random.default_rng(3)
    x, y = random.normal(size=(4 * hvd.size(), 5)), random.normal(size=(4 * hvd.size(), 1))
    start = [random.normal(size=(5, 7)), random.normal(size=7), random.normal(size=(7, 1))]

    def train(rows: slice, wrap: Any) -> list[tf.Variable]:
        weights = [tf.Variable(each) for each in start]

        @run
        def step():
            def compute():
                hidden = tf.tanh(x[rows] @ weights[0] + weights[1])
                return tf.reduce_mean((hidden @ weights[2] - y[rows]) ** 2)

            tape, loss = recorded(compute)
            for weight, grad in zip(weights, wrap(tape).gradient(loss, weights), strict=True):
                weight.assign_sub(0.1 * grad)

        for _ in range(5):
            step()
        return weights

    own = slice(4 * hvd.rank(), 4 * hvd.rank() + 4)
    ours = train(own, hvd.DistributedGradientTape)
    whole = train(slice(None), lambda tape: tape)
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.ranks(2)
def test_plans_end_with_their_variables(hvd):
    def step() -> tuple[Any, int]:
        x = tf.Variable([1.0, 2.0])
        tape, target = recorded(lambda: tf.reduce_sum(x))
        hvd.DistributedGradientTape(tape).gradient(target, x)
        return weakref.ref(x), len(tensorflow_tape._plans)

    last, kept = step()
    gc.collect()
    assert last() is None
    assert len(tensorflow_tape._plans) < kept


@pytest.mark.ranks(2)
def test_autograph_rewrites_the_callers_code_only(hvd):
    found = []

    class Looking:
        """A compressor as written for Horovod, called in the midst of hvdx."""

        @staticmethod
        def compress(tensor):
            files = [frame.filename for frame in traceback.extract_stack()]
            found.append(sum("__autograph_generated_file" in file for file in files))
            return tensor, None

        @staticmethod
        def decompress(tensor, context):
            return tensor

    @tf.function
    def step(x):
        tape, target = recorded(lambda: tf.reduce_sum(3.0 * w))
        tape = hvd.DistributedGradientTape(tape, compression=Looking)
        return tape.gradient(target, w), hvd.allreduce(x, compression=Looking)

    w = tf.Variable([1.0, 2.0])
    gradient, total = step(tf.ones(2))
    np.testing.assert_array_equal(gradient, [3.0, 3.0])
    np.testing.assert_array_equal(total, [1.0, 1.0])
    assert found and set(found) == {1}


@pytest.mark.ranks(2)
def test_xla_is_refused(hvd):
    x = tf.Variable([1.0])

    @tf.function(jit_compile=True)
    def step():
        tape, target = recorded(lambda: tf.reduce_sum(x))
        return hvd.DistributedGradientTape(tape).gradient(target, x)

    with pytest.raises(ValueError, match="XLA cannot compile Horovod's operations"):
        step()
    with pytest.raises(ValueError, match="XLA cannot compile Horovod's operations"):
        tf.function(lambda: hvd.allreduce(tf.ones(1)), jit_compile=True)()
