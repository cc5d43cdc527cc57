"""Running statistics of BatchNorm where a batch comes in micro-batches: moved once, by all of it.

Each micro-batch is normalized by its own mean and variance. But if each also moved the running
statistics, ``momentum`` would hold per micro-batch, a batch would move them further the more it is
cut, and its last rows would count most. So micro-batches only leave their sums here.

Deferred batch normalization is of Kim et al.: torchgpipe. 2020. arXiv:2004.09910. Unlike theirs,
this changes no module: states and checkpoints stay what they are.

Where replicas of a stage take micro-batches side by side, these may be normalized together. What is
left here is each replica's own all the same, and added up once, at the end: so the statistics get
the same bits on all replicas, also on those that had fewer micro-batches, or none.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvdx.integrations.pytorch_sync_batch_norm import found, normalized
from hvdx.pipeline.abreast import Abreast

_STATE = ("running_mean", "running_var", "num_batches_tracked", "momentum")


class Deferred:
    """Keeps the running statistics of some modules from moving until :meth:`commit`.

    Sums are kept by module and call, since each call of a module moves its statistics once.

    Args:
        modules: of one stage, all used by one thread.
    """

    def __init__(self, modules: Iterable[_BatchNorm]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._forwards = [
            functools.partial(self._forward, number, module.forward)
            for number, module in enumerate(self._modules)
        ]
        self.begin()

    def begin(self, abreast: Abreast | None = None) -> None:
        """Forget what was not committed.

        Args:
            abreast: the replicas whose micro-batches are normalized together in this step.
        """
        self._abreast = abreast
        self._sums: dict[tuple[int, ...], torch.Tensor] = {}
        self._calls: collections.Counter[int] = collections.Counter()

    @contextlib.contextmanager
    def gathering(self, micro_batch: int, counts: bool) -> Iterator[None]:
        """Take in what the modules compute within.

        Args:
            micro_batch: that is computed.
            counts: False where it is computed again: then running statistics stay, and sums too.
        """
        self._micro_batch, self._counts = micro_batch, counts
        self._calls.clear()
        for module, forward in zip(self._modules, self._forwards, strict=True):
            vars(module)["forward"] = forward
        try:
            yield
        finally:
            for module in self._modules:
                del vars(module)["forward"]

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running statistics by the sums, as one forward on the whole batch does."""
        sums = self._sums if self._abreast is None else self._abreast.merged(self._sums)
        for (number, _), (count, total, squares) in sums.items():
            module = self._modules[number]
            mean = total / count
            unbiased = (squares - count * mean * mean).clamp_(min=0.0) / (count - 1)
            seen: Any = module.num_batches_tracked
            seen.add_(1)
            share = 1.0 / float(seen) if module.momentum is None else module.momentum
            for running, new in ((module.running_mean, mean), (module.running_var, unbiased)):
                assert running is not None  # or there were no sums
                running.lerp_(new.to(running), share)
        self.begin()

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module, abreast = self._modules[number], self._abreast
        if not module.training or (abreast is None and module.running_mean is None):
            return forward(*args, **kwargs)
        call = number, self._calls[number]
        self._calls[number] += 1
        if abreast is not None:
            return self._together(abreast, call, *args, **kwargs)
        return self._aside(call, forward, *args, **kwargs)

    def _together(self, abreast: Abreast, call: tuple[int, int], input: torch.Tensor) -> Any:
        """Normalize by the moments of the micro-batches that all replicas have meanwhile."""
        module, at = self._modules[call[0]], self._micro_batch
        told = "{} of norm {}, call {}".format

        def gather(own: torch.Tensor) -> torch.Tensor:
            if self._counts and module.running_mean is not None:
                self._add(call, *own)
            return torch.stack(abreast.gathered(own, told("moments", *call), at))

        def add(own: torch.Tensor) -> Any:
            return abreast.summed(own, told("gradients", *call), at)

        module._check_input_dim(input)
        moments = found(input, gather)
        return normalized(input, module.weight, module.bias, module.eps, moments, add)

    def _aside(
        self, call: tuple[int, int], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call ``forward`` with other running statistics, which a momentum of 1 makes its own."""
        module = self._modules[call[0]]
        held = {name: getattr(module, name) for name in _STATE}
        mean = torch.zeros_like(held["running_mean"])
        variance = torch.zeros_like(mean)
        try:
            module.running_mean, module.running_var, module.momentum = mean, variance, 1.0
            module.num_batches_tracked = torch.zeros((), dtype=torch.long)
            result = forward(*args, **kwargs)
        finally:
            for name, value in held.items():
                setattr(module, name, value)
        if self._counts:
            given = args[0] if args else kwargs["input"]
            count = given.numel() // given.shape[1]
            self._add(call, mean, variance.double() * (count - 1), count)
        return result

    @torch.no_grad()
    def _add(
        self, call: tuple[int, int], mean: torch.Tensor, squares: torch.Tensor, count: Any
    ) -> None:
        """Add count, sum and sum of squares: (3, channels), in float64 since squares cancel.

        Args:
            call: module and number of its call.
            mean: of a micro-batch, (channels,).
            squares: sums of squared differences from that, (channels,).
            count: of values, or that by channel.
        """
        mean, squares = mean.double(), squares.double()
        counts = torch.zeros_like(mean) + count
        total = mean * counts
        sums = torch.stack([counts, total, squares + total * mean])
        self._sums[call] = self._sums[call] + sums if call in self._sums else sums
