"""SIGTERM is noted, asked about about once a second, and ends the process after saving."""

from __future__ import annotations

import itertools
import os
import signal
import threading

import pytest

import hvdx
from hvdx.errors import HvdxError
from hvdx.preemption import STATUS


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 0.0

    monkeypatch.setattr("hvdx.preemption.time.monotonic", lambda: Clock.now)
    return Clock


def test_it_saves_and_leaves(capsys):
    saved = []
    with hvdx.Preemption(lambda: saved.append(1)) as preemption:
        for _ in range(100):
            preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            for _ in range(100_000):
                preemption.check()
    assert (left.value.code, saved) == (STATUS, [1]) == (143, [1])
    assert "SIGTERM came to rank 0" in capsys.readouterr().err


def test_the_handler_of_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with hvdx.Preemption():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_ranks_ask_each_other_about_once_a_second(clock, monkeypatch):
    asked = []
    answer = hvdx.preemption._gathered
    monkeypatch.setattr(
        "hvdx.preemption._gathered", lambda n: (asked.append(clock.now), answer(n))[1]
    )
    with hvdx.Preemption() as preemption:
        for _ in range(10_000):  # of 10 ms
            clock.now += 0.01
            assert not preemption.asked()
    later = [b - a for a, b in itertools.pairwise(asked) if a > 3]
    assert len(later) > 90
    assert all(0.9 < each < 1.1 for each in later)
    assert len(asked) < 115


def test_what_rank_0_says_counts(monkeypatch):
    with hvdx.Preemption() as preemption:
        monkeypatch.setattr("hvdx.preemption._gathered", lambda n: [7 << 1, 1 << 1])
        assert not preemption.asked()
        monkeypatch.setattr("hvdx.preemption._gathered", lambda n: [1 << 1, 1 << 1 | 1])
        assert [preemption.asked() for _ in range(8)] == [False] * 6 + [True] * 2


def test_only_the_main_thread_can_watch():
    told = []

    def make():
        try:
            hvdx.Preemption()
        except HvdxError as error:
            told.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert told == ["hvd.Preemption() must be made in the main thread, as Python demands"]


def test_a_grace_that_is_no_number(monkeypatch):
    monkeypatch.setenv("HVDX_GRACE", "soon")
    with pytest.raises(HvdxError, match="HVDX_GRACE='soon' is no number of seconds"):
        hvdx.Preemption()
