"""``horovod.torch.mpi_ops``'s names: collectives on torch tensors, now or later.

The blocking ones that make new tensors are :mod:`hvdx.collectives`'. Those here write in place
(``..._``) or return a handle at once (``..._async``), to be given to :func:`synchronize`. They
take what Horovod's refuse: bfloat16 (summed in float32), small integers (summed in int32), bool,
complex and float8 where tensors are only moved, and tensors that are not contiguous. float16
averages are divided before they are summed, so that they do not overflow on the way.

All raise ``ValueError`` where a tensor of the same name is still under way, and, on every rank,
``MismatchError`` from :func:`synchronize` where the ranks' tensors do not fit together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvdx import frameworks, world
from hvdx.agreement import next_name
from hvdx.collectives import (
    allgather,
    allreduce,
    alltoall,
    broadcast,
    grouped_allgather,
    grouped_allreduce,
    grouped_reducescatter,
    reducescatter,
    scatterable,
)
from hvdx.compression import Compression
from hvdx.integrations.process_sets import ProcessSet, everyone
from hvdx.integrations.pytorch import TorchAdapter
from hvdx.integrations.pytorch_collectives import Handle
from hvdx.reduce_op import Adasum, Average, Max, Min, Product, ReduceOp, Sum
from hvdx.world import shutdown

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "Handle",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "global_process_set",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "join",
    "poll",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "shutdown",
    "sparse_allreduce_async",
    "synchronize",
]

_horovod = frameworks.adapter("torch").horovod

init = functools.partial(world.init, framework="torch")
add_process_set = functools.partial(world.add_process_set, framework="torch")
remove_process_set = functools.partial(world.remove_process_set, framework="torch")
global_process_set = everyone("torch")
is_homogeneous = _horovod.mpi_ops.is_homogeneous


def __getattr__(name: str) -> Any:
    return getattr(_horovod.mpi_ops, name)


@functools.cache
def _core() -> TorchAdapter:
    core: Any = world.core("torch")
    return core


world.on_change(_core.cache_clear)


def _own(process_set: Any) -> Any:
    return process_set if process_set is None else world.own_set("torch", process_set)


def _group(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not tensors:
        raise ValueError("a grouped operation needs at least one tensor")
    return list(tensors)


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Handle:
    """Start what :func:`allreduce` does; the result comes from :func:`synchronize`."""
    return _core().allreduce_async(
        tensor, op=ReduceOp.of(op, average), name=name, prescale_factor=prescale_factor,
        postscale_factor=postscale_factor, process_set=_own(process_set),
    )  # fmt: skip


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Handle:
    """Start to overwrite ``tensor`` with its reduction; it is whole after :func:`synchronize`."""
    return _core().allreduce_async(
        tensor, op=ReduceOp.of(op, average), name=name, prescale_factor=prescale_factor,
        postscale_factor=postscale_factor, process_set=_own(process_set), in_place=True,
    )  # fmt: skip


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> torch.Tensor:
    """Overwrite ``tensor`` with its reduction, see :func:`allreduce`, and return it."""
    return synchronize(
        allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Handle:
    """Start what :func:`grouped_allreduce` does; :func:`synchronize` returns a tuple."""
    return _core().grouped_allreduce_async(
        _group(tensors), op=ReduceOp.of(op, average), name=name, prescale_factor=prescale_factor,
        postscale_factor=postscale_factor, process_set=_own(process_set),
    )  # fmt: skip


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Handle:
    """Start to overwrite ``tensors`` with their reductions, as one operation."""
    return _core().grouped_allreduce_async(
        _group(tensors), op=ReduceOp.of(op, average), name=name, prescale_factor=prescale_factor,
        postscale_factor=postscale_factor, process_set=_own(process_set), in_place=True,
    )  # fmt: skip


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> tuple[torch.Tensor, ...]:
    """Overwrite ``tensors`` with their reductions, as one operation, and return them."""
    return synchronize(
        grouped_allreduce_async_(
            tensors, average, name, op, prescale_factor, postscale_factor, process_set
        )
    )


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str | None = None, op: int | None = None, process_set: Any = None
) -> Callable[[], torch.Tensor]:
    """Start to reduce a sparse COO tensor; the function returned waits for the sparse result.

    The ranks' entries are gathered, not added up: ``coalesce()`` the result to add them.
    ``op`` is ``Average`` (default) or ``Sum``.
    """
    reduction = ReduceOp.of(op)
    if reduction not in (ReduceOp.Average, ReduceOp.Sum):
        raise ValueError(f"sparse_allreduce_async needs op=hvd.Average or hvd.Sum, not {op!r}")
    core, own = _core(), _own(process_set)
    name = name or next_name("sparse_allreduce", own)
    parts = {"indices": tensor._indices().t(), "values": tensor._values()}
    handles = [
        core.allgather_async(part, name=f"{name}.{kind}", process_set=own)
        for kind, part in parts.items()
    ]

    def finish() -> torch.Tensor:
        indices, values = map(synchronize, handles)
        if reduction is ReduceOp.Average:
            values = values / core.ranks(own)
        return torch.sparse_coo_tensor(
            indices.t(), values.to(tensor.dtype), tensor.size(), check_invariants=False
        )

    return finish


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: Any = None
) -> Handle:
    """Start what :func:`allgather` does."""
    return _core().allgather_async(tensor, name=name, process_set=_own(process_set))


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: Any = None
) -> Handle:
    """Start what :func:`grouped_allgather` does; :func:`synchronize` returns a tuple."""
    own = _own(process_set)
    return _core().grouped_allgather_async(_group(tensors), name=name, process_set=own)


def broadcast_async(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None
) -> Handle:
    """Start what :func:`broadcast` does."""
    own = _own(process_set)
    return _core().broadcast_async(tensor, root_rank=root_rank, name=name, process_set=own)


def broadcast_async_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None
) -> Handle:
    """Start to overwrite ``tensor`` with the root's; it is whole after :func:`synchronize`."""
    return _core().broadcast_async(
        tensor, root_rank=root_rank, name=name, process_set=_own(process_set), in_place=True
    )


def broadcast_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: Any = None
) -> torch.Tensor:
    """Overwrite ``tensor`` with the root's, and return it."""
    return synchronize(broadcast_async_(tensor, root_rank, name, process_set))


def alltoall_async(
    tensor: torch.Tensor, splits: Any = None, name: str | None = None, process_set: Any = None
) -> Handle:
    """Start what :func:`alltoall` does; ends in a pair even where no ``splits`` are given."""
    own = _own(process_set)
    return _core().alltoall_async(tensor, splits=splits, name=name, process_set=own)


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start what :func:`reducescatter` does."""
    return _core().reducescatter_async(
        tensor, op=scatterable(op), name=name, prescale_factor=prescale_factor,
        postscale_factor=postscale_factor, process_set=_own(process_set),
    )  # fmt: skip


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start what :func:`grouped_reducescatter` does; :func:`synchronize` returns a tuple."""
    return _core().grouped_reducescatter_async(
        _group(tensors), op=scatterable(op), name=name, prescale_factor=prescale_factor,
        postscale_factor=postscale_factor, process_set=_own(process_set),
    )  # fmt: skip


def poll(handle: int) -> bool:
    """Tell whether :func:`synchronize` would return ``handle``'s result without waiting."""
    return _core().poll(handle)


def synchronize(handle: int) -> Any:
    """Wait for an asynchronous operation and return its result, a tuple for a grouped one.

    Takes Horovod's own handles too. None for an operation that was waited for already.
    """
    return _core().synchronize(handle)


def barrier(process_set: Any = None) -> None:
    """Return once every rank (of the set) has called it."""
    _core().barrier(_own(process_set))


def join(device: int = -1) -> int:
    """Say that this rank has no more data, see :func:`hvdx.join`.

    ``device`` is the number of the GPU on which zeros are made for the others' operations.
    """
    return _core().join(device)
