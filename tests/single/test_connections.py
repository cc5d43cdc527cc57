"""hvdx.connections: what is cut, and what is not."""

from __future__ import annotations

import socket
import sys

import pytest

from hvdx.connections import cut_when

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def test_only_what_was_opened_meanwhile_is_cut_and_who_waits_there_is_woken():
    here, there = socket.socketpair()
    with here, there:
        with cut_when(lambda: True), socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(60)
            with pytest.raises(OSError) as woken:
                server.accept()
        assert not isinstance(woken.value, TimeoutError)
        here.send(b"still there")
        assert there.recv(100) == b"still there"


def test_nothing_is_cut_while_nothing_is_over():
    asked = []
    with cut_when(lambda: bool(asked.append(1))):
        here, there = socket.socketpair()
        with here, there:
            while len(asked) < 2:
                here.send(b"still there")
                assert there.recv(100) == b"still there"
