"""Every verb on every framework gives what it gives on NumPy."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps, ops_for

FLOATS = ["float16", "float32", "float64"]


class Framework(NamedTuple):
    """A framework's verbs, and the ways from and to NumPy."""

    ops: Any
    tensor: Callable[[np.ndarray], Any]
    run: Callable[..., np.ndarray]  # run(verb, tensor, *arguments)


def eagerly(verb: Callable[..., Any], tensor: Any, *arguments: Any) -> np.ndarray:
    return np.asarray(verb(tensor, *arguments))


def traced(verb: Callable[..., Any], tensor: Any, *arguments: Any) -> np.ndarray:
    import tensorflow as tf

    return tf.function(lambda given: verb(given, *arguments))(tensor).numpy()


@pytest.fixture(scope="module", params=["numpy", "torch", "tensorflow", "tf.function"])
def framework(request: pytest.FixtureRequest) -> Framework:
    if request.param == "numpy":
        return Framework(NumpyOps(), np.array, eagerly)
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        return Framework(TorchOps(), torch.tensor, eagerly)
    tf = pytest.importorskip("tensorflow")
    run = traced if request.param == "tf.function" else eagerly
    return Framework(TensorFlowOps(), tf.constant, run)


def same(result: np.ndarray, expected: np.ndarray) -> None:
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "int64"])
def test_dtype_is_numpys_name(framework, dtype):
    assert framework.ops.dtype(framework.tensor(np.ones(2, dtype))) == dtype


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_cast(framework, dtype, to):
    # Ties of float16 among them: 2049 and 2051 lie between representable neighbours.
    numbers = np.array([0.0, 2049, 2051, -2049, 1e-8, np.inf, np.nan], dtype)
    if to != "float16":
        numbers[-1] = 60000  # below float16's largest
    result = framework.run(framework.ops.cast, framework.tensor(numbers), to)
    with np.errstate(over="ignore"):
        same(result, numbers.astype(to))


def test_cast_rounds_to_even(framework):
    halves = framework.tensor(np.array([2049, 2051], np.float32))
    assert framework.run(framework.ops.cast, halves, "float16").tolist() == [2048, 2052]


@pytest.mark.parametrize("dtype", FLOATS)
def test_clip(framework, dtype):
    numbers = np.array([-np.inf, -3, -2, 0, 1.5, 2, 7, np.inf, np.nan], dtype)
    result = framework.run(framework.ops.clip, framework.tensor(numbers), -2.0, 1.5)
    same(result, np.array([-np.inf, -2, -2, 0, 1.5, 1.5, 1.5, np.inf, np.nan], dtype))


@pytest.mark.parametrize("numbers", [[], [1.5, -2.0], [1.5, np.nan], [0.0, np.inf], [-2.5, 0.0]])
def test_clip_where_little_exceeds(framework, numbers):
    numbers = np.array(numbers, "f4")
    result = framework.run(framework.ops.clip, framework.tensor(numbers), -2.0, 1.5)
    same(result, np.where(np.isinf(numbers), numbers, np.clip(numbers, -2, 1.5)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factor", [0.1, 3, -1.0 / 3])
def test_scale_keeps_the_dtype(framework, dtype, factor):
    numbers = np.array([[1.0, -7.0], [0.5, 1000.0]], dtype)
    result = framework.run(framework.ops.scale, framework.tensor(numbers), factor)
    assert (result.dtype, result.shape) == (dtype, (2, 2))
    np.testing.assert_allclose(result, numbers.astype("float64") * factor, np.finfo(dtype).eps)


def test_a_tensor_without_dimensions(framework):
    scalar = framework.tensor(np.array(4.0, np.float32))
    result = framework.run(framework.ops.scale, scalar, 0.5)
    same(np.asarray(result), np.array(2.0, np.float32))


def test_arguments_stay_as_they_are(framework):
    tensor = framework.tensor(np.array([1.0, 5.0], np.float32))
    for verb, arguments in [("clip", (0.0, 2.0)), ("scale", (9.0,)), ("cast", ("float16",))]:
        framework.run(getattr(framework.ops, verb), tensor, *arguments)
    assert np.asarray(tensor).tolist() == [1.0, 5.0]


def test_the_type_picks_the_verbs(framework):
    assert type(ops_for(type(framework.tensor(np.ones(1))))) is type(framework.ops)


def test_variables_have_verbs_too():
    torch = pytest.importorskip("torch")
    assert type(ops_for(torch.nn.Parameter)) is TorchOps
    tf = pytest.importorskip("tensorflow")
    assert type(ops_for(type(tf.Variable(1.0)))) is TensorFlowOps


@pytest.mark.parametrize("kind", [str, list, type(None)])
def test_no_verbs_for_other_things(kind):
    with pytest.raises(TypeError, match=rf"no tensor verbs for builtins\.{kind.__name__}"):
        ops_for(kind)


@pytest.mark.parametrize(
    ("backend", "expected"), [("torch", "TorchOps"), ("tensorflow", "TensorFlowOps")]
)
def test_keras_variables_have_the_verbs_of_their_backend(backend, expected):
    for needed in ("keras", backend):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    code = f"""
import os
os.environ.update(KERAS_BACKEND={backend!r}, TF_CPP_MIN_LOG_LEVEL="3")
import keras
from hvdx.ops import ops_for
variable = keras.Variable([1.0, 2.0])
ops = ops_for(type(variable))
print(type(ops).__name__, ops.scale(variable.value, 2.0).tolist() if {backend!r} == "torch"
      else ops.scale(variable.value, 2.0).numpy().tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"{expected} [2.0, 4.0]", done.stderr


RANDOM = np.random.default_rng(3)
ODD = np.array([0.0, -0.0, 1.5, -2.5, 3e38, -np.inf, np.nan, 1e-40], np.float32)
TIES = np.repeat(np.array([3, -3, 1, 2], np.float32), 2000)
MATRIX = RANDOM.normal(size=(4, 6)).astype(np.float32)
INTS = np.array([[0, 1, 255, 2**23 + 7], [5, 6, 7, 8]], np.int32)
VERBS = {  # name: verb of one tensor, its argument
    "reshape": (lambda ops, x: ops.reshape(x, (6, -1)), MATRIX),
    "concat": (lambda ops, x: ops.concat([x, x[:2]]), MATRIX),
    "concat columns": (lambda ops, x: ops.concat([x, x], axis=1), MATRIX),
    "where": (lambda ops, x: ops.where(x > 0, x, ops.zeros((), "float32")), MATRIX),
    "finite": (lambda ops, x: ops.finite(x), ODD),
    "quantise": (
        lambda ops, x: ops.quantise(x, ops.constant(0.5, "float32"), 7, "int8"),
        np.array([1, 3, -5, 4.8, 100, -100, np.inf, -np.inf, np.nan], np.float32),
    ),
    "quantise rows": (lambda ops, x: ops.quantise(x, x[:, :1] * 9, 2**20, "int32"), MATRIX),
    "pack_bits": (lambda ops, x: ops.pack_bits(ops.positive(x)), RANDOM.normal(size=64)
        .astype(np.float32)),
    "unpack_bits": (lambda ops, x: ops.unpack_bits(x), np.arange(256).astype(np.uint8)),
    "abs_bits": (lambda ops, x: ops.abs_bits(x), ODD),
    "positive": (lambda ops, x: ops.positive(x), ODD[:-2]),
    "from_bits": (lambda ops, x: ops.from_bits(x * 2**7), INTS),
    "shift_right": (lambda ops, x: ops.shift_right(x, 3), INTS),
    "shift_right of bytes": (lambda ops, x: ops.shift_right(x, 4), INTS.astype(np.uint8)),
    "mask": (lambda ops, x: ops.mask(x, 15), INTS),
    "mask of bytes": (lambda ops, x: ops.mask(x, 15), INTS.astype(np.uint8)),
    "max": (lambda ops, x: ops.max(x), INTS),
    "sum": (lambda ops, x: ops.sum(x), INTS),
    "to_bytes": (lambda ops, x: ops.to_bytes(x), INTS[0]),
    "to_bytes of halves": (lambda ops, x: ops.to_bytes(ops.cast(x, "float16")), MATRIX[0]),
    "from_bytes": (lambda ops, x: ops.from_bytes(ops.to_bytes(x)[:8], "float32"), MATRIX[0]),
    "bfloat16": (
        lambda ops, x: ops.from_bfloat16_bytes(ops.bfloat16_bytes(x)), RANDOM.normal(size=999)
        .astype(np.float32)
    ),
    "constant": (lambda ops, x: x * ops.constant([1, 2, 3, 4, 5, 6], "float32"), MATRIX),
    "arange": (lambda ops, x: ops.arange(4) + x, np.array([5], np.int64)),
    "largest": (lambda ops, x: ops.largest(x, 50), RANDOM.normal(size=9999).astype(np.float32)),
    "largest of few": (lambda ops, x: ops.largest(x, 3), MATRIX[0]),
    "largest of equals": (lambda ops, x: ops.largest(x, 4500), TIES),
    "largest of some equals": (lambda ops, x: ops.largest(x, 70), TIES),
    "largest is not finite": (lambda ops, x: ops.largest(x, 2), ODD),
    "take": (lambda ops, x: ops.take(x, ops.constant([3, 0], "int32")), ODD),
    "add_at": (
        lambda ops, x: ops.add_at(x, ops.constant([3, 0], "int32"), x[:2] + 1), MATRIX[0]
    ),
    "repeat": (lambda ops, x: ops.repeat(x, 7), np.array([0, 3, 4], np.int32)),
    "counts": (lambda ops, x: ops.counts(x, 5), np.array([1, 1, 3], np.int32)),
    "noise": (lambda ops, x: ops.noise(ops.sum(ops.sum(x)), x), INTS),
    "quantise with noise": (
        lambda ops, x: ops.quantise(
            x, ops.constant(2.0, "float32"), 100, "int8", ops.noise(ops.constant(7, "int32"), x)
        ),
        np.arange(600, dtype=np.float32) / 16,
    ),
    "finite_or": (lambda ops, x: ops.finite_or(x, ops.from_bits(ops.abs_bits(x) * 0)), ODD),
    "finite_or of what is": (lambda ops, x: ops.finite_or(x, x * 0), MATRIX),
    "either": (lambda ops, x: ops.either(ops.max(ops.max(x)) > 9, lambda: x, lambda: -x), MATRIX),
    "or": (lambda ops, x: ops.either(ops.max(ops.max(x)) > -9, lambda: x, lambda: -x), MATRIX),
}  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_the_verbs_of_compressors(framework, name):
    verb, given = VERBS[name]
    result = framework.run(lambda x: verb(framework.ops, x), framework.tensor(given))
    same(result, np.asarray(verb(NumpyOps(), given)))


def test_matmul_and_orthonormal(framework):
    ops, flat = framework.ops, MATRIX
    product = framework.run(lambda x: ops.matmul(x, x, transposed=True), framework.tensor(flat))
    np.testing.assert_allclose(product, flat @ flat.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        framework.run(lambda x: ops.matmul(ops.matmul(x, x, transposed=True), x),
                      framework.tensor(flat)),
        flat @ flat.T @ flat, rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    for given in (flat, np.zeros_like(flat), np.ones_like(flat)):  # of full rank, 0 and 1
        q = framework.run(ops.orthonormal, framework.tensor(given))
        np.testing.assert_allclose(q @ q.T, np.eye(len(flat)), atol=1e-5)
        np.testing.assert_allclose(given @ q.T @ q, given, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outer_products(framework, dtype):
    """Of a (2, 3) and a (2, 8) matrix, as a (4, 6) tensor."""
    ops = framework.ops
    left, right = MATRIX[:2, :3].copy(), np.concatenate([MATRIX[:2], MATRIX[2:, :2]], 1)
    exact = (left.T @ right).reshape(4, 6)

    def outer(over):
        return ops.outer(ops.constant(left, "float32"), ops.constant(right, "float32"), over)

    result = framework.run(outer, framework.tensor(np.ones((4, 6), dtype)))
    assert result.dtype == dtype
    np.testing.assert_allclose(result, exact, rtol=1e-5)

    def rest(x):
        x = ops.cast(x, "float32") + 0
        return ops.minus_outer(x, ops.constant(left, "float32"), ops.constant(right, "float32"))

    whole = framework.run(rest, framework.tensor(np.ones((4, 6), dtype)))
    np.testing.assert_allclose(whole, 1 - exact, rtol=1e-5, atol=1e-6)


def test_an_outer_product_is_written_over_what_may_be_lost():
    torch = pytest.importorskip("torch")
    ops, left, right = TorchOps(), torch.ones(1, 2), torch.arange(3.0)[None]
    straight, turned = torch.zeros(2, 3), torch.zeros(3, 2).t()
    assert ops.outer(left, right, straight) is straight
    assert ops.outer(left, right, turned).tolist() == straight.tolist() == [[0, 1, 2]] * 2


def test_noise_is_uniform_and_independent():
    """Between its neighbours, between keys, and between an index of one key and of the next."""
    like = np.empty(2**16)
    draws = np.stack([NumpyOps().noise(np.int32(key), like) for key in range(64)])
    assert draws.dtype == np.float32 and np.abs(draws).max() < 0.5
    assert (draws * 2**17 % 2 == 1).all()
    for axis in (0, 1):
        means, size = draws.mean(axis, dtype=float), draws.shape[axis]
        assert np.abs(means).max() < 6 / np.sqrt(12 * size)
    bins = np.histogram(draws, 256, (-0.5, 0.5))[0]
    expected = draws.size / 256
    assert ((bins - expected) ** 2 / expected).sum() < 256 + 6 * np.sqrt(2 * 256)
    for lag in (1, 2, 3, 8, 1024):
        pairs = [(draws[:, lag:], draws[:, :-lag]), (draws[1:, lag:], draws[:-1, :-lag])]
        for one, other in pairs:
            assert abs((one * other).mean(dtype=float)) < 6 / 12 / np.sqrt(one.size)
    assert abs((draws[1:] * draws[:-1]).mean(dtype=float)) < 6 / 12 / np.sqrt(draws[1:].size)
