"""The connections that Horovod opens, so that a rank can cut them.

Horovod keeps Gloo's connections after ``shutdown()``, until the next ``init()``. A rank that has
seen another die and left is then, for a third one in the same collective, a rank that does not
answer: it waits for Gloo's timeout, 30 s, where a connection that is cut fails at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator

_FOLDER = "/proc/self/fd"  # elsewhere than on Linux nothing is known, and nothing cut
LOOK_SECONDS = 0.2

Connection = tuple[int, str]
"""A file descriptor, and the name of the socket behind it, which no other has."""


def sockets() -> set[Connection]:
    """Return the sockets that this process has open."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.listdir(_FOLDER):
            with contextlib.suppress(OSError):  # closed meanwhile
                name = os.readlink(f"{_FOLDER}/{entry}")
                if name.startswith("socket:"):
                    found.add((int(entry), name))
    return found


@contextlib.contextmanager
def noted(into: set[Connection]) -> Iterator[None]:
    """Add to ``into`` the sockets that are opened meanwhile, and left open."""
    before = sockets()
    try:
        yield
    finally:
        into |= sockets() - before


@contextlib.contextmanager
def cut_when(over: Callable[[], bool]) -> Iterator[None]:
    """Cut what is opened meanwhile, from when ``over()`` says so; a thread asks it.

    A rank that waits for another to connect would, if that has died, wait for Gloo's timeout.
    """
    before, done = sockets(), threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            if over():
                cut(sockets() - before)

    thread = threading.Thread(target=look, name="hvdx-connecting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def cut(connections: Iterable[Connection]) -> None:
    """End these connections for both sides; the descriptors stay with who has opened them."""
    still = sockets()
    for descriptor, name in connections:
        if (descriptor, name) in still:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
                end.shutdown(socket.SHUT_RDWR)
