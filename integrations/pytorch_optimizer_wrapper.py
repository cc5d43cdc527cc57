"""What every wrapped optimizer has: a place in the running job, which may start anew."""

from __future__ import annotations

import abc
import gc
import itertools
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hvdx import world
from hvdx.agreement import check_same, next_name
from hvdx.compression import FORMAT, Compressor
from hvdx.frameworks import Adapter
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_optimizer_start import warn_of_differences
from hvdx.reduce_op import ReduceOp

_AVERAGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_serials = itertools.count()


class Options(NamedTuple):
    """What the user asked of ``DistributedOptimizer``."""

    names: Mapping[torch.Tensor, str]  # holds no parameter
    compressor: Compressor
    op: ReduceOp
    process_set: Any = None
    groups: int | list[list[int]] | None = None  # ids of parameters
    sparse_as_dense: bool = False


class Named(NamedTuple):
    """A parameter of the optimizer and what messages call it."""

    name: str
    parameter: torch.Tensor


class Wrapper(abc.ABC):
    """Hooks on a user's optimizer and its parameters, for as long as Horovod runs.

    They stay until the parameters go, or another optimizer that has them is wrapped, even if the
    optimizer goes before: when Python collects it differs from rank to rank, and those that
    still average would wait for those that do not. The wrapper itself holds neither.

    When Horovod stops, all that is known of the ranks is dropped; when it runs again, perhaps
    with other ranks (elastic training), the wrapper joins as a new one would, so that it agrees
    with those of ranks that have just started.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options) -> None:
        self.options = options
        self.serial = next(_serials)
        self._kind = type(optimizer).__name__
        self._optimizer = weakref.ref(optimizer)
        self.joined = False

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The user's optimizer, if that still lives; parameters may outlive it."""
        return self._optimizer()

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

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accept it: gradients stay on this rank however many backward calls add to them."""
        if passes < 1:
            raise ValueError(f"backward_passes_per_step={passes} must be at least 1")
        optimizer: Any = self.optimizer
        optimizer.backward_passes_per_step = passes

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

    def name_of(self, parameter: torch.Tensor, group: int, place: int) -> str:
        """Return what messages call a parameter that has this place in the optimizer."""
        return self.options.names.get(parameter, f"noname.{group}.{place}")

    def named(self, known: Collection[int] = ()) -> list[Named]:
        """Name the optimizer's parameters that are trained, save those whose id is ``known``.

        Last ones first: backward meets them in that order, so that their bucket fills first.

        Raises:
            ValueError: gradients of such a dtype cannot be averaged.
        """
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        found = [
            Named(self.name_of(parameter, group, place), parameter)
            for group, options in enumerate(groups)
            for place, parameter in enumerate(options["params"])
            if id(parameter) not in known and parameter.requires_grad
        ]
        for name, parameter in found:
            if parameter.dtype not in _AVERAGED:
                those = ", ".join(map(dtype_name, _AVERAGED))
                raise ValueError(
                    f"parameter {name!r} is {dtype_name(parameter.dtype)}; DistributedOptimizer "
                    f"averages gradients of {those}. Freeze it (requires_grad_(False)), or train "
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
        process_set = self.options.process_set
        name = f"{self.name}.check{self._meetings}"
        entries = {
            str(place): f"{each.name}: {dtype_name(each.parameter.dtype)} "
            f"{tuple(each.parameter.shape)}"
            for place, each in enumerate(fresh)
        }
        entries["options"] = (
            f"{self._kind}, op={self.options.op.name}, "
            f"compression={self.options.compressor} (wire format {FORMAT}), {more}"
        )
        subject = "parameters or options of DistributedOptimizer"
        check_same(self.adapter, subject, entries, name, process_set)
        first, self._meetings = self._meetings == 0, self._meetings + 1
        if self.ranks > 1:
            optimizer = self.optimizer
            groups = optimizer.param_groups if first and optimizer is not None else []
            warn_of_differences(self.adapter, dict(fresh[::-1]), groups, name, process_set)
        own = [place for place, each in enumerate(fresh) if _has_sparse_gradient(each.parameter)]
        return set().union(*self.adapter.allgather_object(own, f"{name}/sparse", process_set))


def _has_sparse_gradient(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse


_wrappers: weakref.WeakSet[Wrapper] = weakref.WeakSet()


def retire(wrapper: Wrapper) -> None:
    """Let a wrapper that has lost all its parameters take no place in a job that starts anew."""
    _wrappers.discard(wrapper)


def _follow_the_world() -> None:
    """Leave with Horovod's core, and join when it runs again: in order, since names count."""
    runs = "torch" in world.running()
    if runs and not all(wrapper.joined for wrapper in _wrappers):
        gc.collect()  # ranks that have just started hold nothing that is not in use
    for wrapper in sorted(_wrappers, key=lambda wrapper: wrapper.serial):
        if not runs:
            wrapper.leave()
        elif not wrapper.joined and wrapper.optimizer is not None:
            wrapper.join()


world.on_change(_follow_the_world)
