"""The state of PyTorch training: models, optimizers, samplers and all else."""

from __future__ import annotations

from typing import Any

import torch

from hvdx.elastic import ObjectState, StatefulHandler, StateHandler
from hvdx.replicas import broadcast_object, broadcast_optimizer_state, broadcast_parameters
from hvdx.torch.elastic.sampler import ElasticSampler
from hvdx.world import rank

__all__ = [
    "ModelStateHandler",
    "OptimizerStateHandler",
    "SamplerStateHandler",
    "StateHandler",
    "TorchState",
    "get_handler_registry",
    "set_handler_registry",
]


class TorchState(ObjectState):
    """The state of PyTorch training, each part an attribute.

    Models, optimizers, samplers and all that has ``state_dict`` and ``load_state_dict`` (learning
    rate schedules, ``GradScaler``) are saved and shared by those; other objects as they are.

    Args:
        model: a module.
        optimizer: wrapped by ``hvd.DistributedOptimizer`` or not.
        **kwargs: further parts, models and optimizers among them if need be.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.update(model=model, optimizer=optimizer)
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)

    def _handler(self, value: Any) -> StateHandler | None:
        for kind, handler in _handler_registry:
            if isinstance(value, kind):
                made: StateHandler = handler(value)
                return made
        return super()._handler(value)


class ModelStateHandler(StatefulHandler):
    """Saves and shares a module's parameters and buffers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, broadcast_object)

    def sync(self) -> None:
        """Give all ranks what rank 0 has."""
        broadcast_parameters(self.value.state_dict(), root_rank=0)


class OptimizerStateHandler(StatefulHandler):
    """Saves and shares an optimizer's state and options."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, broadcast_object)

    def sync(self) -> None:
        """Give all ranks what rank 0 has."""
        broadcast_optimizer_state(self.value, root_rank=0)


class SamplerStateHandler(StatefulHandler):
    """Saves and shares where a sampler stands, and shares the rest out anew."""

    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler, broadcast_object)

    def sync(self) -> None:
        """Give all ranks what rank 0 has."""
        self.value.load_state_dict(broadcast_object(self.value.state_dict()))

    def reset(self) -> None:
        """Share out what is left: a change that only takes ranks away needs no ``sync``."""
        self.value.reset()


_handler_registry: list[tuple[type, Any]] = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (ElasticSampler, SamplerStateHandler),
]


def get_handler_registry() -> list[tuple[type, Any]]:
    """Return the list of types and their handlers, the first that fits counts."""
    return _handler_registry


def set_handler_registry(registry: list[tuple[type, Any]]) -> None:
    """Replace the list of types and their handlers."""
    global _handler_registry
    _handler_registry = registry
