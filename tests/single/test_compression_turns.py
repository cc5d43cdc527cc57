"""Methods that take turns, and when Compression.auto looks again: in memory, by a clock of ours."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from hvdx import link
from hvdx.comm import in_step, through
from hvdx.compression import Compression, Spec, after
from hvdx.compression import review as reviews
from hvdx.compression.plans import Form, Model
from hvdx.compression.review import RAW, Pace, Review
from hvdx.compression.state import leaves
from hvdx.compression.turns import DELIVER, Clock, taking_turns
from hvdx.link import Footprint, Line, Link, Message
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps

METHODS = {
    "int8": Compression.int8(),
    "rounded": Compression.int8(rounding="stochastic"),
    "onebit": Compression.onebit(),
    "int4": Compression.int4(),
    "powersgd": Compression.powersgd(2),
    "topk": Compression.topk(0.05),
}
TURNS = ["none", *METHODS]
SHAPE = (64, 96)


class Told(Clock):
    """Does as it is told."""

    def __init__(self, *turns: int) -> None:
        super().__init__()
        self.wait, self.turns = 1, list(turns)

    def turn(self, specs: Any) -> int:
        return self.turns[0]

    def review(self, delivered: bool) -> int:
        self.turns.pop(0)
        return 1


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("make", [NumpyOps, TorchOps, TensorFlowOps])
def test_what_is_applied_and_owed_is_all_there_was(make, ranks):
    """However methods take turns, if what is owed is delivered before those without feedback."""
    library = {TorchOps: "torch", TensorFlowOps: "tensorflow"}.get(make)
    module = pytest.importorskip(library) if library else np
    tensor = {"torch": "tensor", "tensorflow": "constant"}.get(library or "", "array")
    ops, tensor = make(), getattr(module, tensor)
    names = ["onebit", "powersgd", "onebit", None, "none", "int4", "topk", None, "powersgd"]
    compressor = taking_turns("turns", METHODS, TURNS, Told())
    spec = Spec("weight", SHAPE, "float32", ranks)
    states = [compressor.init(ops, spec) for _ in range(ranks)]
    random, true, applied = np.random.default_rng(0), 0.0, 0.0
    for name in names:
        phase = compressor.at(DELIVER if name is None else RAW + TURNS.index(name))
        grads = random.normal(size=(ranks, *SHAPE)).astype("f4")
        works = [
            through(phase.reduce(ops, tensor(grad), state), make=tensor)
            for grad, state in zip(grads, states, strict=True)
        ]
        results = in_step(works)
        states = [result.state for result in results]
        true, applied = true + grads.mean(0, dtype="f8"), applied + np.asarray(results[0].mean)
        owed = pending(states)
        np.testing.assert_allclose(applied + owed, true, atol=1e-4)
        assert owed.any() == (name not in (None, "none"))
        form = [(leaf.path, tuple(leaf.tensor.shape)) for leaf in leaves(states[0])]
    assert form == [(leaf.path, leaf.tensor.shape) for leaf in leaves(compressor.init(ops, spec))]


def pending(states: list[Any]) -> Any:
    owed = np.mean([np.asarray(state.residual) for state in states], 0, dtype="f8")
    fields = {leaf.path for leaf in leaves(states[0]) if leaf.kind == "piece"}
    for path in fields:
        pieces = [leaf.tensor for s in states for leaf in leaves(s) if leaf.path == path]
        owed = owed + np.concatenate(pieces)[: owed.size].reshape(owed.shape)
    return owed


def test_a_delivery_that_is_not_finite_delivers_nothing():
    compressor = taking_turns("turns", METHODS, TURNS, Told())
    spec, ops = Spec("weight", SHAPE, "float32", 3), NumpyOps()
    grads = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype("f4")
    states = [compressor.init(ops, spec) for _ in range(3)]
    one = compressor.at(RAW + TURNS.index("onebit"))
    states = [r.state for r in in_step(list(map(one.reduce, [ops] * 3, grads, states)))]
    grads[1, 2, 3] = np.inf
    results = in_step(list(map(compressor.at(DELIVER).reduce, [ops] * 3, grads, states)))
    assert not np.isfinite(results[0].mean).all()
    for result, state in zip(results, states, strict=True):
        for new, old in zip(leaves(result.state), leaves(state), strict=True):
            np.testing.assert_array_equal(new.tensor, old.tensor)


def test_methods_without_state_keep_none():
    compressor = taking_turns("turns", METHODS, ["none", "int8"], Told())
    assert compressor.init(NumpyOps(), Spec("weight", SHAPE, "float32", 2)) is None
    assert not compressor.stateful


def test_what_comes_after_some_steps():
    clock = Told(RAW, RAW + 1)
    compressor = after(3, taking_turns("turns", METHODS, ["none", "onebit"], clock))
    again = after(3, taking_turns("turns", METHODS, ["none", "onebit"], clock))
    assert compressor.clock is again.clock  # one for all parameters
    later = compressor.clock
    assert later.wait == 3 and later.turn([]) == -1
    assert later.review(True) == 1 and later.turn([]) == RAW
    assert later.review(True) == 1 and later.turn([]) == RAW + 1
    sent: list[Any] = []
    grads, state = np.ones((2, *SHAPE), "f4"), compressor.init(NumpyOps(), Spec("w", SHAPE, "f4"))
    works = [compressor.at(-1).reduce(NumpyOps(), grad, state) for grad in grads]
    results = in_step([through(work, sent.append) for work in works])
    assert results[0].state is state and sent[-1].tensor.nbytes == grads[0].nbytes


# -- looking again


class Ranks:
    """An adapter of one process that stands for all, and the time that passes."""

    def __init__(self) -> None:
        self.now = 0.0

    def at_once(self) -> Any:
        return contextlib.nullcontext()

    def place(self, process_set: Any) -> int:
        return 0

    def allgather_object(self, value: Any, name: str, process_set: Any) -> list[Any]:
        return [value]


class Training:
    """Steps that take as long as the turns say; networks are measured as told."""

    def __init__(self, monkeypatch: Any, seconds: dict[int, float], *, every: int = 100) -> None:
        self.adapter, self.seconds = Ranks(), seconds
        self.megabits, self.measuring, self.measured = 300.0, 0.2, 0
        monkeypatch.setattr(reviews.time, "perf_counter", lambda: self.adapter.now)
        monkeypatch.setattr(link, "measure", self.measure)
        self.spec = Spec("weight", (512, 512), "float32", 2)
        self.form = Form.of(self.spec)
        footprints = {("onebit", self.form): Footprint(1e-3, (Message(0, "allgather", "", 2**15),))}
        methods = {"onebit": METHODS["onebit"]}
        model = Model(self.network(), [self.spec], footprints, methods, 2**24)
        pace = Pace(every, 1.0, True)
        plans = model.alternatives()
        self.clock = Review(self.adapter, None, "auto", model, plans, pace)
        self.left = self.clock.wait
        self.turns: list[int] = []

    def network(self) -> Link:
        return Link(2, dict.fromkeys(link.KINDS, Line(1e-3, 8e-6 / self.megabits)))

    def measure(self, adapter: Any, process_set: Any, seconds: float, name: str) -> Link:
        self.measured += 1
        self.adapter.now += min(seconds, self.measuring)
        return self.network()

    def run(self, steps: int, delivered: bool = True) -> list[int]:
        ran = []
        for _ in range(steps):
            ran.append(self.clock.turn([self.spec]))
            self.adapter.now += self.seconds[ran[-1]]
            self.left -= 1
            if not self.left:
                self.left = self.clock.review(delivered)
        self.turns += ran
        return ran


BIT = RAW + 1  # onebit's turn


def test_steps_without_compression_are_tried_where_they_are_cheap(monkeypatch, capsys):
    training = Training(monkeypatch, {DELIVER: 0.3, RAW: 0.3, BIT: 0.2})
    assert training.run(5 + 6 + 50) == [BIT] * 5 + [BIT, RAW] * 3 + [BIT] * 50
    told = capsys.readouterr().err
    assert "a step takes 200.0 ms with onebit and 300.0 ms raw" in told
    assert "predicted to save" in told and "from here" not in told


def test_compression_goes_where_it_does_not_pay(monkeypatch, capsys):
    training = Training(monkeypatch, {DELIVER: 0.2, RAW: 0.2, BIT: 0.2})
    tried = [BIT, RAW] * 3 + [DELIVER]
    assert training.run(12 + 100) == [BIT] * 5 + tried + [RAW] * 100
    assert "gradients travel raw from here" in capsys.readouterr().err
    training.seconds[BIT] = 0.1  # other work has ended, say: the next look sees it
    assert training.run(100) == [BIT, RAW] * 3 + [BIT] * 94


def test_raw_steps_that_would_cost_much_are_not_tried(monkeypatch):
    training = Training(monkeypatch, {DELIVER: 9.0, RAW: 9.0, BIT: 0.2})
    training.megabits = 1.0
    training.clock._model = training.clock._model.on(training.network())  # 8 s are to be saved
    assert training.run(1000) == [BIT] * 1000


def test_the_network_is_measured_again(monkeypatch, capsys):
    training = Training(monkeypatch, {DELIVER: 0.3, RAW: 0.3, BIT: 0.2})
    training.run(11 + 100)
    assert training.measured == 1
    training.megabits = 1e6
    training.run(6 + 100)
    assert training.run(1 + 99) == [DELIVER] + [RAW] * 99
    assert "none instead of onebit" in capsys.readouterr().err
    training.megabits = 300.0
    training.run(1)
    assert training.measured == 3
    assert training.run(6 + 94) == [BIT, RAW] * 3 + [BIT] * 94


def test_what_is_not_delivered_is_sent_again(monkeypatch):
    training = Training(monkeypatch, {DELIVER: 0.3, RAW: 0.3, BIT: 0.2})
    training.run(11 + 100)
    training.megabits = 1e6
    training.run(6 + 99)
    assert training.run(3, delivered=False) == [BIT, DELIVER, DELIVER]
    assert training.run(3) == [DELIVER, RAW, RAW]


@pytest.mark.parametrize("step", [1e-3, 0.03, 0.3])
def test_looking_takes_a_small_share_of_the_time(monkeypatch, step):
    """However short steps are: then it looks seldom."""
    seconds = {DELIVER: 1.05 * step, RAW: 1.05 * step, BIT: step}
    training = Training(monkeypatch, seconds)
    training.measuring = 0.2
    training.run(5 + 7)  # the first look costs what it may
    start, steps = training.adapter.now, 20_000
    training.run(steps)
    assert training.adapter.now - start < 1.03 * steps * seconds[RAW]
    assert training.measured > 0


def test_never_again(monkeypatch):
    training = Training(monkeypatch, {DELIVER: 0.3, RAW: 0.3, BIT: 0.2}, every=0)
    training.run(2000)
    assert training.measured == 0 and training.left > 2**50
