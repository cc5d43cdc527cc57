"""Tensors between ranks over ZeroMQ: one PAIR socket for every two ranks of a pipeline.

ZeroMQ's own thread sends and receives while Python computes, so that a put never waits and what
has come lies ready. Everything else happens in the thread that calls: sockets are not thread-safe.
Ranks of one machine meet at a socket of the kernel, which is quicker than TCP and on no network.

Only those who know a secret of this job, which went round through Horovod, are let in. ZeroMQ's
PLAIN mechanism carries it in clear text, as Horovod's own traffic goes: for networks that one
trusts.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hmac
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np

from hvdx.errors import HvdxError
from hvdx.pipeline.channel import Key
from hvdx.pipeline.post import BYE, FAILURE, MAX_PART, Codec, PostChannel

_COPY = 1 << 16  # smaller parts that come are copied, to be aligned and let go of
# Smaller parts that go are copied: sharing costs a thread that lets go of them when they are sent.
_SHARE = 1 << 21
_LINGER_MS = 2000  # for last messages on their way when the channel closes
_DOMAIN, _USER = "hvdx", b"rank"
_ALONE_MS = 20  # for which one peer's messages are waited for, before all news is
_ASK_SECONDS, _TIMES = 2, 4  # finds hosts that vanish; a dead process shows at once


class ZmqChannel(PostChannel):
    """See :class:`hvdx.pipeline.channel.Channel`; for one process per rank.

    Args:
        place: by stage, the rank that has it, or its replicas.
        rank: this one.
        exchange: gathers one picklable object per rank, in rank order; all call it three times.
        codec: of the framework's tensors.
        address: of this rank's own network interface, on which it listens for other machines.
        seconds: deadline of a get and of the meeting; 0: wait for ever.

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

        super().__init__(place, rank, codec, seconds)
        self._zmq = zmq
        # As plain numbers: ZeroMQ's own flags take a microsecond to combine.
        self._at_once, self._more_follows = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
        self._secret = secrets.token_hex(32)
        self._lost: set[int] = set()  # connection broken
        self._ready: set[int] = set()
        self._refused = False
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets: dict[int, Any] = {}
        self._handlers: dict[Any, Callable[[], object]] = {}  # socket: who reads it
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

    def close(self) -> None:
        """Say goodbye and close all sockets; what is on its way still gets two seconds."""
        if self._closed:
            return
        self._closed = True
        if self._failure is None:
            self._tell_all(self._header(Key(BYE, 0, 0, 0), None))
        else:  # who has not heard of it shall not take this end for the cause
            self._tell_all(self._header(Key(FAILURE, 0, 0, 0), self._failure._asdict()))
        for socket in self._sockets.values():
            socket.disable_monitor()
        self._context.destroy(linger=_LINGER_MS)

    # --- meeting

    def _meet(self, peers: list[int], exchange: Callable[[Any], list[Any]], address: str) -> None:
        """Listen for higher ranks, connect to lower ones, and wait until all have come."""
        everyone = exchange((self._secret, own_kernel()))
        self._secret = everyone[0][0]  # rank 0's is the job's
        near = {peer for peer in peers if own_kernel() and everyone[peer][1] == own_kernel()}
        doors: dict[int, str] | None = None
        problem: Exception | None = None
        try:
            self._serve_secret()
            doors = {
                peer: self._listen(peer, None if peer in near else address)
                for peer in peers
                if peer > self._rank
            }
        except self._zmq.ZMQError as error:
            problem = OSError(f"cannot listen on {address}: {error}")
        doors_of = exchange(doors)
        if problem is not None:
            raise problem
        if None in doors_of:
            return  # who could not listen will say so
        for peer in peers:
            if peer < self._rank:
                self._connect(peer, doors_of[peer][self._rank])
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

    def _listen(self, peer: int, address: str | None) -> str:
        """Return where ``peer`` may connect: at ``address``, or on this machine only."""
        socket = self._socket(peer)
        socket.plain_server = True
        if address is None:
            socket.bind(f"ipc://@hvdx-{secrets.token_hex(16)}")  # a name, no file
        else:
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
        socket.copy_threshold = _SHARE
        # Before bind, since its listener keeps this figure for connections that break: with
        # ZeroMQ's own, no limit, a message sent just then would keep close() waiting for ever.
        socket.linger = _LINGER_MS
        socket.rcvtimeo = _ALONE_MS
        # Never again, since what was lost on the way would stay lost. Not -1: that would also
        # drop what has come and is not yet read.
        socket.reconnect_ivl = 2**31 - 1
        # The kernel asks whether hosts are there. ZeroMQ's own heartbeats can end the process: they
        # go on, into an assertion, where a peer vanishes while a closed socket still sends.
        socket.tcp_keepalive, socket.tcp_keepalive_cnt = 1, _TIMES
        socket.tcp_keepalive_idle = socket.tcp_keepalive_intvl = _ASK_SECONDS
        socket.tcp_maxrt = 1000 * _ASK_SECONDS * (_TIMES + 1)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        monitor = socket.get_monitor_socket(events | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        self._watch(socket, lambda: self._take_next(peer))
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

    # --- messages

    def _watch(self, socket: Any, handler: Callable[[], object]) -> None:
        self._poller.register(socket, self._zmq.POLLIN)
        self._handlers[socket] = handler

    def _service(self, seconds: float, wanted: int | None = None) -> None:
        """Wait for any news, and take what there is.

        First, for a moment, for ``wanted``'s alone: to ask one socket is quicker.
        """
        if wanted is not None and self._take_next(wanted, wait=True):
            return
        wait = None if seconds == math.inf else math.ceil(seconds * 1000)
        for socket, _ in self._poller.poll(wait):
            self._handlers[socket]()

    def _read(self, peer: int) -> None:
        """Take all that has come from ``peer``."""
        while self._take_next(peer):
            pass

    def _take_next(self, peer: int, wait: bool = False) -> bool:
        """Take one message of ``peer``; tell whether there was any."""
        receive = self._sockets[peer].recv
        try:
            parts = [receive(0 if wait else self._at_once, copy=False)]
        except self._zmq.Again:
            return False
        while parts[-1].more:
            parts.append(receive(copy=False))
        self._take(peer, [parts[0].buffer, *map(_writable, parts[1:])])
        return True

    def _post(self, peer: int, parts: list[Any]) -> None:
        if peer in self._lost | self._left:
            raise ConnectionError(self._gone(peer))
        send = self._sockets[peer].send
        try:
            for part in parts[:-1]:
                send(part, self._more_follows, copy=False)
            send(parts[-1], self._at_once, copy=False)
        except self._zmq.Again:  # nobody is there; perhaps he has said why
            self._read(peer)
            self._check()
            raise ConnectionError(self._gone(peer)) from None

    # --- failing

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


@functools.cache
def own_kernel() -> str:
    """Name the kernel and its network that this process has; empty where that cannot be told.

    Processes that have the same reach each other by sockets of the kernel. Containers and network
    namespaces of one machine do not.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


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


def _writable(frame: Any) -> Any:
    """Return the bytes of a ZeroMQ frame as a buffer that may be written to."""
    if len(frame) < _COPY:
        return bytearray(frame.buffer)
    start = np.frombuffer(frame.buffer, np.uint8).ctypes.data
    whole: Any = (ctypes.c_char * len(frame)).from_address(start)
    whole.frame = frame  # keeps the memory, which is this message's alone
    return whole
