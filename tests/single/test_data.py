"""Which samples each rank sees, without ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdx import data
from hvdx.data import Place, Progress, Steps

counts = st.integers(0, 300)
few = st.integers(1, 7)


def test_an_order_has_every_sample_once_and_is_the_same_for_ever():
    assert data.order(10, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert sorted(data.order(1000, 3, seed=5)) == list(range(1000))
    assert data.order(5, 9, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_orders_differ_by_epoch_and_by_seed():
    # With seed + epoch, as usual elsewhere, the second epoch of seed 0 is the first of seed 1.
    orders = [data.order(50, epoch, seed=seed) for epoch in range(3) for seed in (-1, 0, 1, 2**63)]
    assert len({tuple(order) for order in orders}) == len(orders)


@given(counts, few, st.sampled_from(data.UNEVEN))
def test_shares(samples, ranks, uneven):
    indices = data.order(samples, 0)
    shares = [data.share(indices, rank, ranks, uneven) for rank in range(ranks)]
    for rank, own in enumerate(shares):
        assert len(own) == data.share_size(samples, rank, ranks, uneven)
    taken = sorted(np.concatenate(shares))
    if uneven == "join":
        assert taken == list(range(samples))
    else:
        assert len({len(own) for own in shares}) == 1
        repeated = ranks if uneven == "pad" else 0
        assert samples - ranks < len(taken) < samples + max(repeated, 1)
    if uneven == "pad":
        assert set(taken) == set(range(samples))
    if uneven == "drop":
        assert len(set(taken)) == len(taken)


@given(counts, few, few, st.booleans())
@settings(max_examples=300)
def test_steps(samples, ranks, batch, drop_last):
    sizes = data.step_sizes(samples, ranks, batch, drop_last)
    left = data.order(samples, 0)
    plans = [Steps(left, sizes, Place(rank, ranks)) for rank in range(ranks)]
    taken = []
    for step, size in enumerate(sizes):
        parts = [plan[step] for plan in plans]
        real = [own for own, weight in parts if weight]
        taken += [index for own in real for index in own]
        lengths = {len(own) for own in real}
        assert max(lengths) - min(lengths) <= 1
        assert max(lengths) <= max(batch, 2)
        assert len(real) == ranks or samples < ranks
        # The mean of weighted means is the mean of all samples of the step.
        mean = sum(weight * own.mean() for own, weight in parts) / ranks
        assert mean == pytest.approx(left[plans[0].ends[step] : plans[0].ends[step + 1]].mean())
        assert sum(map(len, real)) == size
    if drop_last:
        assert sizes == [ranks * batch] * (samples // (ranks * batch))
        assert len(set(taken)) == len(taken)
    else:
        assert sorted(taken) == list(range(samples))
        assert len(sizes) <= -(-samples // (ranks * batch))
        assert all(plan.even == (samples % ranks == 0) for plan in plans)


@given(st.integers(1, 200), few, few, few, st.data())
def test_resuming_on_other_ranks_loses_nothing(samples, before, after, batch, draw):
    sizes = data.step_sizes(samples, before, batch)
    done = draw.draw(st.integers(0, len(sizes)))
    order = data.order(samples, 2)
    taken = []
    for ranks, start, stop in ((before, 0, done), (after, sum(sizes[:done]), None)):
        left = order[start:]
        steps = data.step_sizes(len(left), ranks, batch)
        for rank in range(ranks):
            plan = Steps(left, steps, Place(rank, ranks))
            for own, weight in list(plan)[:stop]:
                taken += own.tolist() if weight else []
    assert sorted(taken) == list(range(samples))


def test_a_step_too_far():
    steps = Steps(np.arange(4), [2, 2], Place(0, 2))
    assert len(list(steps)) == 2
    with pytest.raises(IndexError, match="step 2 of 2"):
        steps[2]


def test_progress_advances_by_itself_and_obeys():
    progress = Progress()
    assert progress.begin(10, 2, False).tolist() == list(range(10))
    progress.give(10)
    progress.begin(10, 2, False)
    assert progress.epoch == 1
    progress.give(4)  # a look, no epoch
    progress.begin(10, 2, False)
    assert progress.epoch == 1
    progress.set_epoch(7)
    progress.begin(10, 2, True)
    assert progress.epoch == 7


def test_a_pass_is_whole_for_all_ranks_alike():
    # Of 5 samples on 2 ranks one rank gets 3, the other 2: both have given out 4 for certain.
    progress = Progress()
    progress.begin(5, 2, True)
    progress.give(4)
    assert progress.whole
    progress.begin(1, 2, True)  # fewer than ranks: whole from the beginning
    assert progress.whole


def test_progress_is_saved_and_resumed():
    progress = Progress(seed=3)
    progress.set_epoch(2)
    left = progress.begin(10, 2, True)
    progress.give(8)  # fetched ahead
    progress.record(4)
    state = progress.state_dict()
    assert state == {"epoch": 2, "processed_num": 4, "seed": 3}
    other = Progress()
    other.load_state_dict(state, 10)
    other.set_epoch(2)  # as a script's loop says after loading
    assert other.begin(10, 3, True).tolist() == left[4:].tolist()
    assert other.state_dict() == state
    other.set_epoch(2)  # not loaded any more: from its beginning
    assert len(other.begin(10, 3, True)) == 10
    other.load_state_dict({"epoch": 2, "processed_num": 12}, 10)
    assert (other.epoch, other.start) == (3, 0)


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 3), (0, 0)])
def test_a_rank_that_is_none(rank, ranks):
    with pytest.raises(ValueError, match=f"rank {rank} of {ranks}"):
        Place.of(None, rank, ranks)
