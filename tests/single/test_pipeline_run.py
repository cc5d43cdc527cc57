"""The engine: real arithmetic on threads, the same bits under every schedule, errors everywhere."""

from __future__ import annotations

import itertools
import json
import threading
import time

import numpy as np
import pytest

from hvdx.errors import PipelineError
from hvdx.pipeline.channel import Failure, Key, LocalChannel
from hvdx.pipeline.greedy import zbv
from hvdx.pipeline.run import LocalRanks, run
from hvdx.pipeline.schedule import (
    forward_only,
    gpipe,
    interleaved,
    needs,
    one_f_one_b,
    peak_live,
    vee,
    zb1p,
)

LAYERS, WIDTH, BATCH, MICRO = 8, 6, 13, 8  # 13 samples in 8 micro-batches: of 1 and of 2


class Layers:
    """Some tanh layers of a model with a skip from layer 1 to layer 6, which stages relay.

    The live set is (h, skip); a gradient through layer 6 reaches layer 1 beside the main one.
    """

    def __init__(self, weights, layers, x, y):
        self.weights, self.layers = {i: weights[i] for i in layers}, list(layers)
        self.gradients = {i: np.zeros_like(weights[i]) for i in layers}
        self.x, self.y = np.array_split(x, MICRO), np.array_split(y, MICRO)
        self.kept, self.waiting, self.outputs, self.losses = {}, {}, {}, {}
        self.peak = 0
        self.unit = None

    def forward(self, micro_batch, inputs):
        h, skip = inputs or (self.x[micro_batch], None)
        saved = []
        for i in self.layers:
            self.unit = f"layer{i}"
            given = h + skip if i == 6 else h
            h = np.tanh(given @ self.weights[i])
            saved.append((given, h))
            if i == 1:
                skip = h
        self.kept[micro_batch] = saved
        self.peak = max(self.peak, len(self.kept) + len(self.waiting))
        self.outputs[micro_batch] = h
        return [h, skip]

    def _run_back(self, micro_batch, gradients):
        """Yield per layer, from the last, what its weights' gradient needs; return (g, skip)."""
        saved = self.kept.pop(micro_batch)
        if gradients is None:
            error = saved[-1][1] - self.y[micro_batch]
            self.losses[micro_batch] = float((error**2).sum()) / BATCH
            gradients = 2 * error / BATCH, None
        g, skip = gradients
        needs = []
        for i, (given, h) in zip(reversed(self.layers), reversed(saved), strict=True):
            self.unit = f"layer{i}"
            if i == 1:
                g = skip + g
            inner = g * (1 - h**2)
            needs.append((i, given, inner))
            g = inner @ self.weights[i].T
            if i == 6:
                skip = g
        return (g, skip), needs

    def _add(self, needs):
        for i, given, inner in needs:
            self.gradients[i] += given.T @ inner

    def backward(self, micro_batch, gradients):
        result, needs = self._run_back(micro_batch, gradients)
        self._add(needs)
        return result

    def input_gradient(self, micro_batch, gradients):
        result, self.waiting[micro_batch] = self._run_back(micro_batch, gradients)
        return result

    def weight_gradient(self, micro_batch):
        self._add(self.waiting.pop(micro_batch))


def problem():
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal((WIDTH, WIDTH)) / 2 for _ in range(LAYERS)]
    return weights, draw.standard_normal((BATCH, WIDTH)), draw.standard_normal((BATCH, WIDTH))


def stages_of(count, weights, x, y, kind=Layers):
    edges = [LAYERS * s // count for s in range(count + 1)]
    return {s: kind(weights, range(edges[s], edges[s + 1]), x, y) for s in range(count)}


def trained(schedule, steps=3):
    """Train; return weights, losses and the stages."""
    weights, x, y = problem()
    losses = []
    stages = stages_of(schedule.stages, weights, x, y)
    with LocalRanks(stages, schedule.ranks) as ranks:
        for step in range(steps):
            ranks.run(schedule, step)
            last = stages[schedule.stages - 1].losses
            losses.append(sum(last[k] for k in range(MICRO)))
            for stage in stages.values():
                for i, gradient in stage.gradients.items():
                    weights[i] -= 0.1 * gradient
                    gradient[...] = 0
                assert not stage.kept and not stage.waiting
    return weights, losses, stages


def unsplit():
    """Train without stages, schedule or engine."""
    weights, x, y = problem()
    model = Layers(weights, range(LAYERS), x, y)
    losses = []
    for _ in range(3):
        for k in range(MICRO):
            model.forward(k, None)
            model.backward(k, None)
        losses.append(sum(model.losses[k] for k in range(MICRO)))
        for i, gradient in model.gradients.items():
            weights[i] -= 0.1 * gradient
            gradient[...] = 0
    return weights, losses


METHODS = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "1f1b-slack": lambda p, m: one_f_one_b(p, m, slack=True),
    "interleaved": interleaved,
    "interleaved-zb": lambda p, m: interleaved(p, m, split=True),
    "zb1p": zb1p,
    "zbv": zbv,
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_bits_under_every_schedule(name):
    expected, losses = unsplit()
    assert losses[0] > losses[1] > losses[2]
    for ranks in (1, 2, 3, 4):
        schedule = METHODS[name](ranks, MICRO)
        weights, told, stages = trained(schedule)
        assert told == losses
        assert all(np.array_equal(a, b) for a, b in zip(weights, expected, strict=True))
        assert [stage.peak for stage in stages.values()] == peak_live(schedule)


def test_inference():
    weights, x, y = problem()
    stages = stages_of(4, weights, x, y)
    with LocalRanks(stages, 2) as ranks:
        spans = ranks.run(forward_only(vee(2), MICRO))
    whole = Layers(weights, range(LAYERS), x, y)
    for k in range(MICRO):
        whole.forward(k, None)
        assert np.array_equal(stages[3].outputs[k], whole.outputs[k])
    assert [len(row) for row in spans] == [2 * MICRO] * 2


def test_spans_follow_the_schedule():
    schedule = one_f_one_b(3, MICRO)
    with LocalRanks(stages_of(3, *problem()), 3) as ranks:
        spans = ranks.run(schedule)
    assert tuple(tuple(span.action for span in row) for row in spans) == schedule.rows
    ends = {span.action: span.end for row in spans for span in row}
    for row in spans:
        assert all(a.end <= b.start for a, b in itertools.pairwise(row))
        for span in row:
            assert all(ends[need] <= span.start for need in needs(span.action, 3))


class Broken(Layers):
    """Raises in layer 5 in the third micro-batch's forward or backward."""

    at = "forward"

    def forward(self, micro_batch, inputs):
        result = super().forward(micro_batch, inputs)
        if self.at == "forward":
            self._break(micro_batch)
        return result

    def backward(self, micro_batch, gradients):
        if self.at == "backward":
            self._break(micro_batch)
        return super().backward(micro_batch, gradients)

    def _break(self, micro_batch):
        if micro_batch == 2 and 5 in self.layers:
            self.unit = "layer5"
            raise ValueError("shapes do not fit")


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_an_error_reaches_all_ranks(monkeypatch, at):
    monkeypatch.setattr(Broken, "at", at)
    schedule = one_f_one_b(4, MICRO)
    stages = stages_of(4, *problem(), kind=Broken)
    channel, raised = LocalChannel(), {}

    def rank(number):
        try:
            run(schedule, number, stages, channel, step=7)
        except PipelineError as error:
            raised[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 2
    assert sorted(raised) == [0, 1, 2, 3]
    for error in raised.values():
        where = (
            f"rank 2, stage 2, unit 'layer5', {at} of micro-batch 2 in step 7: ValueError: shapes"
        )
        assert str(error).startswith(where)
        assert "Schedule of rank 2: 2F0 2F1" in str(error)
        assert f"[2{at[0].upper()}2]" in error.failure.row
        assert 'raise ValueError("shapes do not fit")' in error.failure.traceback
    assert isinstance(raised[2].__cause__, ValueError)
    with pytest.raises(PipelineError, match="shapes do not fit"):
        channel.put(Key("F", 8, 1, 0), [])


def test_local_ranks_raise_with_the_cause_and_leave_no_threads():
    before = threading.active_count()
    ranks = LocalRanks(stages_of(4, *problem(), kind=Broken), 4)
    with pytest.raises(PipelineError, match="unit 'layer5'") as error:
        ranks.run(one_f_one_b(4, MICRO))
    assert isinstance(error.value.__cause__, ValueError)
    ranks.close()
    ranks.close()
    assert threading.active_count() == before


def test_the_next_step_is_not_disturbed_by_an_error():
    stages = stages_of(2, *problem(), kind=Broken)
    with LocalRanks(stages, 2) as ranks:
        with pytest.raises(PipelineError):
            ranks.run(one_f_one_b(2, MICRO))
        fresh = stages_of(2, *problem())
        stages.update(fresh)
        ranks.run(one_f_one_b(2, MICRO), step=1)


def test_a_stage_that_hangs():
    """The rank that waits says for what, and the other learns it when it comes back."""
    gate = threading.Event()

    class Hanging(Layers):
        def forward(self, micro_batch, inputs):
            if 0 in self.layers and micro_batch == 1:
                gate.wait(10)
            return super().forward(micro_batch, inputs)

    channel = LocalChannel(0.2)
    stages = stages_of(2, *problem(), kind=Hanging)
    schedule = gpipe(2, MICRO)
    ended = []

    def hang():
        with pytest.raises(PipelineError, match=r"^rank 1, stage 1, forward"):
            run(schedule, 0, stages, channel)
        ended.append(True)

    hanging = threading.Thread(target=hang)
    hanging.start()
    message = (
        r"rank 1, stage 1, forward of micro-batch 1 in step 0: TimeoutError: stage 1 has waited "
        r"0\.2 s for the activations of micro-batch 1 in step 0 from stage 0: it hangs or takes "
    )
    with pytest.raises(PipelineError, match=message):
        run(schedule, 1, stages, channel)
    gate.set()
    hanging.join(5)
    assert ended


def test_of_a_long_row_only_the_surroundings_are_told():
    class Late(Layers):
        def backward(self, micro_batch, gradients):
            raise ValueError

    stages = stages_of(1, *problem(), kind=Late)
    with pytest.raises(PipelineError) as error:
        run(gpipe(1, MICRO), 0, stages, LocalChannel())
    assert error.value.failure.row == (
        "0F0 0F1 0F2 0F3 0F4 0F5 0F6 0F7 [0B0] 0B1 0B2 0B3 0B4 0B5 0B6 0B7"
    )
    with pytest.raises(PipelineError) as error:
        run(gpipe(1, 20), 0, {0: Endless()}, LocalChannel())
    assert error.value.failure.row.startswith("... 0F12 0F13")
    assert error.value.failure.row.endswith("[0B0] 0B1 0B2 0B3 0B4 0B5 0B6 0B7 0B8 ...")


class Endless:
    """Computes nothing, and no backward."""

    def forward(self, micro_batch, inputs):
        return []


def test_an_interrupt_is_told_and_stays_what_it_is():
    class Interrupted(Layers):
        def forward(self, micro_batch, inputs):
            raise KeyboardInterrupt

    channel = LocalChannel()
    stages = stages_of(2, *problem(), kind=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(gpipe(2, MICRO), 0, stages, channel)
    with pytest.raises(PipelineError, match="rank 0, stage 0, forward of micro-batch 0 in step 0: "
                                            "KeyboardInterrupt"):  # fmt: skip
        run(gpipe(2, MICRO), 1, stages, channel)


def test_messages_are_found_by_key_in_any_order():
    channel = LocalChannel(1)
    keys = [Key(kind, 0, stage, k) for kind in "FB" for stage in (0, 1) for k in range(3)]
    for number, key in enumerate(keys):
        channel.put(key, [number])
    assert [channel.get(key) for key in reversed(keys)] == [[n] for n in reversed(range(12))]
    channel.put(keys[0], [None])
    with pytest.raises(ValueError, match="was put twice"):
        channel.put(keys[0], [None])
    channel.close()


def test_who_sends_what():
    assert Key("F", 0, 3, 1).sender == 2
    assert Key("B", 0, 3, 1).sender == 4


def test_the_first_failure_stands():
    channel = LocalChannel()
    for text in ("first", "second"):
        channel.fail(Failure(1, text))
    with pytest.raises(PipelineError, match=r"^rank 1: first$"):
        channel.get(Key("F", 0, 1, 0))


def test_a_failure_travels_as_json():
    failure = Failure(1, "ValueError: no", "stage 1", "[1F0]", "Traceback ...")
    assert Failure(**json.loads(json.dumps(failure._asdict()))) == failure
    assert str(failure.exception()) == (
        "rank 1, stage 1: ValueError: no\nSchedule of rank 1: [1F0]\n"
        "Traceback on rank 1:\nTraceback ..."
    )
