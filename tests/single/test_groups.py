"""Groups of ranks: how a job is cut, and what is refused on every rank alike."""

from __future__ import annotations

import pytest

import hvdx as hvd


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch):
    monkeypatch.setenv("HOROVOD_SIZE", "4")


@pytest.mark.parametrize(
    ("asked", "ranks"),
    [
        (1, [(0, 1, 2, 3)]),
        (2, [(0, 1), (2, 3)]),
        (3, [(0,), (1,), (2, 3)]),
        ([[3, 1], [0]], [(1, 3), (0,)]),
    ],
)
def test_cuts(asked, ranks):
    groups = hvd.Groups(asked)
    assert groups.every == ranks and len(groups) == len(ranks)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (0, "groups=0: give a number of groups"),
        ([], "no groups"),
        ([[0], []], "group 1 of .* has no ranks"),
        ([[0, 1], [1, 2]], "rank 1 is in groups 0 and 1 of .*none may have another's ranks"),
        ([[0, 0]], "rank 0 is in group 0 twice"),
        ([[0], [-1]], "group 1 has -1, which is no rank"),
        ([[0], ["1"]], "group 1 has '1', which is no rank"),
    ],
)
def test_groups_that_cannot_be(asked, message):
    with pytest.raises(ValueError, match=message):
        hvd.Groups(asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [(5, "5 groups of 4 ranks: give fewer"), ([[0, 4]], "rank 4, but the job has 4 ranks")],
)
def test_groups_that_the_job_has_no_ranks_for(asked, message):
    with pytest.raises(ValueError, match=message):
        list(hvd.Groups(asked))
