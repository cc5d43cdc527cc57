"""Small things to train: rank r's gradient is r + 1 everywhere, and the ranks' mean 1.5."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def loss(hvd: ModuleType) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda parameter: (parameter * (hvd.rank() + 1.0)).sum()


@pytest.fixture
def wrap(hvd: ModuleType, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Wrap an optimizer; its parameters get names that no others have."""
    count = itertools.count()

    def wrapped(optimizer: torch.optim.Optimizer, **options: Any) -> Any:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        named = [(f"{request.node.name}.{next(count)}", p) for p in parameters]
        return hvd.DistributedOptimizer(optimizer, named_parameters=named, **options)

    return wrapped


@pytest.fixture
def late(hvd: ModuleType) -> Callable[[], None]:
    """Hold rank 1 up: rank 0 then meets an operation that is still under way."""
    return lambda: time.sleep(0.5 * hvd.rank())
