"""Small messages between rank 0 and every other rank, over TCP and apart from Horovod.

Apart, because they must travel when Horovod does not: while a collective hangs, while a rank has
joined, while a process is dying. Horovod's own operations would not do besides: PyTorch's core
numbers unnamed operations by a counter that such traffic would move differently on each rank.

Rank 0 listens only until all ranks have come, on loopback if the job stays on one machine. Each
must show that it knows a secret that went round through Horovod. Messages are JSON, bounded in
size; nothing is ever unpickled.

    rank 0  -> nonce (16 bytes)              a peer that lingers, errs or lies is dropped
    rank r  -> r (4 bytes), HMAC(secret, nonce + r)
    both    -> length (4 bytes), JSON        for the rest of the job
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 1 << 20  # of a message
_MAX_UNSENT = 4 << 20  # to a peer that reads nothing
_NONCE, _DIGEST = 16, 32


class Wire:
    """One connection that carries messages; never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._unsent = bytearray()
        self._unread = bytearray()

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self.connection.fileno()

    def send(self, message: Any) -> None:
        """Send, or keep for later what the network does not take now.

        Raises:
            OSError: the peer is gone, or reads nothing.
        """
        body = json.dumps(message).encode()
        self._unsent += struct.pack("!I", len(body)) + body
        self.flush()
        if len(self._unsent) > _MAX_UNSENT:
            raise OSError("the peer reads nothing")

    def flush(self) -> bool:
        """Send what is left; return whether all has left."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.connection.send(self._unsent)]
        return not self._unsent

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have come.

        Raises:
            OSError: the peer is gone, or sends what is no message.
        """
        over = False
        with contextlib.suppress(BlockingIOError):
            while len(self._unread) < 4 + MAX_BYTES:
                chunk = self.connection.recv(1 << 16)
                over = not chunk
                if over:
                    break
                self._unread += chunk
        while len(self._unread) >= 4:
            (length,) = struct.unpack_from("!I", self._unread)
            if length > MAX_BYTES:
                raise OSError(f"a message of {length} bytes")
            if len(self._unread) < 4 + length:
                break
            body = bytes(self._unread[4 : 4 + length])
            del self._unread[: 4 + length]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError):
                raise OSError("no JSON") from None
            yield message
        if over:
            raise ConnectionResetError("closed by the peer")

    def close(self) -> None:
        """Close."""
        self.connection.close()


class Listener:
    """Rank 0's door: open until all other ranks are in.

    Args:
        size: number of ranks.
        address: IPv4 address to listen on.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, size: int, address: str) -> None:
        self._size = size
        self._secret = secrets.token_bytes(32)
        self._door = socket.create_server((address, 0), backlog=min(size + 16, 1024))
        self._door.setblocking(False)
        self.place = (*self._door.getsockname()[:2], self._secret)

    def admit(self, seconds: float) -> dict[int, Wire]:
        """Return a wire per other rank and close the door.

        Raises:
            OSError: not all have come in time; the message names them.
        """
        wires: dict[int, Wire] = {}
        guests: dict[socket.socket, tuple[bytes, bytearray]] = {}
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._door, selectors.EVENT_READ)
            while len(wires) < self._size - 1 and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    guest: Any = key.fileobj
                    if guest is self._door:
                        self._greet(selector, guests)
                        continue
                    rank = self._identify(guest, *guests[guest])
                    if rank is None:
                        continue
                    selector.unregister(guest)
                    del guests[guest]
                    if rank in range(1, self._size) and rank not in wires:
                        wires[rank] = Wire(guest)
                    else:
                        guest.close()
        for guest in (self._door, *guests):
            guest.close()
        missing = set(range(1, self._size)) - set(wires)
        if missing:
            for wire in wires.values():
                wire.close()
            told = ", ".join(map(str, sorted(missing)))
            raise OSError(f"no connection to {self.place[0]}:{self.place[1]} from ranks {told}")
        return wires

    def close(self) -> None:
        """Close the door."""
        self._door.close()

    def _greet(
        self,
        selector: selectors.BaseSelector,
        guests: dict[socket.socket, tuple[bytes, bytearray]],
    ) -> None:
        try:
            guest, _ = self._door.accept()
        except OSError:
            return
        if len(guests) > self._size + 64:  # a crowd of strangers: the oldest goes
            oldest = next(iter(guests))
            selector.unregister(oldest)
            del guests[oldest]
            oldest.close()
        guest.setblocking(False)
        nonce = secrets.token_bytes(_NONCE)
        with contextlib.suppress(OSError):
            guest.send(nonce)
        guests[guest] = nonce, bytearray()
        selector.register(guest, selectors.EVENT_READ)

    def _identify(self, guest: socket.socket, nonce: bytes, said: bytearray) -> int | None:
        """Return the rank that ``guest`` proves to be, -1 for a stranger, None for not yet."""
        try:
            chunk = guest.recv(4 + _DIGEST - len(said))
        except BlockingIOError:
            return None
        except OSError:
            return -1
        said += chunk
        if len(said) < 4 + _DIGEST:
            return None if chunk else -1
        proof = hmac.digest(self._secret, nonce + said[:4], "sha256")
        return int.from_bytes(said[:4], "big") if hmac.compare_digest(proof, said[4:]) else -1


def knock(place: tuple[str, int, bytes], rank: int, seconds: float) -> Wire:
    """Connect this rank with rank 0.

    Raises:
        OSError: nobody answers there.
    """
    address, port, secret = place
    connection = socket.create_connection((address, port), timeout=seconds)
    try:
        nonce = b""
        while len(nonce) < _NONCE:
            chunk = connection.recv(_NONCE - len(nonce))
            if not chunk:
                raise ConnectionResetError("closed by rank 0")
            nonce += chunk
        own = rank.to_bytes(4, "big")
        connection.sendall(own + hmac.digest(secret, nonce + own, "sha256"))
    except OSError:
        connection.close()
        raise
    return Wire(connection)
