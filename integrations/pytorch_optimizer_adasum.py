"""Adasum: combine the ranks' updates, each scaled down as far as they point the same way.

Horovod's own Adasum needs MPI, or NCCL with MPI, and ends the process without them. This one is
made of the collectives that every build of Horovod has, for any number of ranks.

References:
    Maleki, Musuvathi, Mytkowicz, Saarikivi, Eksarevskiy, Mellor, Emberson, Tal:
    Scaling Distributed Training with Adaptive Summation. MLSys 2021. arXiv:2006.02924.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from hvdx import buckets
from hvdx.comm import Allgather, Allreduce, Alltoall, Work
from hvdx.compression import fp16
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_engine import Flight
from hvdx.integrations.pytorch_optimizer_reducer import release
from hvdx.integrations.pytorch_optimizer_wrapper import Named, Options, Wrapper
from hvdx.reduce_op import ReduceOp

_LEAST_NORM = sys.float_info.min**0.5  # squared norms below it count as zero, as in Horovod


def adasum(
    flat: torch.Tensor,
    sizes: Sequence[int],
    rank: int,
    ranks: int,
    wire: torch.dtype | None = None,
) -> Work[torch.Tensor]:
    """Combine the ranks' vectors, tensor by tensor.

    Two vectors a and b become ``(1 - ab/2aa) a + (1 - ab/2bb) b``: their sum where they are
    orthogonal, their mean where they are equal. Ranks are paired, then pairs, and so on; where
    one is left over it waits for the next round.

    Each rank combines one slice of all vectors, so that N elements travel twice, as in an
    allreduce; between rounds only three numbers per tensor and pair do.

        rank 0   a0 b0 c0      scatter     a0 a1 a2      combine     [a]     gather    [a] [b] [c]
        rank 1   a1 b1 c1     --------->   b0 b1 b2     --------->   [b]    -------->  [a] [b] [c]
        rank 2   a2 b2 c2                  c0 c1 c2                  [c]               [a] [b] [c]

    Args:
        flat: float32 or float64, shape (n,): tensors, one behind the other.
        sizes: their numbers of elements; the sum is n.
        rank: this rank's place among those that take part.
        ranks: their number.
        wire: the dtype that elements travel as; that of ``flat`` by default.

    Returns:
        Shape (n,), the same on all ranks.
    """
    chunk = -(-flat.numel() // ranks)
    padded = torch.nn.functional.pad(flat, (0, chunk * ranks - flat.numel()))
    slices = yield Alltoall(padded.to(wire or flat.dtype), "scatter")
    vectors = list(slices.to(flat.dtype).reshape(ranks, chunk))
    pieces = list(_pieces(sizes, rank * chunk, (rank + 1) * chunk))
    level = 0
    while len(vectors) > 1:
        pairs = list(zip(vectors[::2], vectors[1::2], strict=False))
        products = flat.new_zeros(len(pairs), len(sizes), 3, dtype=torch.float64)
        for row, (a, b) in zip(products, pairs, strict=True):
            for tensor, piece in pieces:
                x, y = a[piece].double(), b[piece].double()
                row[tensor] = torch.stack([x @ y, x @ x, y @ y])
        products = yield Allreduce(products, f"products{level}", op=ReduceOp.Sum)
        factors = _factors(products).to(flat.dtype)
        for row, (a, b) in zip(factors, pairs, strict=True):
            for tensor, piece in pieces:
                a[piece] = row[tensor, 0] * a[piece] + row[tensor, 1] * b[piece]
        vectors = vectors[::2]
        level += 1
    whole = yield Allgather(vectors[0].to(wire or flat.dtype).contiguous(), "gather")
    combined: torch.Tensor = whole.to(flat.dtype)[: flat.numel()]
    return combined


def _factors(products: torch.Tensor) -> torch.Tensor:
    """Return both factors for (ab, aa, bb) in the last dimension."""
    norms = products[..., 1:]
    ratio = products[..., :1] / norms.clamp(min=_LEAST_NORM)
    return torch.where(norms >= _LEAST_NORM, 1 - 0.5 * ratio, 1.0)


def _pieces(sizes: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, slice]]:
    """Yield which parts of the tensors lie in ``start:stop``, counted from ``start``."""
    begin = 0
    for tensor, size in enumerate(sizes):
        low, high = max(begin, start), min(begin + size, stop)
        if low < high:
            yield tensor, slice(low - start, high - start)
        begin += size


class DeltaStepper(Wrapper):
    """Lets each rank step by its own gradients, then combines what the steps changed.

    Horovod's delta optimizer: momentum and the like are each rank's own, so are gradients;
    parameters are the same on all ranks after each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options) -> None:
        super().__init__(optimizer, options)
        self._met: list[int] = []  # ids of the parameters that ranks have compared
        self._named: list[Named] = []
        self._before: list[torch.Tensor] = []

    def begin(self) -> None:
        """See :meth:`Wrapper.begin`."""
        for each in self.named():  # refuses what cannot be combined
            release(each.parameter)
        self._met = []

    def end(self) -> None:
        """See :meth:`Wrapper.end`."""
        self._before = []

    def synchronize(self) -> None:
        """Do nothing, as in Horovod: not gradients are combined, but what ``step()`` changes."""

    def skip_synchronize(self) -> NoReturn:
        """Refuse, as Horovod does.

        Raises:
            AssertionError: always.
        """
        raise AssertionError(
            "skip_synchronize() means nothing with op=hvd.Adasum: parameters are combined after "
            "step(), gradients never are"
        )

    @torch.no_grad()
    def before_step(self, optimizer: Any, args: Any, options: Any) -> None:
        """Keep a copy of the parameters."""
        self.require_place()
        if self.active and self.ranks > 1:
            self._named = self.named()
            ids = [id(each.parameter) for each in self._named]
            if ids != self._met:
                self.meet(self._named, f"buckets of {buckets.limit_bytes()} bytes")
                self._met = ids
            self._before = [each.parameter.detach().clone() for each in self._named]

    @torch.no_grad()
    def after_step(self, optimizer: Any, args: Any, options: Any) -> None:
        """Put the combined change in the place of this rank's own."""
        if not self._before:
            return
        flights = []
        for index, members in enumerate(self._layout(self._named)):
            after = [self._named[i].parameter for i in members]
            before = [self._before[i] for i in members]
            deltas = torch._foreach_sub(after, before)
            name = f"{self.name}.{index}"
            work = self._combined(deltas)
            flights.append(
                (after, before, Flight(self.adapter, work, name, self.options.process_set))
            )
        start = time.perf_counter()
        for after, before, flight in flights:
            torch._foreach_copy_(after, torch._foreach_add(before, flight.finish()))
        elapsed = time.perf_counter() - start
        optimizer.communication_seconds += elapsed
        self._before = []

    def _layout(self, named: list[Named]) -> list[list[int]]:
        entries = [
            buckets.Entry(name, p.numel(), dtype_name(p.dtype), str(p.device)) for name, p in named
        ]
        return buckets.plan(entries, buckets.limit_bytes())

    def _combined(self, deltas: Sequence[torch.Tensor]) -> Work[list[torch.Tensor]]:
        """Combine a bucket of changes; those of 16 bits in float32."""
        flat = torch.cat([delta.reshape(-1) for delta in deltas])
        half = flat.dtype == torch.float16 or self.options.compressor is fp16
        flat = flat if flat.dtype == torch.float64 else flat.float()
        sizes = [delta.numel() for delta in deltas]
        wire = torch.float16 if half else None
        whole = yield from adasum(flat, sizes, self._place(), self.ranks, wire)
        parts = whole.to(deltas[0].dtype).split(sizes)
        return [part.view(delta.shape) for part, delta in zip(parts, deltas, strict=True)]

    def _place(self) -> int:
        rank = int(self.adapter.horovod.rank())
        process_set = self.options.process_set
        return rank if process_set is None else process_set.ranks.index(rank)
