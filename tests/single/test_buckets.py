"""Laws of buckets, for any list of gradients."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdx import buckets
from hvdx.buckets import Entry, evenly, limit_bytes, plan, runs, width
from hvdx.errors import HvdxError

ENTRIES = st.lists(
    st.builds(
        Entry,
        st.just("name"),
        st.integers(0, 40),
        st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
        st.sampled_from(["cpu", "cuda:0"]),
    ),
    max_size=30,
)


def weight(entry):
    return entry.elements * width(entry.dtype)


@given(ENTRIES, st.integers(1, 400))
def test_every_gradient_is_in_one_bucket(entries, limit):
    members = [index for bucket in plan(entries, limit) for index in bucket]
    assert sorted(members) == list(range(len(entries)))


@given(ENTRIES, st.integers(1, 400))
def test_a_bucket_has_one_dtype_and_device(entries, limit):
    for bucket in plan(entries, limit):
        assert len({(entries[i].dtype, entries[i].device) for i in bucket}) == 1


@given(ENTRIES, st.integers(1, 400))
def test_only_a_single_larger_gradient_passes_the_limit(entries, limit):
    for bucket in plan(entries, limit):
        heavy = [i for i in bucket if weight(entries[i])]
        assert len(heavy) <= 1 or sum(weight(entries[i]) for i in bucket) <= limit


@given(ENTRIES, st.integers(1, 400))
def test_no_bucket_is_closed_before_it_is_full(entries, limit):
    """The next gradient of a kind starts a bucket only because it does not fit."""
    layout = plan(entries, limit)
    for kind in {(entry.dtype, entry.device) for entry in entries}:
        own = [b for b in layout if (entries[b[0]].dtype, entries[b[0]].device) == kind]
        assert [i for bucket in own for i in bucket] == sorted(i for bucket in own for i in bucket)
        for full, following in itertools.pairwise(own):
            held = sum(weight(entries[i]) for i in full)
            assert held + weight(entries[following[0]]) > limit


def test_buckets_come_in_the_order_in_which_they_fill():
    small = Entry("small", 1, "float32", "cpu")
    large = Entry("large", 4, "float64", "cpu")
    # float64 fills at 3 and at 4; float32, first to begin, never does.
    assert plan([small, large, small, large, large], limit=40) == [[1], [3], [0, 2], [4]]


@given(ENTRIES, st.integers(1, 400), st.data())
def test_groups_travel_together(entries, limit, data):
    """Whatever their size; all else is planned as if they were not there."""
    chosen = data.draw(st.lists(st.sampled_from(range(len(entries))), unique=True)
                       if entries else st.just([]))  # fmt: skip
    cut = data.draw(st.integers(0, len(chosen)))
    groups = [chosen[:cut], chosen[cut:]]
    layout = plan(entries, limit, groups)
    assert sorted(index for bucket in layout for index in bucket) == list(range(len(entries)))
    for group in groups:
        kinds = {(entries[i].dtype, entries[i].device) for i in group}
        assert len([bucket for bucket in layout if set(bucket) & set(group)]) == len(kinds)
    others = [index for index in range(len(entries)) if index not in chosen]
    alone = plan([entries[index] for index in others], limit)
    assert [bucket for bucket in layout if not set(bucket) & set(chosen)] == [
        [others[index] for index in bucket] for bucket in alone
    ]


@given(st.integers(0, 50), st.integers(1, 60))
def test_even_cuts(count, parts):
    cuts = evenly(count, parts)
    assert [index for cut in cuts for index in cut] == list(range(count))
    assert len(cuts) == max(1, min(count, parts))
    assert max(map(len, cuts)) - min(map(len, cuts)) <= 1


def test_no_gradients_need_no_bucket():
    assert plan([], 100) == []


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float64", 8), ("int64", 8), ("float32", 4), ("bfloat16", 2), ("float16", 2), ("uint8", 1),
     ("bool", 1), ("complex64", 8)],
)  # fmt: skip
def test_width(dtype, expected):
    assert width(dtype) == expected


@pytest.mark.parametrize(("told", "megabytes"), [("2", 2), ("0.5", 0.5), ("", 0), (None, 0)])
def test_the_limit_is_in_megabytes(monkeypatch, told, megabytes):
    monkeypatch.delenv("HVDX_BUCKET_MB", raising=False)
    if told is not None:
        monkeypatch.setenv("HVDX_BUCKET_MB", told)
    assert limit_bytes() == (megabytes or buckets.DEFAULT_MEGABYTES) * 2**20


@pytest.mark.parametrize("told", ["0", "-1", "many", "16MB", "1,5", "nan", "inf"])
def test_what_is_no_size(monkeypatch, told):
    monkeypatch.setenv("HVDX_BUCKET_MB", told)
    with pytest.raises(HvdxError, match=r"HVDX_BUCKET_MB='.*' is no size.*megabytes") as error:
        limit_bytes()
    assert repr(told) in str(error.value)


def test_runs_are_of_one_kind_and_keep_to_the_limit_but_for_single_things():
    words = ["ab", "cd", "EF", "G", "hi", "jklmnop", "q"]
    found = list(runs(words, len, 4, str.isupper))
    assert found == [["ab", "cd"], ["EF", "G"], ["hi"], ["jklmnop"], ["q"]]
    assert list(runs(["ab", "CD"], len, 4)) == [["ab", "CD"]] and not list(runs([], len, 4))
