"""Collectives on torch tensors, over what Horovod's core can do with them.

Each operation is *started*, which gives a :class:`Handle`, and *ended* by waiting for it. What
Horovod lacks is made up for on the way in and on the way out: types it cannot sum are summed in
wider ones, types it cannot move travel as bytes of the same width, tensors that are not
contiguous are copied, and results go back where they belong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from horovod.common.exceptions import HorovodInternalError

from hvdx import world
from hvdx.agreement import next_name
from hvdx.errors import HvdxError
from hvdx.integrations.pytorch_engine import wait
from hvdx.mismatch import explain, is_mismatch
from hvdx.reduce_op import ReduceOp
from hvdx.watchdog import waiting

Tensors = Sequence[torch.Tensor]
Back = Callable[[list[int], Tensors, dict[str, Any]], Tensors]

#: What Horovod reduces and what it moves; for all else see _summable() and _movable().
_SUMMABLE = frozenset({torch.float32, torch.float64, torch.float16, torch.int32, torch.int64})
_MOVABLE = _SUMMABLE | {torch.uint8, torch.int8, torch.int16}
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.uint16})

_GLANCES = 300  # polls before the first sleep, a fraction of a millisecond


class Handle(int):
    """An operation under way: Horovod's number for it, and what its end needs.

    An ``int``, so that it may go wherever Horovod's handles go.
    """

    operation: str  # such as "allgather"
    name: str  # equal on all ranks
    named: str | None  # by the caller
    tensors: Tensors  # as given, for messages
    process_set: Any
    leave: Callable[[Any], Any] | None  # turns Horovod's result into the caller's


class Collectives:
    """Horovod's collectives through the torch core, blocking ones and ``*_async`` ones.

    Unnamed operations are counted here, by process set. Horovod counts handles, over all
    sets: ranks outside a set fall behind, and the next unnamed operation of all ranks stalls.

    Args:
        horovod: ``horovod.torch``.
    """

    framework = "torch"

    def __init__(self, horovod: Any) -> None:
        for op in ReduceOp:
            if getattr(horovod, op.name) != op:
                raise ImportError(f"Horovod numbers hvd.{op.name} otherwise than hvdx does")
        self.horovod = horovod
        self.bytes_sent = 0.0
        self._everyone = horovod.global_process_set

    # Starting -----------------------------------------------------------------------------

    def allreduce_async(
        self,
        tensor: torch.Tensor,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
        in_place: bool = False,
    ) -> Handle:
        """Start to reduce; bfloat16 is summed in float32, float16 divided before it is summed."""
        entered = _summable(tensor)
        if entered.dtype is torch.float16 and op == ReduceOp.Average:
            op, prescale_factor = ReduceOp.Sum, prescale_factor / self.ranks(process_set)
        core = self.horovod
        return self._start(
            "allreduce",
            (tensor,),
            core.allreduce_async_ if in_place or entered is not tensor else core.allreduce_async,
            entered,
            _delivery(tensor, entered, in_place),
            name,
            process_set,
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
        )

    def grouped_allreduce_async(
        self,
        tensors: Tensors,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
        in_place: bool = False,
    ) -> Handle:
        """Start to reduce several tensors as one operation."""
        entered, op, prescale_factor = self._summable_group(
            tensors, op, prescale_factor, process_set
        )
        core = self.horovod
        return self._start(
            "grouped_allreduce",
            tensors,
            core.grouped_allreduce_async_ if in_place else core.grouped_allreduce_async,
            entered,
            _each(_delivery(t, e, in_place) for t, e in zip(tensors, entered, strict=True)),
            name,
            process_set,
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
        )

    def reducescatter_async(
        self,
        tensor: torch.Tensor,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> Handle:
        """Start to reduce, of which this rank keeps a slice."""
        entered = _summable(tensor)
        if entered.dtype is torch.float16 and op == ReduceOp.Average:
            op, prescale_factor = ReduceOp.Sum, prescale_factor / self.ranks(process_set)
        return self._start(
            "reducescatter",
            (tensor,),
            self.horovod.reducescatter_async,
            entered,
            _delivery(tensor, entered),
            name,
            process_set,
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
        )

    def grouped_reducescatter_async(
        self,
        tensors: Tensors,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> Handle:
        """Start to reduce several tensors as one operation, of which this rank keeps slices."""
        entered, op, prescale_factor = self._summable_group(
            tensors, op, prescale_factor, process_set
        )
        return self._start(
            "grouped_reducescatter",
            tensors,
            self.horovod.grouped_reducescatter_async,
            entered,
            _each(_delivery(t, e) for t, e in zip(tensors, entered, strict=True)),
            name,
            process_set,
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
        )

    def _summable_group(
        self, tensors: Tensors, op: int, factor: float, process_set: Any
    ) -> tuple[list[torch.Tensor], int, float]:
        """Return tensors, operator and prescale factor as Horovod shall have them."""
        entered = [_summable(tensor) for tensor in tensors]
        halves = [tensor.dtype is torch.float16 for tensor in entered]
        if op == ReduceOp.Average and any(halves):
            if all(halves):
                return entered, ReduceOp.Sum, factor / self.ranks(process_set)
            entered = [
                tensor.float() if half else tensor
                for tensor, half in zip(entered, halves, strict=True)
            ]
        return entered, op, factor

    def allgather_async(
        self, tensor: torch.Tensor, *, name: str | None, process_set: Any
    ) -> Handle:
        """Start to gather along the first dimension."""
        start = self.horovod.allgather_async
        moved = _movable(tensor)
        restore = _restoring(tensor)
        return self._start("allgather", (tensor,), start, moved, restore, name, process_set)

    def grouped_allgather_async(
        self, tensors: Tensors, *, name: str | None, process_set: Any
    ) -> Handle:
        """Start to gather several tensors as one operation."""
        return self._start(
            "grouped_allgather",
            tensors,
            self.horovod.grouped_allgather_async,
            [_movable(tensor) for tensor in tensors],
            _each(map(_restoring, tensors)),
            name,
            process_set,
        )

    def broadcast_async(
        self,
        tensor: torch.Tensor,
        *,
        root_rank: int,
        name: str | None,
        process_set: Any,
        in_place: bool = False,
    ) -> Handle:
        """Start to fetch the root's tensor."""
        entered = _movable(tensor).detach()  # the root's copy would have a gradient else
        leave = _restoring(tensor)
        if in_place:
            written = entered.data_ptr() == tensor.data_ptr()
            leave = _returning(tensor) if written else _writing(tensor, leave)
        core = self.horovod
        start = core.broadcast_async_ if in_place else core.broadcast_async
        return self._start(
            "broadcast", (tensor,), start, entered, leave, name, process_set, root_rank=root_rank
        )

    def alltoall_async(
        self, tensor: torch.Tensor, *, splits: Any, name: str | None, process_set: Any
    ) -> Handle:
        """Start to exchange slices; ends in a pair of the rows and how many came from whom."""
        moved, restore = _movable(tensor), _restoring(tensor)
        if not moved.dim():  # Horovod would crash
            raise ValueError(f"rank {world.rank()}: alltoall of a scalar: there are no rows in it")
        return self._start(
            "alltoall",
            (tensor,),
            self.horovod.alltoall_async,
            moved,
            restore and (lambda result: (restore(result[0]), result[1])),
            name,
            process_set,
            splits=None if splits is None else _counts(splits),
        )

    def _start(
        self,
        operation: str,
        tensors: Tensors,
        start: Callable[..., int],
        entered: Any,
        leave: Callable[[Any], Any] | None,
        name: str | None,
        process_set: Any,
        **options: Any,
    ) -> Handle:
        known = self._everyone if process_set is None else self._own(process_set)
        called = name or next_name(operation, process_set)
        try:
            with waiting(operation, called, tensors, process_set):  # the job may be stopped
                handle = Handle(start(entered, name=called, process_set=known, **options))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, HvdxError):
                raise
            raise type(error)(self._told(operation, name, error)) from None
        handle.operation, handle.name, handle.named = operation, called, name
        handle.tensors, handle.process_set, handle.leave = tensors, process_set, leave
        return handle

    def _own(self, process_set: Any) -> Any:
        return world.own_set(self.framework, process_set) or self._everyone

    # Ending -------------------------------------------------------------------------------

    def poll(self, handle: int) -> bool:
        """Tell whether :meth:`synchronize` would return at once."""
        return bool(self.horovod.poll(handle))

    def synchronize(self, handle: int) -> Any:
        """Wait for an operation and return its result; None if that was done already.

        Raises:
            MismatchError: ranks submitted tensors that do not fit together.
        """
        try:
            self.horovod.poll(handle)
        except ValueError:
            return None
        if isinstance(handle, Handle):
            result = self._end(handle)
            handle.tensors, handle.leave = (), None  # whoever keeps the handle keeps no tensors
            return result
        return wait(self.horovod, handle, f"handle {handle}", "synchronize")

    def _end(self, handle: Handle) -> Any:
        poll = self.horovod.poll
        for _ in range(_GLANCES):  # most operations take less time than a sleep
            if poll(handle):
                break
            os.sched_yield()
        try:
            result = wait(
                self.horovod,
                handle,
                handle.name,
                handle.operation,
                handle.tensors,
                handle.process_set,
            )
        except HorovodInternalError as error:
            raise self._explained(handle, error) from None
        return result if handle.leave is None else handle.leave(result)

    def _explained(self: Any, handle: Handle, error: Exception) -> Exception:
        """Say on every rank what each submitted, where Horovod only says that they differ."""
        if is_mismatch(error):
            given, reason = list(handle.tensors), str(error)
            return explain(self, handle.operation, handle.named, given, handle.process_set, reason)
        return HorovodInternalError(self._told(handle.operation, handle.named, error))

    def _told(self, operation: str, name: str | None, error: Exception) -> str:
        rank = f"rank {self.horovod.rank()}: " if self.horovod.is_initialized() else ""
        called = f"tensor {name!r}" if name else "an unnamed tensor"
        return f"{rank}{operation} of {called}: {error}"

    # Blocking -----------------------------------------------------------------------------

    def allreduce(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """Reduce; the gradient is reduced likewise."""
        if tensor.requires_grad and torch.is_grad_enabled():
            return self._single("allreduce", self._grads_of_reduced, tensor, options)
        return self._end(self.allreduce_async(tensor, **options))

    def grouped_allreduce(self, tensors: Tensors, **options: Any) -> list[torch.Tensor]:
        """Reduce several tensors as one operation; gradients are reduced likewise."""
        return self._group("grouped_allreduce", self._grads_of_reduced, tensors, options)

    def allgather(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """Gather; the gradient is this rank's rows of the mean of all gradients."""
        return self._single("allgather", self._grads_of_gathered, tensor, options)

    def grouped_allgather(self, tensors: Tensors, **options: Any) -> list[torch.Tensor]:
        """Gather several tensors as one operation; gradients as of :meth:`allgather`."""
        return self._group("grouped_allgather", self._grads_of_gathered, tensors, options)

    def reducescatter(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """Reduce and keep a slice; the gradient is gathered, and scaled as the result was."""
        return self._single("reducescatter", self._grads_of_scattered, tensor, options)

    def grouped_reducescatter(self, tensors: Tensors, **options: Any) -> list[torch.Tensor]:
        """Reduce several tensors as one operation; gradients as of :meth:`reducescatter`."""
        return self._group("grouped_reducescatter", self._grads_of_scattered, tensors, options)

    def broadcast(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """Fetch the root's tensor; its gradient is the mean of all, that of others zero."""
        return self._single("broadcast", self._grads_of_fetched, tensor, options)

    def alltoall(self, tensor: torch.Tensor, *, splits: Any, **options: Any) -> Any:
        """Exchange slices; the gradient travels back."""
        received = None

        def run(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
            nonlocal received
            rows, received = self._end(self.alltoall_async(tensor, splits=splits, **options))
            return rows

        def back(_: list[int], grads: Tensors, options: dict[str, Any]) -> Tensors:
            return [self.alltoall(grads[0], splits=received, **options)[0]]

        rows = self._apply("alltoall", run, back, (tensor,), options)
        return rows if splits is None else (rows, received)

    def ranks(self, process_set: Any) -> int:
        """Count the ranks of the set; asked of the set itself, which no core can confuse."""
        return len(process_set.ranks) if process_set is not None else int(self.horovod.size())

    def place(self, process_set: Any) -> int:
        """Return this rank's place among those of the set."""
        rank = int(self.horovod.rank())
        everyone = process_set is None or process_set.process_set_id == 0
        return rank if everyone else int(process_set.ranks.index(rank))

    def barrier(self, process_set: Any) -> None:
        """Wait for all ranks."""
        number = self._own(process_set).process_set_id
        self._wait_for("barrier", lambda lib: lib.horovod_torch_barrier(number), None, process_set)

    def join(self, device: int = -1) -> int:
        """Say that this rank has no more data."""
        last = torch.tensor(-1, dtype=torch.int32)
        self._wait_for("join", lambda lib: lib.horovod_torch_join(last, device), last)
        return int(last)

    def _wait_for(
        self, name: str, start: Callable[[Any], int], output: Any, process_set: Any = None
    ) -> None:
        """Wait for what Horovod has no asynchronous form of, without its spinning."""
        module = self.horovod.mpi_ops
        try:
            handle = start(module.mpi_lib)
        except RuntimeError as error:
            raise HorovodInternalError(error) from None
        module._handle_map[handle] = (None, output)
        wait(self.horovod, handle, name, name, (), process_set)

    # Gradients ----------------------------------------------------------------------------

    def _single(self, operation: str, back: Back, tensor: torch.Tensor, options: Any) -> Any:
        start = getattr(self, f"{operation}_async")

        def run(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
            return self._end(start(tensor, **options))

        return self._apply(operation, run, back, (tensor,), options)

    def _group(self, operation: str, back: Back, tensors: Tensors, options: Any) -> Any:
        start = getattr(self, f"{operation}_async")

        def run(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
            return tuple(self._end(start(tensors, **options)))

        return list(self._apply(operation, run, back, tensors, options))

    def _apply(
        self,
        operation: str,
        run: Callable[..., Any],
        back: Back,
        tensors: Tensors,
        options: dict[str, Any],
    ) -> Any:
        """Return ``run(*tensors, **options)``, differentiable if a tensor wants a gradient.

        Args:
            operation: what names the call where the caller does not.
            run: from tensors and options to the result.
            back: from the first dimensions of ``tensors``, the gradients of the results and
                the options, with a name, to the gradients of ``tensors``; differentiable.
            tensors: the inputs.
            options: of the operation.
        """
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return run(*tensors, **options)
        # The name of the gradient's operation derives from this one: equal on all ranks too.
        name = options["name"] or next_name(operation, options["process_set"])
        return _Differentiable.apply(run, back, {**options, "name": name}, *tensors)

    # A single tensor's gradient takes the same way as those of a group.

    def _grads_of_reduced(
        self, rows: list[int], grads: Tensors, options: dict[str, Any]
    ) -> Tensors:
        op = options["op"]
        if op not in (ReduceOp.Average, ReduceOp.Sum):
            raise NotImplementedError(
                f"allreduce(op=hvd.{ReduceOp(op).name}) has no gradient: Horovod's reduces the "
                "gradients likewise, which is wrong. Detach the tensor, or use Average or Sum"
            )
        return self.grouped_allreduce(grads, **options)

    def _grads_of_gathered(
        self, rows: list[int], grads: Tensors, options: dict[str, Any]
    ) -> Tensors:
        name, process_set = options["name"], options["process_set"]
        rank = int(self.horovod.rank())
        place = rank if process_set is None else process_set.ranks.index(rank)
        every = self.allgather(torch.tensor([rows]), name=f"{name}.rows", process_set=process_set)
        starts = every[:place].sum(0).tolist()
        means = self.grouped_allreduce(grads, **_averaging(options))
        return [
            mean.narrow(0, start, length)
            for mean, start, length in zip(means, starts, rows, strict=True)
        ]

    def _grads_of_scattered(
        self, rows: list[int], grads: Tensors, options: dict[str, Any]
    ) -> Tensors:
        name, process_set = options["name"], options["process_set"]
        factor = options["prescale_factor"] * options["postscale_factor"]
        if options["op"] == ReduceOp.Sum:
            factor *= self.ranks(process_set)
        scaled = [grad * factor for grad in grads] if factor != 1.0 else grads
        return self.grouped_allgather(scaled, name=name, process_set=process_set)

    def _grads_of_fetched(
        self, rows: list[int], grads: Tensors, options: dict[str, Any]
    ) -> Tensors:
        mean = self.allreduce(grads[0], **_averaging(options))
        return [mean if self.horovod.rank() == options["root_rank"] else mean * 0]


class _Differentiable(torch.autograd.Function):
    """A collective whose gradient is made by collectives."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, back: Any, options: dict[str, Any], *tensors: torch.Tensor
    ) -> Any:
        ctx.back = back
        ctx.rows = [tensor.shape[0] if tensor.dim() else 1 for tensor in tensors]
        ctx.options = {**options, "name": f"{options['name']}.gradient"}
        return run(*tensors, **options)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (None, None, None, *ctx.back(ctx.rows, grads, ctx.options))


def _averaging(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "op": ReduceOp.Average,
        "name": options["name"],
        "prescale_factor": 1.0,
        "postscale_factor": 1.0,
        "process_set": options["process_set"],
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Name ``dtype`` as NumPy does."""
    return str(dtype).removeprefix("torch.")


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` with its elements one after the other in memory, as they look."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"a torch.Tensor is needed here, not {type(tensor).__qualname__}")
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"Horovod takes dense tensors, not those of {tensor.layout}; convert with "
            "to_dense(), or use sparse_allreduce_async"
        )
    settled = tensor.contiguous().resolve_conj().resolve_neg()
    return tensor if settled is tensor else settled.detach()


def _summable(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` itself, or a copy that Horovod can reduce."""
    tensor = _settled(tensor)
    if tensor.dtype in _SUMMABLE:
        return tensor
    if tensor.dtype.is_floating_point:
        return tensor.detach().float()
    if tensor.dtype in _SMALL_INTEGERS:
        return tensor.int()
    raise ValueError(
        f"Horovod cannot reduce {dtype_name(tensor.dtype)} tensors; convert this one of shape "
        f"{tuple(tensor.shape)} first, bool to uint8 for instance"
    )


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` as a type that Horovod moves, in the same memory where possible."""
    tensor = _settled(tensor)
    if tensor.dtype in _MOVABLE:
        return tensor
    if tensor.dtype.is_complex:
        return torch.view_as_real(tensor.detach())
    return tensor.detach().view(_SAME_WIDTH[tensor.element_size()])


def _restoring(given: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what turns a moved tensor into one of the type given, if that takes anything."""
    if given.dtype in _MOVABLE:
        return None
    if given.dtype.is_complex:
        return torch.view_as_complex
    return lambda result: result.view(given.dtype)


def _delivery(
    given: torch.Tensor, entered: torch.Tensor, in_place: bool = False
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what brings a reduced tensor to the caller, if that takes anything."""
    if entered is given:
        return None
    if in_place:
        return _writing(given, None)
    if entered.dtype == given.dtype:
        return None
    return lambda result: result.to(given.dtype)


def _writing(given: torch.Tensor, restore: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def write(result: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return given.copy_(result if restore is None else restore(result))

    return write


def _returning(given: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: given


def _each(leave: Any) -> Callable[[Any], Any] | None:
    """Return what brings a group of results to the caller, one function or None for each."""
    steps = list(leave)
    if not any(steps):
        return None
    return lambda results: tuple(
        result if step is None else step(result)
        for result, step in zip(results, steps, strict=True)
    )


def _counts(splits: Any) -> torch.Tensor:
    """Return ``splits`` of an alltoall as Horovod wants them."""
    tensor = torch.as_tensor(splits)
    if not tensor.numel():  # equal slices, as without splits
        return tensor.to(torch.int32)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype is torch.bool:
        raise ValueError(
            f"rank {world.rank()}: alltoall needs whole numbers of rows in splits, not "
            f"{dtype_name(tensor.dtype)} ones"
        )
    return tensor.to(torch.int32).contiguous()
