"""A rank that dies is named by the others at once."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import zmq

from hvdx.errors import HvdxError
from hvdx.pipeline.channel import Key
from hvdx.pipeline.zmq_channel import ZmqChannel

OTHER = """
import ast, sys, time
import numpy as np
from hvdx.pipeline.channel import Key
from hvdx.pipeline.zmq_channel import ZmqChannel

def exchange(value):
    print(repr(value), flush=True)
    return ast.literal_eval(sys.stdin.readline())

channel = ZmqChannel(range(2), 1, exchange, seconds=20)
channel.put(Key("B", 0, 0, 0), [np.ones(1 << 20)])
print("sent", flush=True)
time.sleep(60)
"""


def test_a_killed_rank_is_named_at_once():
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:

        def exchange(value):
            both = [value, ast.literal_eval(other.stdout.readline())]
            other.stdin.write(f"{both!r}\n")
            other.stdin.flush()
            return both

        channel = ZmqChannel(range(2), 0, exchange, seconds=20)
        assert other.stdout.readline() == "sent\n"
        assert channel.get(Key("B", 0, 0, 0))[0].sum() == 1 << 20
        other.kill()
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="rank 1 is gone: its connection broke"):
            channel.get(Key("B", 0, 0, 1))
        with pytest.raises(ConnectionError, match="rank 1 is gone"):
            channel.put(Key("F", 0, 1, 1), [np.ones(3)])
        assert time.monotonic() - start < 2
        channel.close()
        with pytest.raises(OSError, match="has been closed"):
            channel.get(Key("B", 0, 0, 1))


def test_closing_just_when_a_connection_breaks_ends():
    # ZeroMQ kept a goodbye sent in that moment for ever, and close() waited for it: CI hung once.
    for _ in range(50):
        barrier, values = threading.Barrier(2), [None, None]

        def exchange(rank, value, barrier=barrier, values=values):
            values[rank] = value
            barrier.wait()
            both = list(values)
            barrier.wait()
            return both

        with ThreadPoolExecutor(2) as threads:
            channels = [
                threads.submit(ZmqChannel, range(2), rank, partial(exchange, rank), seconds=20)
                for rank in range(2)
            ]
            here, there = (each.result() for each in channels)

        def leave(channel=here):
            channel._poller.poll(10_000)  # the news of it
            channel.close()

        closing = threading.Thread(target=leave, daemon=True)
        closing.start()
        there._context.destroy(linger=0)  # as a process dies: without a word
        closing.join(10)
        assert not closing.is_alive()


def plain(endpoint: str) -> socket.socket:
    """Connect without ZeroMQ."""
    if endpoint.startswith("tcp://"):
        address, port = endpoint.removeprefix("tcp://").split(":")
        return socket.create_connection((address, int(port)))
    made = socket.socket(socket.AF_UNIX)
    made.connect("\0" + endpoint.removeprefix("ipc://@"))
    return made


def strangers(endpoint: str, context: zmq.Context) -> list:
    """Connect in wrong ways, and stay: in silence, with noise, without and with a wrong secret."""
    held: list = [plain(endpoint) for _ in range(20)]
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    oversized = b"\xff" + bytes(8) + b"\x7f\x03\x00PLAIN" + bytes(47) + b"\x06" + b"\xff" * 8
    for number, guest in enumerate(held[:15]):
        guest.sendall([b"GET / HTTP/1.1\r\n\r\n", greeting, oversized][number % 3])
    for kind, name, secret in ((zmq.PAIR, b"", b""), (zmq.PAIR, b"rank", b"guess")):
        guest = context.socket(kind)
        guest.linger = 0
        if name:
            guest.plain_username, guest.plain_password = name, secret
        guest.connect(endpoint)
        guest.send(b"[1, []]", zmq.NOBLOCK)
        held.append(guest)
    return held


@pytest.mark.parametrize("machines", [1, 2])
def test_strangers_stay_outside(machines):
    barrier, values, held, doors = threading.Barrier(2), [None, None], [], []
    context = zmq.Context()

    def exchange(rank, value):
        if machines == 2 and isinstance(value, tuple):  # secret and kernel
            value = value[0], rank
        values[rank] = value
        barrier.wait()
        if rank == 1 and isinstance(values[0], dict):
            doors.extend(values[0].values())
            for door in doors:
                held.extend(strangers(door, context))
        barrier.wait()
        both = list(values)
        barrier.wait()
        return both

    with ThreadPoolExecutor(2) as threads:
        made = [
            threads.submit(ZmqChannel, range(2), rank, partial(exchange, rank), seconds=20)
            for rank in range(2)
        ]
        here, there = (each.result() for each in made)
    here.put(Key("F", 0, 1, 0), [np.ones(3)])
    there.put(Key("B", 0, 0, 0), [np.zeros(2)])
    assert there.get(Key("F", 0, 1, 0))[0].tolist() == [1, 1, 1]
    assert here.get(Key("B", 0, 0, 0))[0].tolist() == [0, 0]
    assert [door[:3] for door in doors] == [{1: "ipc", 2: "tcp"}[machines]]
    # The door stays open: ZeroMQ would close the connections with it.
    held.extend(strangers(doors[0], context))
    here.put(Key("F", 1, 1, 0), [np.ones(1)])
    assert there.get(Key("F", 1, 1, 0))[0].tolist() == [1]
    for channel in (here, there):
        channel.close()
    for guest in held:
        guest.close()
    context.destroy(linger=0)


CLOSING = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
import numpy as np
from hvdx.pipeline.channel import Key
from hvdx.pipeline.zmq_channel import ZmqChannel

class Slow(ZmqChannel):
    def _socket(self, peer):
        socket = super()._socket(peer)
        socket.rcvhwm, socket.rcvbuf = 1, 4096  # takes next to nothing
        return socket

barrier, values = threading.Barrier(2), [None, None]

def exchange(rank, value):
    values[rank] = value
    barrier.wait()
    both = list(values)
    barrier.wait()
    return both

with ThreadPoolExecutor(2) as threads:
    kinds = enumerate([ZmqChannel, Slow])
    here, there = [threads.submit(kind, range(2), rank, partial(exchange, rank), seconds=20)
                   for rank, kind in kinds]
    here, there = here.result(), there.result()
for k in range(50):
    here.put(Key("F", 0, 1, k), [np.ones(1 << 17)])
closing = threading.Thread(target=here.close)
closing.start()
time.sleep(0.1)
for k in range(20):
    there.put(Key("B", 0, 0, k), [np.ones(500)])
time.sleep(0.1)
there._context.destroy(linger=0)  # as a process dies
closing.join(10)
assert not closing.is_alive()
"""


def test_closing_with_messages_on_their_way_to_one_who_dies():
    # ZeroMQ's heartbeats ended the process then: "Assertion failed: !_io_error".
    done = subprocess.run([sys.executable, "-c", CLOSING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_address_that_is_not_there():
    def other(value):  # of another machine
        return [value, ("", "") if isinstance(value, tuple) else None]

    with pytest.raises(HvdxError, match=r"rank 0: cannot listen on 203\.0\.113\.1"):
        ZmqChannel(range(2), 0, other, address="203.0.113.1")
