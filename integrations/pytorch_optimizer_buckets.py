"""What travels as one operation: many dense gradients side by side, or one sparse gradient.

Nothing here holds a parameter: hooks of a parameter that lead back to it are a circle that
Python's collector cannot see, and the model would stay for ever.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from hvdx.comm import Allgather, Allreduce, Together, Work
from hvdx.compression import Compressor
from hvdx.compression.rows import gather_rows, row_codec
from hvdx.integrations.pytorch import dtype_name, on_host
from hvdx.integrations.pytorch_engine import Flight
from hvdx.integrations.pytorch_optimizer_states import Taken
from hvdx.ops import ops_for
from hvdx.reduce_op import ReduceOp


class Bucket:
    """Gradients of one dtype and device, side by side in one flat tensor.

    Behind the gradients lies one number per parameter that tells what this rank has: nothing
    (0), a gradient (1), or a sparse one that travels as dense (``2 * ranks``). A rank without a
    gradient learns from the sum whether the mean is a gradient to apply, of which kind, or
    whether there is none anywhere.

    Args:
        index: of the bucket, for names.
        names: of the parameters.
        parameters: in the order of the flat tensor.
        ranks: that take part.

    Attributes:
        methods: what reduces each gradient, where each is reduced alone.
        compressor: what reduces the flat tensor; None if each gradient is reduced alone.
        turn: for names: which of the ways of reducing it this is.
        scale: what gradients are multiplied by on their way in. The 1/N of a mean costs
            nothing in the same pass, and a pass of its own afterwards.
    """

    methods: Sequence[Compressor]
    compressor: Compressor | None
    turn: str
    scale: float

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        parameters: Sequence[torch.Tensor],
        ranks: int,
    ) -> None:
        self.index = index
        self.names = names
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._shapes = [(p.numel(), p.shape, _strides(p)) for p in parameters]
        self._dtype, self._device = parameters[0].dtype, parameters[0].device
        self._lay_out()
        self._ranks = ranks
        self.waiting = len(parameters)
        self.placed: set[int] = set()  # moved in already
        self._streams: set[Any] = set()  # of a GPU, on which gradients of this round were made
        self.summed: set[int] = set()  # with op=Sum: gradients that are sums over the ranks
        self.rounds = 0  # reductions since the last step
        self._absent: list[int] = []
        self._sparse: list[int] = []
        self.flight: Flight | None = None

    def adjust(self, taken: Taken, *, scale: float, full: int) -> None:
        """Travel otherwise from now on, between two rounds.

        Args:
            taken: what reduces the gradients.
            scale: see :attr:`scale`.
            full: what the number behind a gradient becomes where every rank has a dense one.
        """
        self.methods, self.compressor, self.turn = taken.methods, taken.shared, taken.turn
        self.scale, self._full = scale, full

    def _lay_out(self) -> None:
        sizes = [size for size, _, _ in self._shapes]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=self._dtype, device=self._device)
        *parts, self.presence = self.flat.split([*sizes, len(sizes)])
        self.views = [
            part.as_strided(shape, strides)
            for part, (_, shape, strides) in zip(parts, self._shapes, strict=True)
        ]
        del parts
        self._pointers = [view.data_ptr() for view in self.views]
        self._storage = self.flat.untyped_storage()
        self._tensors = self._sharing()

    def _sharing(self) -> int:
        """Count the tensors that lie in the flat tensor's memory."""
        return int(torch._C._storage_Use_Count(self._storage._cdata))

    def let_go(self) -> None:
        """Leave the flat tensor to the user where gradients in it have been kept; take another.

        ``kept = [p.grad for p in parameters]`` before the gradients are set to None shall stay
        what it is, as without hvdx.
        """
        if self._sharing() > self._tensors or self._views_kept():
            self.begin()
            self._lay_out()

    def _views_kept(self) -> bool:
        counts = list(map(sys.getrefcount, self.views))
        if max(counts) == 2:  # our list's and the call's
            return False
        for reference, view, count in zip(self._parameters, self.views, counts, strict=True):
            if count > 2:
                parameter = reference()
                if parameter is None or parameter.grad is not view:
                    return True
        return False

    def tensors(self) -> list[torch.Tensor]:
        """Return the gradients as compressors see them."""
        return self.views

    def note_stream(self) -> None:
        """Note that a gradient was made on the current stream of its GPU, if it is on one."""
        if self._device.type == "cuda":
            self._streams.add(torch.cuda.current_stream(self._device))

    def _await_streams(self) -> None:
        """Have the current stream wait for those where a model computes side by side."""
        if self._streams:
            own = torch.cuda.current_stream(self._device)
            for stream in self._streams - {own}:
                own.wait_stream(stream)
            self._streams.clear()

    def place(self, index: int, parameter: torch.Tensor) -> None:
        """Copy one large gradient in, as soon as it is there: it still lies in the cache."""
        grad = parameter.grad
        if grad is None or grad.is_sparse or grad.data_ptr() == self._pointers[index]:
            return
        with torch.no_grad():
            torch.mul(grad, self.scale, out=self.views[index])
        self.placed.add(index)

    def idle(self, index: int) -> bool:
        """Tell whether no rank has had this gradient, so that its mean will not be applied."""
        return index in self._absent and not self.presence[index]

    def means(self) -> torch.Tensor:
        """Return what has come."""
        return self.flat

    def begin(self) -> None:
        """Forget what an earlier backward pass left that has failed half-way."""
        self.placed.clear()
        self._streams.clear()
        self.waiting = len(self.views)

    @torch.no_grad()
    def share(self, index: int) -> None:
        """Divide a sum over the ranks by their number: once summed again, it counts once."""
        if index in self.summed:
            self.summed.discard(index)
            parameter = self._parameters[index]()
            grad = parameter.grad if parameter is not None else None
            if grad is not None and (grad.is_sparse or grad.data_ptr() == self._pointers[index]):
                grad.mul_(1 / self._ranks)

    @torch.no_grad()
    def fill(self) -> None:
        """Move the other gradients in; from here on all are views of the flat tensor."""
        self._await_streams()
        for index in tuple(self.summed):
            self.share(index)
        self._absent, self._sparse = [], []
        into, given, unscaled = [], [], []
        own = zip(self._parameters, self.views, self._pointers, strict=True)
        for index, (reference, view, pointer) in enumerate(own):
            parameter = reference()
            if parameter is None or (grad := parameter.grad) is None:
                self._absent.append(index)
                continue
            if index in self.placed:
                parameter.grad = view
                continue
            unscaled.append(view)
            if grad.is_sparse:
                self._sparse.append(index)
                grad = grad.to_dense()
            elif grad.data_ptr() == pointer:
                continue
            into.append(view)
            given.append(grad)
            parameter.grad = view
        if into:
            torch._foreach_copy_(into, given)
        if unscaled and self.scale != 1.0:
            if self.placed:
                torch._foreach_mul_(unscaled, self.scale)
            else:  # all of them: one pass instead of hundreds
                self.flat.mul_(self.scale)
        self.presence.fill_(1)
        for index in self._sparse:
            self.presence[index] = 2 * self._ranks
        for index in self._absent:
            self.views[index].zero_()
            self.presence[index] = 0

    def deliver(self, op: ReduceOp) -> None:
        """Hand out means that are not in place: where this rank has no gradient, or a sparse one.

        A gradient that came sparse from any rank is sparse again, so that optimizers that
        treat sparse gradients in a way of their own do so on every rank.
        """
        if self._absent or self._sparse:
            present = self.presence.tolist()
            for index in (*self._absent, *self._sparse):
                parameter = self._parameters[index]()
                if present[index] and parameter is not None:
                    view = self.views[index]
                    came_sparse = present[index] > 1.5 * self._full
                    parameter.grad = view.to_sparse(1) if came_sparse else view
        if op == ReduceOp.Sum:
            self.summed.update(range(len(self.views)))
        self.flight = None
        self.begin()


class SparseBucket:
    """One parameter whose gradients are sparse along its first dimension.

    The rows that have a gradient travel with their numbers; zeros stay at home. The result is
    the mean (or sum) of all ranks' gradients, sparse and coalesced, or None where no rank has
    one. A dense gradient, from a rank that uses the parameter otherwise, becomes sparse.

    Args:
        index: of the bucket, for names.
        name: of the parameter.
        parameter: of at least one dimension.
        scale: what values are multiplied by: 1/N for a mean.
        ranks: that take part.
        compressor: says how values travel.
    """

    turn = ""  # see :attr:`Bucket.turn`: rows always travel alike

    def __init__(
        self,
        index: int,
        name: str,
        parameter: torch.Tensor,
        *,
        scale: float,
        ranks: int,
        compressor: Compressor,
    ) -> None:
        self.index = index
        self.names = [name]
        self._parameter = weakref.ref(parameter)
        self._like = parameter.new_empty(0, *parameter.shape[1:])  # no rows
        self._shape = parameter.shape
        self._scale = scale
        self._ranks = ranks
        dtype = dtype_name(parameter.dtype)
        self._codec = row_codec(compressor, tuple(parameter.shape), dtype) if ranks > 1 else None
        self.waiting = 1
        self.summed: set[int] = set()
        self.rounds = 0
        self.flight: Flight | None = None

    def let_go(self) -> None:
        """Do nothing: each round makes a new gradient."""

    def note_stream(self) -> None:
        """Do nothing: the only gradient leaves on its own stream."""

    def place(self, index: int, parameter: torch.Tensor) -> None:
        """Do nothing: there is no place of its own."""

    def means(self) -> torch.Tensor:
        """See :meth:`Bucket.means`."""
        return self._values

    def begin(self) -> None:
        """See :meth:`Bucket.begin`."""
        self.waiting = 1

    def _grad(self) -> torch.Tensor | None:
        parameter = self._parameter()
        return parameter.grad if parameter is not None else None

    @torch.no_grad()
    def share(self, index: int) -> None:
        """See :meth:`Bucket.share`."""
        grad = self._grad()
        if self.summed and grad is not None:
            grad.mul_(1 / self._ranks)
        self.summed.clear()

    @torch.no_grad()
    def fill(self) -> None:
        """Take the gradient apart into row numbers (n) and rows (n, ...)."""
        self.share(0)
        grad = self._grad()
        self._present = torch.tensor([int(grad is not None)], dtype=torch.int32)
        if grad is None:
            self._rows = torch.zeros(0, dtype=torch.int64, device=self._like.device)
            self._values = self._like
            return
        if not grad.is_sparse:
            grad = grad.to_sparse(1)
        elif grad.sparse_dim() != 1:
            grad = grad.to_dense().to_sparse(1)
        grad = grad.coalesce()
        self._rows = grad.indices()[0].contiguous()
        self._values = (grad.values() * self._scale).contiguous()

    def reduction(self) -> Work[None]:
        """Gather all ranks' rows."""
        presence = Allreduce(self._present, "presence", op=ReduceOp.Sum)
        if self._codec is not None:
            ops = ops_for(torch.Tensor).beside(self._values)
            self._rows, self._values, (self._present,) = yield from gather_rows(
                ops, self._codec, self._rows, self._values, presence
            )
            return
        dtype = self._values.dtype
        payload = self._values.view(torch.int16) if dtype == torch.bfloat16 else self._values
        self._rows, values, self._present = yield Together(
            (
                Allgather(self._rows, "rows"),
                Allgather(payload, "values"),
                presence,
            )
        )
        self._values = values.view(dtype)

    @torch.no_grad()
    def deliver(self, op: ReduceOp) -> None:
        """Put the ranks' rows together."""
        parameter = self._parameter()
        if int(self._present) and parameter is not None:
            rows = self._rows.reshape(1, -1)
            values = self._values.reshape(-1, *self._shape[1:])
            whole = torch.sparse_coo_tensor(rows, values, self._shape, check_invariants=False)
            parameter.grad = whole.coalesce()
        if op == ReduceOp.Sum:
            self.summed.add(0)
        self.flight = None
        self.begin()


AnyBucket: TypeAlias = Bucket | SparseBucket


def finite(buckets: Sequence[AnyBucket]) -> bool:
    """Tell whether all the means are; GPUs are waited for once."""
    # A sum takes a tenth of the time, but is infinite as well where it overflows.
    if all(on_host([bucket.means().sum().isfinite() for bucket in buckets])):
        return True
    return all(on_host([bucket.means().isfinite().all() for bucket in buckets]))


def _strides(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return a gradient's strides: where the parameter's memory has no gaps, its order.

    PyTorch lays gradients out so; fused optimizers insist on it.
    """
    return torch.empty_like(parameter, device="meta").stride()
