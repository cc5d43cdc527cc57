"""Running statistics of BatchNorm where a batch comes in micro-batches: moved once, by all of it.

Each micro-batch is normalized by its own mean and variance. But if each also moved the running
statistics, ``momentum`` would hold per micro-batch, a batch would move them further the more it is
cut, and its last rows would count most. So micro-batches only leave their sums here.

Deferred batch normalization is of Kim et al.: torchgpipe. 2020. arXiv:2004.09910. Unlike theirs,
this changes no module: states and checkpoints stay what they are.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

_STATE = ("running_mean", "running_var", "num_batches_tracked", "momentum")


class Deferred:
    """Keeps the running statistics of some modules from moving until :meth:`commit`.

    Sums are kept by module and call, since each call of a module moves its statistics once.

    Args:
        modules: of one stage, all used by one thread.
    """

    def __init__(self, modules: Iterable[_BatchNorm]) -> None:
        self._forwards = {
            module: functools.partial(self._forward, module, module.forward) for module in modules
        }
        self.begin()

    def begin(self) -> None:
        """Forget what was not committed."""
        self._sums: dict[tuple[_BatchNorm, int], torch.Tensor] = {}
        self._calls: collections.Counter[_BatchNorm] = collections.Counter()

    @contextlib.contextmanager
    def gathering(self, counts: bool) -> Iterator[None]:
        """Take in what the modules compute within, a micro-batch.

        Args:
            counts: False where it is computed again: then running statistics stay, and sums too.
        """
        self._counts = counts
        self._calls.clear()
        for module, forward in self._forwards.items():
            vars(module)["forward"] = forward
        try:
            yield
        finally:
            for module in self._forwards:
                del vars(module)["forward"]

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running statistics by the sums, as one forward on the whole batch does."""
        for (module, _), (count, total, squares) in self._sums.items():
            mean = total / count
            unbiased = (squares - count * mean * mean).clamp_(min=0.0) / (count - 1)
            seen: Any = module.num_batches_tracked
            seen.add_(1)
            share = 1.0 / float(seen) if module.momentum is None else module.momentum
            for running, new in ((module.running_mean, mean), (module.running_var, unbiased)):
                assert running is not None  # or there were no sums
                running.lerp_(new.to(running.dtype), share)
        self.begin()

    def _forward(
        self, module: _BatchNorm, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call ``forward`` with other running statistics, which a momentum of 1 makes its own."""
        running = module.running_mean
        if not module.training or running is None:
            return forward(*args, **kwargs)
        held = {name: getattr(module, name) for name in _STATE}
        mean, variance = torch.zeros_like(running), torch.zeros_like(running)
        try:
            module.running_mean, module.running_var, module.momentum = mean, variance, 1.0
            module.num_batches_tracked = torch.zeros((), dtype=torch.long)
            result = forward(*args, **kwargs)
        finally:
            for name, value in held.items():
                setattr(module, name, value)
        if self._counts:
            given = args[0] if args else kwargs["input"]
            self._add(module, given.numel() // given.shape[1], mean, variance)
        return result

    @torch.no_grad()
    def _add(
        self, module: _BatchNorm, count: int, mean: torch.Tensor, unbiased: torch.Tensor
    ) -> None:
        """Add count, sum and sum of squares: (3, channels), in float64 since squares cancel."""
        mean, unbiased = mean.double(), unbiased.double()
        total = mean * count
        squares = unbiased * (count - 1) + total * mean
        sums = torch.stack([torch.full_like(mean, count), total, squares])
        key = module, self._calls[module]
        self._calls[module] += 1
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
