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
