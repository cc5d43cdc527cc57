"""Local SGD and DiLoCo: ranks step alone, and average once in a while what that has changed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvdx import buckets, world
from hvdx.comm import Work, together
from hvdx.compression import CompressionError, Local, Reduced, Spec
from hvdx.compression.local import Outer
from hvdx.compression.portable import PORTABLE
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_engine import Flight
from hvdx.integrations.pytorch_optimizer_reducer import release
from hvdx.integrations.pytorch_optimizer_states import Kept
from hvdx.integrations.pytorch_optimizer_wrapper import Named, Options, Wrapper
from hvdx.ops import ops_for

METHODS = (
    "synchronize",
    "skip_synchronize",
    "no_sync",
    "set_backward_passes_per_step",
    "flush",
    "compression_state",
    "portable_compression_state",
    "load_compression_state",
)
_ALONE = "steps alone"  # in a saved state


class LocalStepper(Wrapper):
    """Counts the steps that each rank takes alone, and takes the outer ones.

    Only ``step()`` is followed: gradients, clipping, accumulation and closures are each rank's
    own affair. A round ends with the step whose number in it is ``training.steps``; parameters
    are then reduced in buckets, all of them at once.

    When ranks change (elastic training), a round begins from the parameters as they are then;
    the outer momentum stays.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options, training: Local) -> None:
        self.training = training
        outer = training.outer(self._start)
        super().__init__(optimizer, options._replace(compressor=outer))
        self.kept = Kept(outer)
        self._alone = 0  # steps since the last outer step
        self._left = False  # a job, for another
        self._loaded: Mapping[str, Any] = {}  # what was, by parameter name, since the last step
        self._hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._scales_itself = False  # fused optimizers skip overflows by themselves
        self._empty()

    def _empty(self) -> None:
        self._members: dict[str, torch.Tensor] = {}  # by name, frozen later or not
        self._known: set[int] = set()  # ids of the members
        self._named: dict[str, torch.Tensor] = {}  # all that may have a state

    def attach(self, methods: Sequence[str]) -> None:
        """See :meth:`Wrapper.attach`."""
        super().attach(methods)
        optimizer: Any = self.optimizer
        # A GradScaler then calls step() in any case: steps are counted alike on all ranks.
        self._scales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
        optimizer._step_supports_amp_scaling = True

    def begin(self) -> None:
        """See :meth:`Wrapper.begin`."""
        for each in self.named():  # refuses what cannot be averaged
            release(each.parameter)
        self._empty()
        self.kept.join(self.adapter, self.options.process_set, self.name)

    def end(self) -> None:
        """See :meth:`Wrapper.end`."""
        self.kept.leave()
        self._empty()
        self._left = True

    # -- what a wrapped optimizer can do

    def synchronize(self) -> None:
        """Do nothing: gradients are not averaged. Horovod's scripts call this in each step."""

    def skip_synchronize(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: there is no averaging of gradients to be skipped."""
        return contextlib.nullcontext()

    no_sync = skip_synchronize

    @torch.no_grad()
    def flush(self) -> None:
        """End the round early, if steps were taken since the last outer step; on all ranks."""
        self.require_place()
        if self.active and self._alone:
            self._outer_step()

    def compression_state(self) -> dict[str, Any]:
        """Return what this rank keeps; see :func:`DistributedOptimizer`.

        Anchors and the outer momentum are the same on all ranks; parameters, within a round, and
        what error feedback holds back are each rank's own.
        """
        self.require_place()
        return {**self.kept.saved(), _ALONE: self._alone}

    def portable_compression_state(self) -> dict[str, Any]:
        """Return what any number of ranks can go on from; on all ranks, after ``flush()``.

        Raises:
            CompressionError: a round is under way, so that each rank has its own parameters.
        """
        self.require_place()
        if self._alone:
            raise CompressionError(
                f"portable_compression_state() after {self._alone} steps of each rank alone: "
                "parameters differ between ranks. Call optimizer.flush() before"
            )
        return {**self.kept.portable(), _ALONE: 0}

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what either of the other two has returned; on all ranks.

        An empty one begins anew: with parameters as they are then, and without momentum. That
        is for parameters that were replaced during training; what an outer step finds changed
        else counts as learnt.

        Raises:
            CompressionError: it is of another model, method or number of ranks.
        """
        self.require_place()
        if not self.active:
            return
        state = state or {
            "compressor": self.options.compressor.name,
            **{"step": 0, "rank": PORTABLE[0], "ranks": PORTABLE[1], "kinds": {}, "parameters": {}},
        }
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        self._named = {
            self.name_of(parameter, group, place): parameter
            for group, options in enumerate(groups)
            for place, parameter in enumerate(options["params"])
        }
        try:
            self.kept.load(state, [self._spec(*each) for each in self._named.items()], self._named)
        except CompressionError as error:
            raise CompressionError(f"rank {world.rank()}: {error}") from None
        self._alone, self._loaded = state.get(_ALONE, 0), state["parameters"]

    # -- which parameters

    def _follow(self) -> None:
        """Take in parameters that are new to the optimizer, or newly trainable."""
        fresh = self.named(self._known)
        if not fresh:
            return
        first = not self._members
        start = [each._replace(parameter=self._common(each)) for each in fresh]
        self.meet(start, f"{self.training}, buckets of {buckets.limit_bytes()} bytes")
        self._named.update(fresh)
        self.kept.meet([self._spec(*each) for each in fresh], dict(fresh))
        self._members.update(fresh)
        self._known.update(id(each.parameter) for each in fresh)
        if first:
            self._agree_on_round()

    def _common(self, each: Named) -> torch.Tensor:
        """Return what must be equal on all ranks: the anchor, within a round that is resumed."""
        anchor = self._loaded.get(each.name, {}).get("anchor", each.parameter)
        return anchor.to(each.parameter.dtype)

    def _agree_on_round(self) -> None:
        """Go on within a round that was loaded; begin one if ranks have changed."""
        told = self._alone, bool(self._loaded), self._left
        name = f"{self.name}.round{self._meetings}"
        everyone = self.adapter.allgather_object(told, name, self.options.process_set)
        loaded = any(loaded for _, loaded, _ in everyone)
        self._alone = max(alone for alone, _, _ in everyone) if loaded else 0
        if any(left for _, _, left in everyone) and not loaded:
            for each, parameter in self._members.items():
                state = self.kept.states[each]
                if isinstance(state, Outer):
                    anchor = parameter.detach().to(state.anchor.dtype, copy=True)
                    self.kept.states[each] = state._replace(anchor=anchor)
        self._left = False

    def _start(self, spec: Spec) -> torch.Tensor:
        """Return a copy of the parameter ``spec``, where its anchor will be."""
        return self._named[spec.name].detach().clone()

    def _spec(self, name: str, parameter: torch.Tensor) -> Spec:
        return Spec(name, tuple(parameter.shape), dtype_name(parameter.dtype), self.ranks)

    # -- around step()

    @torch.no_grad()
    def before_step(self, optimizer: Any, args: Any, options: Any) -> None:
        """Keep what parameters start from, and gradients that have overflowed out of the way."""
        self.require_place()
        if self.active:
            self._follow()
        if not self._scales_itself and getattr(optimizer, "found_inf", None) is not None:
            self._unscale(optimizer)

    def _unscale(self, optimizer: Any) -> None:
        """Do what a ``GradScaler`` leaves to optimizers that it calls in any case.

        Where this rank's gradients have overflowed it takes the step without them: others do not.
        """
        overflow, scale = bool(optimizer.found_inf), optimizer.grad_scale
        optimizer.found_inf = optimizer.grad_scale = None
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if overflow:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None
                elif scale is not None and parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))

    @torch.no_grad()
    def after_step(self, optimizer: Any, args: Any, options: Any) -> None:
        """Count, and take the outer step when its time has come."""
        for parameter, grad in self._hidden:
            parameter.grad = grad
        self._hidden = []
        self._loaded = {}
        if self.active:
            self._alone += 1
            if self._alone >= self.training.steps:
                self._outer_step()

    def _outer_step(self) -> None:
        """Replace all ranks' parameters by what the outer optimizer makes of them."""
        flights = [
            Flight(self.adapter, self._reductions(names), bucket, self.options.process_set)
            for bucket, names in self._layout()
        ]
        start = time.perf_counter()
        results = [result for flight in flights for result in flight.finish()]
        for name, reduced in results:  # all have arrived, or nothing has changed
            self._members[name].copy_(reduced.mean)
            self.kept.await_settling(name, reduced.state)
        self.kept.settle(delivered=True)
        self.kept.steps += 1
        self._alone = 0
        optimizer: Any = self.optimizer
        if optimizer is not None:
            optimizer.communication_seconds += time.perf_counter() - start

    def _layout(self) -> list[tuple[str, list[str]]]:
        """Return the names of buckets and of the parameters in them."""
        entries = [
            buckets.Entry(name, p.numel(), dtype_name(p.dtype), str(p.device))
            for name, p in self._members.items()
        ]
        return [
            (f"{self.name}.{index}", [entries[place].name for place in places])
            for index, places in enumerate(buckets.plan(entries, buckets.limit_bytes()))
        ]

    def _reductions(self, names: list[str]) -> Work[list[tuple[str, Reduced]]]:
        """Reduce the parameters of a bucket, in rounds that they share."""
        works = [self.kept.reduce(name, self._members[name].detach()) for name in names]
        results = yield from together(works, ops_for(torch.Tensor))
        return list(zip(names, results, strict=True))
