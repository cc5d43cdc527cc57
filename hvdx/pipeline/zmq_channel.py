"""Tensors between ranks over ZeroMQ: one PAIR socket for every two ranks of a pipeline.

ZeroMQ's own thread sends and receives while Python computes, so that a put never waits and what
has come lies ready. Everything else happens in the thread that calls: sockets are not thread-safe.

    header (JSON)   [version, kind, step, stage, micro-batch, note,
                     [[dtype, shape, layout] or null, ..]]
    then            one part of raw bytes per tensor; null stands for None and has no part

Nothing is unpickled, and no tensor is made that its header does not describe byte for byte. Only
those who know a secret of this job, which went round through Horovod, are let in. ZeroMQ's PLAIN
mechanism carries it in clear text, as Horovod's own traffic goes: for networks that one trusts.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from socket import gethostname
from typing import Any, NamedTuple, Protocol

import numpy as np

from hvdx.errors import HvdxError, MismatchError
from hvdx.pipeline.channel import Failure, Key, Tensors, holder, late, rows_of_ranks

VERSION = 1
MAX_HEADER = 1 << 20
MAX_PART = 1 << 34  # bytes of one tensor
_COPY = 1 << 16  # smaller parts are copied, to be aligned and let go of
_LINGER_MS = 2000  # for last messages on their way when the channel closes
_DOMAIN, _USER = "hvdx", b"rank"
_HEARTBEAT_MS, _SILENCE_MS = 1000, 10_000  # finds hosts that vanish; a dead process shows at once
_FAILURE, _BYE = "fail", "bye"  # kinds besides those of keys


class Packed(NamedTuple):
    """A tensor as the channel sees it: ``layout`` is the codec's own, plain JSON or None."""

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
        try:
            dtype = np.dtype(packed.dtype)
        except TypeError:
            raise ValueError(f"no dtype {packed.dtype!r}") from None
        return np.frombuffer(packed.data, dtype).reshape(packed.shape)


class ZmqChannel:
    """See :class:`hvdx.pipeline.channel.Channel`; for one process per rank.

    Args:
        place: by stage, the rank that has it, or its replicas.
        rank: this one.
        exchange: gathers one picklable object per rank, in rank order; all ranks call it twice.
        codec: of the framework's tensors.
        address: of this rank's own network interface, on which it listens.
        seconds: deadline of a get and of the meeting; 0: wait for ever.

    Attributes:
        note: travels with each message and must be the receiver's, when it asks for it.

    Raises:
        HvdxError: the ranks could not connect; raised on every rank.
    """

    def __init__(
        self,
        place: Sequence[int | Sequence[int]],
        rank: int,
        exchange: Callable[[Any], list[Any]],
        codec: Codec | None = None,
        *,
        address: str = "127.0.0.1",
        seconds: float = 30.0,
    ) -> None:
        import zmq

        self._zmq = zmq
        self._rows, self._rank, self._seconds = rows_of_ranks(place), rank, seconds or math.inf
        self._codec: Codec = codec or NumpyCodec()
        self._secret = secrets.token_hex(32)
        self.note = ""
        self._arrived: dict[tuple[int, Key], tuple[str, Tensors]] = {}  # by sender and key
        self._failure: Failure | None = None
        self._left: set[int] = set()  # said goodbye
        self._lost: set[int] = set()  # connection broken
        self._ready: set[int] = set()
        self._refused = False
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets: dict[int, Any] = {}
        self._handlers: dict[Any, Callable[[], None]] = {}  # socket: who reads it
        self._closed = False
        problem = None
        try:
            self._meet(
                sorted({each for row in self._rows for each in row} - {rank}), exchange, address
            )
        except (OSError, HvdxError, zmq.ZMQError) as error:
            problem = f"rank {rank}: {error}"
        except BaseException:
            self.close()
            raise
        problems = [each for each in exchange(problem) if each]
        if problems:
            self.close()
            raise HvdxError(f"the pipeline's ranks cannot connect: {'; '.join(problems)}")

    def put(self, key: Key, tensors: Tensors) -> None:
        """See :meth:`Channel.put`."""
        self.send(holder(self._rows, key.stage, key.micro_batch), key, tensors)

    def get(self, key: Key) -> Tensors:
        """See :meth:`Channel.get`."""
        return self.receive(holder(self._rows, key.sender, key.micro_batch), key)

    def send(self, peer: int, key: Key, tensors: Tensors) -> None:
        """Send to any rank of the pipeline; ``key`` need be new between these two only."""
        self._check()
        if peer in self._lost | self._left:
            raise ConnectionError(self._gone(peer))
        packed = [None if each is None else self._codec.pack(each) for each in tensors]
        told = [each and [each.dtype, list(each.shape), each.layout] for each in packed]
        parts = [self._header(key, told), *(each.data for each in packed if each)]
        try:
            self._sockets[peer].send_multipart(parts, self._zmq.NOBLOCK, copy=False)
        except self._zmq.Again:  # nobody is there; perhaps he has said why
            self._read(peer)
            self._check()
            raise ConnectionError(self._gone(peer)) from None

    def receive(self, peer: int, key: Key) -> Tensors:
        """Wait for what ``peer`` sends under ``key``; raises as :meth:`get` does."""
        self._check()
        until = time.monotonic() + self._seconds
        self._read(peer)
        while (peer, key) not in self._arrived:
            self._check()
            self._check_peers(peer, key)
            if (peer, key) in self._arrived:
                break
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError(self._late(peer, key))
            self._service(left)
        note, tensors = self._arrived.pop((peer, key))
        if note != self.note:
            raise MismatchError(
                f"rank {peer} is at {note or 'nothing'}, rank {self._rank} at "
                f"{self.note or 'nothing'}: all ranks must make the same calls on the same batch"
            )
        return tensors

    def _late(self, peer: int, key: Key) -> str:
        if key.kind in ("F", "B"):
            return late(key, self._seconds)
        return f"rank {self._rank} has waited {self._seconds:g} s for rank {peer} (HVDX_TIMEOUT)"

    def fail(self, failure: Failure) -> None:
        """See :meth:`Channel.fail`."""
        if self._failure is None and not self._closed:
            self._failure = failure
            self._tell_all(self._header(Key(_FAILURE, 0, 0, 0), failure._asdict()))

    def close(self) -> None:
        """Say goodbye and close all sockets; what is on its way still gets two seconds."""
        if self._closed:
            return
        self._closed = True
        if self._failure is None:
            self._tell_all(self._header(Key(_BYE, 0, 0, 0), None))
        else:  # who has not heard of it shall not take this end for the cause
            self._tell_all(self._header(Key(_FAILURE, 0, 0, 0), self._failure._asdict()))
        for socket in self._sockets.values():
            socket.disable_monitor()
        self._context.destroy(linger=_LINGER_MS)

    # --- meeting

    def _meet(self, peers: list[int], exchange: Callable[[Any], list[Any]], address: str) -> None:
        """Listen for higher ranks, connect to lower ones, and wait until all have come."""
        doors: dict[int, str] = {}
        problem: Exception | None = None
        try:
            self._serve_secret()
            doors = {peer: self._listen(peer, address) for peer in peers if peer > self._rank}
        except self._zmq.ZMQError as error:
            problem = OSError(f"cannot listen on {address}: {error}")
        everyone = exchange((self._secret, doors))  # rank 0's secret is the job's
        if problem is not None:
            raise problem
        self._secret = everyone[0][0]
        for peer in peers:
            if peer < self._rank and self._rank in everyone[peer][1]:
                self._connect(peer, everyone[peer][1][self._rank])
        until = time.monotonic() + min(self._seconds, 30.0)
        while missing := sorted(set(peers) - self._ready):
            if self._refused:
                raise HvdxError("it is refused by another: the secrets of the ranks differ")
            left = until - time.monotonic()
            if left <= 0:
                raise HvdxError(f"no connection with ranks {missing} from {address} in 30 s")
            self._service(left)

    def _serve_secret(self) -> None:
        """Answer ZeroMQ's questions whether a newcomer may enter, in this thread."""
        door = self._context.socket(self._zmq.REP)
        door.bind("inproc://zeromq.zap.01")

        def answer() -> None:
            version, request, _domain, _address, _identity, _mechanism, *proof = (
                door.recv_multipart()
            )
            admitted = proof[:1] == [_USER] and hmac.compare_digest(
                proof[-1], self._secret.encode()
            )
            status = [b"200", b"OK"] if admitted else [b"400", b"wrong secret"]
            door.send_multipart([version, request, *status, b"", b""])

        self._watch(door, answer)

    def _listen(self, peer: int, address: str) -> str:
        socket = self._socket(peer)
        socket.plain_server = True
        socket.bind_to_random_port(f"tcp://{address}")
        return str(socket.last_endpoint.decode())

    def _connect(self, peer: int, endpoint: str) -> None:
        socket = self._socket(peer)
        socket.plain_username, socket.plain_password = _USER, self._secret.encode()
        socket.connect(endpoint)

    def _socket(self, peer: int) -> Any:
        zmq = self._zmq
        socket = self._sockets[peer] = self._context.socket(zmq.PAIR)
        socket.zap_domain = _DOMAIN.encode()
        socket.sndhwm = socket.rcvhwm = 0  # the schedule bounds what is on its way
        socket.maxmsgsize = MAX_PART
        # Before bind, since its listener keeps this figure for connections that break: with
        # ZeroMQ's own, no limit, a message sent just then would keep close() waiting for ever.
        socket.linger = _LINGER_MS
        # Never again, since what was lost on the way would stay lost. Not -1: that would also
        # drop what has come and is not yet read.
        socket.reconnect_ivl = 2**31 - 1
        socket.heartbeat_ivl, socket.heartbeat_timeout = _HEARTBEAT_MS, _SILENCE_MS
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        monitor = socket.get_monitor_socket(events | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        self._watch(socket, lambda: self._read(peer))
        self._watch(monitor, lambda: self._heed(peer, monitor))
        return socket

    def _heed(self, peer: int, monitor: Any) -> None:
        """Note what ZeroMQ tells about the connection with ``peer``."""
        from zmq.utils.monitor import recv_monitor_message

        event = recv_monitor_message(monitor)["event"]
        if event == self._zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._ready.add(peer)
        elif event == self._zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refused |= peer < self._rank  # else it is a stranger whom this rank refuses
        elif peer in self._ready:
            self._lost.add(peer)

    # --- reading

    def _watch(self, socket: Any, handler: Callable[[], None]) -> None:
        self._poller.register(socket, self._zmq.POLLIN)
        self._handlers[socket] = handler

    def _service(self, seconds: float) -> None:
        """Wait for any news, and take what there is."""
        wait = None if seconds == math.inf else math.ceil(seconds * 1000)
        for socket, _ in self._poller.poll(wait):
            self._handlers[socket]()

    def _read(self, peer: int) -> None:
        """Take all that has come from ``peer``."""
        while True:
            try:
                parts = self._sockets[peer].recv_multipart(self._zmq.NOBLOCK, copy=False)
            except self._zmq.Again:
                return
            try:
                self._take(peer, parts)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise OSError(f"rank {peer} sent what is no message: {error}") from None

    def _take(self, peer: int, parts: list[Any]) -> None:
        if len(parts[0]) > MAX_HEADER:
            raise ValueError(f"a header of {len(parts[0])} bytes")
        version, kind, step, stage, micro_batch, note, told = json.loads(parts[0].bytes)
        if version != VERSION:
            raise ValueError(f"version {version!r}, not {VERSION}")
        if kind == _FAILURE:
            self._failure = self._failure or Failure(**told)
        elif kind == _BYE:
            self._left.add(peer)
        else:
            tensors = self._tensors(told, parts[1:])
            self._arrived[peer, Key(kind, step, stage, micro_batch)] = note, tensors

    def _tensors(self, told: Any, parts: list[Any]) -> Tensors:
        if len(parts) != sum(each is not None for each in told):
            raise ValueError(f"{len(parts)} parts for {told}")
        rest = iter(parts)
        return [
            None if each is None else self._codec.unpack(_described(each, next(rest)))
            for each in told
        ]

    # --- failing

    def _check(self) -> None:
        if self._closed:
            raise OSError("the pipeline has been closed")
        if self._failure is not None:
            raise self._failure.exception()

    def _check_peers(self, wanted: int, key: Key) -> None:
        """Raise if a rank is gone, or if the one waited for has left."""
        for peer in self._lost - self._left:
            self._read(peer)  # its last words
            self._check()
            if peer not in self._left and (wanted, key) not in self._arrived:
                raise ConnectionError(self._gone(peer))
        if wanted in self._left and (wanted, key) not in self._arrived:
            raise ConnectionError(self._gone(wanted))

    def _gone(self, peer: int) -> str:
        why = "has closed its pipeline" if peer in self._left else "is gone: its connection broke"
        return f"rank {peer} {why}"

    def _tell_all(self, message: bytes) -> None:
        for socket in self._sockets.values():
            with contextlib.suppress(self._zmq.ZMQError):
                socket.send(message, self._zmq.NOBLOCK)

    def _header(self, key: Key, told: Any) -> bytes:
        return json.dumps([VERSION, *key, self.note, told]).encode()


def own_address(one_machine: bool) -> str:
    """Return the address on which this process listens: no wider than the job needs.

    Raises:
        HvdxError: it cannot be told.
    """
    from hvdx.launch import network

    if one_machine:
        return "127.0.0.1"
    interface = os.environ.get("HOROVOD_GLOO_IFACE", "").split(",")[0]
    if interface and interface != network.loopback():
        return network.address_of(interface)
    server = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR", "").partition("/")[0]
    own = network.route_to(server)[1] if server else network.resolve(gethostname())
    if own is None or own.startswith("127."):
        raise HvdxError(
            "cannot tell at which address other hosts reach this one: name its network interface "
            "with HOROVOD_GLOO_IFACE"
        )
    return own


def _described(told: Any, frame: Any) -> Packed:
    dtype, shape, layout = told
    return Packed(dtype, shape, layout, _writable(frame))


def _writable(frame: Any) -> Any:
    """Return the bytes of a ZeroMQ frame as a buffer that may be written to."""
    if len(frame) < _COPY:
        return bytearray(frame.buffer)
    start = np.frombuffer(frame.buffer, np.uint8).ctypes.data
    whole: Any = (ctypes.c_char * len(frame)).from_address(start)
    whole.frame = frame  # keeps the memory, which is this message's alone
    return whole
