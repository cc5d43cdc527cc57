"""A small model, data for all ranks and for each, and ways to train on a backend of choice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import hvdx

STEPS, PER_RANK = 5, 4

sys.path.insert(0, str(Path(__file__).parent))  # for what tests share
if keras.backend.backend() == "torch":  # Keras would load it to save a model: long, and not needed
    sys.modules["tensorflow"] = None  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "backend(name): on this backend only: what it shows is the same on the other, and torch, "
        "which traces nothing, is the quicker one; or the other cannot do it; a test's own mark "
        "goes before its module's",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are marked for the other backend."""
    elsewhere = [
        item
        for item in items
        if (mark := item.get_closest_marker("backend")) is not None
        and keras.backend.backend() not in mark.args
    ]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


@pytest.fixture(autouse=True)
def float32_afterwards() -> Iterator[None]:
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")  # Keras makes one of floatx once, and keeps it


class Data(NamedTuple):
    """Batches (step, row, ...): ``shard`` is what this rank sees of ``whole``."""

    whole: tuple[np.ndarray, np.ndarray]
    shard: tuple[np.ndarray, np.ndarray]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that all ranks know."""
    return Path(hvdx.broadcast_object(str(tmp_path)))


@pytest.fixture
def data() -> Callable[[str], Data]:
    def make(dtype: str = "float32") -> Data:
        rank, size = hvdx.rank(), hvdx.size()
        random = np.random.default_rng(7)
        whole = tuple(
            random.normal(size=(STEPS, size * PER_RANK, width)).astype(dtype) for width in (6, 1)
        )
        own = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        return Data(whole, tuple(part[:, own] for part in whole))

    return make


@pytest.fixture
def make_model() -> Callable[..., Any]:
    def make(dtype: str = "float32", seed: int = 3, width: int = 8) -> Any:
        keras.config.set_floatx(dtype)  # losses, learning rates and fit's data are of this type
        keras.utils.set_random_seed(seed)
        keras.backend.clear_session(free_memory=False)  # equal names on all ranks and in all tests
        return keras.Sequential(
            [
                keras.Input((6,), dtype=dtype),
                keras.layers.Dense(width, activation="tanh", dtype=dtype),
                keras.layers.Dense(5, activation="tanh", dtype=dtype),
                keras.layers.Dense(1, dtype=dtype),
            ]
        )

    return make


class SquareError(keras.losses.Loss):
    """The mean square error in the model's precision: Keras' own is float32 on torch."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return keras.ops.sum(keras.ops.square(y_pred - y_true)) / y_pred.shape[0]


def fit(model: Any, optimizer: Any, batches: Sequence[np.ndarray], **options: Any) -> None:
    """Train with ``fit``, one step per batch, in order."""
    x, y = batches
    model.compile(optimizer, SquareError(), **options)
    if not optimizer.built:
        optimizer.build(model.trainable_variables)  # or TensorFlow traces everything twice
    flat = [part.reshape(-1, part.shape[-1]) for part in (x, y)]
    model.fit(*flat, batch_size=x.shape[1], shuffle=False, verbose=0)


def loop(model: Any, optimizer: Any, batches: Sequence[np.ndarray], graph: bool = False) -> None:
    """Train with a loop of one's own that calls ``apply``."""
    step = _torch_step if keras.backend.backend() == "torch" else _tensorflow_step
    if graph and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(step)
        optimizer.build(model.trainable_variables)  # tf.function allows no new variables later
    for x, y in zip(*batches, strict=True):
        step(model, optimizer, x, y)


def gradients(model: Any, x: np.ndarray, y: np.ndarray, forward: Any = None) -> list[Any]:
    """Return this rank's gradients of the mean square error."""
    forward = forward or model
    if keras.backend.backend() == "torch":
        model.zero_grad()
        SquareError()(keras.ops.convert_to_tensor(y), forward(x)).backward()
        return [variable.value.grad for variable in model.trainable_variables]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = SquareError()(y, forward(x))
    return tape.gradient(loss, model.trainable_variables)


def _torch_step(model: Any, optimizer: Any, x: np.ndarray, y: np.ndarray) -> None:
    import torch

    grads = gradients(model, x, y)
    with torch.no_grad():
        optimizer.apply(grads, model.trainable_variables)


def _tensorflow_step(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    optimizer.apply(gradients(model, x, y), model.trainable_variables)


@pytest.fixture
def ways() -> Any:
    """The ways to train, for tests that need one of them."""
    return type("Ways", (), {"fit": staticmethod(fit), "loop": staticmethod(loop),
                             "gradients": staticmethod(gradients)})  # fmt: skip


@pytest.fixture
def exact() -> float:
    """Tolerance for float64; Keras on torch multiplies matrices in float32 even so."""
    return 1e-6 if keras.backend.backend() == "torch" else 1e-12


@pytest.fixture
def farthest() -> Callable[[Any, Any], float]:
    """Return the largest difference of two models' weights, relative to the largest weight."""

    def measure(one: Any, other: Any) -> float:
        pairs = list(zip(one.get_weights(), other.get_weights(), strict=True))
        largest = max(float(np.abs(a).max()) for a, _ in pairs)
        return max(float(np.abs(a - b).max()) for a, b in pairs) / largest

    return measure


@pytest.fixture
def assert_equal_replicas() -> Callable[[Any], None]:
    def check(model: Any) -> None:
        hashes = hvdx.allgather_object(hvdx.parameter_hash(model))
        assert len(set(hashes)) == 1, hashes

    return check
