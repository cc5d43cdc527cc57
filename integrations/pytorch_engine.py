"""Carry out requests of compressors through Horovod's torch core, many at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from horovod.torch import mpi_ops

from hvdx import world
from hvdx.comm import (
    FACTS,
    Allgather,
    Allreduce,
    Alltoall,
    Among,
    Owners,
    Rank,
    Ranks,
    Reducescatter,
    Request,
    Together,
    Work,
)
from hvdx.frameworks import Adapter
from hvdx.mismatch import explain, is_mismatch
from hvdx.reduce_op import ReduceOp
from hvdx.watchdog import Pending, describe, failure, waiting

_INNER = ("horovod.", "torch.autograd.")
_POLL_SECONDS, _POLL_SHARE, _POLL_MOST = 50e-6, 0.02, 1e-3
_SUMMABLE = frozenset({torch.float32, torch.float64, torch.int32, torch.int64})


def wait(
    horovod: Any,
    handle: int,
    name: str,
    operation: str = "allreduce",
    tensors: Any = (),
    process_set: Any = None,
) -> Any:
    """Return the result of the asynchronous operation ``name``, sleeping meanwhile.

    Horovod's ``synchronize`` spins; with more ranks than cores that starves the thread it
    waits for (measured: 4 ranks on 2 cores, 1.7-10 ms a small operation against 1.1-1.6). What
    has taken long is asked after less often, lest ranks that wait take the time of one that
    computes.

    The last three arguments are for messages.

    Raises:
        StallError: the job was stopped since other ranks do not come.
    """
    with waiting(operation, name, tensors, process_set):
        start = time.monotonic()
        while not horovod.poll(handle):
            waited = time.monotonic() - start
            time.sleep(min(max(_POLL_SECONDS, _POLL_SHARE * waited), _POLL_MOST))
            if (stopped := failure()) is not None:
                raise stopped
        return horovod.synchronize(handle)


_blocked_before: dict[int, int] = {}  # thread: the handle that it waited for a look ago


def blocked() -> dict[tuple[str, int], Pending]:
    """Find threads that wait inside Horovod's own ``synchronize``, for the watchdog.

    Its callers have the name and the tensor among their variables. Handles are numbered, so
    that a call is told from the next one.
    """
    global _blocked_before
    found, blocked_now = {}, {}
    for thread, frame in sys._current_frames().items():
        if frame.f_code is not mpi_ops.synchronize.__code__ or "handle" not in frame.f_locals:
            continue
        blocked_now[thread] = frame.f_locals["handle"]
        if _blocked_before.get(thread) != blocked_now[thread]:
            continue  # only a stack that stands still may be walked along
        known: dict[str, Any] = {}
        operation, handle = "synchronize", blocked_now[thread]
        caller = frame.f_back
        while caller is not None and caller.f_globals.get("__name__", "").startswith(_INNER):
            if caller.f_globals["__name__"].startswith("horovod."):
                known = {**caller.f_locals, **known}
                operation = caller.f_code.co_name
            caller = caller.f_back
        name, tensor = known.get("name"), known.get("tensor")
        own = known.get("process_set")
        found["torch", handle] = Pending(
            operation,
            name if isinstance(name, str) else None,
            describe(tensor) if isinstance(tensor, torch.Tensor) else "",
            tuple(own.ranks) if own is not None and own.process_set_id else None,
            thread,
        )
    _blocked_before = blocked_now
    return found


class Flight:
    """One generator on its way: started at once, resumed when its answers are there.

    Args:
        adapter: the running torch core.
        work: yields requests, returns its result.
        name: of the collectives, ``<name>/<phase>``; equal on all ranks.
        process_set: the ranks that take part.
    """

    def __init__(self, adapter: Adapter, work: Work[Any], name: str, process_set: Any) -> None:
        self._adapter = adapter
        self._horovod = adapter.horovod
        self._work = work
        self._name = name
        self._process_set = world.own_set(adapter.framework, process_set)
        self._collect: Callable[[], Any] | None = None
        self._handles: list[int] = []
        self._resume(None)

    def advance(self) -> bool:
        """Resume the generator as often as answers are there already; True at its end."""
        while self._collect and all(map(self._horovod.poll, self._handles)):
            self._resume(self._collect())
        return self._collect is None

    def finish(self) -> Any:
        """Wait for the generator's end and return its result.

        Raises:
            MismatchError: ranks submitted what does not fit together.
        """
        while self._collect:
            self._resume(self._collect())
        return self.result

    def _resume(self, answer: Any) -> None:
        try:
            request = self._work.send(answer)
            while isinstance(request, FACTS):
                request = self._work.send(self._place(request))
        except StopIteration as done:
            self._collect = None
            self.result = done.value
        else:
            self._handles = []
            with waiting("reduction", self._name):  # Horovod may have been stopped meanwhile
                self._collect = self._submit(request, self._name, self._process_set)

    def _place(self, request: Rank | Ranks | Owners) -> int | None:
        if isinstance(request, Owners):
            return None
        asked = self._adapter.ranks if isinstance(request, Ranks) else self._adapter.place
        return asked(self._process_set)

    def _submit(self, request: Request, name: str, among: Any) -> Callable[[], Any]:
        """Start ``request`` among ranks; the function returned waits for its answer."""
        if isinstance(request, FACTS):
            return lambda: self._place(request)
        if isinstance(request, Together):
            parts = [
                self._submit(each, f"{name}/{index}", among)
                for index, each in enumerate(request.requests)
            ]
            return lambda: [part() for part in parts]
        if isinstance(request, Among):
            return self._submit(request.request, name, request.process_set)
        name = f"{name}/{request.phase}"
        if isinstance(request, Allreduce):
            return self._submit_allreduce(request, name, among)
        options: dict[str, Any] = {"name": name, "process_set": self._known(among)}
        if isinstance(request, Allgather):
            start = self._horovod.allgather_async
        elif isinstance(request, Reducescatter):
            start, options["op"] = self._horovod.reducescatter_async, int(ReduceOp.Sum)
        else:
            start = self._horovod.alltoall_async
            if request.splits is not None:
                options["splits"] = torch.tensor(request.splits, dtype=torch.int32)
        handle = start(request.tensor, **options)
        operation = type(request).__name__.lower()
        self._count(operation, request.tensor, among)
        collect = self._waiting(handle, request.tensor, name, among, operation)
        if isinstance(request, Alltoall):  # Horovod tells besides how much came from each rank
            return lambda: collect()[0]
        return collect

    def _known(self, among: Any) -> Any:
        return among or self._horovod.global_process_set

    def _submit_allreduce(self, request: Allreduce, name: str, among: Any) -> Callable[[], Any]:
        tensor, op, before = request.tensor, int(request.op), 1.0
        options = {"name": name, "process_set": self._known(among)}
        if tensor.dtype not in _SUMMABLE and op == ReduceOp.Average:
            # Halves are divided before they are summed: a sum overflows long before a mean.
            op, before = int(ReduceOp.Sum), 1.0 / self._adapter.ranks(among)
        if tensor.dtype == torch.bfloat16:  # no Horovod type; summed in float32
            wide = tensor.float()
            handle = self._horovod.allreduce_async_(wide, op=op, prescale_factor=before, **options)
            self._count("allreduce", wide, among)
            collect = self._waiting(handle, wide, name, among)
            return lambda: tensor.copy_(collect()) if request.in_place else collect().bfloat16()
        call = self._horovod.allreduce_async_ if request.in_place else self._horovod.allreduce_async
        handle = call(tensor, op=op, prescale_factor=before, **options)
        self._count("allreduce", tensor, among)
        return self._waiting(handle, tensor, name, among)

    def _count(self, operation: str, tensor: torch.Tensor, among: Any) -> None:
        self._adapter.count(operation, tensor, self._adapter.ranks(among))

    def _waiting(
        self,
        handle: int,
        tensor: torch.Tensor,
        name: str,
        among: Any,
        operation: str = "allreduce",
    ) -> Callable[[], Any]:
        self._handles.append(handle)

        def collect() -> Any:
            try:
                return wait(self._horovod, handle, name, operation, tensor, among)
            except RuntimeError as error:
                if not is_mismatch(error):
                    raise
                raise explain(self._adapter, "reduction", name, [tensor], among) from None

        return collect
