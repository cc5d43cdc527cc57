"""Batch normalization over the batches of all ranks, on any device and in any float type.

Horovod's runs on GPUs only. Statistics travel in one gather, and are kept as means and sums of
squared differences from them: sums of squares would cancel where the mean is large.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hvdx import world
from hvdx.reduce_op import ReduceOp


class SyncBatchNorm(_BatchNorm):
    """Batch normalization whose mean and variance are those of all ranks' batches together.

    With gradients averaged over the ranks (``DistributedOptimizer``), training equals that of
    one process on the whole batch. Batches may differ in size, and be empty on some ranks. All
    ranks must call the layer, in training; in evaluation only where running statistics are not
    tracked, since then a batch's own are used.

    Args:
        num_features: channels C of inputs (N, C, ...).
        eps: added to the variance.
        momentum: share of a new batch in the running statistics; None for their plain mean.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics for evaluation.
        process_set: the ranks whose batches count; all by default.

    Shapes:
        input (N, C, ...), the output likewise and of the same dtype; half precision is
        computed in float32.

    Raises:
        ValueError: an input of fewer than 2 dimensions, or one value per channel in all ranks'
            batches together, whose variance is unknown.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_set = process_set

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize ``input`` by the statistics of all ranks, or by the running ones."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        core, process_set = world.core("torch"), world.own_set("torch", self.process_set)
        moments = found(input, lambda own: _gathered(own, core, process_set))
        add = functools.partial(_summed, core=core, process_set=process_set)
        output = normalized(input, self.weight, self.bias, self.eps, moments, add)
        if self.training and self.track_running_stats:
            self._track(*moments)
        return output

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """Move the running statistics towards a batch's; their variance is the unbiased one."""
        seen: Any = self.num_batches_tracked
        seen.add_(1)
        share = 1.0 / float(seen) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None  # as long as they are tracked
            running.lerp_(new.to(running.dtype), share)


class Moments(NamedTuple):
    """What batches are normalized by.

    Attributes:
        mean: (channels,).
        variance: (channels,), the biased one.
        number: of values of each channel, ().
    """

    mean: torch.Tensor
    variance: torch.Tensor
    number: torch.Tensor


Share: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Takes what this rank has and returns what all ranks have, or its sum."""


@torch.no_grad()
def found(input: torch.Tensor, gather: Share) -> Moments:
    """Return the moments of all ranks' batches.

    Args:
        input: (N, C, ...), of this rank.
        gather: of this rank's means, sums of squared differences from them, and counts, (3, C);
            returns those of all ranks, (ranks, 3, C).

    Raises:
        ValueError: there is one value per channel in all.
    """
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    channels = input.shape[1]
    others = [dim for dim in range(input.dim()) if dim != 1]
    count = input.numel() // channels
    own = torch.zeros(3, channels, dtype=wide, device=input.device)
    if count:
        variance, mean = torch.var_mean(input.to(wide), others, correction=0)
        own = torch.stack([mean, variance * count, torch.full_like(mean, count)])
    means, squares, counts = gather(own).double().unbind(1)  # each (ranks, channels)
    total = counts[:, 0].sum()
    if total <= 1:
        raise ValueError(
            f"rank {world.rank()}: batch normalization got {int(total)} values per channel from "
            "all ranks together; a variance needs 2"
        )
    mean = (means * counts).sum(0) / total
    variance = (squares + counts * (means - mean) ** 2).sum(0) / total
    return Moments(mean.to(wide), variance.to(wide), total.to(wide))


def normalized(
    input: torch.Tensor, weight: Any, bias: Any, eps: float, moments: Moments, add: Share
) -> torch.Tensor:
    """Normalize by the moments of all ranks' batches; gradients know of the others' share.

    Args:
        input: (N, C, ...), of this rank.
        weight: (C,), or None.
        bias: (C,), or None.
        eps: added to the variance.
        moments: from :func:`found`.
        add: sums a tensor over the ranks, for the gradient of ``input``.
    """
    output: torch.Tensor = _Normalize.apply(input, weight, bias, eps, moments, add)
    return output


class _Normalize(torch.autograd.Function):
    """Normalize by the statistics of all ranks; the gradient takes all ranks' gradients in.

    For the outputs y and x^ = (x - mean) / deviation, of n values per channel in all:

        dx = weight / deviation * (dy - sum(dy) / n - x^ * sum(dy * x^) / n)

    The sums run over all ranks. Gradients of weight and bias are this rank's own: an optimizer
    averages them like any other.
    """

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: Any, bias: Any, eps: float, moments: Moments,
        add: Share,
    ) -> torch.Tensor:  # fmt: skip
        mean, variance, count = moments
        ctx.save_for_backward(input, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.add = add
        return functional.batch_norm(
            input, mean, variance, _like(weight, mean), _like(bias, mean), eps=eps
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        input, weight, mean, scale, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (input.dim() - 2)]
        others = [dim for dim in range(input.dim()) if dim != 1]
        grad = grad.to(mean.dtype)
        normal = (input.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([grad.sum(others), (grad * normal).sum(others)])
        of_bias, of_weight = sums
        of_input = None
        if ctx.needs_input_grad[0]:
            total, along = ctx.add(sums) / count
            factor = scale if weight is None else scale * weight.to(mean.dtype)
            of_input = grad - total.view(shape) - normal * along.view(shape)
            of_input = (of_input * factor.view(shape)).to(input.dtype)
        if weight is None:
            return of_input, None, None, None, None, None
        return of_input, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None


def _like(parameter: torch.Tensor | None, statistic: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(statistic.dtype)


# Named by their size, and so alike for the layers of one width: Horovod remembers what it has
# agreed on by name.


def _gathered(own: torch.Tensor, core: Any, process_set: Any) -> torch.Tensor:
    """Return (ranks, ...)."""
    if core.ranks(process_set) == 1:
        return own.unsqueeze(0)
    name = f"hvdx.sync_batch_norm.statistics.{own.shape[-1]}"
    return core.allgather(own.unsqueeze(0), name=name, process_set=process_set)  # type: ignore[no-any-return]


def _summed(own: torch.Tensor, core: Any, process_set: Any) -> torch.Tensor:
    if core.ranks(process_set) == 1:
        return own
    return core.allreduce(  # type: ignore[no-any-return]
        own,
        op=ReduceOp.Sum,
        name=f"hvdx.sync_batch_norm.gradients.{own.shape[-1]}",
        prescale_factor=1.0,
        postscale_factor=1.0,
        process_set=process_set,
    )
