"""The planner: its clock, what a step costs, what ranks keep, and what it chooses."""

import itertools
import statistics

import pytest

from hvdx.errors import PlanError
from hvdx.link import Line
from hvdx.pipeline.ir import Graph, Unit
from hvdx.pipeline.partition import size_of
from hvdx.pipeline.plan import SCHEDULES, Link, Means, schedule_of, stage_times
from hvdx.pipeline.simulator import simulate
from hvdx.planner.clock import Need, Task, clock
from hvdx.planner.costs import Candidate, predict, tasks_of
from hvdx.planner.facts import Codec, Job, Network, Profile, Trim
from hvdx.planner.search import Wanted, candidates, counts, meshes, ranked, to_measure, to_try
from hvdx.planner.table import advice, table
from hvdx.planner.trim import Trial, calibrated

MB = 1 << 20


def chain(rows, units=8, parameters=MB, fixed=1e-4):
    """A line of equal units, a micro-batch of ``rows`` rows."""
    return Graph.chain(
        [
            Unit(
                f"u{number}", makes={"x": 1000 * rows}, parameters={f"w{number}": parameters},
                kept_bytes=10_000 * rows, forward=fixed + 1e-4 * rows,
                inputs=fixed + 1e-4 * rows, weights=fixed + 1e-4 * rows,
            )
            for number in range(units)
        ],
        1000 * rows,
    )  # fmt: skip


def profile(rows=32, **options):
    lines = tuple((each, chain(each, **options)) for each in (1, 2, 4, 8, 16, 32))
    return Profile(rows, lines, update=1e-10)


# --- the clock


def test_who_shares_a_core_takes_longer_and_who_waits_does_not_share():
    rows = [[Task(2.0)], [Task(1.0)], [Task(1.0, (Need(1, 0, 0.5),))]]
    assert clock(rows)[2][0] == (1.5, 2.5)
    shared = clock(rows, lanes=1)
    # Ranks 0 and 1 at half speed; then 0 alone for 0.5; then 0 and 2 at half speed.
    assert shared[1][0] == (0.0, 2.0)
    assert shared[0][0].end == pytest.approx(3.5)
    assert shared[2][0] == pytest.approx((2.5, 4.0))


def test_ranks_of_two_hosts_do_not_share():
    rows = [[Task(1.0)], [Task(1.0)]]
    assert clock(rows, lanes=1, hosts=(0, 1)) == clock(rows)
    assert clock(rows, lanes=1, hosts=(0, 0))[1][0].end == 2.0


@pytest.mark.parametrize("lanes", [1, float("inf")])
def test_tasks_that_wait_for_each_other_are_told(lanes):
    rows = [[Task(1.0, (Need(1, 0),))], [Task(1.0, (Need(0, 0),))]]
    with pytest.raises(PlanError, match=r"ranks \[0, 1\] wait for each other"):
        clock(rows, lanes=lanes)


# --- a step


@pytest.mark.parametrize("mesh", [((0,), (1,)), ((0, 1), (2, 3)), ((0, 1), (2,))], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_sums_and_updates_a_step_is_what_the_simulator_says(mesh, schedule):
    given = profile()._replace(update=0.0)
    free = {count: Line(0.0, 0.0) for count in (2, 3, 4)}
    job = Job(sum(map(len, mesh)), Network(Link(1e-4, 1e9), free))
    found = predict(Candidate(mesh, 8, schedule), given, job)
    order = found.plan.order(found.times)
    assert found.step == pytest.approx(simulate(order, found.times).step, rel=1e-12)


def test_a_crowded_host_never_is_quicker_and_takes_all_the_work_in_the_end():
    given, mesh = profile(), ((0,), (1,), (2,), (3,))
    steps = [predict(Candidate(mesh, 8), given, Job(4, lanes=lanes)).step for lanes in (4, 3, 2, 1)]
    assert steps == sorted(steps)
    work = 8 * sum(u.forward + u.inputs + u.weights for u in given.at(8).units)
    assert steps[-1] >= work  # on one core nothing is saved


def test_what_costs_more_takes_longer():
    given = profile()
    base = Job(4, Network(Link(1e-4, 1e9)))
    two = Candidate(((0, 1), (2, 3)), 8)

    def step(job, which=two, of=given):
        return predict(which, of, job).step

    assert step(base._replace(network=Network(Link(1e-3, 1e9)))) > step(base)
    assert step(base._replace(network=Network(Link(1e-4, 1e8)))) > step(base)
    assert step(base._replace(trim=Trim(action=1e-4))) > step(base)
    assert step(base._replace(trim=Trim(loss=1e-4))) > step(base)
    assert step(base._replace(speeds=(1.0, 1.0, 1.0, 0.5))) > step(base)
    assert step(base, of=given._replace(update=1e-8)) > step(base)
    assert step(base, two._replace(checkpoint="always")) > step(base)
    assert step(base._replace(trim=Trim(step=1e-3))) == pytest.approx(step(base) + 1e-3)


def test_sums_of_late_stages_hide_behind_early_ones():
    slow = Network(Link(1e-5, 1e12), {2: Line(0.0, 2e-9)})
    one = predict(Candidate(((0, 1),), 8), profile(), Job(2, slow))
    # One stage waits for all of its gradients, 8 MiB; of two, only the first one's are waited for.
    assert one.sums == pytest.approx(8 * MB * 2e-9, rel=1e-6)
    two = predict(Candidate(((0, 1), (2, 3)), 8), profile(), Job(4, slow))
    assert two.sums == pytest.approx(one.sums / 2, rel=1e-6)


def test_compression_trades_computing_for_bytes():
    none = (0.0,) * 8
    quarter = tuple(MB / 4 for _ in range(8))
    given = profile()._replace(codecs={"int8": Codec((1e-3,) * 8, quarter, none, 1, none)})
    raw, coded = Candidate(((0, 1),), 8), Candidate(((0, 1),), 8, compression="int8")
    for bandwidth, better in ((1e7, coded), (1e11, raw)):
        job = Job(2, Network(Link(1e-5, bandwidth)))
        found = ranked([raw, coded], given, job)
        assert found[0].candidate == better
        assert found[0].plan.compression == better.compression


def test_costs_between_measured_numbers_of_rows_follow_a_line():
    lines = tuple((rows, chain(rows)) for rows in (2, 8, 32))
    unit = Profile(32, lines).at(8).units[3]  # 4 rows, which were not measured
    assert unit.forward == pytest.approx(5e-4)
    assert (unit.kept_bytes, dict(unit.makes)) == (40_000, {"u3": 4000})
    assert Profile(32, lines).at(1) is lines[2][1]
    with pytest.raises(PlanError, match="64 micro-batches of a batch of 32 rows"):
        Profile(32, lines).at(64)


# --- memory


def test_memory_is_what_is_kept_and_what_training_needs():
    given, weights, value = profile(), 4 * MB, 4000  # of half the units; 4 rows
    kept, flow = 4 * 10_000 * 4 + value, 2 * value  # with what the stage makes; gradients of values
    found = predict(Candidate(((0,), (1,)), 8), given, Job(2)).plan.memory
    # Weights, two slots of Adam, gradients, those of a micro-batch and the first new sum; kept.
    assert found[0] == pytest.approx(4 * weights + max(2 * kept, kept + weights + MB) + flow)
    assert found[1] == pytest.approx(4 * weights + weights + MB + flow)
    # The first backward has no sums to add to yet.
    gpipe = predict(Candidate(((0,), (1,)), 8, "gpipe"), given, Job(2)).plan.memory
    assert gpipe[0] == pytest.approx(4 * weights + max(7 * kept, 6 * kept + weights + MB) + flow)
    again = predict(Candidate(((0,), (1,)), 8, "gpipe", "always"), given, Job(2)).plan.memory
    assert again[0] < gpipe[0]


def test_what_does_not_fit_is_not_chosen():
    given, job = profile(parameters=4 * MB), Job(2, Network(Link(1e-4, 1e12)))
    free = ranked(candidates(2, 32), given, job)
    assert len(free[0].candidate.mesh) == 1  # replicas need no hops
    room = 1.01 * min(max(each.plan.memory) for each in free)
    found = ranked(candidates(2, 32), given, job._replace(memory=(room, room)))
    assert {len(each.candidate.mesh) for each in found} == {2}
    assert all(max(each.plan.memory) <= room for each in found)


def test_if_nothing_fits_the_smallest_memory_that_would_is_told():
    given, wanted = profile(), Wanted(8, ("1f1b", "zbv"), ("never", "always"))
    least = min(max(each.plan.memory)
                for each in ranked(candidates(2, 32, wanted), given, Job(2)))  # fmt: skip
    with pytest.raises(PlanError, match="no plan fits into memory=1 MiB a rank") as error:
        ranked(candidates(2, 32, wanted), given, Job(2, memory=(MB, MB)))
    told = float(str(error.value).partition("does fit is ")[2].split(" MiB")[0]) * MB
    assert told <= least * 1.001
    room = (1.001 * told,) * 2
    assert ranked(candidates(2, 32, wanted), given, Job(2, memory=room))  # and it would do


def test_ranks_with_unequal_memory_are_told_by_rank():
    with pytest.raises(PlanError, match=r"memory=1 MiB, 2 MiB a rank.* by rank .* MiB, .* MiB"):
        ranked(candidates(2, 32), profile(), Job(2, memory=(MB, 2 * MB)))
    # With room on one rank alone, the cuts give it more.
    given = profile()
    even = predict(Candidate(((0,), (1,)), 8), given, Job(2)).plan.memory
    found = ranked(
        [Candidate(((0,), (1,)), 8)], given, Job(2, memory=(1.5 * even[0], 0.8 * even[1]))
    )
    assert found[0].plan.memory[1] <= 0.8 * even[1] < even[1]


# --- candidates


def test_meshes_have_each_rank_once():
    assert meshes(1) == [((0,),)]
    assert ((0, 1), (2,)) in meshes(3)
    assert ((0,), (1, 2)) in meshes(3)
    assert {tuple(map(len, mesh)) for mesh in meshes(4)} == {
        (4,), (2, 2), (2, 1, 1), (1, 1, 2), (1, 1, 1, 1)}  # fmt: skip
    for ranks in range(1, 20):
        for mesh in meshes(ranks):
            assert list(itertools.chain(*mesh)) == list(range(ranks))


def test_micro_batches_can_be_shared_out():
    assert counts(((0, 1), (2,)), 100) == [2, 4, 8]
    assert counts(((0, 1, 2, 3),), 6) == [4]
    for each in candidates(4, 64):
        assert all(each.micro_batches % len(row) == 0 for row in each.mesh)
        assert each.micro_batches <= 64


def test_every_candidate_can_be_scheduled():
    given = profile()
    for each in candidates(3, 32):
        found = predict(each, given, Job(3))
        mesh = found.plan.mesh
        made = schedule_of(each.schedule, len(each.mesh), each.micro_batches, mesh=mesh)
        assert made.ranks == 3 and len(found.plan.memory) == 3
        assert sum(stage_times(given.at(each.micro_batches), Means(3, mesh=found.plan.mesh), made,
                               found.plan.edges(given.lines[0][1])).forward) > 0  # fmt: skip


def test_small_models_are_replicated_and_large_ones_cut():
    network = Network(Link(2e-4, 1e8))
    small = ranked(candidates(2, 32), profile(parameters=100), Job(2, network))
    large = ranked(candidates(2, 32), profile(parameters=16 * MB), Job(2, network))
    assert small[0].candidate.shape == "2x1"
    assert large[0].candidate.shape == "1x2"


def test_five_numbers_of_micro_batches_are_measured_at_most():
    told = to_measure(candidates(4, 64), 64)
    assert told == [16, 8, 4, 2]
    assert len(to_measure(candidates(8, 4096), 4096)) == 5


# --- what steps teach


TRUTH = Trim(1.2, 0.9, action=2e-4, loss=1e-4, back_loss=3e-4, sums=1.5, step=1e-3)


def ran(candidate, given, job, **truth):
    """A trial of a candidate whose steps take exactly what ``TRUTH``, or else, makes of them."""
    prediction = predict(candidate, given, job)
    real = job._replace(**{"trim": TRUTH, **truth})
    rows = tasks_of(prediction, given, real)
    taken = clock(rows, real.lanes, real.hosts)
    actions = {}
    for row, spans in zip(rows, taken, strict=True):
        for task, span in zip(row, spans, strict=True):
            if task.action is not None:
                actions.setdefault(task.action[:2], []).append(span.end - span.start)
    medians = {key: statistics.median(each) for key, each in actions.items()}
    return Trial(prediction, [max(each[-1].end for each in taken)], medians)


@pytest.mark.parametrize("lanes", [2, float("inf")])
def test_trials_of_three_plans_mend_the_predictions_of_all(lanes):
    given, job = profile(), Job(4, Network(Link(1e-4, 1e8)), lanes=lanes)
    row = tuple((rank,) for rank in range(4))
    teachers = [Candidate(row, 8), Candidate(row, 16), Candidate(((0, 1, 2, 3),), 4)]
    learnt = calibrated([ran(each, given, job) for each in teachers], given, job)
    errors = {"plain": [], "trimmed": []}
    for each in candidates(4, 32, Wanted(schedules=("gpipe", "1f1b", "interleaved"))):
        true = predict(each, given, job._replace(trim=TRUTH)).step
        for name, own in (("plain", job), ("trimmed", learnt)):
            found = predict(each, given, own).step
            errors[name].append(abs(found / true - 1))
    assert max(errors["trimmed"]) < 0.05 < statistics.median(errors["plain"])


def test_steps_correct_what_was_taken_for_the_number_of_ranks_that_compute_side_by_side():
    given, job = profile(), Job(4, Network(Link(1e-4, 1e8)), lanes=3.4)
    row = tuple((rank,) for rank in range(4))
    teachers = [Candidate(row, 4), Candidate(row, 16), Candidate(((0, 1), (2, 3)), 8),
                Candidate(((0, 1, 2, 3),), 4)]  # fmt: skip
    learnt = calibrated([ran(each, given, job, lanes=2.0) for each in teachers], given, job)
    errors = {"plain": [], "learnt": []}
    for each in candidates(4, 32, Wanted(schedules=("1f1b",))):
        true = predict(each, given, job._replace(trim=TRUTH, lanes=2.0)).step
        for name, own in (("plain", job), ("learnt", learnt)):
            errors[name].append(abs(predict(each, given, own).step / true - 1))
    assert statistics.median(errors["learnt"]) < 0.05 < 0.3 < statistics.median(errors["plain"])
    assert max(errors["learnt"]) < 0.15


def test_what_may_be_quicker_is_tried_next_and_not_its_likes_alone():
    several = candidates(4, 32, Wanted(schedules=("1f1b", "zb1p")))
    found = ranked(several, profile(), Job(4, Network(Link(1e-4, 1e8)), lanes=2))
    first, unlike = (each.candidate for each in to_try(found, {}))
    assert first == found[0].candidate and unlike[:2] != first[:2]
    more = [each.candidate for each in to_try(found, {first: found[0].step})]
    assert more[0] == found[1].candidate and first not in more
    assert to_try(found, {found[-1].candidate: 0.5 * found[0].step}) == []


# --- in words


def test_the_table_marks_what_is_taken_and_says_why():
    given = profile(parameters=100)
    found = ranked(candidates(4, 32), given, Job(4, Network(Link(2e-4, 1e8))))
    best, other = found[0].candidate, found[-1].candidate
    told = table(found, best, {best: 0.5, other: 0.7}).splitlines()
    assert told[0].split()[:3] == ["replicas", "micro-batches", "schedule"]
    assert [line.split()[1] for line in told if line.startswith("*")] == ["4x1"]
    assert sum("500.00" in line or "700.00" in line for line in told) == 2
    assert len({line.strip("* ").split()[0] for line in told[1:]}) == 5  # all meshes are shown
    line = advice(found, best, 800.0, {best: 0.5})
    assert line.startswith("data parallel (4x1) 500.00 ms; stages (1x4) ")
    assert "; hybrid (" in line and "take data parallel, where adding up 800 B of" in line
    slow, quick = [each.candidate for each in found if len(each.candidate.mesh) == 4][:2]
    line = advice(found, best, 800.0, {best: 0.5, slow: 0.9, quick: 0.8})
    assert "stages (1x4) 800.00 ms" in line


def test_where_data_parallel_does_not_fit_the_advice_says_so():
    given, wanted = profile(parameters=4 * MB), Wanted(8, ("1f1b",))
    room = (6 * 4 * 4 * MB,) * 2
    found = ranked(candidates(2, 32, wanted), given, Job(2, memory=room))
    line = advice(found, found[0].candidate, 32.0 * MB)
    assert line.startswith("data parallel does not fit; stages (1x2) ")


@pytest.mark.parametrize(
    ("text", "size"), [("2G", 2 << 30), ("500M", 500 << 20), ("0.5", 1 << 29), ("10 KiB", 10240)]
)
def test_sizes_are_read(text, size):
    assert size_of(text) == size


def test_links_are_read():
    assert Link.parse("100mbit,200us") == Link(200e-6, 12.5e6)
    assert Link.parse("3 GB, 0.5ms") == Link(0.5e-3, 3e9)
    for wrong in ("100mbit", "0gbit,1us", "fast"):
        with pytest.raises(PlanError, match="give bandwidth and latency, such as 100mbit,200us"):
            Link.parse(wrong)
    for wrong in ("0", "much", "-1G"):
        with pytest.raises(PlanError, match="give a size such as 500M or 2G"):
            size_of(wrong)
