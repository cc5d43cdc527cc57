"""Compression.auto's choice, from networks and methods that are given, and how it is told."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest

from hvdx import link
from hvdx.comm import in_step, operations, sent_share, through
from hvdx.compression import Compression, CompressionError, Compressor, Spec, none
from hvdx.compression.auto import BUDGETS, Found, describe, survey
from hvdx.compression.methods import candidates
from hvdx.compression.plans import Form, Model, choose
from hvdx.compression.review import Pace, Review
from hvdx.link import Footprint, Line, Link, Message, fit, watch
from hvdx.ops import NumpyOps

OPS = NumpyOps()
LARGE, SMALL, VECTOR = (512, 1024), (16, 32), (8192,)


class Alone:
    """An adapter of NumPy, for one process."""

    framework = "numpy"

    def __init__(self, ranks: int = 2) -> None:
        self._ranks = ranks

    def ranks(self, process_set: Any) -> int:
        return self._ranks

    def at_once(self) -> Any:
        return contextlib.nullcontext()

    def from_numpy(self, array: Any) -> Any:
        return array

    def to_numpy(self, tensor: Any) -> Any:
        return tensor

    def allgather_object(self, value: Any, name: str, process_set: Any) -> list[Any]:
        return [value]


def network(megabits: float, ranks: int = 2, latency: float = 1e-3) -> Link:
    line = Line(latency, 8e-6 / megabits)
    return Link(ranks, dict.fromkeys(link.KINDS, line))


def spec(
    shape: tuple[int, ...], name: str = "layer", ranks: int = 2, dtype: str = "float32"
) -> Any:
    return Spec(name, shape, dtype, ranks)


@functools.cache
def watched(name: str, about: Spec) -> Footprint:
    return watch(Alone(about.ranks), candidates([name])[name], about)


def footprints(
    specs: list[Spec], methods: dict[str, Compressor], per_element: float
) -> dict[tuple[str, Form], Footprint]:
    """What methods really send, at a given price for computing."""
    return {
        (name, Form.of(each)): watched(name, each._replace(name=""))._replace(
            seconds=per_element * math.prod(each.shape)
        )
        for each in specs
        if Form.of(each).compressible
        for name in methods
    }


def model(
    megabits: float,
    shapes: list[tuple[int, ...]],
    budget: str = "bold",
    *,
    ranks: int = 2,
    per_element: float = 3e-9,
    latency: float = 1e-3,
    limit: int = 2**24,
) -> Model:
    specs = [spec(shape, str(place), ranks) for place, shape in enumerate(shapes)]
    methods = candidates(BUDGETS.get(budget, [budget]))
    made = footprints(specs, methods, per_element)
    return Model(network(megabits, ranks, latency), specs, made, methods, limit)


def best(*args: Any, **options: Any) -> str:
    return choose(model(*args, **options).plans()).name


@pytest.mark.parametrize(
    ("budget", "megabits", "expected"),
    [
        ("bold", 1e6, {"none"}),
        ("balanced", 1e6, {"none"}),
        ("safe", 1000, {"fp16", "int8"}),
        ("safe", 10, {"int8"}),
        ("balanced", 10, {"powersgd"}),
        ("bold", 10, {"powersgd", "topk", "randomk"}),
    ],
)
def test_the_slower_the_link_the_more_is_saved(budget, megabits, expected):
    assert best(megabits, [LARGE, VECTOR], budget) in expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_slower_link_never_sends_more(ranks):
    sent = []
    for megabits in (1e6, 1e5, 1e4, 1e3, 100, 10, 1):
        made = model(megabits, [LARGE, SMALL, VECTOR], ranks=ranks)
        sent.append(made.sent(choose(made.plans()).choice))
    # A little more, where of equally quick methods the one that errs less is taken.
    assert all(after <= 1.05 * before for before, after in itertools.pairwise(sent))
    assert sent[0] > 10 * sent[-1]


def test_computing_that_costs_more_than_it_saves_is_left():
    assert best(1000, [LARGE], per_element=1e-9) != "none"
    assert best(1000, [LARGE], per_element=1e-6) == "none"


def test_latency_counts_by_operation():
    # PowerSGD's second round costs a second on a link as far as the moon.
    assert best(100, [LARGE], "powersgd", latency=0.0) == "powersgd"
    assert best(100, [LARGE], "powersgd", latency=1.0) == "none"
    for limit, more in ((2**30, 1), (4 * 2**20, 2)):  # one bucket of four parameters, or two
        plans = [
            {plan.name: plan.seconds for plan in made.plans()}
            for made in (
                model(10, [LARGE] * 4, "powersgd", limit=limit, latency=latency)
                for latency in (0.0, 0.1)
            )
        ]
        late = {name: plans[1][name] - plans[0][name] for name in plans[0]}
        assert late["powersgd"] - late["none"] == pytest.approx(more * 0.1)


def test_small_parameters_and_vectors_travel_raw():
    made = model(1, [LARGE, SMALL, VECTOR])
    chosen = choose(made.plans())
    assert set(chosen.choice) == {Form(LARGE, "float32")}
    assert best(1, [SMALL, VECTOR], "balanced") in ("none", "fp16")


def test_integers_are_never_compressed():
    specs = [spec(LARGE, dtype="int32")]
    methods = candidates(["int8", "topk"])
    assert survey(Alone(), methods, specs) == {}
    plans = Model(network(1), specs, {}, methods, 2**24).plans()
    assert [plan.name for plan in plans] == ["none"]


def test_of_equally_quick_methods_the_one_that_errs_less():
    specs = [spec(LARGE)]
    methods = candidates(["int8", "onebit"])
    message = (Message(0, "allgather", "", 1000),)
    equal = {(name, Form.of(specs[0])): Footprint(1e-6, message) for name in methods}
    for order in (["int8", "onebit"], ["onebit", "int8"]):
        known = {name: methods[name] for name in order}
        assert choose(Model(network(10), specs, equal, known, 2**24).plans()).name == order[0]


def test_each_parameter_gets_its_own_method_where_that_is_quicker():
    one, other = spec((512, 512), "one"), spec((256, 512), "other")
    methods = candidates(["int8", "onebit"])
    cheap, dear = (Footprint(t, (Message(0, "allgather", "", 1000),)) for t in (1e-3, 1.0))
    known = {
        ("int8", Form.of(one)): cheap, ("onebit", Form.of(one)): dear,
        ("int8", Form.of(other)): dear, ("onebit", Form.of(other)): cheap,
    }  # fmt: skip
    chosen = choose(Model(network(1), [one, other], known, methods, 2**24).plans())
    assert chosen.name == "mixed"
    assert chosen.choice == {Form.of(one): "int8", Form.of(other): "onebit"}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", [*BUDGETS["bold"]])
def test_what_is_watched_is_what_is_sent(name, ranks):
    """The bytes that a rank alone sees are those that ranks together send."""
    compressor = candidates([name])[name]
    about = spec((96, 128), ranks=ranks)
    made = watch(Alone(ranks), compressor, about)
    sent: list[tuple[str, int]] = []

    def note(request: Any) -> None:
        for each in operations(request):
            sent.append((type(each).__name__.lower(), each.tensor.nbytes))

    grad = np.random.default_rng(1).standard_normal((96, 128)).astype(np.float32)
    works = [compressor.reduce(OPS, grad, compressor.init(OPS, about)) for _ in range(ranks)]
    in_step([through(works[0], note), *works[1:]])
    assert [(each.kind.partition(" ")[0], each.payload) for each in made.messages] == sent
    assert made.seconds > 0


def test_the_share_of_a_payload_that_is_sent():
    assert [sent_share("allreduce float32", n) for n in (2, 4)] == [1.0, 1.5]
    assert [sent_share("allgather", n) for n in (2, 4)] == [1, 3]
    assert [sent_share("alltoall", n) for n in (2, 4)] == [0.5, 0.75]


def test_a_line_through_what_was_measured():
    line = fit([(1000, 2e-3), (100_000, 3e-3), (1_000_000, 12e-3)])
    assert line.beta == pytest.approx(1e-2 / 999_000)
    assert line.alpha == pytest.approx(2e-3 - 1000 * line.beta)
    assert fit([(1000, 2e-3), (64_000, 1e-3)]).beta == 0  # noise is no bandwidth


def test_the_plan_in_words():
    specs = [spec(LARGE, "weight"), spec(VECTOR, "bias")]
    methods = candidates(BUDGETS["balanced"])
    made = Model(network(10), specs, footprints(specs, methods, 3e-9), methods, 2**24)
    told = describe(found(network(10), made, specs, {True: 2.0, False: 0.1}))
    assert "measured for 1.5 s: allreduce takes 1 ms and 1.25 MB/s on 2 ranks" in told
    assert "exchanging 2.1 MB of gradients" in told
    assert "(2000.0 ms when tried)" in told and "100.0 ms when tried" in told
    assert re.search(r"powersgd: predicted [\d.]+ ms; serves 1 of 2 parameters", told)
    assert all(line.startswith("hvdx: ") for line in told.splitlines())
    quick = made.on(network(1e6))
    told = describe(found(network(1e6), quick, specs, {}))
    assert "no method saves 20% of that" in told


def found(link: Link, model: Model, specs: list[Spec], tried: dict[bool, float]) -> Found:
    clock = Review(Alone(), None, "auto", model, model.alternatives(), Pace(0, 1.0, False))
    return Found(link, model, clock, specs, tried, 1.5)


def test_one_rank_sends_nothing():
    auto = Compression.auto()
    assert auto.prepare is not None
    assert auto.prepare(Alone(ranks=1), [spec(LARGE)], None) is none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "brave"}, "budget='brave'.*safe, balanced, bold"),
        ({"methods": ["zip"]}, "unknown compression='zip'"),
        ({"methods": []}, "give a list"),
        ({"methods": "fp16"}, "give a list"),
        ({"methods": ["fp16", "dgc"]}, "cannot choose Compression.dgc"),
        ({"methods": ["auto"]}, "unknown compression='auto'"),
        ({"seconds": 0}, "seconds=0"),
        ({"every": -1}, "every=-1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(CompressionError, match=message):
        Compression.auto(**options)


def test_methods_by_name_or_as_they_are():
    own = Compression.powersgd(rank=2)
    assert list(candidates(["fp16", own, "none"])) == ["fp16", own.name]
    assert candidates(["int8"])["int8"].name == Compression.int8().name


def test_ranks_that_would_look_at_other_times_have_other_names():
    names = {Compression.auto(every=every).name for every in (0, 500, 501)}
    assert names >= {Compression.auto().name} and len(names) == 3


def test_it_cannot_be_used_before_ranks_have_met():
    auto = Compression.auto()
    with pytest.raises(CompressionError, match="when the ranks of an optimizer meet"):
        auto.init(OPS, spec(LARGE))


def test_it_can_be_a_key():
    """A tape keeps its buckets by compressor; once the methods' dictionary made that fail."""
    one, other = (Compression.auto(methods=["onebit"]) for _ in range(2))
    assert {one: 1, other: 2}[one] == 1
