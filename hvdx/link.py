"""What a collective costs on the network of the running job, and what a compressor costs to run.

An operation that sends b bytes takes about alpha + beta * b seconds: alpha for agreeing that all
ranks are there and for the network's latency, beta for bandwidth, and for adding up where the
operation does that. Both are measured through the very operations that training uses. What a
compressor computes is measured by running it: its requests are answered at once, with tensors of
the right shape, and noted.

All functions that measure return the same on all ranks: the slowest rank's numbers.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hvdx.agreement import next_name
from hvdx.buckets import width
from hvdx.comm import (
    FACTS,
    Allgather,
    Allreduce,
    Alltoall,
    Rank,
    Ranks,
    Together,
    Work,
    operations,
    sent_share,
)
from hvdx.compression.base import Compressor, Spec
from hvdx.frameworks import Adapter
from hvdx.ops import Ops, ops_for
from hvdx.reduce_op import ReduceOp

KINDS = ("allreduce float32", "allreduce float16", "allgather", "alltoall")
_SIZES = tuple(2**power for power in (10, 16, 18, 20, 22, 24))  # bytes sent by a rank
_REPEATS = 5
_CLEAR = 4.0  # an operation that takes this many times as long as the smallest shows bandwidth
_LEAST_BETA = 1e-10  # 10 GB/s, where no bandwidth shows
_WATCHED_SECONDS = 0.1  # a compressor runs until these are over, from 3 to _REPEATS times


class Line(NamedTuple):
    """What one kind of collective takes: ``alpha`` seconds, and ``beta`` for each byte sent."""

    alpha: float
    beta: float


class Link(NamedTuple):
    """The network between the ranks of a process set; ``lines`` has every kind in KINDS."""

    ranks: int
    lines: dict[str, Line]

    def alpha(self, kind: str) -> float:
        """Return the seconds that an operation takes however small it is."""
        return self._line(kind).alpha

    def beta(self, kind: str) -> float:
        """Return the seconds for each byte that a rank sends."""
        return self._line(kind).beta

    def sent(self, kind: str, payload: int) -> float:
        """Return the bytes a rank sends in an operation on a tensor of ``payload`` bytes."""
        return payload * sent_share(kind, self.ranks)

    def paced(self, pace: float) -> Link:
        """Return a link that takes ``pace`` times as long for each byte."""
        lines = {
            kind: Line(line.alpha, pace * max(line.beta, _LEAST_BETA))
            for kind, line in self.lines.items()
        }
        return Link(self.ranks, lines)

    def _line(self, kind: str) -> Line:
        return self.lines.get(kind) or self.lines["allreduce float32"]


class Message(NamedTuple):
    """A request of a compressor."""

    round: int  # those of one round wait for no other's answer
    kind: str  # as in KINDS, or an allreduce of another dtype
    op: str  # of an allreduce
    payload: int  # bytes of the tensor


def messages(ops: Ops, request: Any, round_: int = 0) -> list[Message]:
    """Return what ``request`` makes a rank send."""
    return [_message(ops, each, round_) for each in operations(request)]


def _message(ops: Ops, request: Any, round_: int) -> Message:
    tensor = request.tensor
    kind, dtype = type(request).__name__.lower(), ops.dtype(tensor)
    size = math.prod(tensor.shape) * width(dtype)
    if not isinstance(request, Allreduce):
        return Message(round_, kind, "", size)
    if dtype == "bfloat16":  # no type of Horovod's: summed as float32
        dtype, size = "float32", 2 * size
    return Message(round_, f"{kind} {dtype}", request.op.name, size)


def sent(ops: Ops, request: Any, ranks: int) -> float:
    """Return the bytes that ``request`` makes each of ``ranks`` send, headers left out."""
    told = messages(ops, request)
    return sum(each.payload * sent_share(each.kind, ranks) for each in told)


class Footprint(NamedTuple):
    """What reducing one gradient takes: seconds of computing, and requests."""

    seconds: float
    messages: tuple[Message, ...]


def measure(
    adapter: Adapter, process_set: Any = None, seconds: float = 1.0, name: str | None = None
) -> Link:
    """Measure every kind of collective; all ranks of ``process_set`` must call it together.

    Sizes grow from 1 KB to 16 MB as long as the time allows, or until bandwidth shows.

    Args:
        adapter: the running core.
        process_set: the ranks that take part.
        seconds: about what it may take.
        name: of the operations, equal on all ranks; by default calls are counted.
    """
    ranks = adapter.ranks(process_set)
    if ranks == 1:
        return Link(1, dict.fromkeys(KINDS, Line(0.0, 0.0)))
    name = name or next_name("link", process_set)

    def timed(kind: str, size: int) -> Callable[[], float]:
        tensor = _payload(adapter, kind, math.ceil(size / sent_share(kind, ranks)), ranks)
        own = f"{name}.{kind.replace(' ', '.')}.{size}"

        def once() -> float:
            start = time.perf_counter()
            adapter.carry_out(_one(kind, tensor), own, process_set)
            return time.perf_counter() - start

        return once

    def slowest(taken: float) -> float:
        return float(max(adapter.allgather_object(taken, f"{name}.agree", process_set)))

    share = seconds / len(KINDS)
    lines = {kind: _line(functools.partial(timed, kind), slowest, share) for kind in KINDS}
    return Link(ranks, lines)


def _line(
    timed: Callable[[int], Callable[[], float]], slowest: Callable[[float], float], share: float
) -> Line:
    """Measure one kind of collective for about ``share`` seconds.

    Of each size the quickest counts: a machine's other work only ever delays.
    """
    points: list[tuple[int, float]] = []
    left = share
    for size in _SIZES:
        shows = len(points) > 1 and points[-1][1] > _CLEAR * points[0][1]
        if shows and left < 2 * _expected(points, size):
            break
        once = timed(size)
        first = slowest(once())
        repeats = max(1, min(_REPEATS, int(left / first)))
        taken = slowest(min(once() for _ in range(repeats)))
        left -= first + repeats * taken
        points.append((size, min(first, taken)))
    return fit(points)


def _expected(points: list[tuple[int, float]], size: int) -> float:
    line = fit(points)
    return line.alpha + line.beta * size


def fit(points: list[tuple[int, float]]) -> Line:
    """Return the line through the smallest and the largest of (bytes sent, seconds)."""
    (least, low), (most, high) = points[0], points[-1]
    beta = max(0.0, (high - low) / (most - least)) if most > least else 0.0
    return Line(max(0.0, low - beta * least), beta)


def _payload(adapter: Adapter, kind: str, size: int, ranks: int) -> Any:
    import numpy as np

    dtype = kind.partition(" ")[2] or "uint8"
    count = math.ceil(size / width(dtype) / ranks) * ranks
    return adapter.from_numpy(np.zeros(count, dtype))


def _one(kind: str, tensor: Any) -> Work[Any]:
    if kind == "allgather":
        return (yield Allgather(tensor))
    if kind == "alltoall":
        return (yield Alltoall(tensor))
    return (yield Allreduce(tensor, op=ReduceOp.Sum, in_place=True))


def watch(adapter: Adapter, compressor: Compressor, spec: Spec) -> Footprint:
    """Run ``compressor`` on a gradient like ``spec`` on this rank alone; note what it asks for.

    Random numbers stand for the gradient, and its own tensors for what other ranks would send.
    """
    ops, grad = gradient(adapter, spec)
    state = compressor.init(ops, spec)
    samples: list[float] = []
    messages: tuple[Message, ...] = ()
    until = time.perf_counter() + _WATCHED_SECONDS
    while len(samples) < 3 or (len(samples) < _REPEATS and time.perf_counter() < until):
        watched = _Watched(adapter, ops, spec.ranks)
        watched.run(compressor.reduce(ops, grad, state))
        samples.append(watched.seconds)
        messages = tuple(watched.messages)
    return Footprint(min(samples), messages)


def gradient(adapter: Adapter, spec: Spec) -> tuple[Ops, Any]:
    """Return random numbers in the form of ``spec``, and the verbs for them."""
    import numpy as np

    random = np.random.default_rng(0).standard_normal(min(math.prod(spec.shape), 2**20))
    values = np.resize(random.astype(np.float32), spec.shape)
    tensor = adapter.from_numpy(values)
    ops = ops_for(type(tensor)).beside(tensor)
    return ops, ops.cast(tensor, spec.dtype)


class _Watched:
    """One run of a reduction without other ranks."""

    def __init__(self, adapter: Adapter, ops: Ops, ranks: int) -> None:
        self._adapter, self._ops, self._ranks = adapter, ops, ranks
        self.seconds = 0.0
        self.messages: list[Message] = []

    def run(self, work: Work[Any]) -> None:
        reply: Any = None
        rounds = 0
        while True:
            start = time.perf_counter()
            try:
                request = work.send(reply)
                for each in operations(request):
                    self._settle(each.tensor)
            except StopIteration as done:
                self._settle(done.value.mean)
                self.seconds += time.perf_counter() - start
                return
            self.seconds += time.perf_counter() - start
            self.messages += messages(self._ops, request, rounds)
            reply = self._answer(request)
            rounds += not isinstance(request, FACTS)

    def _answer(self, request: Any) -> Any:
        if isinstance(request, Ranks):
            return self._ranks
        if isinstance(request, FACTS):
            return 0 if isinstance(request, Rank) else None
        if isinstance(request, Together):
            return [self._answer(each) for each in request.requests]
        if isinstance(request, Allgather):
            return self._ops.concat([request.tensor] * self._ranks)
        return request.tensor

    def _settle(self, tensor: Any) -> None:
        """Wait until ``tensor`` is computed: frameworks may run behind."""
        if math.prod(tensor.shape):
            self._adapter.to_numpy(self._ops.reshape(tensor, (-1,))[:1])
