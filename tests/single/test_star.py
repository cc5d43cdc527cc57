"""Messages between rank 0 and the others: who gets in, and what strangers can do."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time

import pytest

from hvdx import star
from hvdx.star import Listener, Wire, knock


def eventually(receive):
    """Return what comes within a second."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        got = list(receive())
        if got:
            return got
        time.sleep(0.005)
    raise AssertionError("nothing came")


@contextlib.contextmanager
def job(size, disturb=lambda place: None, seconds=10.0):
    """Connect ``size`` ranks; yield rank 0's wires and the others'."""
    listener = Listener(size, "127.0.0.1")
    held = disturb(listener.place)
    others = {}

    def come(rank):
        others[rank] = knock(listener.place, rank, 5)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    wires = listener.admit(seconds)
    for thread in threads:
        thread.join()
    yield wires, others
    for wire in (*wires.values(), *others.values(), *(held or ())):
        wire.close()


def test_messages_go_both_ways():
    with job(3) as (wires, others):
        assert sorted(wires) == [1, 2]
        for rank in (1, 2):
            others[rank].send({"report": [rank, "é"]})
            assert eventually(wires[rank].receive) == [{"report": [rank, "é"]}]
            wires[rank].send({"failure": "x" * 100_000})
            assert eventually(others[rank].receive) == [{"failure": "x" * 100_000}]


def test_the_end_of_a_peer():
    with job(2) as (wires, others):
        others[1].send("last")
        others[1].close()
        heard = []
        with pytest.raises(OSError):
            for _ in range(1000):
                heard += wires[1].receive()
                time.sleep(0.005)
        assert heard == ["last"]


def test_the_door_is_closed_afterwards():
    listener = Listener(1, "127.0.0.1")
    assert listener.admit(1) == {}
    with pytest.raises(OSError):
        knock(listener.place, 1, 1)


def test_who_does_not_come_is_named():
    listener = Listener(4, "127.0.0.1")
    threading.Thread(target=knock, args=(listener.place, 2, 5)).start()
    with pytest.raises(OSError, match="from ranks 1, 3"):
        listener.admit(0.5)


def strangers(place):
    """Connect in every wrong way, and stay; knocking waits for an answer, so aside."""
    address, port, secret = place
    held = [socket.create_connection((address, port)) for _ in range(20)]
    for number, guest in enumerate(held[:15]):
        guest.sendall([b"x", b"\0\0\0\1" + bytes(32), b"GET / HTTP/1.1\r\n" * 10][number % 3])
    liar, nobody = (address, port, b"guess" * 6 + b"ab"), (address, port, secret)

    def try_it(place, rank):
        with contextlib.suppress(OSError):  # turned away, or the door was closed before
            held.append(knock(place, rank, 5))

    for place, rank in ((liar, 1), (nobody, 7)):
        threading.Thread(target=try_it, args=(place, rank)).start()
    return held


def test_strangers_stay_outside():
    with job(3, strangers) as (wires, others):
        others[2].send("me")
        assert eventually(wires[2].receive) == ["me"]


def test_a_crowd_does_not_keep_ranks_out():
    def crowd(place):
        return [socket.create_connection(place[:2]) for _ in range(15)]

    with job(2, crowd) as (wires, _):
        assert sorted(wires) == [1]


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!I", star.MAX_BYTES + 1),
        struct.pack("!I", 4) + b"{{{{",
        struct.pack("!I", 2) + b"\xff\xfe",
        b"\xff" * 64,
    ],
)
def test_malformed_messages_end_the_connection(data):
    here, there = socket.socketpair()
    wire = wire_of(there)
    here.sendall(data)
    with pytest.raises(OSError):
        for _ in range(100):
            list(wire.receive())
            time.sleep(0.01)
    here.close()
    wire.close()


def wire_of(connection):
    wire = Wire.__new__(Wire)
    connection.setblocking(False)
    wire.connection, wire._unsent, wire._unread = connection, bytearray(), bytearray()
    return wire


def test_a_message_in_pieces():
    here, there = socket.socketpair()
    wire = wire_of(there)
    body = json.dumps(["a" * 10]).encode()
    whole = (struct.pack("!I", len(body)) + body) * 2
    heard = []
    for byte in whole:
        here.sendall(bytes([byte]))
        heard += wire.receive()
    assert heard == [["a" * 10]] * 2
    here.close()
    wire.close()


def test_a_peer_that_reads_nothing_costs_bounded_memory():
    here, there = socket.socketpair()
    wire = wire_of(there)
    with pytest.raises(OSError, match="reads nothing"):
        for _ in range(100):
            wire.send("x" * 200_000)
    here.close()
    wire.close()
