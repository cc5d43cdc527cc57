"""What ranks are told when they differ."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from hvdx import agreement, world
from hvdx.agreement import digest, first_difference, next_name

A, B, C = ("a", "float32 (2,)"), ("b", "float32 (3,)"), ("c", "int64 ()")


@pytest.mark.parametrize(
    ("everyone", "told"),
    [
        ([[A, B], [A, C]], "entry 1 is rank 0: 'b' float32 (3,), rank 1: 'c' int64 ()"),
        ([[A, B], [A]], "entry 1 is rank 0: 'b' float32 (3,), rank 1: nothing"),
        ([[], [A]], "entry 0 is rank 0: nothing, rank 1: 'a' float32 (2,)"),
        ([[A, B], [B, A]], "entry 0 is rank 0: 'a'"),  # the order counts
        ([[A], [A], [("a", "float64 (2,)")]], "rank 2: 'a' float64 (2,)"),
    ],
)
def test_the_first_difference_and_what_each_rank_has(everyone, told):
    text = first_difference(everyone)
    assert told in text
    assert f"(entries per rank: {', '.join(str(len(own)) for own in everyone)})" in text


@pytest.mark.parametrize("everyone", [[[], []], [[A, B], [A, B]], [[A, B], [list(A), list(B)]]])
def test_nothing_differs(everyone):
    assert first_difference(everyone) == "nothing differs"


def test_digests_differ_where_keys_values_or_order_do():
    entries = [{"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "1", "b": "3"}, {"a": "1"}, {}]
    entries.append({"a": '1"], ["b": "2'})
    for one, other in itertools.combinations(entries, 2):
        assert digest(one) != digest(other), (one, other)
    assert digest({"a": "1", "b": "2"}) == digest(dict([("a", "1"), ("b", "2")]))


def test_names_are_counted_by_subject_and_process_set(monkeypatch):
    monkeypatch.setattr(agreement, "_named", type(agreement._named)())
    some = SimpleNamespace(process_set_id=1)
    given = [next_name("x"), next_name("x", some), next_name("y"), next_name("x")]
    assert given == ["hvdx.x.1", "hvdx.x.1", "hvdx.y.1", "hvdx.x.2"]


def test_names_are_counted_anew_once_no_core_runs(monkeypatch):
    # Ranks that join a job later have counted nothing.
    monkeypatch.setattr(agreement, "_named", type(agreement._named)())
    monkeypatch.setattr(world, "_started", {"torch": object(), "tensorflow": object()})
    assert next_name("x") == "hvdx.x.1"
    del world._started["tensorflow"]
    world._changed()
    assert next_name("x") == "hvdx.x.2"  # torch runs on
    world._started.clear()
    world._changed()
    assert next_name("x") == "hvdx.x.1"
