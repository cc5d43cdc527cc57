"""Local SGD and DiLoCo: ranks step alone, and average once in a while what that has changed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hvdx import buckets, world
from hvdx.comm import together
from hvdx.compression import CompressionError, Compressor, Local, Reduced, Spec
from hvdx.compression.local import anchored
from hvdx.compression.portable import restored
from hvdx.compression.state import leaves
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_engine import Flight
from hvdx.integrations.pytorch_optimizer_reducer import release
from hvdx.integrations.pytorch_optimizer_wrapper import Named, Options, Wrapper
from hvdx.ops import ops_for

METHODS = (
    "synchronize",
    "skip_synchronize",
    "no_sync",
    "set_backward_passes_per_step",
    "flush",
    "compression_state",
    "load_compression_state",
)
_OWN = ""  # in a saved state: what belongs to no parameter


class Member(NamedTuple):
    """A parameter and what reduces it; followed until the optimizer goes."""

    name: str
    parameter: torch.Tensor
    outer: Compressor


class LocalStepper(Wrapper):
    """Counts the steps that each rank takes alone, and takes the outer ones.

    Only ``step()`` is followed: gradients, clipping, accumulation and closures are each rank's
    own affair. A round ends with the step whose number in it is ``training.steps``; parameters
    are reduced in buckets, all of them at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options, training: Local) -> None:
        super().__init__(optimizer, options)
        self.training = training
        self.states: dict[str, Any] = {}  # the outer compressor's, by parameter name
        self._loaded: dict[str, dict[str, Any]] = {}  # of parameters yet to be followed
        self._hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._scales_itself = False  # fused optimizers skip overflows by themselves
        self._empty()

    def _empty(self) -> None:
        self.states = {}
        self._members: list[Member] = []
        self._known: set[int] = set()  # ids of the members
        self._outer: Compressor | None = None  # as prepared when ranks have met
        self._steps = 0  # since the last outer step
        self._rounds = 0  # outer steps so far

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

    def end(self) -> None:
        """See :meth:`Wrapper.end`."""
        self._empty()

    # -- what a wrapped optimizer can do

    def synchronize(self) -> None:
        """Do nothing: gradients are not averaged. Horovod's scripts call this in each step."""

    def skip_synchronize(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: there is no averaging of gradients to be skipped."""
        return contextlib.nullcontext()

    no_sync = skip_synchronize

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accept it: gradients stay on this rank however many backward calls add to them."""
        if passes < 1:
            raise ValueError(f"backward_passes_per_step={passes} must be at least 1")
        optimizer: Any = self.optimizer
        optimizer.backward_passes_per_step = passes

    @torch.no_grad()
    def flush(self) -> None:
        """End the round early, if steps were taken since the last outer step; on all ranks."""
        self.require_place()
        if self.active and self._steps:
            self._outer_step()

    def compression_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return ``{parameter name: {path: tensor}}``, with counters under the name ``""``.

        What the outer optimizer keeps is the same on all ranks, and may be loaded by any number
        of them; what error feedback keeps is each rank's own. The parameters themselves are each
        rank's own between outer steps: save them on each, or call ``flush()`` before.
        """
        state = {
            name: {leaf.path: leaf.tensor for leaf in leaves(kept)}
            for name, kept in self.states.items()
        }
        counters = {"steps": self._steps, "rounds": self._rounds}
        return {**state, _OWN: {name: torch.tensor(value) for name, value in counters.items()}}

    def load_compression_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Go on from what :meth:`compression_state` has returned; on all ranks.

        An empty one begins anew: with parameters as they are then, and without momentum. That
        is for parameters that were replaced during training; what an outer step finds changed
        else counts as learnt.

        Raises:
            CompressionError: it is of another model or method; told at once for parameters that
                have been trained already, at the next ``step()`` for others.
        """
        if not state:
            self.states = {each.name: self._initial(each) for each in self._members}
            self._loaded, self._steps, self._rounds = {}, 0, 0
            return
        given = {name: dict(tensors) for name, tensors in state.items()}
        counters = given.pop(_OWN, {})
        if set(counters) != {"steps", "rounds"}:
            raise CompressionError(f"this is no state of {self.training}: it has no counters")
        self.states = {each.name: self._restored(each, given) for each in self._members}
        self._steps, self._rounds = int(counters["steps"]), int(counters["rounds"])
        self._loaded = given

    # -- which parameters

    def _follow(self) -> None:
        """Take in parameters that are new to the optimizer, or newly trainable."""
        fresh = self.named(self._known)
        if not fresh:
            return
        start = [each._replace(parameter=self._start(each)) for each in fresh]
        self.meet(start, f"buckets of {buckets.limit_bytes()} bytes")
        if self._outer is None:
            outer = self.training.outer
            if outer.prepare is not None:
                specs = [self._spec(each) for each in fresh]
                outer = outer.prepare(self.adapter, specs, self.options.process_set)
            self._outer = outer
        for each in fresh:
            member = Member(*each, self._outer.of(self._spec(each)))
            self.states[each.name] = (
                self._restored(member, self._loaded) if self._loaded else self._initial(member)
            )
            self._members.append(member)
            self._known.add(id(each.parameter))

    def _start(self, each: Named) -> torch.Tensor:
        """Return what must be equal on all ranks: within a round, which is restored, the anchor."""
        return self._loaded.get(each.name, {}).get("anchor", each.parameter)

    def _spec(self, each: Named | Member) -> Spec:
        parameter = each.parameter
        return Spec(each.name, tuple(parameter.shape), dtype_name(parameter.dtype), self.ranks)

    def _initial(self, member: Member) -> Any:
        ops = ops_for(torch.Tensor)
        with torch.device(member.parameter.device):
            state = member.outer.init(ops, self._spec(member))
        return anchored(ops, state, member.parameter.detach().clone())

    def _restored(self, member: Member, saved: Mapping[str, Mapping[str, torch.Tensor]]) -> Any:
        """Return the state of ``member`` that was saved."""
        device = member.parameter.device
        given = saved.get(member.name, {})
        try:
            return restored(
                self._initial(member),
                {path: tensor.to(device, copy=True) for path, tensor in given.items()},
            )
        except CompressionError as error:
            told = f"rank {world.rank()}, parameter {member.name!r}: {error}"
            raise CompressionError(told) from None

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
            self._steps += 1
            if self._steps >= self.training.steps:
                self._outer_step()

    def _outer_step(self) -> None:
        """Replace all ranks' parameters by what the outer optimizer makes of them."""
        flights = [
            Flight(self.adapter, self._reductions(members), name, self.options.process_set)
            for name, members in self._layout()
        ]
        start = time.perf_counter()
        results = [result for flight in flights for result in flight.finish()]
        for member, reduced in results:  # all have arrived, or nothing has changed
            member.parameter.copy_(reduced.mean)
            self.states[member.name] = reduced.state
        self._steps = 0
        self._rounds += 1
        optimizer: Any = self.optimizer
        if optimizer is not None:
            optimizer.communication_seconds += time.perf_counter() - start

    def _layout(self) -> list[tuple[str, list[Member]]]:
        """Return buckets of parameters, with the names of their collectives."""
        entries = [
            buckets.Entry(
                each.name,
                each.parameter.numel(),
                dtype_name(each.parameter.dtype),
                str(each.parameter.device),
            )
            for each in self._members
        ]
        return [
            (f"{self.name}.{index}", [self._members[place] for place in places])
            for index, places in enumerate(buckets.plan(entries, buckets.limit_bytes()))
        ]

    def _reductions(self, members: list[Member]) -> Any:
        """Reduce the parameters of a bucket, in rounds that they share."""
        ops = ops_for(torch.Tensor)
        works = [
            each.outer.at(self._rounds).reduce(ops, each.parameter.detach(), self.states[each.name])
            for each in members
        ]
        results: list[Reduced] = yield from together(works, ops)
        return list(zip(members, results, strict=True))
