"""Batch normalization over the batches of all ranks, on any device and in any float type.

Horovod's runs on GPUs only. Statistics travel in one gather, and are kept as means and sums of
squared differences from them: sums of squares would cancel where the mean is large.
"""

from __future__ import annotations

from typing import Any

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
        output, mean, variance, count = _Normalize.apply(
            input, self.weight, self.bias, self.eps, self.process_set
        )
        if self.training and self.track_running_stats:
            self._track(mean, variance, count)
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


class _Normalize(torch.autograd.Function):
    """Normalize by the statistics of all ranks; the gradient takes all ranks' gradients in.

    For the outputs y and x^ = (x - mean) / deviation, of n values per channel in all:

        dx = weight / deviation * (dy - sum(dy) / n - x^ * sum(dy * x^) / n)

    The sums run over all ranks. Gradients of weight and bias are this rank's own: an optimizer
    averages them like any other.
    """

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: Any, bias: Any, eps: float, process_set: Any
    ) -> Any:
        mean, variance, count = _statistics(input, process_set)
        output = functional.batch_norm(
            input, mean, variance, _like(weight, mean), _like(bias, mean), eps=eps
        )
        ctx.save_for_backward(input, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.process_set = process_set
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        input, weight, mean, scale, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (input.dim() - 2)]
        others = [dim for dim in range(input.dim()) if dim != 1]
        grad = grad.to(mean.dtype)
        normal = (input.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([grad.sum(others), (grad * normal).sum(others)])
        of_bias, of_weight = sums
        of_input = None
        if ctx.needs_input_grad[0]:
            total, along = _summed(sums, ctx.process_set) / count
            factor = scale if weight is None else scale * weight.to(mean.dtype)
            of_input = grad - total.view(shape) - normal * along.view(shape)
            of_input = (of_input * factor.view(shape)).to(input.dtype)
        if weight is None:
            return of_input, None, None, None, None
        return of_input, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def _statistics(
    input: torch.Tensor, process_set: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and variance per channel over all ranks, and how many values each is of."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    channels = input.shape[1]
    others = [dim for dim in range(input.dim()) if dim != 1]
    count = input.numel() // channels
    own = torch.zeros(3, channels, dtype=wide, device=input.device)
    if count:
        variance, mean = torch.var_mean(input.to(wide), others, correction=0)
        own = torch.stack([mean, variance * count, torch.full_like(mean, count)])
    every = _gathered(own.unsqueeze(0), process_set)  # (ranks, 3, channels)
    means, squares, counts = every.double().unbind(1)  # each (ranks, channels)
    total = counts[:, 0].sum()
    if total <= 1:
        raise ValueError(
            f"rank {world.rank()}: SyncBatchNorm got {int(total)} values per channel from all "
            "ranks together; a variance needs 2"
        )
    mean = (means * counts).sum(0) / total
    variance = (squares + counts * (means - mean) ** 2).sum(0) / total
    return mean.to(wide), variance.to(wide), total.to(wide)


def _like(parameter: torch.Tensor | None, statistic: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(statistic.dtype)


# Named by their size, and so alike for the layers of one width: Horovod remembers what it has
# agreed on by name.


def _gathered(own: torch.Tensor, process_set: Any) -> torch.Tensor:
    core, process_set = _core(process_set)
    if core.ranks(process_set) == 1:
        return own
    name = f"hvdx.sync_batch_norm.statistics.{own.shape[-1]}"
    return core.allgather(own, name=name, process_set=process_set)


def _summed(own: torch.Tensor, process_set: Any) -> torch.Tensor:
    core, process_set = _core(process_set)
    if core.ranks(process_set) == 1:
        return own
    return core.allreduce(
        own,
        op=ReduceOp.Sum,
        name=f"hvdx.sync_batch_norm.gradients.{own.shape[-1]}",
        prescale_factor=1.0,
        postscale_factor=1.0,
        process_set=process_set,
    )


def _core(process_set: Any) -> tuple[Any, Any]:
    return world.core("torch"), world.own_set("torch", process_set)
