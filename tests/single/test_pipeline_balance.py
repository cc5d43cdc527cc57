"""When units move while training: the decision, on simulated times."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from hvdx.errors import PlanError
from hvdx.pipeline.balance import Balancer, busy, partly, propose, whole
from hvdx.pipeline.ir import Graph, Unit
from hvdx.pipeline.plan import Link, Means, Plan, make, stage_times
from hvdx.pipeline.rebalance import Rebalance, rebalance_of
from hvdx.pipeline.schedule import Action, Span
from hvdx.pipeline.simulator import simulate

UNITS, MICRO_BATCHES = 24, 8


def line(costs=None, frozen=0):
    """Units that take 1 ms for each of F, I and W, but as ``costs`` says."""
    units = [
        Unit(f"u{i}", parameters={f"w{i}": 4000}, makes={f"v{i}": 1000}, forward=1e-3 * cost,
             inputs=1e-3 * cost, weights=1e-3 * cost)
        for i, cost in enumerate(costs or [1.0] * UNITS)
    ]  # fmt: skip
    return partly(Graph.chain(units), trained(frozen, len(units)))


def trained(frozen=0, units=UNITS):
    return (0.0,) * frozen + (1.0,) * (units - frozen)


class Job:
    """A job whose ranks take what their units cost, on devices that may be slower, with noise."""

    def __init__(self, ranks=4, noise=0.0, options=None, link=None, schedule="1f1b", mesh=()):
        self.means = Means(ranks, link or Link(1e-4, 1e9), mesh=mesh)
        self.line = line()
        self.plan = make(self.line, self.means, MICRO_BATCHES, schedule=schedule)
        self.balancer = Balancer(self.line, self.means, options or Rebalance(), trained())
        self.slow = [1.0] * ranks  # by rank
        self.heavy = [1.0] * UNITS  # by unit: what the measurement did not show
        self.frozen, self.noise, self.moves = 0, noise, []
        self.random = random.Random(3)
        self.step = 0

    @property
    def real(self):
        costs = partly(whole(line(self.heavy), trained()), trained(self.frozen))
        return costs, replace(self.means, speeds=[1.0 / each for each in self.slow])

    def seconds_per_step(self, plan=None):
        plan = plan or self.plan
        costs, means = self.real
        times = stage_times(costs, means, plan.order(), plan.edges(costs))
        return simulate(plan.order(times), times).step

    def best(self):
        costs, means = self.real
        return self.seconds_per_step(propose(costs, means, self.plan).plan)

    def run(self, steps):
        means = self.seconds()
        for _ in range(steps):
            self.step += 1
            seconds = {rank: mean * self.random.uniform(1 - self.noise, 1 + self.noise)
                       for rank, mean in means.items()}  # fmt: skip
            seen = self.balancer.observe(seconds, trained(self.frozen))
            plan = seen and self.balancer.decide(self.plan, seen)
            if plan:
                self.moves.append(self.step)
                self.plan = plan
                self.balancer.moved(0.0)
                means = self.seconds()

    def seconds(self):
        """By rank, what a micro-batch takes in its stages."""
        costs, means = self.real
        times = stage_times(costs, means, self.plan.order(), self.plan.edges(costs))
        found = {}
        for row, ranks in enumerate(self.plan.rows):
            own = [stage for stage, each in enumerate(self.plan.place) if each == row]
            mean = sum(part[stage] for part in times[:3] for stage in own)
            for rank in ranks:  # the row waits for its slowest
                found[rank] = mean * self.slow[rank] / max(self.slow[r] for r in ranks)
        return found


@pytest.mark.parametrize(
    ("ranks", "schedule", "seeds"),
    [(2, "1f1b", 20), (4, "1f1b", 20), (4, "zb1p", 5), (4, "interleaved", 5), (2, "zbv", 1)],
)
def test_noise_moves_nothing(ranks, schedule, seeds):
    for seed in range(seeds):
        job = Job(ranks, noise=0.1, schedule=schedule)
        job.random.seed(seed)
        job.run(200)
        assert job.moves == []


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_that_is_three_times_slower_keeps_fewer_units(rank, noise):
    job = Job(noise=noise)
    job.run(50)
    before = job.seconds_per_step()
    job.slow[rank] = 3.0
    worse, optimum = job.seconds_per_step(), job.best()
    assert before < optimum < worse
    job.run(20)
    assert job.moves == [70]  # two looks of ten steps each
    assert optimum / job.seconds_per_step() >= (0.8 if noise else 1.0)
    job.run(100)
    assert len(job.moves) <= 2 and optimum / job.seconds_per_step() >= (0.9 if noise else 1.0)
    job.slow[rank] = 1.0  # and back, when it has recovered, but for less than is asked for
    job.run(40)
    assert job.best() / job.seconds_per_step() >= 0.85


def test_replicas_wait_for_their_slowest():
    job = Job(mesh=[[0, 2], [1, 3]])
    job.slow[3] = 2.0
    optimum = job.best()
    assert optimum < 0.9 * job.seconds_per_step()
    job.run(20)
    assert job.moves == [20] and job.seconds_per_step() == optimum


@pytest.mark.parametrize("lower", [True, False])
def test_frozen_layers_cost_less_and_the_cuts_follow(lower):
    """The half that is frozen needs no gradients of weights, and the lower one none at all."""
    job = Job(ranks=2)
    job.run(45)
    before = job.seconds_per_step()
    if lower:
        job.frozen = UNITS // 2
        still = job.seconds_per_step()
        job.run(10)
        assert job.moves == [55]  # the cause is known: one look is enough
        assert job.seconds_per_step() == job.best() < still
        assert before / job.seconds_per_step() > 1.3
        job.frozen = 0
        job.run(10)
    assert job.seconds_per_step() == before


def test_a_layer_that_has_become_slow_itself_does_not_move_to_and_fro():
    """It is taken for a slow rank, which the look after the move shows to be wrong."""
    job = Job(ranks=2)
    job.heavy = [6.0 if i == 3 else 1.0 for i in range(UNITS)]
    before = job.seconds_per_step()
    job.run(1000)
    assert 1 <= len(job.moves) <= 5 and job.moves[-1] < 500
    assert job.seconds_per_step() <= before


def test_a_move_must_pay_and_gain():
    for options, link in (
        (Rebalance(gain=0.6), None),
        (Rebalance(horizon=1), Link(1.0, 1e3)),
        (Rebalance(every=101), None),
        (Rebalance(checks=11), None),
    ):
        job = Job(options=options, link=link)
        job.slow[0] = 3.0
        job.run(100)
        assert job.moves == []
    job = Job(options=Rebalance(every=1, checks=1, gain=0.01))
    job.slow[0] = 3.0
    job.run(1)
    assert job.moves == [1]
    job.balancer.moved(1e3)  # it took so long
    job.slow[0] = 1.0
    job.run(20)
    assert len(job.moves) == 1


def test_what_does_not_fit_is_no_choice():
    job = Job(ranks=2)
    size = sum(sum(unit.parameters.values()) for unit in job.line.units)
    means = replace(job.means, memory=[4 * size / 2 * 1.2] * 2)
    job.balancer = Balancer(job.line, means, Rebalance(), trained())
    job.slow[0] = 3.0
    job.run(40)
    assert [stop - first for first, stop in job.plan.edges(job.line)] == [10, 14]


def test_costs_of_what_was_frozen_when_it_was_measured():
    units = [
        Unit("a", parameters={"a": 4}, makes={"x": 1}, forward=1.0),  # frozen, nothing below
        Unit("b", parameters={"b": 4}, makes={"y": 1}, forward=1.0, weights=2.0),
        Unit("c", makes={"z": 1}, forward=1.0, inputs=0.5),
        Unit("d", parameters={"d": 4}, makes={"o": 1}, forward=1.0, inputs=3.0),
    ]
    chain = Graph.chain(units)
    every = whole(chain, (0.0, 1.0, 0.0, 1.0)).units  # of d both halves were measured as one
    assert [(u.inputs, u.weights) for u in every] == [
        (1.0, 1.0),
        (1.0, 2.0),
        (0.5, 0.0),
        (1.5, 1.5),
    ]
    part = partly(whole(chain, (0.0, 1.0, 0.0, 1.0)), (0.0, 0.0, 0.0, 0.5)).units
    assert [(u.inputs, u.weights) for u in part] == [(0.0, 0.0)] * 3 + [(0.0, 0.75)]
    part = partly(whole(chain, (0.0, 1.0, 0.0, 1.0)), (1.0, 0.0, 0.0, 0.0)).units
    assert [u.inputs for u in part] == [0.0, 1.0, 0.5, 1.5]


def test_seconds_of_a_micro_batch():
    spans = [Span(Action(kind, stage, k), 0.0, 0.5) for k in (0, 2) for stage in (0, 3)
             for kind in "FB"]  # fmt: skip
    assert busy(spans) == 2.0
    assert busy([]) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"every": 0}, "every=0"),
        ({"checks": 1.5}, "checks=1.5"),
        ({"horizon": True}, "horizon=True"),
        ({"gain": 1.0}, "gain=1.0"),
        ({"gain": "much"}, "gain='much'"),
    ],
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(PlanError, match=told):
        Rebalance(**options)


def test_the_option_of_pipelines():
    assert rebalance_of(None) is None and rebalance_of("auto") == Rebalance()
    assert rebalance_of(Rebalance(every=5)) == Rebalance(every=5)
    with pytest.raises(
        PlanError, match=r"rebalance=True: use 'auto', hvd.Rebalance\(...\) or None"
    ):
        rebalance_of(True)


def test_plans_stay_what_they_are_but_for_the_cuts():
    job = Job(ranks=2)
    job.slow[1] = 2.0
    job.run(20)
    first = Plan(("u1",), (0, 1), "1f1b", MICRO_BATCHES)
    assert (job.plan.place, job.plan.schedule) == (first.place, first.schedule)
    assert all(first < stop for first, stop in pairwise([0, *map(job.line.find, job.plan.cuts)]))
