"""Who owns what, and what travels, between ranks in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest

import hvdx
from hvdx.comm import in_step
from hvdx.compression import Spec
from hvdx.compression.powersgd import low_rank
from hvdx.ops import NumpyOps
from hvdx.servers import (
    Cut,
    Member,
    checked_servers,
    cut,
    for_owners,
    pieces,
    pull,
    pull_changes,
    push,
)

OPS = NumpyOps()
C = hvdx.Compression


@pytest.mark.parametrize("size", [0, 1, 3, 10, 1001])
@pytest.mark.parametrize("servers", [(0,), (1, 3), (0, 1, 2, 3)])
def test_parts_are_equal_and_have_no_gaps(size, servers):
    made = cut(size, 4, servers)
    assert sum(made.sizes) == size
    assert [a for a, _ in made.spans[1:]] == [b for _, b in made.spans[:-1]]
    assert {place for place, own in enumerate(made.sizes) if own} <= set(servers)
    assert max(made.sizes) - min(made.sizes[place] for place in servers) <= 1
    assert made.even == (len(servers) == 4 and size > 3)


def test_a_part_of_a_parameter():
    assert Cut((4, 0, 3)).within(2, 6) == Cut((2, 0, 2))
    members = [Member(Spec("a", (2, 1), "float32"), 0), Member(Spec("b", (5,), "float32"), 2)]
    assert pieces(members, Cut((4, 0, 3)), 0) == [(0, 0, 2), (1, 0, 2)]
    assert pieces(members, Cut((4, 0, 3)), 1) == []
    assert pieces(members, Cut((4, 0, 3)), 2) == [(1, 2, 5)]


@pytest.mark.parametrize("servers", [(0,), (1, 2), (0, 1, 2)])
def test_push_and_pull(servers):
    made = cut(11, 3, servers)
    flats = [np.random.default_rng(rank).normal(size=11) for rank in range(3)]
    parts = in_step([push(OPS, flat, made) for flat in flats])
    assert [len(part) for part in parts] == list(made.sizes)
    for whole in in_step([pull(OPS, part) for part in parts]):
        np.testing.assert_allclose(whole, sum(flats), rtol=1e-12)


@pytest.mark.parametrize("servers", [(1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(
    "method",
    [C.none, C.fp16, C.int8(), C.int8(rounding="stochastic"), C.onebit(), C.powersgd(2)],
    ids=str,
)
def test_owners_have_the_mean_and_nothing_is_lost(method, servers):
    """What a worker has not sent it owes, whoever the receiver is."""
    shape, ranks = (40, 48), 3
    spec = Spec("weight", shape, "float32", ranks)
    made = cut(math.prod(shape), ranks, servers)
    states = [method.init(OPS, spec) for _ in range(ranks)]
    applied, total = np.zeros(shape), np.zeros(shape)
    random = np.random.default_rng(0)
    for _ in range(4):
        grads = random.normal(size=(ranks, *shape)).astype("float32")
        total += grads.mean(0)
        works = [for_owners(OPS, method, g, s, made) for g, s in zip(grads, states, strict=True)]
        reduced = in_step(works)
        states = [each.state for each in reduced]
        for place, (a, b) in enumerate(made.spans):
            applied.reshape(-1)[a:b] += reduced[place].mean.reshape(-1)[a:b]
    tolerance = {"none": 1e-6, "fp16": 4e-3}.get(method.name, 0.15)
    if "feedback=True" in method.name or "powersgd" in method.name:
        applied += np.mean([state.residual for state in states], axis=0)
        tolerance = 1e-5
    np.testing.assert_allclose(applied, total, rtol=0, atol=tolerance)


@pytest.mark.parametrize("servers", [(1,), (0, 1)])
def test_changes_are_told_in_time(servers):
    """Copies stay equal; with what an owner has yet to tell they are what it has."""
    shapes = {"coded": (30, 20), "factors": (20, 40), "raw": (13,)}
    messengers = [C.int4().updates, low_rank(2), None]
    members, start = [], 0
    for (name, shape), messenger in zip(shapes.items(), messengers, strict=True):
        members.append(Member(Spec(name, shape, "float32", 2), start, messenger))
        start += math.prod(shape)
    made = cut(start, 2, servers)
    random = np.random.default_rng(0)
    exact = random.normal(size=start).astype("float32")
    copies = [exact.copy(), exact.copy()]
    states = [
        {
            index: members[index].messenger.first(OPS, members[index].spec)
            for index, a, b in pieces(members, made, place)
            if members[index].size(a, b) is not None
        }
        for place in range(2)
    ]
    assert all(states[place] for place in servers)
    sent = []
    for _ in range(4):
        exact += random.normal(size=start).astype("float32")
        works = []
        for place in range(2):
            parts = {}
            for index, a, b in pieces(members, made, place):
                own = slice(members[index].start + a, members[index].start + b)
                told = members[index].size(a, b) is None
                parts[index] = exact[own] if told else exact[own] - copies[place][own]
            works.append(pull_changes(OPS, members, made, parts, states[place]))
        for place, (found, kept) in enumerate(in_step(works)):
            states[place] = kept
            for index, a, b, values, change in found:
                own = slice(members[index].start + a, members[index].start + b)
                if change is None:
                    copies[place][own] = values
                else:
                    copies[place][own] += change
        np.testing.assert_array_equal(*copies)
        sent.append(np.abs(exact - copies[0]).max())
    np.testing.assert_array_equal(copies[0][-13:], exact[-13:])
    assert 0.01 < sent[-1] < 6  # rounding, which is not forgotten: it does not add up


def test_servers_are_checked():
    assert checked_servers("allreduce", None, [0, 1]) is None
    assert checked_servers("parameter_server", None, [2, 5]) == (0, 1)
    assert checked_servers("parameter_server", [5], [2, 5]) == (1,)
    assert checked_servers("parameter_server", range(1, -1, -1), [0, 1, 2]) == (0, 1)
    with pytest.raises(ValueError, match="rank 0 is not among the 2 that train, 2, 5"):
        checked_servers("parameter_server", [0], [2, 5])
