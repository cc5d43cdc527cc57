"""A model to train on data that differ between the ranks, so that gradients do as well."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest


class AsOnGpu(keras.Sequential):
    """A model for which Keras' ``jit_compile="auto"`` means XLA, as it does beside a GPU."""

    def _resolve_auto_jit_compile(self) -> bool:
        return True


@pytest.fixture
def make_model() -> Callable[..., Any]:
    def make(seed: int = 3, layers: int = 1, kind: Any = keras.Sequential) -> Any:
        keras.utils.set_random_seed(seed)
        keras.backend.clear_session()
        return kind([keras.Input((2,)), *(keras.layers.Dense(1) for _ in range(layers))])

    return make


@pytest.fixture
def as_on_gpu() -> type:
    return AsOnGpu


@pytest.fixture
def data(hvd: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(hvd.rank())
    return random.normal(size=(4, 2)).astype("float32"), np.ones((4, 1), "float32")


@pytest.fixture
def fit(data: tuple[np.ndarray, np.ndarray]) -> Callable[..., Any]:
    """Train two steps; return the history."""

    def train(model: Any, **options: Any) -> Any:
        return model.fit(*data, batch_size=2, shuffle=False, verbose=0, **options)

    return train
