"""What channels between processes have in common: how messages are written, kept and fetched.

    header (JSON)   [version, kind, step, stage, micro-batch, note,
                     [[dtype, shape, layout] or null, ..]]
    then            one part of raw bytes per tensor; null stands for None and has no part

Nothing is unpickled, and no tensor is made that its header does not describe byte for byte.
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hvdx.errors import MismatchError
from hvdx.pipeline.channel import Failure, Key, Tensors, holder, late, rows_of_ranks

VERSION = 1
MAX_HEADER = 1 << 20
MAX_PART = 1 << 34  # bytes of one tensor
_DTYPE = re.compile(r"[<>=|]?[A-Za-z]\d{0,9}")  # np.dtype() takes whole expressions
FAILURE, BYE = "fail", "bye"  # kinds besides those of keys


class Packed(NamedTuple):
    """A tensor as a channel sees it: ``layout`` is the codec's own, plain JSON or None."""

    dtype: str
    shape: Sequence[int]
    layout: Any
    data: Any  # a contiguous buffer of bytes


class Codec(Protocol):
    """How a framework's tensors become bytes and arise from them."""

    def pack(self, tensor: Any) -> Packed:
        """Describe ``tensor``; ``data`` may share its memory."""

    def unpack(self, packed: Packed) -> Any:
        """Make a tensor, on the memory of ``packed.data`` if it likes: nobody else uses that.

        Raises:
            ValueError: dtype, shape, layout and number of bytes do not fit together.
        """


class NumpyCodec:
    """For NumPy arrays."""

    def pack(self, tensor: Any) -> Packed:
        """See :meth:`Codec.pack`."""
        array = np.ascontiguousarray(tensor)
        return Packed(array.dtype.str, tensor.shape, None, array.reshape(-1).view(np.uint8).data)

    def unpack(self, packed: Packed) -> Any:
        """See :meth:`Codec.unpack`."""
        if not (isinstance(packed.dtype, str) and _DTYPE.fullmatch(packed.dtype)):
            raise ValueError(f"no dtype {packed.dtype!r}")
        try:
            dtype = np.dtype(packed.dtype)
        except TypeError:
            raise ValueError(f"no dtype {packed.dtype!r}") from None
        return np.frombuffer(packed.data, dtype).reshape(packed.shape)


class PostChannel(abc.ABC):
    """Messages by key between processes, of which each has one of these.

    See :class:`hvdx.pipeline.channel.Channel`. How messages travel is a subclass' part: it gives
    :meth:`_take` what has come.

    Args:
        place: by stage, the rank that has it, or its replicas.
        rank: this one.
        codec: of the framework's tensors.
        seconds: deadline of a get; 0: wait for ever.

    Attributes:
        note: travels with each message and must be the receiver's, when it asks for it.
        bytes_sent: of tensors, since it was opened.
        seconds_waited: for messages that had not come when they were asked for.
    """

    def __init__(
        self,
        place: Sequence[int | Sequence[int]],
        rank: int,
        codec: Codec | None,
        seconds: float,
    ) -> None:
        self._rows, self._rank, self._seconds = rows_of_ranks(place), rank, seconds or math.inf
        self._codec: Codec = codec or NumpyCodec()
        self.note = ""
        self.bytes_sent, self.seconds_waited = 0, 0.0
        self._arrived: dict[tuple[int, Key], tuple[str, Tensors]] = {}  # by sender and key
        self._failure: Failure | None = None
        self._left: set[int] = set()  # said goodbye
        self._closed = False

    # --- what users call

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Surround what all ranks do together: a step, a call, a checkpoint."""
        yield

    def put(self, key: Key, tensors: Tensors) -> None:
        """See :meth:`Channel.put`."""
        self.send(holder(self._rows, key.stage, key.micro_batch), key, tensors)

    def get(self, key: Key) -> Tensors:
        """See :meth:`Channel.get`."""
        return self.receive(holder(self._rows, key.sender, key.micro_batch), key)

    def send(self, peer: int, key: Key, tensors: Tensors) -> None:
        """Send to any rank of the pipeline; ``key`` need be new between these two only."""
        self._check()
        packed = [None if each is None else self._pack(peer, each) for each in tensors]
        self.bytes_sent += sum(map(self._measure, filter(None, packed)))
        told = [each and [each.dtype, list(each.shape), each.layout] for each in packed]
        self._post(peer, [self._header(key, told), *(each.data for each in packed if each)])

    def receive(self, peer: int, key: Key) -> Tensors:
        """Wait for what ``peer`` sends under ``key``; raises as :meth:`get` does."""
        self._check()
        until = time.monotonic() + self._seconds
        while (peer, key) not in self._arrived and self._take_next(peer):
            pass
        if (peer, key) not in self._arrived:
            start = time.perf_counter()
            self._await(peer, key, until)
            self.seconds_waited += time.perf_counter() - start
        note, tensors = self._arrived.pop((peer, key))
        if note != self.note:
            raise MismatchError(
                f"rank {peer} is at {note or 'nothing'}, rank {self._rank} at "
                f"{self.note or 'nothing'}: all ranks must make the same calls on the same batch"
            )
        return tensors

    def _await(self, peer: int, key: Key, until: float) -> None:
        while (peer, key) not in self._arrived:
            self._check()
            self._check_peers(peer, key)
            if (peer, key) in self._arrived:
                break
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError(self._late(peer, key))
            self._service(left, peer)

    def fail(self, failure: Failure) -> None:
        """See :meth:`Channel.fail`."""
        if self._failure is None and not self._closed:
            self._failure = failure
            self._tell_all(self._header(Key(FAILURE, 0, 0, 0), failure._asdict()))

    @abc.abstractmethod
    def close(self) -> None:
        """See :meth:`Channel.close`."""

    # --- how messages travel

    @abc.abstractmethod
    def _post(self, peer: int, parts: list[Any]) -> None:
        """Send a header and its parts, and return at once."""

    @abc.abstractmethod
    def _tell_all(self, message: bytes) -> None:
        """Send a header without parts to all other ranks; never wait, never raise."""

    def _take_next(self, peer: int) -> bool:
        """Take one message of ``peer``, without waiting; tell whether there was any."""
        return False

    @abc.abstractmethod
    def _service(self, seconds: float, wanted: int | None = None) -> None:
        """Wait for any news, above all of ``wanted``, and take what there is."""

    @abc.abstractmethod
    def _check_peers(self, wanted: int, key: Key) -> None:
        """Raise OSError if a rank is gone, or if the one waited for has left."""

    def _pack(self, peer: int, tensor: Any) -> Packed:
        """Make bytes of a tensor on its way to ``peer``."""
        return self._codec.pack(tensor)

    def _measure(self, packed: Packed) -> int:
        """Count the bytes of a tensor that :meth:`_pack` has seen."""
        return len(packed.data)

    def _unpack(self, peer: int, packed: Packed) -> Any:
        """Make a tensor of bytes that came from ``peer``."""
        return self._codec.unpack(packed)

    # --- messages

    def _take(self, peer: int, parts: Sequence[Any]) -> None:
        """Keep a message: a header and buffers that nobody else writes to.

        Raises:
            OSError: it is none.
        """
        try:
            self._understand(peer, parts)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise OSError(f"rank {peer} sent what is no message: {error}") from None

    def _understand(self, peer: int, parts: Sequence[Any]) -> None:
        if len(parts[0]) > MAX_HEADER:
            raise ValueError(f"a header of {len(parts[0])} bytes")
        version, kind, step, stage, micro_batch, note, told = json.loads(bytes(parts[0]))
        if version != VERSION:
            raise ValueError(f"version {version!r}, not {VERSION}")
        if kind == FAILURE:
            self._failure = self._failure or _failure(told)
        elif kind == BYE:
            self._left.add(peer)
        else:
            tensors = self._tensors(peer, told, parts[1:])
            self._arrived[peer, Key(kind, step, stage, micro_batch)] = note, tensors

    def _tensors(self, peer: int, told: Any, parts: Sequence[Any]) -> Tensors:
        if len(parts) != sum(each is not None for each in told):
            raise ValueError(f"{len(parts)} parts for {told}")
        rest = iter(parts)
        return [
            None if each is None else self._unpack(peer, _described(each, next(rest)))
            for each in told
        ]

    def _header(self, key: Key, told: Any) -> bytes:
        return json.dumps([VERSION, *key, self.note, told]).encode()

    def _check(self) -> None:
        if self._closed:
            raise OSError("the pipeline has been closed")
        if self._failure is not None:
            raise self._failure.exception()

    def _late(self, peer: int, key: Key) -> str:
        if key.kind in ("F", "B"):
            return late(key, self._seconds)
        return f"rank {self._rank} has waited {self._seconds:g} s for rank {peer} (HVDX_TIMEOUT)"


def _failure(told: Any) -> Failure:
    """Return what :meth:`PostChannel.fail` has sent."""
    failure = Failure(**told)
    if type(failure.rank) is not int or not all(type(text) is str for text in failure[1:]):
        raise ValueError(f"no failure: {told}")
    return failure


def _described(told: Any, data: Any) -> Packed:
    dtype, shape, layout = told
    return Packed(dtype, shape, layout, data)
