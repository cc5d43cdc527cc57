"""A rank that dies is named by the others at once."""

from __future__ import annotations

import ast
import subprocess
import sys
import time

import numpy as np
import pytest

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


def test_an_address_that_is_not_there():
    from hvdx.errors import HvdxError

    with pytest.raises(HvdxError, match=r"rank 0: cannot listen on 203\.0\.113\.1"):
        ZmqChannel(range(2), 0, lambda value: [value, value], address="203.0.113.1")
