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
from hvdx.comm import (
    Allgather,
    Allreduce,
    Among,
    Owners,
    Rank,
    Ranks,
    Reducescatter,
    Request,
    Together,
    Work,
    drive,
    together,
)
from hvdx.compression import CompressionError, Spec, as_compressor, none
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
    """Return the way of a list of tensors, all of one library."""
    if not tensors:
        raise ValueError("a grouped operation needs at least one tensor")
    kinds = {kind_of(type(tensor)) for tensor in tensors}
    if len(kinds) > 1:
        names = " and ".join(sorted(str(kind) for kind in kinds))
        raise TypeError(f"tensors of {names} in one call; convert them to one framework first")
    route = _route(tensors[0])
    enter, leave = (list if change is None else _mapping(change) for change in route[1:])
    return _Route(route.adapter, enter, leave)


def _mapping(change: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    return lambda group: [change(each) for each in group]


def _through(route: _Route, operation: str, given: Any, process_set: Any, **options: Any) -> Any:
    """Send a tensor, or a group, through an operation of the route's core."""
    if process_set is not None:
        process_set = world.own_set(route.adapter.framework, process_set)
    entered = given if route.enter is None else route.enter(given)
    result = getattr(route.adapter, operation)(entered, process_set=process_set, **options)
    return result if route.leave is None else route.leave(result)


def _reduced(
    route: _Route,
    operation: str,
    given: Any,
    op: ReduceOp,
    name: str | None,
    compression: Any,
    prescale_factor: float,
    postscale_factor: float,
    process_set: Any,
) -> Any:
    """Send a tensor, or a group, through a reduction, compressed or not."""
    if compression is not none and as_compressor(compression) is not none:
        return _compressed(
            route, operation, given, op, name, compression, prescale_factor, postscale_factor,
            process_set,
        )  # fmt: skip
    return _through(
        route,
        operation,
        given,
        process_set,
        op=op,
        name=name,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )


def _compressed(
    route: _Route,
    operation: str,
    given: Any,
    op: ReduceOp,
    name: str | None,
    compression: Any,
    prescale_factor: float,
    postscale_factor: float,
    process_set: Any,
) -> Any:
    """Reduce through a stateless compressor, whose reductions ``operation`` performs.

    Rows of sparse tensors travel as any compressor writes them.
    """
    compressor = as_compressor(compression)
    if op not in (ReduceOp.Average, ReduceOp.Sum):
        raise ValueError(f"compression={compressor} needs op=hvd.Average or hvd.Sum, not {op.name}")
    adapter, process_set = route.adapter, world.own_set(route.adapter.framework, process_set)
    entered = given if route.enter is None else route.enter(given)
    grouped = operation.startswith("grouped")
    group = entered if grouped else [entered]
    factor = postscale_factor * (adapter.ranks(process_set) if op is ReduceOp.Sum else 1)

    def mean_of(tensor: Any) -> Work[Any]:
        rows = adapter.reduce_rows(
            tensor, compressor, op=op, name=name, process_set=process_set,
            factor=prescale_factor * postscale_factor,
        )  # fmt: skip
        if rows is not None:  # of which nothing is kept
            return rows
        if compressor.stateful:
            raise CompressionError(
                f"compression={compressor} keeps state from step to step, which a single operation "
                "has not: use hvd.DistributedOptimizer for it"
            )
        ops = ops_for(type(tensor)).beside(tensor)
        if prescale_factor != 1.0:
            tensor = ops.scale(tensor, prescale_factor)
        spec = Spec(name or "", tuple(tensor.shape), ops.dtype(tensor), adapter.ranks(process_set))
        chosen = compressor.of(spec)
        reduced = yield from chosen.reduce(ops, tensor, chosen.init(ops, spec))
        return ops.scale(reduced.mean, factor) if factor != 1.0 else reduced.mean

    answer = functools.partial(
        perform, adapter, name=name, process_set=process_set, reduction=operation
    )
    result = drive(together([*map(mean_of, group)]) if grouped else mean_of(entered), answer)
    return result if route.leave is None else route.leave(result)


def perform(
    adapter: Adapter,
    request: Request,
    *,
    name: str | None,
    process_set: Any,
    reduction: str = "allreduce",
) -> Any:
    """Carry out one request of a compressor through a Horovod core and wait for the answer.

    ``reduction`` is the operation that answers :class:`Allreduce`; a grouped one answers all
    of a round that share an operator at once.
    """
    if isinstance(request, Ranks):
        return adapter.ranks(process_set)
    if isinstance(request, Rank):
        return adapter.place(process_set)
    if isinstance(request, Owners):
        return None
    if isinstance(request, Among):
        own = request.process_set
        return perform(adapter, request.request, name=name, process_set=own)
    if isinstance(request, Together):
        if reduction.startswith("grouped"):
            return _perform_group(adapter, request, name, process_set, reduction)
        return [
            perform(adapter, each, name=name and f"{name}/{i}", process_set=process_set)
            for i, each in enumerate(request.requests)
        ]
    full = f"{name}/{request.phase}" if name else None
    adapter.count(type(request).__name__.lower(), request.tensor, adapter.ranks(process_set))
    if isinstance(request, Allreduce):
        return getattr(adapter, reduction)(
            request.tensor, op=request.op, name=full, process_set=process_set, **_UNSCALED
        )
    if isinstance(request, Allgather):
        return adapter.allgather(request.tensor, name=full, process_set=process_set)
    if isinstance(request, Reducescatter):
        return adapter.reducescatter(
            request.tensor, op=ReduceOp.Sum, name=full, process_set=process_set, **_UNSCALED
        )
    if request.splits is None:
        return adapter.alltoall(request.tensor, splits=None, name=full, process_set=process_set)
    splits = ops_for(type(request.tensor)).constant(list(request.splits), "int32")
    return adapter.alltoall(request.tensor, splits=splits, name=full, process_set=process_set)[0]


_UNSCALED = {"prescale_factor": 1.0, "postscale_factor": 1.0}


def _perform_group(
    adapter: Adapter, round_: Together, name: str | None, process_set: Any, reduction: str
) -> list[Any]:
    answers: list[Any] = [None] * len(round_.requests)
    alike: dict[tuple[ReduceOp, str], list[int]] = {}
    for place, request in enumerate(round_.requests):
        if isinstance(request, Allreduce):
            alike.setdefault((request.op, request.phase), []).append(place)
            adapter.count("allreduce", request.tensor, adapter.ranks(process_set))
        else:
            own = name and f"{name}/{place}"
            answers[place] = perform(adapter, request, name=own, process_set=process_set)
    for (op, phase), places in alike.items():
        tensors = [round_.requests[place].tensor for place in places]
        full = f"{name}/{phase}.{op.name}" if name else None
        results = getattr(adapter, reduction)(
            tensors, op=op, name=full, process_set=process_set, **_UNSCALED
        )
        for place, result in zip(places, results, strict=True):
            answers[place] = result
    return answers


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
    return _reduced(
        _route(tensor), "allreduce", tensor, ReduceOp.of(op, average), name, compression,
        prescale_factor, postscale_factor, process_set,
    )  # fmt: skip


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
    result: list[Any] = _reduced(
        _group_route(tensors), "grouped_allreduce", tensors, ReduceOp.of(op, average), name,
        compression, prescale_factor, postscale_factor, process_set,
    )  # fmt: skip
    return result


def allgather(tensor: Any, name: str | None = None, process_set: Any = None) -> Any:
    """Concatenate all ranks' tensors along the first dimension, in rank order.

    First dimensions may differ between ranks; dtype and the other dimensions may not.
    """
    return _through(_route(tensor), "allgather", tensor, process_set, name=name)


def grouped_allgather(
    tensors: Sequence[Any], name: str | None = None, process_set: Any = None
) -> list[Any]:
    """Gather several tensors as one operation; see :func:`allgather`."""
    route = _group_route(tensors)
    result: list[Any] = _through(route, "grouped_allgather", tensors, process_set, name=name)
    return result


def broadcast(tensor: Any, root_rank: int, name: str | None = None, process_set: Any = None) -> Any:
    """Return the tensor of ``root_rank`` (a global rank) on every rank.

    Every rank gives a tensor of the same shape and dtype; only the root's values matter.
    """
    route = _route(tensor)
    return _through(route, "broadcast", tensor, process_set, root_rank=root_rank, name=name)


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
    if splits is not None and route.leave is not None:
        route = route._replace(leave=_mapping(route.leave))
    result = _through(route, "alltoall", tensor, process_set, splits=splits, name=name)
    return result if splits is None else tuple(result)


def reducescatter(
    tensor: Any,
    name: str | None = None,
    compression: Any = none,
    op: int = ReduceOp.Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Reduce over the ranks and return this rank's slice of the first dimension.

    Where the first dimension does not divide evenly, the first ranks get one row more.
    ``compression`` must be elementwise and is applied to what travels (``Compression.fp16``, or
    a Horovod ``Compressor`` class); ``op`` is ``Average`` (default) or ``Sum``.
    """
    return _reduced(
        _route(tensor), "reducescatter", tensor, scatterable(op, compression), name, compression,
        prescale_factor, postscale_factor, process_set,
    )  # fmt: skip


def grouped_reducescatter(
    tensors: Sequence[Any],
    name: str | None = None,
    compression: Any = none,
    op: int = ReduceOp.Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Any]:
    """Reduce several tensors as one operation and keep slices; see :func:`reducescatter`."""
    result: list[Any] = _reduced(
        _group_route(tensors), "grouped_reducescatter", tensors, scatterable(op, compression),
        name, compression, prescale_factor, postscale_factor, process_set,
    )  # fmt: skip
    return result


def scatterable(op: int, compression: Any = none) -> ReduceOp:
    """Return the operator of a reducescatter; refuse what does not work on slices."""
    reduction = ReduceOp.of(op)
    if reduction not in (ReduceOp.Average, ReduceOp.Sum):
        raise ValueError(f"reducescatter needs op=hvd.Average or hvd.Sum, not {reduction.name}")
    compressor = as_compressor(compression)
    if not compressor.elementwise and not hasattr(compression, "compress"):
        raise ValueError(
            f"reducescatter(compression={compressor}): this treats a tensor as a whole, of which "
            "reducescatter makes slices; use allreduce for it"
        )
    return reduction


def barrier(process_set: Any = None) -> None:
    """Return once every rank (of the set) has called it."""
    adapter = world.core()
    adapter.barrier(world.own_set(adapter.framework, process_set))


def join() -> int:
    """Say that this rank has no more data; return the last rank that said so.

    Until all have joined, the ranks that have send zeros to others' allreduce. Horovod's
    allgather, broadcast, alltoall and reducescatter do not work meanwhile.
    """
    return world.core().join()
