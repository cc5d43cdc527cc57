"""Models for pipelines, as the tests in one process have them, and what was learnt of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

import hvdx as hvd


def load_single(name: str) -> Any:
    """The module of tests/single of this name."""
    path = Path(__file__).parents[2] / "single" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_single("test_pipeline_keras")


def learnt(pipe: Any, path: Path) -> dict[str, np.ndarray]:
    """Rank 0's whole model, gathered by a checkpoint."""
    pipe.save(path)
    hvd.barrier()
    return {n: each for n, each in hvd.load_state(path)["model"].items() if "seed" not in n}


def with_weights(build: Any, weights: dict[str, np.ndarray]) -> Any:
    """A plain model that has learnt this."""
    plain = models.made(build)
    for variable in plain.variables:
        if variable.path in weights:
            variable.assign(weights[variable.path])
    return plain
