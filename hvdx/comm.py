"""Collectives as requests: a generator yields what it needs and is resumed with the answer.

Whoever holds the generator decides how the request is carried out: at once (:func:`drive`),
many at a time while backward goes on (the torch engine), while TensorFlow traces a graph, or
between ranks that live in one process (:func:`in_step`, for tests). The algorithm that yields
is the same in all of them.

Which requests are yielded, and in which order, may depend on shapes, options and the number
of ranks, never on the values of tensors: ranks would wait for each other for ever, and a
graph could not be traced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from hvdx.reduce_op import ReduceOp


class Allreduce(NamedTuple):
    """Ask for the mean (or sum) of ``tensor`` over all ranks; same shape and dtype."""

    tensor: Any
    phase: str = "mean"  # the collective is named "<bucket>/<phase>"
    op: ReduceOp = ReduceOp.Average
    in_place: bool = False  # the answer may overwrite ``tensor``


class Allgather(NamedTuple):
    """Ask for all ranks' tensors, concatenated along the first dimension in rank order."""

    tensor: Any
    phase: str = "gather"


class Alltoall(NamedTuple):
    """Ask for this rank's chunk of every rank's 1-D ``tensor``, in rank order."""

    tensor: Any
    phase: str = "exchange"
    splits: tuple[int, ...] | None = None  # lengths of chunks, equal on all ranks; None: all equal


class Reducescatter(NamedTuple):
    """Ask for this rank's part of the sum of all ranks' 1-D ``tensor``.

    Parts are as equal as can be; the first ones are longer by one where that does not divide.
    """

    tensor: Any
    phase: str = "scatter"


class Ranks(NamedTuple):
    """Ask how many ranks take part; answered at once, without communication."""


class Rank(NamedTuple):
    """Ask for this rank's place among those that take part; answered at once."""


class Owners(NamedTuple):
    """Ask which ranks need which part of the mean, as a :class:`hvdx.servers.Cut`.

    Answered at once; by None where all ranks need all of it, as they do unless somebody asks on
    behalf of owners (:func:`hvdx.servers.for_owners`).
    """


FACTS = (Rank, Ranks, Owners)
"""Requests that are answered at once, without communication."""


class Together(NamedTuple):
    """Ask for several requests at once; the answer is a list in the same order."""

    requests: tuple[Any, ...]


class Among(NamedTuple):
    """Ask for ``request`` as if there were only these ranks, of which this one is.

    All ranks ask at the same moment, each group its own.
    """

    ranks: tuple[int, ...]  # places among those that take part, ascending
    request: Any  # a collective, and no alltoall with splits
    process_set: Any = None  # which these ranks form for Horovod


Request: TypeAlias = (
    Allreduce | Allgather | Alltoall | Reducescatter | Rank | Ranks | Owners | Among | Together
)
Result = TypeVar("Result")
Work: TypeAlias = Generator[Request, Any, Result]


def drive(work: Work[Result], answer: Callable[[Any], Any]) -> Result:
    """Run ``work`` to its end; ``answer`` performs each request."""
    try:
        request = next(work)
        while True:
            request = work.send(answer(request))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def through(
    work: Work[Result],
    see: Callable[[Any], object] | None = None,
    make: Callable[[Any], Any] | None = None,
) -> Work[Result]:
    """Pass the requests of ``work`` on, and the answers back, for who wants to know or change them.

    Args:
        work: a generator of requests.
        see: is shown each request.
        make: makes tensors of the NumPy arrays in answers, as :func:`in_step` gives them.
    """
    answer: Any = None
    while True:
        try:
            request = work.send(answer)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        if see is not None:
            see(request)
        answer = yield request
        if make is not None:
            answer = _made(answer, make)


def _made(answer: Any, make: Callable[[Any], Any]) -> Any:
    if isinstance(answer, list):
        return [_made(each, make) for each in answer]
    return make(answer) if hasattr(answer, "__array__") else answer


def operations(request: Any) -> Iterator[Any]:
    """Yield the collectives that a request asks for: several at once, or none."""
    if isinstance(request, Together):
        for each in request.requests:
            yield from operations(each)
    elif isinstance(request, Among):
        yield request.request
    elif not isinstance(request, FACTS):
        yield request


def sent_share(operation: str, ranks: int) -> float:
    """Return the bytes that a rank sends per byte of its tensor: by ring, but for an alltoall.

    Args:
        operation: ``"allgather"``, ``"alltoall"``, or any kind of ``"allreduce"``.
        ranks: how many take part.
    """
    if operation == "allgather":
        return ranks - 1
    return (1 if operation in ("alltoall", "reducescatter") else 2) * (ranks - 1) / ranks


def together(works: Sequence[Work[Result]], ops: Any = None) -> Work[list[Result]]:
    """Run generators side by side: the requests of each round travel as one group.

    All must take part in every round until they end; those that end early drop out.

    Args:
        works: the generators. Their requests must be equal on all ranks.
        ops: the verbs (:class:`hvdx.ops.Ops`) of the tensors. With them requests of one kind,
            operator and dtype become one request for one flat tensor, and the answer is cut up
            again: Horovod does not fuse alltoalls, and each operation costs a negotiation.
    """
    results: list[Any] = [None] * len(works)
    replies: dict[int, Any] = dict.fromkeys(range(len(works)))
    facts: dict[type, Any] = {}
    while True:
        requests = {}
        for index, reply in replies.items():
            try:
                request = works[index].send(reply)
                while isinstance(request, FACTS):
                    if type(request) not in facts:
                        facts[type(request)] = yield request
                    request = works[index].send(facts[type(request)])
                requests[index] = request
            except StopIteration as done:
                results[index] = done.value
        if not requests:
            return results
        if ops is None:
            answers = yield Together(tuple(requests.values()))
        else:
            asked = list(requests.values())
            for fact in (Ranks, Rank) if any(map(_uneven, asked)) else (Ranks,):
                if fact not in facts:
                    facts[fact] = yield fact()
            answers = yield from _merged(asked, ops, facts.get(Rank), facts[Ranks])
        replies = dict(zip(requests, answers, strict=True))


def _uneven(request: Any) -> bool:
    return getattr(request, "splits", None) is not None


def _merged(requests: list[Any], ops: Any, rank: int | None, ranks: int) -> Work[list[Any]]:
    """Ask for all of these in as few requests as possible; return their answers in order."""
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        among = request.ranks if isinstance(request, Among) else None
        one = request if among is None else request.request
        operator = getattr(one, "op", None)
        key = among, type(one), operator, _uneven(one), ops.dtype(one.tensor)
        groups.setdefault(key, []).append(index)
    whole = tuple(_joined([requests[i] for i in group], ops, ranks) for group in groups.values())
    received = (yield Together(whole)) if len(whole) > 1 else [(yield whole[0])]
    answers: list[Any] = [None] * len(requests)
    for group, one in zip(groups.values(), received, strict=True):
        parts = _parted([requests[i] for i in group], one, ops, rank, ranks)
        for index, part in zip(group, parts, strict=True):
            answers[index] = part
    return answers


def _joined(requests: list[Any], ops: Any, ranks: int) -> Any:
    """Return one request for all of these, which are of one kind."""
    first = requests[0]
    if len(requests) == 1:
        return first
    if isinstance(first, Among):
        inner = _joined([each.request for each in requests], ops, len(first.ranks))
        return first._replace(request=inner)
    if _uneven(first):
        return _joined_unevenly(requests, ops)
    rows = ranks if isinstance(first, Alltoall) else 1
    parts = [ops.reshape(request.tensor, (rows, -1)) for request in requests]
    flat = ops.reshape(ops.concat(parts, axis=1), (-1,))
    if isinstance(first, Allreduce):
        return first._replace(tensor=flat, in_place=True)
    return first._replace(tensor=flat)


def _joined_unevenly(requests: list[Any], ops: Any) -> Alltoall:
    """Join what goes to each rank, of alltoalls whose chunks are not equal."""
    chunks, starts = [], [0] * len(requests)
    sizes = list(zip(*(request.splits for request in requests), strict=True))  # by rank
    for by_request in sizes:
        for place, size in enumerate(by_request):
            start, starts[place] = starts[place], starts[place] + size
            chunks.append(requests[place].tensor[start : start + size])
    splits = tuple(map(sum, sizes))
    return Alltoall(ops.concat(chunks), requests[0].phase, splits)


def _parted(requests: list[Any], answer: Any, ops: Any, rank: int | None, ranks: int) -> list[Any]:
    """Cut the answer to :func:`_joined` into those to each request."""
    if len(requests) == 1:
        return [answer]
    if isinstance(requests[0], Among):
        inner = [each.request for each in requests]
        return _parted(inner, answer, ops, None, len(requests[0].ranks))
    if _uneven(requests[0]):
        own = [request.splits[rank] for request in requests]
        rows = ops.reshape(answer, (ranks, sum(own)))
        ends = list(itertools.accumulate(own))
        return [
            ops.reshape(rows[:, end - size : end], (ranks * size,))
            for size, end in zip(own, ends, strict=True)
        ]
    summed = isinstance(requests[0], Allreduce)
    given = isinstance(requests[0], Allgather)
    rows = ops.reshape(answer, (1 if summed else ranks, -1))
    parts, start = [], 0
    for request in requests:
        shape = tuple(request.tensor.shape)
        size = math.prod(shape) // (1 if summed or given else ranks)
        part = rows[:, start : start + size]
        parts.append(ops.reshape(part, shape if summed else (-1, *shape[1:])))
        start += size
    return parts


def in_step(works: Sequence[Work[Result]]) -> list[Result]:
    """Run one generator per rank in lock-step, all in this process, on NumPy arrays.

    Raises:
        AssertionError: ranks ask for different collectives. Real ranks would wait for ever.
    """
    replies: list[Any] = [None] * len(works)
    results: list[Any] = []
    while True:
        requests = []
        for work, reply in zip(works, replies, strict=True):
            try:
                requests.append(work.send(reply))
            except StopIteration as done:
                results.append(done.value)
        if results and requests:
            raise AssertionError(f"{len(results)} ranks ended while others ask for {requests[0]}")
        if not requests:
            return results
        replies = answer_in_memory(requests)


def answer_in_memory(requests: Sequence[Any]) -> list[Any]:
    """Answer one request per rank as Horovod would, from NumPy arrays in rank order.

    Raises:
        AssertionError: the requests differ in kind, phase, operator, dtype or shape.
    """
    import numpy as np

    first, ranks = requests[0], len(requests)
    if len({type(r) for r in requests}) > 1:
        raise AssertionError(f"ranks ask for different collectives: {requests}")
    if isinstance(first, Ranks):
        return [ranks] * ranks
    if isinstance(first, Rank):
        return list(range(ranks))
    if isinstance(first, Owners):
        return [None] * ranks
    if isinstance(first, Together):
        rounds = zip(*(r.requests for r in requests), strict=True)
        return [list(each) for each in zip(*map(answer_in_memory, rounds), strict=True)]
    if isinstance(first, Among):
        return _among_in_memory(requests)
    tensors = [np.asarray(r.tensor) for r in requests]
    told = {(r[1:], t.dtype, t.shape[not isinstance(first, Allreduce) :]) for r, t in
            zip(requests, tensors, strict=True)}  # fmt: skip
    if len(told) > 1:
        raise AssertionError(f"ranks disagree about {type(first).__name__}: {told}")
    if isinstance(first, Allgather):
        return [np.concatenate(tensors)] * ranks
    if isinstance(first, Reducescatter):
        return list(np.array_split(sum(tensors), ranks))
    if isinstance(first, Alltoall):
        ends = ranks if first.splits is None else np.cumsum(first.splits)[:-1]
        parts = [np.split(t, ends) for t in tensors]
        return [np.concatenate([part[rank] for part in parts]) for rank in range(ranks)]
    fold: dict[Any, Any] = {
        ReduceOp.Average: lambda: sum(tensors) / np.asarray(ranks, tensors[0].dtype),
        ReduceOp.Sum: lambda: sum(tensors),
        ReduceOp.Min: lambda: np.minimum.reduce(tensors),
        ReduceOp.Max: lambda: np.maximum.reduce(tensors),
        ReduceOp.Product: lambda: np.multiply.reduce(tensors),
    }
    mean: Any = fold[first.op]()
    return [mean] * ranks


def _among_in_memory(requests: Sequence[Among]) -> list[Any]:
    answers: list[Any] = [None] * len(requests)
    for group in {request.ranks for request in requests}:
        asking = tuple(rank for rank, each in enumerate(requests) if each.ranks == group)
        if asking != group:
            raise AssertionError(f"ranks {asking} ask among {group}")
        own = answer_in_memory([requests[rank].request for rank in group])
        for rank, answer in zip(group, own, strict=True):
            answers[rank] = answer
    return answers
