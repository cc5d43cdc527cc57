"""Where the ranks of a job find each other, and where nobody else gets in.

Horovod's own rendezvous listens on every interface for the whole job and answers everyone. This
one listens on one address (loopback if the job stays on one machine), admits the job's hosts
only, demands the job's token, bounds what it reads, never unpickles, and closes its port as soon
as every rank has reported "up".

It speaks just what Horovod's C++ client needs: GET, PUT and DELETE of ``/scope/key``. The client
pastes ``HOROVOD_GLOO_RENDEZVOUS_ADDR`` unparsed into its URL, and that carries the token:

    HOROVOD_GLOO_RENDEZVOUS_ADDR=10.0.0.1:29500/TOKEN    HOROVOD_GLOO_RENDEZVOUS_PORT=29500
    http://10.0.0.1:29500/TOKEN:29500/global/0           what it asks for, at 10.0.0.1:29500

One event loop serves all connections. A thread per connection would let a stranger who sends one
byte a second use them all up; here a crowd of unfinished requests costs the oldest its place, and
a rank, whose request comes in one piece, is answered within milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar

from hvdx.errors import LaunchError
from hvdx.launch.store import Refused, Store

HEAD_BYTES = 4096  # a rank's request line and headers take about 150
REQUEST_SECONDS = 5.0
MAX_UNFINISHED = 256  # connections that have not shown the token yet
OWN_SCOPE = "hvdx"  # hvdx's own keys; no Horovod scope has this name

T = TypeVar("T")


class _Request(NamedTuple):
    verb: str
    scope: str
    key: str
    length: int


class Rendezvous:
    """The key-value server of one job.

    Args:
        size: number of ranks.
        address: IPv4 address to listen on.
        port: port to listen on; 0 takes a free one.
        token: the job's secret; drawn at random if None.
        admitted: IPv4 addresses that may connect; None admits all (who show the token).
        stays: keep the port open until :meth:`close`, for ranks that initialise again.
        taken: what to advise when the port is taken.
        told: called with key and value when a rank has put one of hvdx's own; in the server's
            thread.

    Raises:
        LaunchError: the address or port cannot be had.
    """

    def __init__(
        self,
        size: int,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        admitted: Collection[str] | None = None,
        stays: bool = False,
        taken: str = "",
        told: Callable[[str, bytes], None] | None = None,
    ) -> None:
        self.size = size
        self.stays = stays
        self.token = token or secrets.token_urlsafe(24)
        self.closed = threading.Event()
        self._admitted = None if admitted is None else frozenset(admitted)
        self._store = Store(size)
        self._told = told
        self._over = False
        self._up: set[int] = set()
        self._unfinished: dict[asyncio.StreamWriter, None] = {}  # oldest first
        self._loop = asyncio.new_event_loop()
        try:
            self._socket = socket.create_server((address, port), backlog=1024)
        except OSError as error:
            self._loop.close()
            advice = f": {taken}" if taken and error.errno == errno.EADDRINUSE else ""
            raise LaunchError(
                f"the rendezvous cannot listen on {address}:{port} ({error.strerror}){advice}"
            ) from None
        self.address, self.port = self._socket.getsockname()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="hvdx-rendezvous", daemon=True)

    def start(self) -> Rendezvous:
        """Begin to answer, in a thread of its own."""
        self._thread.start()
        return self

    def environment(self) -> dict[str, str]:
        """Return the variables by which ranks find this rendezvous."""
        return rendezvous_environment(self.address, self.port, self.token, stays=self.stays)

    def get(self, key: str) -> bytes | None:
        """Return one of hvdx's own values, as the ranks put it."""
        return self._ask(lambda: self._store.get(OWN_SCOPE, key))

    def put(self, key: str, value: bytes) -> None:
        """Set one of hvdx's own values."""
        self._ask(lambda: self._store.put(OWN_SCOPE, key, value))

    def admit(self, addresses: Collection[str]) -> None:
        """Let ranks connect from further addresses."""
        if self._admitted is not None:
            self._admitted |= frozenset(addresses)

    def renew(self, size: int, values: Mapping[tuple[str, str], bytes]) -> None:
        """Begin another round, of ``size`` ranks: forget what those before have put.

        Args:
            size: number of ranks.
            values: by scope and key, what they shall find.
        """

        def renew() -> None:
            self.size, self._over = size, False
            self._store = Store(size)
            for (scope, key), value in values.items():
                self._store.put(scope, key, value)

        self._ask(renew)

    def end_round(self) -> None:
        """Refuse ranks that still connect: one of them is gone, and the others would wait."""
        self._over = True

    def close(self) -> None:
        """Close the port and end the thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(REQUEST_SECONDS)

    def _ask(self, call: Callable[[], T]) -> T:
        """Run ``call`` in the server's thread: the store has no lock."""

        async def ask() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(REQUEST_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._socket.close()
            self.closed.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._socket, limit=HEAD_BYTES)
        await self._done.wait()
        server.close()
        self.closed.set()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # answers on their way; each is bounded by REQUEST_SECONDS
            await asyncio.wait(others, timeout=REQUEST_SECONDS)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = writer.get_extra_info("peername")
            if self._admitted is not None and (not peer or peer[0] not in self._admitted):
                return
            self._unfinished[writer] = None
            if len(self._unfinished) > MAX_UNFINISHED:
                next(iter(self._unfinished)).transport.abort()
            await asyncio.wait_for(self._answer(reader, writer), REQUEST_SECONDS)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # too slow, cut off, or too long: no answer
        except OSError:
            pass  # the other side is gone
        finally:
            self._unfinished.pop(writer, None)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = self._authenticated(head)
        if request is None:  # same answer as for an absent key, whatever was asked
            status, value = 404, b""
        else:
            self._unfinished.pop(writer, None)
            try:
                if request.length > self._store.max_value:
                    raise Refused("too large")
                body = await reader.readexactly(request.length)
                status, value = self._perform(request, body)
            except Refused:
                status, value = 400, b""
        writer.write(b"HTTP/1.1 %d \r\nContent-Length: %d\r\n\r\n" % (status, len(value)) + value)
        await writer.drain()
        if not self.stays and len(self._up) == self.size:
            self._done.set()

    def _authenticated(self, head: bytes) -> _Request | None:
        """Return the request if it is whole and carries the token."""
        line, *headers = head[:-4].split(b"\r\n")
        try:
            verb, path, version = line.decode("ascii").split(" ")
            _, token, scope, key = path.split("/")
        except ValueError:
            return None
        expected = f"{self.token}:{self.port}"
        if not hmac.compare_digest(token.encode(), expected.encode()):
            return None
        lengths = [
            value
            for name, _, value in (h.partition(b":") for h in headers)
            if name.strip().lower() == b"content-length"
        ]
        length = lengths[0].strip() if len(lengths) == 1 else b"0"
        if version != "HTTP/1.1" or len(lengths) > 1 or not length.isdigit() or len(length) > 9:
            return None
        return _Request(verb, scope, key, int(length))

    def _perform(self, request: _Request, body: bytes) -> tuple[int, bytes]:
        verb, scope, key, _ = request
        if self._over and scope != OWN_SCOPE:
            return 409, b""
        if verb == "GET":
            value = self._store.get(scope, key)
            return (404, b"") if value is None else (200, value)
        if verb == "PUT":
            self._store.put(scope, key, body)
            if scope == OWN_SCOPE and key.startswith("up_") and key[3:].isdecimal():
                self._up |= {int(key[3:])} & set(range(self.size))
            if scope == OWN_SCOPE and self._told is not None:
                self._told(key, body)
            return 200, b""
        if verb == "DELETE":
            self._store.delete(scope)
            return 200, b""
        return 405, b""


def rendezvous_environment(address: str, port: int, token: str, *, stays: bool) -> dict[str, str]:
    """Return the variables by which a rank finds the rendezvous and knows whether it closes."""
    return {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{address}:{port}/{token}",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HVDX_RENDEZVOUS": "stays" if stays else "closes",
    }


def stays_open(environ: Mapping[str, str]) -> bool:
    """Return whether ``environ`` asks for dynamic process sets, which need an open rendezvous."""
    return environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0") not in ("", "0")
