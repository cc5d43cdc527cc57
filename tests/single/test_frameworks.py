"""To whom an object belongs, and whose core ``init`` starts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from hvdx.frameworks import FRAMEWORKS, adapter, choose, framework_of_kind, kind_of


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


def fresh(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where no framework is imported yet."""
    own = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**own, "TF_CPP_MIN_LOG_LEVEL": "3", **environ},
    )


@pytest.mark.parametrize(
    ("value", "library"),
    [(1, "numpy"), (1.5, "numpy"), (True, "numpy"), (np.float32(1), "numpy"),
     (np.ones(2), "numpy"), ("text", None), ([1.0], None), (None, None), (1j, None)],
    ids=repr,
)  # fmt: skip
def test_arrays_numbers_and_other_things(value, library):
    assert kind_of(type(value)) == library


def test_torch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(1, 1)
    for value in (torch.ones(1), layer.weight, layer, torch.optim.SGD(layer.parameters(), 0.1)):
        assert kind_of(type(value)) == "torch"


def test_a_class_of_the_users_own():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        pass

    class Array(np.ndarray):
        pass

    assert (kind_of(Net), kind_of(Array), kind_of(object)) == ("torch", "numpy", None)


def test_tensorflow():
    tf = pytest.importorskip("tensorflow")
    sparse = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]))
    for value in (tf.constant(1.0), tf.Variable(1.0), sparse):
        assert kind_of(type(value)) == "tensorflow"


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_keras_is_keras_on_either_backend(backend):
    needs("keras", backend)
    code = """
import keras
from hvdx.frameworks import framework_of_kind, kind_of
layer = keras.layers.Dense(1)
layer.build((None, 2))
things = layer, layer.kernel, keras.Sequential([layer]), keras.optimizers.SGD()
print({kind_of(type(each)) for each in things}, framework_of_kind("keras"))
print(kind_of(type(layer.kernel.value)))
"""
    done = fresh(code, KERAS_BACKEND=backend)
    assert done.stdout == f"{{'keras'}} {backend}\n{backend}\n", done.stderr


def test_keras_2_is_refused():
    kind = type("Model", (), {"__module__": "tf_keras.src.engine"})
    with pytest.raises(TypeError, match="Model is Keras 2; hvdx supports Keras 3"):
        kind_of(kind)


def test_keras_on_a_backend_that_horovod_cannot_serve(monkeypatch):
    # jax is in no environment of ours: this stands for a Keras that runs on it.
    keras = types.SimpleNamespace(backend=types.SimpleNamespace(backend=lambda: "jax"))
    monkeypatch.setitem(sys.modules, "keras", keras)
    with pytest.raises(TypeError, match=r"'jax' backend, which Horovod cannot serve.*'torch'"):
        framework_of_kind("keras")


@pytest.mark.parametrize("library", ["torch", "tensorflow", "numpy"])
def test_other_libraries_compute_for_themselves(library):
    assert framework_of_kind(library) == library


@pytest.mark.parametrize(
    ("said", "expected"),
    [("torch", ("torch",)), ("tensorflow", ("tensorflow",)),
     (("tensorflow", "torch"), ("tensorflow", "torch")), (["torch"], ("torch",))],
)  # fmt: skip
def test_what_the_caller_says_counts_first(monkeypatch, said, expected):
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert choose(said) == expected


@pytest.mark.parametrize("said", ["jax", "Torch", ("torch", "mxnet")])
def test_unknown_frameworks(said):
    with pytest.raises(ValueError) as error:
        choose(said)
    wrong = said if isinstance(said, str) else said[-1]
    assert f"unknown framework {wrong!r}; use one of torch, tensorflow, or both" == str(error.value)


def test_an_adapter_of_an_unknown_framework():
    with pytest.raises(ValueError, match="unknown framework 'jax'; use one of torch, tensorflow"):
        adapter("jax")


CHOICE = """
import json, os, sys
{imports}
from hvdx.frameworks import choose
told = {{}}
for backend in ("", "torch", "tensorflow", "jax"):
    os.environ["KERAS_BACKEND"] = backend
    try:
        told[backend] = choose(None)
    except ValueError as error:
        told[backend] = str(error)
print(json.dumps([told, sorted({{"torch", "tensorflow"}} & set(sys.modules))]))
"""


@pytest.mark.parametrize(
    ("imported", "open_"),
    [
        (["torch"], ""),
        (["tensorflow"], ""),
        (["tensorflow", "torch"], "torch and tensorflow are both imported"),
        ([], "torch and tensorflow are both installed, none imported yet"),
    ],
)
def test_what_is_imported_counts_next_then_what_keras_says(imported, open_):
    needs(*FRAMEWORKS)
    done = fresh(CHOICE.format(imports="".join(f"import {name}\n" for name in imported)))
    told, loaded = json.loads(done.stdout)
    assert loaded == imported, "it loaded one"
    if not open_:  # KERAS_BACKEND is of no interest: that framework is not in use
        assert set(map(tuple, told.values())) == {tuple(imported)}
        return
    assert (told["torch"], told["tensorflow"]) == (["torch"], ["tensorflow"])
    for backend in ("", "jax"):
        assert told[backend].startswith(open_)
        assert "say hvd.init(framework='torch')" in told[backend]
        assert "or both as a tuple, or set KERAS_BACKEND" in told[backend]


@pytest.mark.parametrize(
    ("hidden", "told"),
    [
        (["tensorflow"], ["torch"]),
        (["torch"], ["tensorflow"]),
        (["torch", "tensorflow"], "neither torch nor tensorflow is installed"),
    ],
)
def test_what_is_installed_counts_last(monkeypatch, hidden, told):
    needs(*FRAMEWORKS)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else real(name)
    )
    for name in FRAMEWORKS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if isinstance(told, list):
        assert choose(None) == tuple(told)
    else:
        with pytest.raises(ValueError, match=told):
            choose(None)
