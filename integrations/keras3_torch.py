"""Average Keras gradients on the torch backend."""

from __future__ import annotations

import time
from typing import Any

import torch

from hvdx.frameworks import Adapter
from hvdx.integrations.keras3_averager import Averager, Bucket, Layout, Options
from hvdx.integrations.pytorch_engine import Flight
from hvdx.ops import TorchOps


class TorchAverager(Averager):
    """Sends all buckets at once, then waits; gradients come back as views of the buckets."""

    def __init__(self, adapter: Adapter, options: Options) -> None:
        super().__init__(adapter, options)
        self.ops = TorchOps()
        self.seconds = 0.0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def average(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """See :meth:`Averager.average`."""
        return super().average(optimizer, grads, variables)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def everywhere(self, condition: Any) -> Any:
        """See :meth:`Averager.everywhere`."""
        return super().everywhere(condition)

    def reduce(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """See :meth:`Averager.reduce`."""
        flights = []
        for bucket in layout.buckets:
            own = [_dense(grads[place], layout.variables[place].value) for place in bucket.members]
            work = self.work(bucket, own)
            flights.append(Flight(self.adapter, work, bucket.name, self.options.process_set))
        start = time.perf_counter()
        means: list[Any] = [None] * len(grads)
        for bucket, flight in zip(layout.buckets, flights, strict=True):
            for place, mean in zip(bucket.members, flight.finish(), strict=True):
                means[place] = mean
        self.seconds += time.perf_counter() - start
        return means

    def pack(self, bucket: Bucket, grads: list[Any]) -> tuple[Any, bool]:
        """See :meth:`Averager.pack`; a gradient alone in its bucket is not copied."""
        if len(grads) == 1:
            return grads[0].reshape(-1), False
        if bucket.flat is None:
            bucket.flat = grads[0].new_empty(sum(bucket.sizes))
        torch.cat([grad.reshape(-1) for grad in grads], out=bucket.flat)
        return bucket.flat, True

    def unpack(self, bucket: Bucket, flat: Any) -> list[Any]:
        """See :meth:`Averager.unpack`."""
        pieces = flat.split(bucket.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, bucket.shapes, strict=True)]

    def device(self, variable: Any) -> str:
        """See :meth:`Averager.device`."""
        return str(variable.value.device)

    def dense(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """See :meth:`Averager.dense`."""
        return [
            _dense(grad, variable.value)
            for grad, variable in zip(grads, layout.variables, strict=True)
        ]

    def is_tracing(self) -> bool:
        """See :meth:`Averager.is_tracing`; torch.compile leaves this code out."""
        return False

    def is_zero(self, mean: Any) -> bool:
        """See :meth:`Averager.is_zero`."""
        return not mean.any()


def _dense(grad: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    if grad is None:
        return torch.zeros_like(value, requires_grad=False)
    return (grad.to_dense() if grad.is_sparse else grad.detach()).to(value.dtype)
