"""Meshes: micro-batches dealt round replicas, planned, scheduled and predicted."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from hvdx.errors import PlanError
from hvdx.pipeline.dispatch import dry_run
from hvdx.pipeline.ir import Graph, Unit
from hvdx.pipeline.plan import SCHEDULES, Link, Means, Plan, check_mesh, make, schedule_of
from hvdx.pipeline.schedule import Action, needs, parse, peak_live_of_ranks, validate
from hvdx.pipeline.simulator import Times, simulate

TWO_BY_TWO = ((0, 2), (1, 3))


def random_mesh(draw):
    sizes = [draw.randint(1, 3) for _ in range(draw.randint(1, 4))]
    ranks = iter(draw.sample(range(sum(sizes)), sum(sizes)))
    return tuple(tuple(itertools.islice(ranks, size)) for size in sizes)


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_schedule_can_run_on_any_mesh(name):
    draw = random.Random(name)
    for _ in range(40):
        mesh = random_mesh(draw)
        order = schedule_of(name, len(mesh), draw.randint(1, 9), mesh=mesh)
        validate(order)
        assert order.ranks == sum(map(len, mesh))
        for rank, row in enumerate(order.rows):
            assert all(order.owner(action.stage, action.micro_batch) == rank for action in row)


def ready(row, left, order, done):
    """The actions of a turn that replicas are all at, the next of ``row`` among them, or none."""
    if not row:
        return []
    (kind, stage, micro_batch), replicas = row[0], len(order.mesh[order.place[row[0].stage]])
    first = micro_batch // replicas * replicas
    members = range(first, min(first + replicas, order.micro_batches))
    turn = [Action(kind, stage, k) for k in members]
    at = {actions[0] for actions in left if actions}
    can = all(action in at and done.issuperset(needs(action, order.stages)) for action in turn)
    return turn if can else []


@pytest.mark.parametrize("name", SCHEDULES)
def test_replicas_of_a_turn_may_wait_for_each_other_in_each_action(name):
    """As those do that normalize together: no schedule blocks on any mesh."""
    draw = random.Random(name)
    for _ in range(40):
        mesh, count = random_mesh(draw), draw.randint(1, 9)
        order = schedule_of(name, len(mesh), count, mesh=mesh)
        left, done = [list(row) for row in order.rows], set()
        while turn := next(filter(None, (ready(row, left, order, done) for row in left)), None):
            done.update(action.gives for action in turn)
            for action in turn:
                left[order.owner(*action[1:])].pop(0)
        assert not any(left), order


@pytest.mark.parametrize("name", SCHEDULES)
def test_chains_of_equal_rows_run_the_schedule_by_themselves(name):
    order = schedule_of(name, 2, 8, mesh=TWO_BY_TWO)
    chain = schedule_of(name, 2, 4)
    for number, row in enumerate(TWO_BY_TWO):
        for replica, rank in enumerate(row):
            dealt = [
                a._replace(micro_batch=2 * a.micro_batch + replica) for a in chain.rows[number]
            ]
            assert list(order.rows[rank]) == dealt


def test_rows_that_share_a_rank_after_them():
    order = schedule_of("1f1b", 2, 5, mesh=((0, 1), (2,)))
    assert str(order) == (
        "0F0,0F2,0B0,0F4,0B2,0B4\n0F1,0F3,0B1,0B3\n1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3,1F4,1B4"
    )
    assert peak_live_of_ranks(order) == [2, 2, 1]


def test_replicas_share_the_time():
    """A slow stage on two ranks and a quick one behind them; sums count at the end."""
    times = Times((2.0, 1.0), (2.0, 1.0), (2.0, 1.0), (0.0,))
    alone = simulate(schedule_of("1f1b", 2, 32), times)
    shared = simulate(schedule_of("1f1b", 2, 32, mesh=((0, 1), (2,))), times)
    assert alone.step >= 32 * 6
    assert shared.step < 32 * 3 * 1.1
    later = simulate(schedule_of("1f1b", 2, 32, mesh=((0, 1), (2,))), times._replace(sums=(5, 0)))
    assert later.step == shared.step + 5


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ([], "row 0 has no rank"),
        ([[0, 1], []], r"place=\[\[0, 1\], \[\]\]: row 1 has no rank"),
        ([[0, 1], [2, 1]], "rank 1 is in rows 0 and 1"),
        ([[0, 0], [1, 2]], "rank 0 is in row 0 twice"),
        ([[0, 1], [2, 4]], "row 1 has rank 4, but the job has ranks 0 to 3"),
        ([[0, 1], [-1, 2]], "row 1 has rank -1"),
        ([[0, 1], [2]], "has 3 of 4 ranks: add rank 3 to a row"),
    ],
)
def test_each_rank_has_one_place(mesh, told):
    with pytest.raises(PlanError, match=told):
        check_mesh(mesh, 4)


def line(*costs):
    sizes = {"makes": {"out": 8}, "kept_bytes": 10}
    units = [
        Unit(f"u{i}", parameters={f"w{i}": 100}, forward=cost, inputs=cost, weights=cost, **sizes)
        for i, cost in enumerate(costs)
    ]
    return Graph.chain(units)


def test_plans_carry_the_mesh(tmp_path):
    plan = make(line(1, 1, 1, 1), Means(4, mesh=TWO_BY_TWO), 8, schedule="1f1b")
    assert plan.cuts == ("u2",) and plan.rows == TWO_BY_TWO and plan.ranks == 4
    assert plan.row(1) == (1, 3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.order().ranks == 4 and plan.inference(3).owner(1, 1) == 3
    with pytest.raises(
        PlanError, match="place has 1 rows, but the stages of schedule '1f1b' are on 2"
    ):
        replace(plan, mesh=((0, 1, 2, 3),))
    with pytest.raises(PlanError, match=r"mesh=\[0\] is no list of list"):
        Plan.from_json(plan.to_json().replace('"mesh": [', '"mesh": [0], "_": ['))
    told = str(parse("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1"))  # that of a chain
    assert make(line(1, 1), Means(4, mesh=TWO_BY_TWO), 4, schedule=told).order().ranks == 4


def test_a_stage_with_replicas_gets_more_units():
    mesh = ((0, 1), (2,))
    for by in ("time", "params"):
        plan = make(line(*[1] * 6), Means(3, mesh=mesh), 8, schedule="1f1b", by=by)
        assert plan.cuts == ("u4",)
    assert plan.step < make(line(*[1] * 6), Means(2), 8, schedule="1f1b").step
    even = make(line(*[1] * 6), Means(4, mesh=TWO_BY_TWO), 8, schedule="1f1b")
    assert even.cuts == ("u3",)


def test_plans_without_ranks_have_meshes_too():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    sample, place = torch.ones(64, 64), [[0, 1], [2]]
    dry = dry_run(model, sample, 3, place=place, by="params", schedule="1f1b")
    assert dry.plan.mesh == ((0, 1), (2,)) and dry.plan.cuts == ("4",)
    assert " 0,1 " in str(dry) and "rank 2" in str(dry)
    with pytest.raises(PlanError, match="has 3 of 4 ranks"):
        dry_run(model, sample, 4, place=place)


def test_memory_and_sums_are_those_of_each_rank():
    mesh = ((0, 1), (2,))
    means = Means(3, Link(latency=1e-3, bandwidth=1e3), mesh=mesh)
    plan = make(line(*[1] * 3), means, 8, schedule="gpipe", stages=[2, 1], by="params")
    assert plan.memory == (800 + 4 * 20, 800 + 4 * 20, 400 + 8 * 10)
    whole = make(line(*[1] * 3), replace(means, ranks=4, mesh=((0, 1, 3), (2,))), 8,
                 schedule="gpipe", stages=[2, 1], by="params")  # fmt: skip
    assert whole.memory[0] == 800 + 3 * 20 and whole.memory[3] == 800 + 2 * 20
    for name in SCHEDULES:  # that zbv's is made for the times of groups
        timed = make(line(*[1] * 6), means, 8, schedule=name)
        assert timed.order(Times.equal(len(timed.place))).mesh == mesh
    free = make(line(*[1] * 3), replace(means, link=Link()), 8, schedule="gpipe", stages=[2, 1],
                by="params")  # fmt: skip
    assert plan.step >= free.step + 0.2 + 1e-3  # two ranks send each other 200 bytes
    with pytest.raises(PlanError, match="not enough memory"):
        make(line(*[1] * 3), replace(means, memory=[900, 800, 900]), 8, schedule="gpipe")
