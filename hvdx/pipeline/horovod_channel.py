"""Tensors between ranks over Horovod alone: the portable reference, wherever Horovod runs.

Horovod has no messages from one rank to another. Here a thread of each rank meets those of all
others, round after round, in one alltoall, into which each puts what it has to send:

    round          1              2              3
    rank 0   F0 -> 1        F1 -> 1        nothing          computing goes on meanwhile
    rank 1   nothing        nothing        B0 -> 0

Since the thread of a rank never waits for what its stages compute, only for the other threads, no
order of puts and gets can block a round: what a schedule allows, this carries. Nor does it need
sets of two ranks, which a job would have to declare when it starts, and which Horovod visits one
after the other in each of its cycles. The price is that a message waits for the next round.

Rounds go on within a :meth:`HorovodChannel.session` only, until one in which all ranks say that
they are done with it. A rank that fails sends why in the next round.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hvdx.pipeline.channel import Key
from hvdx.pipeline.post import Codec, PostChannel

_ROW = 64  # bytes: parts begin at multiples of it, as memory that frameworks allocate does
_LAST_SECONDS = 2.0  # for last messages when the channel closes
_NAME = "hvdx-pipeline-rounds"  # of the thread

Message = Sequence[Any]  # a header and its parts, all buffers


class HorovodChannel(PostChannel):
    """See :class:`hvdx.pipeline.channel.Channel`; for one process per rank.

    Args:
        place: by stage, the rank that has it, or its replicas.
        rank: this one.
        size: how many ranks the job has; all of them have such a channel.
        alltoall: exchanges an int64 array of shape (n, 8), of which each rank gets as many rows
            as a list says; returns the rows that came, and how many from each rank. All ranks
            call it, in a thread of its own.
        codec: of the framework's tensors.
        seconds: deadline of a get and of a session's end; 0: wait for ever.
    """

    def __init__(
        self,
        place: Sequence[int | Sequence[int]],
        rank: int,
        size: int,
        alltoall: Callable[[np.ndarray, list[int]], tuple[np.ndarray, list[int]]],
        codec: Codec | None = None,
        *,
        seconds: float = 30.0,
    ) -> None:
        super().__init__(place, rank, codec, seconds)
        self._size, self._alltoall = size, alltoall
        self._lock = threading.Lock()  # of the next two
        self._outgoing: list[list[Message]] = [[] for _ in range(size)]
        self._done = True  # with the session
        self._rounds: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._news = threading.Event()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Trade messages meanwhile; return when all ranks are done.

        Raises:
            PipelineError: a rank has failed, if only after the last message to this one.
            OSError: Horovod has.
            TimeoutError: a rank is not done before the deadline.
        """
        self._check()
        self._check_rounds()
        self._done = False
        self._rounds = threading.Thread(target=self._trade, name=_NAME, daemon=True)
        self._rounds.start()
        try:
            yield
        finally:  # after a failure the rounds go on, so that all learn of it, but nobody waits
            with self._lock:
                self._done = True
        self._rounds.join(min(self._seconds, threading.TIMEOUT_MAX))
        self._check()
        self._check_rounds()
        if self._rounds.is_alive():
            raise TimeoutError(
                f"rank {self._rank} has waited {self._seconds:g} s for the others to finish, too "
                "(HVDX_TIMEOUT)"
            )

    def close(self) -> None:
        """End with the session that goes on, if there is one: two seconds are left to it."""
        with self._lock:
            self._done = True
        if self._rounds is not None:
            self._rounds.join(_LAST_SECONDS)
        self._closed = True

    # --- messages

    def _post(self, peer: int, parts: Message) -> None:
        with self._lock:
            if self._done:
                raise OSError("messages travel within a session only")
            self._outgoing[peer].append(parts)

    def _tell_all(self, message: bytes) -> None:
        with self._lock:
            for peer in set(range(self._size)) - {self._rank}:
                self._outgoing[peer].append([message])

    def _service(self, seconds: float, wanted: int | None = None) -> None:
        self._news.wait(min(seconds, threading.TIMEOUT_MAX))
        self._news.clear()  # what has come since is looked for next

    def _check_peers(self, wanted: int, key: Key) -> None:
        self._check_rounds()

    def _check_rounds(self) -> None:
        if self._broken is not None:
            raise ConnectionError(str(self._broken)) from self._broken

    # --- rounds

    def _trade(self) -> None:
        """Meet the other ranks until all of them are done: the body of the thread."""
        try:
            while not self._round():
                self._news.set()
        except BaseException as error:
            self._broken = error
        self._news.set()

    def _round(self) -> bool:
        """Send and take what there is; tell whether all ranks are done."""
        with self._lock:
            outgoing, self._outgoing = self._outgoing, [[] for _ in range(self._size)]
            done = self._done
        segments = [segment(done, messages) for messages in outgoing]
        rows, counts = self._alltoall(joined(segments), [_rows(each) for each in segments])
        flat = rows.reshape(-1).view(np.uint8)
        over = True
        for peer, (stop, count) in enumerate(
            zip(itertools.accumulate(counts), counts, strict=True)
        ):
            is_done, messages = parsed(flat[(stop - count) * _ROW : stop * _ROW])
            over = over and is_done
            for parts in messages:
                try:
                    self._take(peer, parts)
                except Exception as error:  # for who waits; the others still need the rounds
                    self._broken = self._broken or error
        return over


def segment(done: bool, messages: Sequence[Message]) -> list[Any]:
    """Return what one rank gets in a round: an index, and all parts of all messages.

    The index is of int64: how many numbers it has, whether the sender is done, and by message the
    number and the sizes of its parts.
    """
    parts = [_bytes(part) for message in messages for part in message]
    sizes = iter([part.nbytes for part in parts])
    index = [0, int(done)]
    for message in messages:
        index += [len(message), *itertools.islice(sizes, len(message))]
    index[0] = len(index)
    return [_bytes(np.array(index, np.int64)), *parts]


def parsed(data: np.ndarray) -> tuple[bool, list[Message]]:
    """Undo :func:`segment`: whether the sender is done, and messages on the memory of ``data``."""
    count = int(data[:8].view(np.int64)[0])
    _, done, *index = data[: 8 * count].view(np.int64).tolist()
    start = _padded(8 * count)
    messages: list[Message] = []
    numbers = iter(index)
    for parts in numbers:
        message = []
        for size in itertools.islice(numbers, parts):
            message.append(_bytes(data[start : start + size]))
            start += _padded(size)
        messages.append(message)
    return bool(done), messages


def joined(segments: Sequence[Sequence[Any]]) -> np.ndarray:
    """Copy segments into the rows of one array, each part to the start of a row."""
    flat = np.zeros(_ROW * sum(map(_rows, segments)), np.uint8)
    start = 0
    for part in itertools.chain.from_iterable(segments):
        flat[start : start + part.nbytes] = part
        start += _padded(part.nbytes)
    return flat.view(np.int64).reshape(-1, _ROW // 8)


def _bytes(part: Any) -> memoryview[int]:
    view = memoryview(part)
    return view.cast("B") if view.nbytes else memoryview(b"")  # which cannot be cast


def _rows(parts: Sequence[Any]) -> int:
    return sum(_padded(part.nbytes) for part in parts) // _ROW


def _padded(size: int) -> int:
    return -(-size // _ROW) * _ROW
