"""Average Keras gradients on the torch backend."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from hvdx.frameworks import Adapter
from hvdx.integrations.keras3_averager import Averager, Bucket, Layout, Options
from hvdx.integrations.keras3_state import Kept, States
from hvdx.integrations.pytorch import on_host
from hvdx.integrations.pytorch_engine import Flight
from hvdx.ops import TorchOps


class TensorStates(States):
    """Keeps tensors on the parameters' devices."""

    def beside(self, kept: Kept) -> contextlib.AbstractContextManager[Any]:
        """See :meth:`States.beside`."""
        return torch.device(kept.device)


class TorchAverager(Averager):
    """Sends all buckets at once, then waits; gradients come back as views of the buckets."""

    def __init__(self, adapter: Adapter, options: Options) -> None:
        self.ops = TorchOps()
        super().__init__(adapter, options)
        self.seconds = 0.0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def average(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """See :meth:`Averager.average`."""
        return super().average(optimizer, grads, variables)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def everywhere(self, condition: Any, purpose: str = "finite") -> Any:
        """See :meth:`Averager.everywhere`."""
        return super().everywhere(condition, purpose)

    def make_states(self) -> TensorStates:
        """See :meth:`Averager.make_states`."""
        return TensorStates(self.ops, self.options.compressor)

    def finite(self, tensors: list[Any]) -> bool:
        """See :meth:`Averager.finite`; looks at each element only where a sum is not finite."""
        if all(on_host([tensor.sum().isfinite() for tensor in tensors])):
            return True
        return all(on_host([tensor.isfinite().all() for tensor in tensors]))

    def reduce(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """See :meth:`Averager.reduce`."""
        flights = []
        for bucket in layout.buckets:
            own = [_dense(grads[place], layout.variables[place].value) for place in bucket.members]
            start = bucket.start(self.states.step)
            work, name = self.work(bucket, own, start), bucket.name(start)
            flights.append(Flight(self.adapter, work, name, self.options.process_set))
        began = time.perf_counter()
        means: list[Any] = [None] * len(grads)
        states: dict[str, Any] = {}
        for bucket, flight in zip(layout.buckets, flights, strict=True):
            found, kept = flight.finish()
            states.update(kept)
            for place, mean in zip(bucket.members, found, strict=True):
                means[place] = mean
        self.seconds += time.perf_counter() - began
        finite = True
        if layout.remembers:
            if states or not layout.turns:
                finite = bool(self.all_finite(layout, means, grads))
            self.states.settle(finite, states)
        if layout.clocks:
            self.review(layout, finite)
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
