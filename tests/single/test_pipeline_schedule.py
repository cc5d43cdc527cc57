"""Schedules: what they promise in time and memory, and what is no schedule."""

from __future__ import annotations

import itertools
import random

import pytest

from hvdx.errors import PlanError
from hvdx.pipeline.greedy import greedy, zbv
from hvdx.pipeline.schedule import (
    Schedule,
    forward_only,
    gpipe,
    interleaved,
    looped,
    one_f_one_b,
    parse,
    peak_live,
    peak_live_of_ranks,
    recomputed,
    validate,
    vee,
    zb1p,
)
from hvdx.pipeline.simulator import Times, simulate

SIZES = [(p, m) for p in range(1, 9) for m in {p, p + 1, 2 * p, 3 * p - 1, 31, 32}]


def admissible(p, m):
    return m % max(1, m // p) == 0


def step(schedule, **times):
    return simulate(schedule, Times.equal(schedule.stages, **times))


def bubble(p, work):
    return pytest.approx((p - 1) / (work + p - 1), abs=1e-9)


def test_unsplit_schedules_have_the_bubble_of_the_formula():
    for p, m in SIZES:
        for schedule in (gpipe(p, m), one_f_one_b(p, m), one_f_one_b(p, m, slack=True)):
            validate(schedule)
            assert step(schedule).bubble == bubble(p, m), schedule.name


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_interleaved_schedules_have_the_bubble_of_the_formula(chunks):
    for p, m in SIZES:
        if admissible(p, m):
            plain, split = interleaved(p, m, chunks), interleaved(p, m, chunks, split=True)
            validate(plain), validate(split)
            assert step(plain).bubble == bubble(p, m * chunks)
            assert step(split).bubble == bubble(p, 3 * m * chunks)


def test_zbv_has_the_bubble_of_the_formula():
    """But for few sizes a little above p, found by trying all 196."""
    missed = {(5, 6), (6, 7), (7, 8), (7, 9), (8, 9), (8, 10)}
    sizes = [(p, m) for p in range(2, 9) for m in {p, p + 1, p + 2, 2 * p, 3 * p + 1, 32}]
    for p, m in sizes:
        schedule = zbv(p, m)
        validate(schedule)
        if (p, m) in missed:
            assert 0 < step(schedule).step - (6 * m + p - 1) <= p / 2
        else:
            assert step(schedule).bubble == bubble(p, 6 * m)


def test_memory_is_as_promised():
    for p, m in SIZES:
        assert peak_live(gpipe(p, m)) == [m] * p
        assert peak_live(one_f_one_b(p, m)) == [p - r for r in range(p)]
        slack = peak_live(one_f_one_b(p, m, slack=True))
        assert slack == [min(m, 2 * (p - r) - 1) for r in range(p)]
        if admissible(p, m):
            assert max(peak_live(zb1p(p, m))) == p
            for v in (2, 3):
                peak = max(peak_live_of_ranks(interleaved(p, m, v)))
                assert peak == min(v * m, v * p + p - 1 + (v - 1) * (m // (m // p) - p))


@pytest.mark.parametrize("p", [2, 3, 5, 8])
def test_memory_of_zbv(p):
    assert max(peak_live_of_ranks(zbv(p, 2 * p))) <= 2 * (p + 1)


def test_unequal_stages():
    """gpipe takes sum f + sum b + (m-1)(max f + max b), 1f1b never more.

    sum t + (m-1) max t, with t = f + b, bounds 1f1b only where b is in proportion to f.
    """
    draw = random.Random(3)
    for _ in range(100):
        p = draw.randint(1, 6)
        m = draw.randint(p, 16)
        f, b = (tuple(draw.uniform(0.1, 3) for _ in range(p)) for _ in "fb")
        for back in (b, tuple(2 * x for x in f)):
            times = Times(f, back, (0.0,) * p, (0.0,) * (p - 1))
            exact = sum(f) + sum(back) + (m - 1) * (max(f) + max(back))
            assert simulate(gpipe(p, m), times).step == pytest.approx(exact, rel=1e-9)
            assert simulate(one_f_one_b(p, m), times).step <= exact * (1 + 1e-9)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 32), (8, 16)])
def test_what_hops_cost(p, m):
    """Tight 1f1b stalls in the steady state; slack hides that."""
    c = 0.125

    def extra(schedule):
        return step(schedule, hop=c).step - step(schedule).step

    assert extra(gpipe(p, m)) == pytest.approx(2 * (p - 1) * c)
    assert extra(one_f_one_b(p, m, slack=True)) == pytest.approx(2 * (p - 1) * c)
    assert extra(one_f_one_b(p, m)) == pytest.approx((2 * m * (p - 1) / p + 2 * (p - 2)) * c)
    assert extra(interleaved(p, m)) == pytest.approx((4 * p - 2) * c)
    assert extra(zb1p(p, m)) == pytest.approx(4 * (p - 1) * c)


def test_random_times_never_deadlock():
    """1,000 orders made for random stages, hops, layouts and memory."""
    draw = random.Random(1)
    for _ in range(1000):
        p, m = draw.randint(1, 8), draw.randint(1, 32)
        if draw.random() < 0.9:  # small ones are as telling, and quicker
            p, m = draw.randint(1, 5), draw.randint(1, 7)
        v = draw.randint(1, 3)
        place = vee(p) if draw.random() < 0.4 else looped(p, v)
        n = len(place)
        times = Times(*(tuple(draw.choice([0.0, 1.0, draw.uniform(0, 3)]) for _ in range(k))
                        for k in (n, n, n, n - 1)))  # fmt: skip
        cap = draw.randint(n // p, n + 2)
        schedule = greedy(place, m, times, cap=cap, split=draw.random() < 0.5)
        validate(schedule)
        assert max(peak_live_of_ranks(schedule)) <= cap
        simulate(schedule, times)


def test_fewer_micro_batches_than_ranks_do_not_deadlock():
    for p in range(2, 9):
        for m in range(1, p):
            for schedule in (gpipe(p, m), one_f_one_b(p, m), one_f_one_b(p, m, slack=True)):
                validate(schedule)
            for v, split in itertools.product((1, 2, 3), (False, True)):
                validate(interleaved(p, m, v, split=split))


def test_greedy_finds_1f1b():
    for p, m in [(1, 3), (2, 2), (4, 8), (4, 3), (7, 20)]:
        found = greedy(
            looped(p), m, Times.equal(p), cap=[p - r for r in range(p)], split=False
        )  # fmt: skip
        assert found.rows == one_f_one_b(p, m).rows


def test_greedy_never_starts_before_its_inputs_come():
    """The order made for a hop is at least as good with that hop as one made without."""
    blind, seeing = Times.equal(8), Times.equal(8, hop=0.3)
    orders = [greedy(vee(4), 8, times, cap=16, name="zbv-slack") for times in (blind, seeing)]
    assert simulate(orders[1], seeing).step < simulate(orders[0], seeing).step
    assert simulate(orders[1], seeing).step == pytest.approx(48 + 3 + 3 * 0.3)
    assert orders[1] == zbv(4, 8, seeing, slack=True)


@pytest.mark.parametrize("hop", [0.01, 0.1, 0.3])
def test_measured_times_make_zbv_no_slower(hop):
    # Greedy for hops of a hundredth was slower, by a unit, than for none.
    draw = random.Random(0)
    parts = [tuple(draw.uniform(0.97, 1.03) for _ in range(8)) for _ in range(3)]
    times = Times(*parts, hops=(hop,) * 7)
    made = zbv(4, 8, times)
    validate(made)
    assert max(peak_live_of_ranks(made)) <= 10
    step = simulate(made, times).step
    assert step <= simulate(zbv(4, 8), times).step
    assert step <= simulate(greedy(vee(4), 8, times, cap=10), times).step


def test_the_order_of_1f1b():
    assert str(one_f_one_b(2, 3)) == "0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2"


def test_the_order_of_zb1p():
    assert str(zb1p(2, 2)) == "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1"


def test_inference():
    schedule = forward_only(vee(2), 2)
    validate(schedule)
    assert not schedule.trains
    assert str(schedule) == "0F0,3F0,0F1,3F1\n1F0,2F0,1F1,2F1"
    assert gpipe(2, 2).trains


@pytest.mark.parametrize(
    "schedule", [gpipe(3, 4), zb1p(2, 4), interleaved(2, 4), zbv(3, 3), forward_only((0, 1), 2)]
)
def test_text_and_back(schedule):
    read = parse(f"\n{str(schedule).replace(',', ' , ')}\n")
    assert (read.rows, read.place, read.micro_batches) == (
        schedule.rows, schedule.place, schedule.micro_batches,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "an empty schedule: write one line per rank, such as 0F0,0B0"),
        ("0F0,0X0", "line 1: '0X0' is no action such as 0F3"),
        ("0F0,,0B0", "line 1: '' is no action"),
        ("0F0,0B0\n\n1F0,1B0", "line 2: '' is no action"),
        ("0F0,0B0\n1F0,0B1", "line 2: 0B1, but stage 0 has actions on line 1 too"),
        ("0F0,0B0\n2F0,2B0", "no line has actions of stage 1, but there is 2"),
        ("0F0,0B0,0B0", "rank 0: 0B0 comes twice"),
        ("0F0,0B0,0F1", r"rank 0: micro-batch 1 has F in stage 0; it needs F and B, or F, I and W"),
        ("0F0,0I0", r"rank 0: micro-batch 0 has F\+I in stage 0"),
        ("0F1,0B1", "rank 0: micro-batch 0 has nothing in stage 0"),
        ("0F0,1F1\n2F0,2F1", "rank 0: micro-batch 1 has nothing in stage 0; it needs F$"),
        ("0F1,0F0,0B0,0B1", "rank 0: 0F0 comes after 0F1; each stage must take micro-batches"),
        ("0F0,0F1,0B1,0B0", "rank 0: 0B0 comes after 0B1"),
        ("0F0,0F1,0I0,0I1,0W1,0W0", "rank 0: 0W0 comes after 0W1"),
        ("0F0,0F1,0I0,0B1,0W0", "rank 0: 0W0 comes after 0B1"),
        ("0B0,0F0", "deadlocks: rank 0 stops at 0B0, which needs 0F0 later in its own row$"),
        (
            "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1",
            "deadlocks: rank 0 stops at 0B0, which needs 1B0 on rank 1; "
            "rank 1 stops at 1F1, which needs 0F1 on rank 0$",
        ),
    ],
)
def test_what_is_no_schedule(text, problem):
    with pytest.raises(PlanError, match=problem):
        parse(text)


def test_actions_out_of_place():
    good = gpipe(2, 1)
    for rows, problem in [
        (good.rows[::-1], "rank 0: 1F0, but stage 1 is on rank 1"),
        (((*good.rows[0], ("F", 2, 0)), good.rows[1]), "rank 0: 2F0, but there are 2 stages"),
        (((*good.rows[0], ("F", 0, 1)), good.rows[1]), "rank 0: 0F1, but there are 1 micro-"),
        (((*good.rows[0], ("X", 0, 0)), good.rows[1]), "rank 0: 0X0 is no F, B, I or W"),
    ]:
        kind = type(good.rows[0][0])
        rows = tuple(tuple(kind(*action) for action in row) for row in rows)
        with pytest.raises(PlanError, match=problem):
            validate(Schedule(rows, good.place, 1))


def test_micro_batches_that_make_no_full_rounds():
    for p, m in [(4, 9), (3, 7), (5, 13), (8, 31), (2, 5)]:
        for split in (False, True):
            schedule = interleaved(p, m, split=split)
            validate(schedule)
            full = next(n for n in range(m, m + p + 1) if admissible(p, n))
            assert step(schedule).step <= step(interleaved(p, full, split=split)).step


def test_numbers_below_one():
    for make in (gpipe, one_f_one_b, interleaved, zb1p):
        with pytest.raises(PlanError, match="micro_batches=0: give at least 1"):
            make(2, 0)
    with pytest.raises(PlanError, match="cap=1: rank 0 has 2 stages and must keep as many"):
        greedy(vee(2), 4, Times.equal(4), cap=1)


def test_the_simulator_s_picture():
    seen = step(one_f_one_b(2, 2), inputs=2.0, weights=0.0)
    assert [[(str(a), s, e) for a, s, e in row] for row in seen.spans] == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 4, 6), ("0B1", 7, 9)],
        [("1F0", 1, 2), ("1B0", 2, 4), ("1F1", 4, 5), ("1B1", 5, 7)],
    ]
    assert (seen.step, seen.live) == (9, (2, 1))
    assert seen.bubble == pytest.approx(1 - 12 / 18)


def test_what_is_computed_again():
    """Not what backward needs at once: under 1f1b the last stage computes nothing twice."""
    every = frozenset(range(4))
    assert recomputed(gpipe(2, 4), "always") == [every, every]
    assert recomputed(gpipe(2, 4), "except_last") == [every - {3}, every]
    assert recomputed(one_f_one_b(2, 4), "always") == [every, frozenset()]
    assert recomputed(gpipe(2, 4), "never") == [frozenset()] * 2
