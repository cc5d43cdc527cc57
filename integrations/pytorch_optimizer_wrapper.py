"""What every wrapped optimizer has: a place in the running job, which may start anew."""

from __future__ import annotations

import abc
import itertools
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hvdx import world
from hvdx.agreement import check_same, next_name
from hvdx.compression import Compressor
from hvdx.frameworks import Adapter
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_optimizer_start import warn_of_differences
from hvdx.reduce_op import ReduceOp

_AVERAGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_serials = itertools.count()


class Options(NamedTuple):
    """What the user asked of ``DistributedOptimizer``."""

    names: dict[torch.Tensor, str]
    compressor: Compressor
    op: ReduceOp
    process_set: Any = None
    groups: int | list[list[torch.Tensor]] | None = None
    sparse_as_dense: bool = False


class Named(NamedTuple):
    """A parameter of the optimizer and what messages call it."""

    name: str
    parameter: torch.Tensor


class Wrapper(abc.ABC):
    """Hooks on a user's optimizer, for as long as that lives and Horovod runs.

    The optimizer holds the wrapper, not the other way round: where the user drops it, the hooks
    go with it. When Horovod stops, all that it knew of the ranks is dropped; when it runs again,
    perhaps with other ranks (elastic training), the wrapper joins as a new one would, so that it
    agrees with those of ranks that have just started.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options) -> None:
        self.options = options
        self.serial = next(_serials)
        self._optimizer = weakref.ref(optimizer)
        self.joined = False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The user's optimizer."""
        optimizer = self._optimizer()
        assert optimizer is not None, "hooks of an optimizer outlive it"
        return optimizer

    def attach(self, methods: Sequence[str]) -> None:
        """Hook into the optimizer and give it ``methods`` of this object."""
        optimizer: Any = self.optimizer
        self.join()
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)
        for name in methods:
            setattr(optimizer, name, getattr(self, name))
        optimizer.reducer = self
        optimizer.communication_seconds = 0.0
        weakref.finalize(optimizer, self.leave).atexit = False
        _wrappers.add(self)

    def join(self) -> None:
        """Take a place in the running job; of no effect on ranks outside the process set."""
        self.adapter: Adapter = world.core("torch")
        self.joined = True
        process_set = self.options.process_set
        self.active = process_set is None or self.adapter.horovod.rank() in process_set.ranks
        if self.active:
            self.ranks = self.adapter.ranks(process_set)
            self.name = next_name("gradients", process_set)
            self._meetings = 0
            self.begin()

    def require_place(self) -> None:
        """Join if Horovod runs again by now.

        Raises:
            NotInitializedError: it does not; training on would leave the others behind unnoticed.
        """
        if not self.joined:
            world.core("torch")  # where Horovod's own init() was called, this joins
            if not self.joined:
                self.join()

    def leave(self) -> None:
        """Give the place up."""
        if self.joined and self.active:
            self.end()
        self.joined = self.active = False

    @abc.abstractmethod
    def begin(self) -> None:
        """Start to follow the optimizer's parameters."""

    @abc.abstractmethod
    def end(self) -> None:
        """Stop that, and forget what is under way."""

    @abc.abstractmethod
    def before_step(self, optimizer: Any, args: Any, options: Any) -> Any:
        """See ``torch.optim.Optimizer.register_step_pre_hook``."""

    @abc.abstractmethod
    def after_step(self, optimizer: Any, args: Any, options: Any) -> None:
        """See ``torch.optim.Optimizer.register_step_post_hook``."""

    def named(self, known: Collection[int] = ()) -> list[Named]:
        """Name the optimizer's parameters that are trained, save those whose id is ``known``.

        Last ones first: backward meets them in that order, so that their bucket fills first.

        Raises:
            ValueError: gradients of such a dtype cannot be averaged.
        """
        found = [
            Named(self.options.names.get(parameter, f"noname.{group}.{place}"), parameter)
            for group, options in enumerate(self.optimizer.param_groups)
            for place, parameter in enumerate(options["params"])
            if id(parameter) not in known and parameter.requires_grad
        ]
        for name, parameter in found:
            if parameter.dtype not in _AVERAGED:
                known = ", ".join(map(dtype_name, _AVERAGED))
                raise ValueError(
                    f"parameter {name!r} is {dtype_name(parameter.dtype)}; DistributedOptimizer "
                    f"averages gradients of {known}. Freeze it (requires_grad_(False)), or train "
                    "it by an optimizer of its own and hvd.allreduce its gradient as real numbers"
                )
        return found[::-1]

    def meet(self, fresh: list[Named], more: str) -> set[int]:
        """Compare notes before ``fresh`` parameters are averaged first; on all ranks of the set.

        Args:
            fresh: parameters in the order in which buckets are planned.
            more: options that must be equal besides ours.

        Returns:
            The places in ``fresh`` of parameters whose gradient is sparse on any rank.

        Raises:
            MismatchError: models, optimizers or options differ between ranks.
        """
        optimizer, process_set = self.optimizer, self.options.process_set
        name = f"{self.name}.check{self._meetings}"
        entries = {
            str(place): f"{each.name}: {dtype_name(each.parameter.dtype)} "
            f"{tuple(each.parameter.shape)}"
            for place, each in enumerate(fresh)
        }
        entries["options"] = (
            f"{type(optimizer).__name__}, op={self.options.op.name}, "
            f"compression={self.options.compressor}, {more}"
        )
        subject = "parameters or options of DistributedOptimizer"
        check_same(self.adapter, subject, entries, name, process_set)
        first, self._meetings = self._meetings == 0, self._meetings + 1
        if self.ranks > 1:
            groups = optimizer.param_groups if first else []
            warn_of_differences(self.adapter, dict(fresh), groups, name, process_set)
        own = [place for place, each in enumerate(fresh) if _has_sparse_gradient(each.parameter)]
        return set().union(*self.adapter.allgather_object(own, f"{name}/sparse", process_set))


def _has_sparse_gradient(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse


_wrappers: weakref.WeakSet[Wrapper] = weakref.WeakSet()


def _in_order() -> Iterator[Wrapper]:
    yield from sorted(_wrappers, key=lambda wrapper: wrapper.serial)


def _follow_the_world() -> None:
    """Leave with Horovod's core, and join when it runs again: in order, since names count."""
    runs = "torch" in world.running()
    for wrapper in _in_order():
        if not runs:
            wrapper.leave()
        elif not wrapper.joined and wrapper._optimizer() is not None:
            wrapper.join()


world.on_change(_follow_the_world)
