"""The state of PyTorch training: models, optimizers, samplers and all else."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from hvdx.compression import CompressionError
from hvdx.elastic import ObjectState, OwedHandler, StatefulHandler, StateHandler
from hvdx.integrations.pytorch_optimizer_reducer import Reducer
from hvdx.integrations.pytorch_optimizer_states import Kept
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
        conserve: bring together, at every commit, what the optimizer's compression holds back
            on each rank, so that it is not lost with a rank that dies. Costs an allreduce of the
            model's size. Ranks that are taken away as planned lose nothing in any case.
        **kwargs: further parts, models and optimizers among them if need be.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        conserve: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.update(model=model, optimizer=optimizer)
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)
        self.conserve = conserve

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

    def reset(self) -> None:
        """Do nothing: it is what it was, whoever the ranks are."""


class OptimizerStateHandler(StatefulHandler):
    """Saves and shares an optimizer's state and options, and what its compression holds back."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._owed = _OwedHandler(optimizer)
        super().__init__(optimizer, broadcast_object)

    def save(self) -> None:
        """Keep a copy."""
        super().save()
        self._owed.save()

    def restore(self) -> None:
        """Go back to the copy."""
        super().restore()
        self._owed.restore()

    def sync(self) -> None:
        """Give all ranks what rank 0 has."""
        broadcast_optimizer_state(self.value, root_rank=0)

    def reset(self) -> None:
        """Do nothing: it is what it was, whoever the ranks are."""

    def gather(self) -> None:
        """Bring together what compression holds back; on all ranks."""
        self._owed.gather()

    def leave(self) -> None:
        """Take that to the next ranks."""
        self._owed.leave()

    def set_value(self, value: Any) -> None:
        """Watch another optimizer from now on."""
        self._owed.set_value(value)
        super().set_value(value)


class _OwedHandler(OwedHandler):
    """See :class:`hvdx.elastic.OwedHandler`; ``value`` is an optimizer.

    Rounds of training alone are not among it: they begin anew with other ranks.
    """

    @property
    def _kept(self) -> Kept | None:
        reducer = getattr(self.value, "reducer", None)
        return reducer.kept if isinstance(reducer, Reducer) and reducer.active else None

    def own(self) -> Any:
        """Return what this rank holds back."""
        return None if self._kept is None else self._kept.saved()

    def together(self) -> Any:
        """Return what any number of ranks can start from; None if they have just met."""
        if self._kept is None:
            return None
        with contextlib.suppress(CompressionError):  # alike on all ranks
            return self._kept.portable()
        return None

    def load(self, saved: Any) -> None:
        """Go on from ``saved``."""
        if self._kept is not None:
            with contextlib.suppress(CompressionError):  # of ranks that are no more
                self.value.load_compression_state(saved)

    def wait(self, saved: Any) -> None:
        """Take ``saved`` to the ranks that are met next."""
        if self._kept is not None:
            self._kept.go_back(saved)


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
