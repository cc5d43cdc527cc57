"""Elastic training with PyTorch: ``hvd.elastic``; see :mod:`hvdx.elastic`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdx import elastic as _elastic
from hvdx.torch.elastic.sampler import ElasticSampler
from hvdx.torch.elastic.state import TorchState

__all__ = ["ElasticSampler", "TorchState", "run"]


def _reset() -> None:
    _elastic.reset()


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``func(state, ...)`` again whenever ranks have failed, left or joined.

    Nothing may communicate between ``hvd.init()`` and the decorated function: ranks that join
    later would wait there for ranks that are training.

    Example:
        >>> @hvd.elastic.run
        ... def train(state):
        ...     for state.epoch in range(state.epoch, epochs):
        ...         ...
        ...         state.commit()
        >>> train(hvd.elastic.TorchState(model, optimizer, epoch=0))
    """
    return _elastic.run_fn(func, _reset)
