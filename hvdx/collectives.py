"""The shared collectives: one function for torch, TensorFlow, Keras and NumPy.

Each call is handed to the Horovod core of its tensor's framework, picked by the tensor's
type. Keras variables travel as their backend's tensors; NumPy arrays and plain numbers go
through the running core and come back as NumPy arrays. All functions raise

- ``NotInitializedError`` (a ``ValueError``) before ``hvd.init()``,
- ``TypeError`` for objects of no framework, or of two frameworks in one call,
- ``MismatchError`` on every rank where the ranks' tensors do not fit together.

Arguments, defaults and results are Horovod's. Names must be equal on all ranks; without a
name, Horovod counts calls, so that all ranks must call in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hvdx import world
from hvdx.comm import Allgather, Allreduce, Ranks, Request, Together, drive
from hvdx.compression import Spec, as_compressor, none
from hvdx.frameworks import Adapter, framework_of_kind, kind_of
from hvdx.ops import ops_for
from hvdx.reduce_op import ReduceOp


class _Route(NamedTuple):
    """The way of one type of tensor through a core: convert, communicate, convert back."""

    adapter: Adapter
    enter: Callable[[Any], Any] | None
    leave: Callable[[Any], Any] | None


_routes: dict[type, _Route] = {}
world.on_change(_routes.clear)


def _route(tensor: Any) -> _Route:
    route = _routes.get(type(tensor))
    return route if route is not None else _find_route(tensor)


def _find_route(tensor: Any) -> _Route:
    kind = type(tensor)
    library = kind_of(kind)
    if library is None:
        raise TypeError(
            f"no framework for {kind.__module__}.{kind.__qualname__}; give a torch, TensorFlow, "
            "Keras or NumPy tensor"
        )
    if library == "numpy":
        adapter = world.core()
        route = _Route(adapter, adapter.from_numpy, adapter.to_numpy)
    elif library == "keras":
        route = _Route(world.core(framework_of_kind(library)), _keras_value, None)
    else:
        route = _Route(world.core(library), None, None)
    _routes[kind] = route
    return route


def _keras_value(variable: Any) -> Any:
    return variable.value


def _group_route(tensors: Sequence[Any]) -> _Route:
    if not tensors:
        raise ValueError("a grouped operation needs at least one tensor")
    kinds = {kind_of(type(tensor)) for tensor in tensors}
    if len(kinds) > 1:
        names = " and ".join(sorted(str(kind) for kind in kinds))
        raise TypeError(f"tensors of {names} in one call; convert them to one framework first")
    return _route(tensors[0])


def _through(route: _Route, tensor: Any, call: Callable[..., Any], **options: Any) -> Any:
    entered = route.enter(tensor) if route.enter else tensor
    result = call(entered, **options)
    return route.leave(result) if route.leave else result


def _group_through(
    route: _Route, tensors: Sequence[Any], call: Callable[..., Any], **options: Any
) -> list[Any]:
    entered = [route.enter(t) for t in tensors] if route.enter else list(tensors)
    results = call(entered, **options)
    return [route.leave(r) for r in results] if route.leave else list(results)


def allreduce(
    tensor: Any,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> Any:
    """Reduce ``tensor`` over the ranks and return the result; the argument is left alone.

    Args:
        tensor: any shape, equal on all ranks.
        average: Horovod's older spelling of ``op``.
        name: of the operation; equal on all ranks.
        compression: a compressor of :mod:`hvdx.compression` without state, such as
            ``Compression.fp16``, or a Horovod ``Compressor`` class.
        op: ``Average`` (default), ``Sum``, ``Adasum``, ``Min``, ``Max`` or ``Product``.
        prescale_factor: multiplies each rank's tensor first.
        postscale_factor: multiplies the result.
        process_set: the ranks that take part; all by default.

    Returns:
        A tensor of the same framework, shape and dtype.

    Example:
        >>> hvd.allreduce(loss, op=hvd.Average)
    """
    route = _route(tensor)
    reduction = ReduceOp.of(op, average)
    if compression is not none:
        return _compressed(
            route, tensor, compression, reduction, name, prescale_factor, postscale_factor,
            process_set,
        )  # fmt: skip
    if route.enter is None:  # the common case, kept short
        return route.adapter.allreduce(
            tensor,
            op=reduction,
            name=name,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set,
        )
    return _through(
        route,
        tensor,
        route.adapter.allreduce,
        op=reduction,
        name=name,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )


def _compressed(
    route: _Route,
    tensor: Any,
    compression: Any,
    op: ReduceOp,
    name: str | None,
    prescale_factor: float,
    postscale_factor: float,
    process_set: Any,
) -> Any:
    """Answer one stateless compressor's requests, one after the other."""
    compressor = as_compressor(compression)
    if op not in (ReduceOp.Average, ReduceOp.Sum):
        raise ValueError(f"compression={compressor} needs op=hvd.Average or hvd.Sum, not {op.name}")
    entered = route.enter(tensor) if route.enter else tensor
    ops = ops_for(type(entered))
    ranks = route.adapter.ranks(process_set)
    factor = postscale_factor * (ranks if op is ReduceOp.Sum else 1)
    if prescale_factor != 1.0:
        entered = ops.scale(entered, prescale_factor)
    state = compressor.init(ops, Spec(name or "", tuple(entered.shape), ops.dtype(entered)))
    answer = functools.partial(perform, route.adapter, name=name, process_set=process_set)
    mean = drive(compressor.reduce(ops, entered, state), answer).mean
    result = ops.scale(mean, factor) if factor != 1.0 else mean
    return route.leave(result) if route.leave else result


def perform(adapter: Adapter, request: Request, *, name: str | None, process_set: Any) -> Any:
    """Carry out one request of a compressor through a Horovod core and wait for the answer."""
    if isinstance(request, Ranks):
        return adapter.ranks(process_set)
    if isinstance(request, Together):
        return [
            perform(adapter, each, name=name and f"{name}/{i}", process_set=process_set)
            for i, each in enumerate(request.requests)
        ]
    full = f"{name}/{request.phase}" if name else None
    if isinstance(request, Allreduce):
        return adapter.allreduce(
            request.tensor,
            op=request.op,
            name=full,
            prescale_factor=1.0,
            postscale_factor=1.0,
            process_set=process_set,
        )
    if isinstance(request, Allgather):
        return adapter.allgather(request.tensor, name=full, process_set=process_set)
    return adapter.alltoall(request.tensor, splits=None, name=full, process_set=process_set)


def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> list[Any]:
    """Reduce several tensors as one operation: none is reduced before all are there.

    Arguments as in :func:`allreduce`; the result is a list in the order of ``tensors``.
    """
    route = _group_route(tensors)
    reduction = ReduceOp.of(op, average)
    if compression is not none:
        return [
            _compressed(
                route, tensor, compression, reduction, name and f"{name}.{i}", prescale_factor,
                postscale_factor, process_set,
            )
            for i, tensor in enumerate(tensors)
        ]  # fmt: skip
    return _group_through(
        route,
        tensors,
        route.adapter.grouped_allreduce,
        op=reduction,
        name=name,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )


def allgather(tensor: Any, name: str | None = None, process_set: Any = None) -> Any:
    """Concatenate all ranks' tensors along the first dimension, in rank order.

    First dimensions may differ between ranks; dtype and the other dimensions may not.
    """
    route = _route(tensor)
    return _through(route, tensor, route.adapter.allgather, name=name, process_set=process_set)


def grouped_allgather(
    tensors: Sequence[Any], name: str | None = None, process_set: Any = None
) -> list[Any]:
    """Gather several tensors as one operation; see :func:`allgather`."""
    route = _group_route(tensors)
    call = route.adapter.grouped_allgather
    return _group_through(route, tensors, call, name=name, process_set=process_set)


def broadcast(tensor: Any, root_rank: int, name: str | None = None, process_set: Any = None) -> Any:
    """Return the tensor of ``root_rank`` (a global rank) on every rank.

    Every rank gives a tensor of the same shape and dtype; only the root's values matter.
    """
    route = _route(tensor)
    call = route.adapter.broadcast
    return _through(route, tensor, call, root_rank=root_rank, name=name, process_set=process_set)


def alltoall(
    tensor: Any, splits: Any = None, name: str | None = None, process_set: Any = None
) -> Any:
    """Send a slice of the first dimension to every rank and return what they sent here.

    Args:
        tensor: shape (n, ...); dtype and all but the first dimension equal on all ranks.
        splits: how many rows go to each rank, one integer per rank; equal slices by default.
        name: of the operation; equal on all ranks.
        process_set: the ranks that take part; all by default.

    Returns:
        The received rows in rank order; with ``splits`` a pair of them and an integer tensor
        that tells how many came from each rank, as Horovod does.
    """
    route = _route(tensor)
    entered = route.enter(tensor) if route.enter else tensor
    result = route.adapter.alltoall(entered, splits=splits, name=name, process_set=process_set)
    if route.leave is None:
        return result
    return tuple(map(route.leave, result)) if splits is not None else route.leave(result)


def reducescatter(
    tensor: Any,
    name: str | None = None,
    compression: Any = none,
    op: int | None = None,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Reduce over the ranks and return this rank's slice of the first dimension.

    Where the first dimension does not divide evenly, the first ranks get one row more.
    ``compression`` must be elementwise and is applied to what travels (Horovod's classes, or
    ``Compression.fp16``); ``op`` is ``Average`` (default) or ``Sum``.
    """
    route = _route(tensor)
    reduction = ReduceOp.of(op)
    if reduction not in (ReduceOp.Average, ReduceOp.Sum):
        raise ValueError(f"reducescatter needs op=hvd.Average or hvd.Sum, not {reduction.name}")
    if as_compressor(compression) is not none:
        raise ValueError(
            f"reducescatter takes no compression={compression!r} yet; use allreduce for it"
        )
    return _through(
        route,
        tensor,
        route.adapter.reducescatter,
        op=reduction,
        name=name,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )


def barrier(process_set: Any = None) -> None:
    """Return once every rank (of the set) has called it."""
    world.core().barrier(process_set)


def join() -> int:
    """Say that this rank has no more data; return the last rank that said so.

    Until all have joined, the ranks that have send zeros to others' allreduce. Horovod's
    allgather, broadcast, alltoall and reducescatter do not work meanwhile.
    """
    return world.core().join()
