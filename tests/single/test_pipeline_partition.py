"""Units, cuts and plans: the best cuts against all cuts, and what cannot be cut."""

from __future__ import annotations

import itertools
import random

import pytest

from hvdx.errors import PlanError
from hvdx.pipeline import plan as planning
from hvdx.pipeline.ir import Graph, Unit
from hvdx.pipeline.partition import Problem, partition
from hvdx.pipeline.plan import SCHEDULES, Link, Means, Plan, make, schedule_of
from hvdx.pipeline.schedule import gpipe, one_f_one_b


def random_problem(draw):
    n = draw.randint(1, 9)
    stages = draw.randint(1, min(n, 4))
    whole = draw.random() < 0.5  # many ties

    def number(most):
        return draw.randint(0, int(most)) if whole else draw.uniform(0, most)

    weights = [draw.randint(0, 9) for _ in range(n)]
    live = [draw.randint(1, 3) for _ in range(stages)]
    solid = {cut for cut in range(1, n) if draw.random() < 0.15}
    return Problem(
        costs=[number(6) for _ in range(n)],
        stages=stages,
        hops=[number(2) for _ in range(n + 1)] if draw.random() < 0.5 else None,
        sizes=[draw.randint(0, 3) for _ in range(n + 1)],
        speeds=[draw.choice([1, 2, 4]) for _ in range(stages)] if draw.random() < 0.5 else None,
        memory=(lambda a, b, s: live[s] * sum(weights[a:b])) if draw.random() < 0.5 else None,
        limits=[draw.randint(5, 60) for _ in range(stages)],
        solid=frozenset(solid),
    )


def by_trying_all(problem):
    """Rank all cuts by bottleneck, bytes, place."""
    n = len(problem.costs)
    sums = [0, *itertools.accumulate(problem.costs)]
    hops = [0, *(problem.hops or [0] * (n + 1))[1:n], 0]
    found = []
    for cuts in itertools.combinations(range(1, n), problem.stages - 1):
        if problem.solid & set(cuts):
            continue
        stages = list(enumerate(itertools.pairwise([0, *cuts, n])))
        if problem.memory and any(
            problem.memory(a, b, s) > problem.limits[s] for s, (a, b) in stages
        ):
            continue
        slowest = max(
            (sums[b] - sums[a]) / (problem.speeds[s] if problem.speeds else 1) + (hops[a] + hops[b])
            for s, (a, b) in stages
        )
        found.append((slowest, sum(problem.sizes[cut] for cut in cuts), list(cuts)))
    return min(found, default=None)


def test_no_cuts_are_better():
    draw = random.Random(7)
    impossible = 0
    for _ in range(1000):
        problem = random_problem(draw)
        best = by_trying_all(problem)
        if best is None:
            impossible += 1
            with pytest.raises(PlanError, match=r"not enough memory|use at most"):
                partition(problem)
        else:
            assert partition(problem) == best[2]
    assert 50 < impossible < 500


def test_more_stages_than_units():
    with pytest.raises(PlanError, match="5 stages, but the model has 3 units: use at most 3"):
        partition(Problem([1, 1, 1], 5))
    with pytest.raises(
        PlanError, match="3 units, 1 of them bound to the one before: use at most 2"
    ):
        partition(Problem([1, 1, 1], 3, solid=frozenset({2})))
    with pytest.raises(PlanError, match="stages=0: give at least 1"):
        partition(Problem([1], 0))


def test_not_enough_memory_says_how_much_each_stage_needs():
    sizes = [3 << 20, 1 << 20, 2 << 20]
    problem = Problem(
        [1, 1, 1], 2, memory=lambda a, b, s: sum(sizes[a:b]), limits=[2 << 20, 2 << 20]
    )
    with pytest.raises(
        PlanError,
        match=r"not enough memory for 2 stages.* stage 0 \(units 0\.\.0\) needs 3 MiB of 2 MiB; "
        r"stage 1 \(units 1\.\.2\) needs 3 MiB of 2 MiB\. Use more stages",
    ):
        partition(problem)


# A skip from a over b and c to d; two inputs, of which y is read late; two outputs; w is tied.
SKIP = Graph(
    units=(
        Unit("a", ("x",), {"a0": 10, "a1": 1}, {"w": 100}),
        Unit("b", ("a0",), {"b": 20}, {"b.k": 7}),
        Unit("c", ("b",), {"c": 30, "side": 5}),
        Unit("d", ("c", "a0", "y"), {"d": 40}, {"w": 100}),
    ),
    inputs={"x": 2, "y": 3},
    outputs=("d", "side"),
)


def test_live_sets():
    assert SKIP.live(0) == ("x", "y")
    assert SKIP.live(1) == ("y", "a0")  # nothing reads a1
    assert SKIP.live(2) == ("y", "a0", "b")
    assert SKIP.live(3) == ("y", "a0", "c", "side")
    assert SKIP.live(4) == ()
    assert SKIP.live_bytes() == [5, 13, 33, 48, 0]


def test_live_bytes_are_those_of_the_live_sets():
    draw = random.Random(2)
    for _ in range(200):
        sizes = {"in": 1}
        units = []
        for index in range(draw.randint(1, 8)):
            reads = draw.sample(sorted(sizes), draw.randint(0, min(3, len(sizes))))
            makes = {f"v{index}.{k}": draw.randint(1, 99) for k in range(draw.randint(0, 2))}
            units.append(Unit(f"u{index}", tuple(reads), makes))
            sizes.update(makes)
        outputs = tuple(draw.sample(sorted(sizes), 1))
        graph = Graph(tuple(units), {"in": 1}, outputs)
        for cut, size in enumerate(graph.live_bytes()):
            assert size == sum(sizes[value] for value in graph.live(cut))


def test_tied_parameters():
    assert SKIP.tied() == {"w": (0, 3)}
    assert SKIP.parameter_bytes(0, 4) == 107  # w once
    assert SKIP.parameter_bytes(2, 4) == 100


def test_the_best_cut_avoids_the_skip():
    """Both cuts halve the work; fewer bytes cross the later one."""
    units = [
        Unit("a", ("x",), {"a": 9}, forward=1.0),
        Unit("b", ("a",), {"b": 9}, forward=0.0),
        Unit("c", ("b", "a"), {"c": 1}, forward=0.0),
        Unit("d", ("c",), {"d": 1}, forward=1.0),
    ]
    graph = Graph(tuple(units), {"x": 1}, ("d",))
    assert make(graph, Means(2), 4, schedule="1f1b").cuts == ("d",)


def test_what_is_no_graph():
    a = Unit("a", ("x",), {"v": 1})
    for units, outputs, problem in [
        ((), (), "a model without units"),
        ((a, a), ("v",), "two units are named 'a'"),
        ((Unit("b", ("v",)), a), ("v",), "unit 'b' reads 'v', which no unit before makes"),
        ((a, Unit("b", ("v",), {"v": 1})), ("v",), "unit 'b' makes 'v', which is made before it"),
        ((a,), ("w",), "the model returns 'w', which no unit before makes"),
    ]:
        with pytest.raises(PlanError, match=problem):
            Graph(tuple(units), {"x": 1}, outputs)


def line(*costs, **attributes):
    """Make a model of blocks that each take some seconds for each of F, I and W."""
    return Graph.chain([
        Unit(f"block{i}.linear", makes={"y": 8}, parameters={f"{i}.w": 100}, kept_bytes=50,
             forward=cost, inputs=cost, weights=cost, **attributes)
        for i, cost in enumerate(costs)
    ])  # fmt: skip


def test_names_of_units():
    graph = line(*[1] * 12)
    assert graph.find("block3.linear") == graph.find("block3") == 3
    assert graph.find("block1") == 1, "not block10"
    with pytest.raises(PlanError, match=r"no unit is named 'blok3\.linear'; did you mean 'block"):
        graph.find("blok3.linear")
    with pytest.raises(
        PlanError, match=r"no unit is named 'zzz'; there are block0\.linear, .*\.\.\."
    ):
        graph.find("zzz")


def test_manual_cuts():
    graph = line(1, 1, 1, 5)
    means = Means(2)
    assert make(graph, means, 4, schedule="1f1b").cuts == ("block3.linear",)
    assert make(graph, means, 4, schedule="1f1b", stages=["block1"]).cuts == ("block1.linear",)
    assert make(graph, means, 4, schedule="1f1b", stages="block1").cuts == ("block1.linear",)
    assert make(graph, means, 4, schedule="1f1b", stages="auto").cuts == ("block3.linear",)
    assert make(graph, means, 4, schedule="1f1b", stages=[2, 2]).cuts == ("block2.linear",)
    for stages, problem in [
        (["block9"], "no unit is named 'block9'"),
        ([1, 2], r"stages=\[1, 2\] are 3 units; it has 4"),
        ([0, 4], "stages=.* give names of units, or how many units each has"),
        (["block1", "block2"], "3 stages on 2 ranks, but schedule '1f1b' takes 2"),
        (3, "3 stages on 2 ranks, but schedule '1f1b' takes 2"),
    ]:
        with pytest.raises(PlanError, match=problem):
            make(graph, means, 4, schedule="1f1b", stages=stages)
    with pytest.raises(PlanError, match=r"cuts must ascend.*'block1\.linear' follows 'block2"):
        make(graph, Means(3), 4, schedule="1f1b", stages=["block2", "block1"])
    with pytest.raises(PlanError, match="cuts must ascend"):
        make(graph, means, 4, schedule="1f1b", stages=["block0"])


def test_a_joined_unit_is_not_cut_off():
    graph = Graph.chain(
        [Unit("a", forward=1.0), Unit("relu_", joined=True), Unit("b", forward=1.0)]
    )
    assert make(graph, Means(2), 2, schedule="gpipe").cuts == ("b",)
    with pytest.raises(
        PlanError, match=r"no stage can begin at 'relu_': it must be in that of 'a'"
    ):
        make(graph, Means(2), 2, schedule="gpipe", stages=["relu_"])


def test_by_parameters_and_by_memory():
    big = {"w": 900}
    graph = Graph.chain([
        Unit("embedding", parameters=big), Unit("a", kept_bytes=500), Unit("b", kept_bytes=500),
        Unit("head", parameters={"h": 100}, kept_bytes=0),
    ])  # fmt: skip
    assert make(graph, Means(2), 8, schedule="1f1b", by="params").cuts == ("a",)
    assert make(graph, Means(2), 8, schedule="1f1b", by="memory").cuts == ("b",)
    with pytest.raises(
        PlanError, match="no unit has a time: profile the model, or use by='params'"
    ):
        make(graph, Means(2), 8)
    with pytest.raises(PlanError, match="by='flops': use 'time', 'params' or 'memory'"):
        make(graph, Means(2), 8, by="flops")


def test_a_slow_rank_gets_less():
    plan = make(line(*[1] * 6), Means(2, speeds=[2, 1]), 8, schedule="gpipe")
    assert plan.cuts == ("block4.linear",)
    with pytest.raises(PlanError, match="speeds has 1 entries for 2 ranks"):
        Means(2, speeds=[1])


def test_memory_follows_the_schedule():
    """1f1b fits where gpipe, which keeps all 8 micro-batches, does not."""
    graph = line(*[1] * 4)
    means = Means(2, memory=[1100, 1100])
    assert make(graph, means, 8, schedule="1f1b").memory == (1000, 900)
    with pytest.raises(PlanError, match=r"stage 0 \(units 0\.\.1\) needs 1\.562 KiB of 1\.074 KiB"):
        make(graph, means, 8, schedule="gpipe")
    assert make(graph, means, 8).schedule in ("1f1b", "zb1p", "zbv", "interleaved", "1f1b-slack")
    with pytest.raises(PlanError, match=r"rank 0 needs 1\.562 KiB of 1\.074 KiB under 'gpipe'"):
        make(graph, means, 8, schedule="gpipe", stages=[2, 2])


def test_a_tied_parameter_is_in_memory_once_per_rank():
    """In a V the first and the last stage share rank 0; in a line they do not."""
    units = [Unit("in", parameters={"w": 1000}, forward=1.0), Unit("a", forward=1.0),
             Unit("b", forward=1.0), Unit("out", parameters={"w": 1000}, forward=1.0)]  # fmt: skip
    graph = Graph.chain(units)
    assert make(graph, Means(2), 2, schedule="gpipe").memory == (4000, 4000)
    assert make(graph, Means(2), 2, schedule="zbv").memory == (4000, 0)


def test_several_stages_per_rank_are_evened_out_in_sum():
    """The slowest stage is 4 either way; ranks with 4+1 and 2+4 could not be evener."""
    plan = make(line(4, 1, 1, 1, 1, 1), Means(2), 4, schedule="interleaved")
    assert plan.place == (0, 1, 0, 1)
    found = plan.edges(line(4, 1, 1, 1, 1, 1))
    sums = [sum([4, 1, 1, 1, 1, 1][slice(*found[s])]) for s in range(4)]
    assert max(sums[0] + sums[2], sums[1] + sums[3]) == 5


def test_auto_takes_the_quickest():
    graph = line(*[1.0] * 8)
    free = make(graph, Means(2), 8)
    steps = {name: make(graph, Means(2), 8, schedule=name).step for name in SCHEDULES}
    assert free.step == min(steps.values()) == steps["zbv"] < steps["1f1b"]
    slow = Means(2, link=Link(latency=0.5))
    chosen = make(graph, slow, 8)
    assert chosen.step == min(make(graph, slow, 8, schedule=name).step for name in SCHEDULES)


def test_a_schedule_as_text():
    graph = line(1, 1)
    plan = make(graph, Means(2), 3, schedule=str(one_f_one_b(2, 3)))
    assert plan.order().rows == one_f_one_b(2, 3).rows
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="is for 2 ranks and 3 micro-batches, not for 2 and 4"):
        make(graph, Means(2), 4, schedule=str(gpipe(2, 3)))
    with pytest.raises(
        PlanError, match=r"schedule='2f2b': use one of 1f1b, .* or write one as text"
    ):
        schedule_of("2f2b", 2, 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_json_and_back(tmp_path, schedule):
    graph = line(1, 2, 3, 4, 5)
    plan = make(graph, Means(2, Link(1e-3, 1e6)), 4, schedule=schedule)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.edges(graph) == plan.edges(graph)
    assert again.order().place == plan.place


GOOD = {"hvdx_plan": 1, "cuts": ["b"], "place": [0, 1], "schedule": "1f1b", "micro_batches": 4}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hvdx_plan": 2}, "plan of another version than 1"),
        ({"cuts": "b"}, "cuts='b' is no list of str"),
        ({"place": [0, 1.5]}, r"place=\[0, 1\.5\] is no list of int"),
        ({"place": [0, True]}, r"place=\[0, True\] is no list of int"),
        ({"place": [0]}, "a plan with 1 cuts places 1 stages; it must place 2"),
        ({"place": [1, 0]}, r"place=\[1, 0\], but schedule '1f1b' has \[0, 1\]"),
        ({"micro_batches": "4"}, "micro_batches='4' is no int"),
        ({"micro_batches": 0}, "micro_batches=0: give at least 1"),
        ({"schedule": "fast"}, "schedule='fast': use one of"),
        ({"stepp": 3}, "a plan has no 'stepp'; it has cuts"),
    ],
)
def test_what_is_no_plan(tmp_path, change, problem):
    import json

    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD))
    assert Plan.load(path).cuts == ("b",)
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(PlanError, match=rf"plan\.json: .*{problem}"):
        Plan.load(path)


def test_files_that_are_no_plan():
    for text, problem in [("{", "no JSON"), ("[]", "no plan"), ('{"hvdx_plan": 1}', "no 'cuts'")]:
        with pytest.raises(PlanError, match=problem):
            Plan.from_json(text)


def test_the_table():
    graph = line(0.001, 0.001, 0.002)
    means = Means(2)
    drawn = planning.table(make(graph, means, 4, schedule="1f1b"), graph, means).splitlines()
    assert drawn[1].split() == ["0", "0", "2", "6.00", "200", "B", "8", "B", "block0.linear"]
    assert drawn[2].split() == ["1", "1", "1", "6.00", "100", "B", "0", "B", "block2.linear"]


def test_a_plan_that_computes_again():
    """Less memory and more time; the last stage only does later what it does once."""
    units = [Unit(f"u{i}", makes={"": 10}, kept_bytes=100, forward=1.0, inputs=1.0, weights=1.0)
             for i in range(4)]  # fmt: skip
    graph = Graph.chain(units, input_bytes=10)
    plans = [make(graph, Means(2, recompute=again), 8, schedule="gpipe", by="memory")
             for again in (False, True)]  # fmt: skip
    assert [plan.memory for plan in plans] == [(1600, 1600), (280, 280)]
    assert plans[0].step < plans[1].step < plans[0].step * 4 / 3 + 1e-9
