"""What the ranks' reports mean: who is missing, whether it is time, what is told."""

from __future__ import annotations

import json

import pytest

from hvdx.verdict import LEFT_SECONDS, SLOW, Picture, Report, Wait, from_plain, to_plain

TIMEOUT = 30.0


def wait(name="loss", seconds=0.0, *, operation="allreduce", ranks=None):
    return Wait(operation, name, "float32 (3,)", seconds, ranks, "train.py:7 in main")


def idle(*, patience=0.0, progress="", at="train.py:9 in main: sleep()", last="allreduce 'first'"):
    return Report([], at, last, patience, progress)


def busy(*waits, patience=0.0, progress=""):
    return Report(list(waits), "train.py:7 in main", "allreduce 'first'", patience, progress)


def picture(*reports, now=100.0):
    """Return what rank 0 knows at ``now``, having heard these."""
    known = Picture(len(reports), TIMEOUT, 0.0)
    for rank, report in enumerate(reports):
        known.hear(rank, report, now)
    return known


def test_reports_survive_the_journey():
    report = busy(wait("a", 1.5), wait(None, 2.0, ranks=[0, 2]), patience=3.0, progress="5")
    assert from_plain(json.loads(json.dumps(to_plain(report)))) == report


@pytest.mark.parametrize("nonsense", [None, [], [1, 2, 3, 4, 5], [[[1]], "", "", 0, ""], "text"])
def test_what_is_no_report(nonsense):
    with pytest.raises(ValueError):
        from_plain(nonsense)


def test_a_rank_that_does_not_come():
    told = picture(busy(wait(seconds=31)), idle()).stalled(100)
    assert told.startswith(
        "rank 0 waited 31 s for allreduce 'loss' (float32 (3,)), but rank 1 has not called it.\n"
    )
    assert "rank 0: waiting for allreduce 'loss' (float32 (3,)) for 31 s, called at " in told
    assert (
        "rank 1: in no collective (its last: allreduce 'first'); it is at train.py:9 in main: "
        "sleep()" in told
    )
    assert "hvd.patience(seconds)" in told and "HVDX_TIMEOUT" in told


def test_different_names():
    told = picture(busy(wait("a", 31)), busy(wait("b", 30.5)), busy(wait("b", 31))).stalled(100)
    assert "rank 0 waited 31 s for allreduce 'a'" in told
    assert "but ranks 1-2 are waiting for another collective" in told
    assert "ranks 1-2: waiting for allreduce 'b' (float32 (3,)) for 31 s" in told


def test_not_before_the_time():
    assert picture(busy(wait(seconds=29.9)), idle()).stalled(100) is None
    assert picture(idle(), idle()).stalled(1000) is None


def test_what_all_have_called_may_take_long():
    reports = [busy(wait(seconds=40)), busy(wait(seconds=41), wait("next", 2))]
    assert picture(*reports).stalled(100) is None
    late = busy(wait(seconds=SLOW * TIMEOUT + 1))
    assert "all ranks have called it, but it does not finish" in picture(
        late, late, now=1000
    ).stalled(1000)


def test_the_same_name_in_another_process_set_is_another_collective():
    one = busy(wait(seconds=31, ranks=[0, 1]))
    assert picture(one, one, idle()).stalled(100) is None
    told = picture(one, idle(), busy(wait(seconds=31))).stalled(100)
    assert "in the process set [0, 1]" in told
    assert "but rank 1 has not called it" in told


def test_patience_does_not_count():
    known = picture(busy(wait(seconds=500)), idle(patience=1.0), now=1000)
    known.hear(0, busy(wait(seconds=520)), 1020)
    known.hear(1, idle(), 1020)
    assert known.patience() == 0
    assert known.stalled(1020) is None
    assert known.stalled(1031) is not None


def test_a_rank_that_has_joined_waits_for_the_others_work():
    joined = busy(wait(None, 300, operation="join"))
    known = picture(joined, idle(progress="1"), now=300)
    assert known.stalled(320) is None
    known.hear(0, joined, 335)
    known.hear(1, idle(progress="2"), 335)
    assert known.stalled(340) is None
    known.hear(0, joined, 366)
    known.hear(1, idle(progress="2"), 366)
    assert "for join" in known.stalled(366)


def test_places_are_asked_for_when_something_waits_long():
    assert not picture(busy(wait(seconds=7)), idle()).curious(100)
    assert picture(busy(wait(seconds=8)), idle()).curious(100)
    assert not picture(busy(wait(seconds=8)), idle(patience=60.0)).curious(100)
    known = picture(busy(wait(seconds=1)), idle())
    known.lose(1, "has left the job: its script has ended", 99)
    assert known.curious(100)


def test_a_place_that_is_told_now_but_was_not_before_is_no_progress():
    joined = busy(wait(None, 300, operation="join"))
    known = picture(joined, idle(at=""), now=300)
    known.hear(1, idle(at="a.py:1"), 309)
    known.hear(1, idle(at="a.py:1"), 331)
    known.hear(0, joined, 331)
    assert "for join" in known.stalled(331)
    known.hear(1, idle(at="a.py:2"), 332)
    assert known.stalled(332) is None


def test_a_rank_that_has_joined_takes_part():
    known = picture(busy(wait(None, 50, operation="join")), busy(wait(seconds=31)), now=100)
    assert known.stalled(100) is None
    told = picture(busy(wait(None, 50, operation="join")), busy(wait(seconds=31)), idle())
    assert "but rank 2 has not called it" in told.stalled(100)


def test_a_silent_rank():
    known = picture(busy(wait(seconds=31)), busy(wait(seconds=31)))
    known.hear(0, busy(wait(seconds=60)), 130)
    told = known.stalled(130)
    assert "but rank 1 has not been heard of" in told
    assert "rank 1: not heard of for 30 s" in told
    assert known.silent(130) == [1] and known.silent(101) == []


def test_a_rank_that_has_left():
    known = picture(busy(wait(seconds=3.5)), idle())
    known.lose(1, "has left the job: its script has ended", 99)
    assert known.stalled(100) is None  # Horovod itself will say so
    told = known.stalled(99 + LEFT_SECONDS + 1)
    assert "rank 1 has left the job." in told and "rank 1: has left the job: its script" in told


def test_a_rank_that_is_cut_off_may_be_alive():
    known = picture(busy(wait(seconds=29)), idle(), now=100)
    known.lose(1, "has left the job without a word", 1, certain=False)
    assert known.stalled(100) is None
    known.hear(0, busy(wait(seconds=31)), 102)
    assert "rank 1 has left the job." in known.stalled(102)


def test_half_of_the_time_is_told_once():
    known = picture(busy(wait("a", 16)), busy(wait("b", 16)))
    told = known.slow(100)
    assert told.startswith("rank 0 waits 16 s already for allreduce 'a'")
    assert "missing: rank 1. The job is stopped after 30 s (HVDX_TIMEOUT)" in told
    assert known.slow(100) is None
    assert picture(busy(wait("a", 14)), idle()).slow(100) is None


def test_many_ranks_take_few_lines():
    told = picture(*[busy(wait(seconds=31))] * 100, idle(), *[busy(wait(seconds=30))] * 99)
    lines = told.stalled(100).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("  ranks 0-99, 101-199: waiting for")
    apart = picture(busy(wait(seconds=31)), *[idle(at=f"a.py:{i}") for i in range(99)])
    lines = apart.stalled(100).splitlines()
    assert len(lines) == 19 and lines[-2] == "  and 84 more"
