"""A model to train on data that differ between the ranks, so that gradients do as well."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest


@pytest.fixture
def make_model() -> Callable[..., Any]:
    def make(seed: int = 3, layers: int = 1) -> Any:
        keras.utils.set_random_seed(seed)
        keras.backend.clear_session()
        dense = [keras.layers.Dense(1) for _ in range(layers)]
        return keras.Sequential([keras.Input((2,)), *dense])

    return make


@pytest.fixture
def data(hvd: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(hvd.rank())
    return random.normal(size=(4, 2)).astype("float32"), np.ones((4, 1), "float32")


@pytest.fixture
def eager() -> dict[str, bool]:
    """Options of ``compile`` where a graph, which takes its time to trace, is not the point."""
    return {"loss": "mse", "run_eagerly": True}


@pytest.fixture
def fit(data: tuple[np.ndarray, np.ndarray]) -> Callable[..., Any]:
    """Train two steps; return the history."""

    def train(model: Any, **options: Any) -> Any:
        return model.fit(*data, batch_size=2, shuffle=False, verbose=0, **options)

    return train
