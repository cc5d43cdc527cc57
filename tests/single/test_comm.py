"""Requests and those who answer them: one rank, many generators, many ranks in memory."""

from __future__ import annotations

import numpy as np
import pytest

from hvdx.comm import (
    Allgather,
    Allreduce,
    Alltoall,
    Rank,
    Ranks,
    Together,
    answer_in_memory,
    drive,
    in_step,
    operations,
    through,
    together,
)
from hvdx.ops import NumpyOps
from hvdx.reduce_op import ReduceOp


def countdown(rounds):
    """Ask ``rounds`` times; return the answers."""
    got = []
    for number in range(rounds):
        got.append((yield Allreduce(np.array([float(number)]), f"round {number}")))
    return got


def arrays(*rows):
    return [np.array(row, np.float32) for row in rows]


def lists(answers):
    return [np.asarray(answer).tolist() for answer in answers]


def test_drive_answers_each_request_in_order():
    asked = []

    def answer(request):
        asked.append(request.phase)
        return len(asked) * 10

    assert drive(countdown(3), answer) == [10, 20, 30]
    assert asked == ["round 0", "round 1", "round 2"]


def test_drive_of_work_that_asks_for_nothing():
    assert drive(countdown(0), pytest.fail) == []


def test_drive_lets_errors_of_the_answer_reach_the_work():
    def work():
        yield Ranks()

    with pytest.raises(ZeroDivisionError):
        drive(work(), lambda request: 1 // 0)


def test_together_merges_rounds_and_lets_the_short_ones_go():
    rounds = []

    def answer(request):
        if isinstance(request, Ranks):
            return 2
        rounds.append((request.phase, len(request.tensor)))
        return request.tensor

    works = [countdown(2), countdown(0), countdown(3), countdown(1)]
    results = drive(together(works, NumpyOps()), answer)
    assert results == [[0, 1], [], [0, 1, 2], [0]]
    assert rounds == [("round 0", 3), ("round 1", 2), ("round 2", 1)]


@pytest.mark.parametrize("works", [[], [countdown(0), countdown(0)]])
def test_together_asks_nothing_if_nobody_asks(works):
    count = len(works)
    assert drive(together(works, NumpyOps()), pytest.fail) == [[]] * count


def test_together_in_step_on_several_ranks():
    works = [together([countdown(1), countdown(2)], NumpyOps()) for _ in range(3)]
    assert in_step(works) == [[[0.0], [0.0, 1.0]]] * 3


def ask_all(rank, shape):
    """Ask once in every way; what comes back tells who sent it."""
    tensor = np.full(shape, rank, np.float32)
    got = [(yield Allreduce(tensor)), (yield Allgather(tensor))]
    got.append((yield Alltoall(np.repeat(tensor, 3, axis=0))))
    return [*got, (yield Rank()), (yield Ranks())]


@pytest.mark.parametrize("shapes", [[(2,)], [(2,), (1, 3), (4, 2)]], ids=["one", "three"])
def test_together_gives_each_what_it_would_get_alone(shapes):
    alone = [in_step([ask_all(rank, shape) for rank in range(3)]) for shape in shapes]
    works = [together([ask_all(rank, shape) for shape in shapes], NumpyOps()) for rank in range(3)]
    for rank, results in enumerate(in_step(works)):
        for place, result in enumerate(results):
            for got, expected in zip(result, alone[place][rank], strict=True):
                np.testing.assert_array_equal(got, expected)


def test_together_keeps_dtypes_and_operators_apart():
    def ask(dtype, op):
        return (yield Allreduce(np.ones(2, dtype), op=op))

    works = [("float32", ReduceOp.Sum), ("float16", ReduceOp.Sum), ("float32", ReduceOp.Average)]
    ranks = [together([ask(*each) for each in works], NumpyOps()) for _ in range(2)]
    for results in in_step(ranks):
        assert [(r.dtype.name, r.tolist()) for r in results] == [
            ("float32", [2, 2]), ("float16", [2, 2]), ("float32", [1, 1])
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ReduceOp.Average, [2, 5]),
        (ReduceOp.Sum, [6, 15]),
        (ReduceOp.Min, [1, 0]),
        (ReduceOp.Max, [3, 11]),
        (ReduceOp.Product, [6, 0]),
    ],
)
def test_allreduce(op, expected):
    answers = answer_in_memory([Allreduce(t, op=op) for t in arrays([1, 4], [2, 0], [3, 11])])
    assert lists(answers) == [expected] * 3
    assert {answer.dtype for answer in answers} == {np.dtype("float32")}


def test_an_average_of_halves_is_half():
    (answer, _) = answer_in_memory([Allreduce(np.ones(2, np.float16))] * 2)
    assert (answer.dtype, answer.tolist()) == (np.float16, [1, 1])


def test_allgather_takes_different_lengths():
    answers = answer_in_memory([Allgather(t) for t in arrays([[1, 2]], [[3, 4], [5, 6]])])
    assert lists(answers) == [[[1, 2], [3, 4], [5, 6]]] * 2


def test_alltoall_sends_chunk_r_to_rank_r():
    answers = answer_in_memory([Alltoall(t) for t in arrays([1, 2, 3, 4], [5, 6, 7, 8])])
    assert lists(answers) == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_ranks_and_groups():
    ones, twos = arrays([1], [2])
    requests = [Together((Ranks(), Allreduce(tensor))) for tensor in (ones, twos)]
    assert [(n, t.tolist()) for n, t in answer_in_memory(requests)] == [(2, [1.5])] * 2


def ask(request):
    return (yield request)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Allreduce(np.ones(2)), Allgather(np.ones(2))),
        (Allreduce(np.ones(2), "p"), Allreduce(np.ones(2), "q")),
        (Allreduce(np.ones(2)), Allreduce(np.ones(3))),
        (Allreduce(np.ones(2)), Allreduce(np.ones(2, np.float32))),
        (Allreduce(np.ones(2)), Allreduce(np.ones(2), op=ReduceOp.Sum)),
        (Allgather(np.ones((1, 2))), Allgather(np.ones((1, 3)))),
        (Together((Ranks(),)), Together((Allreduce(np.ones(2)),))),
    ],
    ids=["kind", "phase", "shape", "dtype", "operator", "columns", "in a group"],
)
def test_in_step_notices_ranks_that_ask_for_different_things(first, second):
    assert len(in_step([ask(first), ask(first)])) == 2
    with pytest.raises(AssertionError, match="ranks"):
        in_step([ask(first), ask(second)])


def test_in_step_notices_ranks_that_end_early():
    with pytest.raises(AssertionError, match="1 ranks ended while others ask for Allreduce"):
        in_step([countdown(1), countdown(2)])


def test_in_step_notices_groups_of_different_length():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        in_step([ask(Together((Ranks(),))), ask(Together((Ranks(), Ranks())))])


def test_through_shows_requests_and_makes_tensors_of_answers():
    seen = []

    def ask():
        ranks = yield Ranks()
        one, two = yield Together((Allreduce(np.ones(2)), Allgather(np.zeros(1))))
        return ranks, one, two

    results = in_step([through(ask(), seen.append, np.ndarray.tolist) for _ in range(2)])
    assert results == [(2, [1.0, 1.0], [0.0, 0.0])] * 2
    kinds = [type(each) for request in seen for each in operations(request)]
    assert kinds == [Allreduce, Allgather] * 2  # to ask how many there are is no operation
    unchanged = through(countdown(2))
    assert drive(unchanged, lambda request: request.tensor + 1) == [1.0, 2.0]
