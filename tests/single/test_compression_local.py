"""Outer steps, between ranks that live in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdx.comm import drive, in_step
from hvdx.compression import (
    Compression,
    CompressionError,
    Compressor,
    Local,
    Spec,
    after,
    as_compressor,
    as_local,
    error_feedback,
)
from hvdx.compression.local import Outer, outer_optimizer
from hvdx.compression.state import leaves
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")

OPS = NumpyOps()
SHAPE = (24, 40)


class Workers:
    """Ranks that move one parameter each, by what they are told, and take outer steps."""

    def __init__(self, training: Local, ranks: int, dtype: str = "float32") -> None:
        self.rounds = 0
        start = np.random.default_rng(1).normal(size=SHAPE).astype(dtype)
        self.parameters = [start.copy() for _ in range(ranks)]
        self.outer = training.outer(lambda spec: start)
        self.states = [self.outer.init(OPS, Spec("w", SHAPE, dtype, ranks))] * ranks

    def round(self, moves: Any) -> Any:
        for parameter, move in zip(self.parameters, moves, strict=True):
            parameter -= move.astype(parameter.dtype)
        works = [
            self.outer.at(self.rounds).reduce(OPS, parameter, state)
            for parameter, state in zip(self.parameters, self.states, strict=True)
        ]
        results = in_step(works)
        self.parameters = [result.mean.copy() for result in results]
        self.states = [result.state for result in results]
        self.rounds += 1
        for result in results:
            np.testing.assert_array_equal(result.mean, results[0].mean)
        return results[0].mean


def moves(ranks: int, rounds: int) -> Any:
    random = np.random.default_rng(0)
    common = random.normal(size=SHAPE)
    return 0.1 * (common + random.normal(size=(rounds, ranks, *SHAPE)))


def published(start: Any, moves: Any, lr: float, momentum: float) -> Any:
    """DiLoCo's algorithm 1, with the Nesterov momentum of its authors, in float64."""
    anchor, velocity = start.astype("float64"), 0.0
    for each in moves:
        grad = each.mean(0)
        velocity = momentum * velocity + grad
        anchor = anchor - lr * (grad + momentum * velocity)
    return anchor


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("lr, momentum", [(0.7, 0.9), (1.0, 0.0)])
def test_as_published(ranks, dtype, lr, momentum):
    training = Compression.diloco(8, lr, momentum, Compression.none)
    workers, given = Workers(training, ranks, dtype), moves(ranks, 6)
    expected = published(workers.parameters[0], given, lr, momentum)
    for each in given:
        result = workers.round(each)
    assert result.dtype == dtype
    exact = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2}[dtype]
    np.testing.assert_allclose(result, expected, atol=exact)
    kept = {leaf.path for leaf in leaves(workers.states[0])}
    assert kept == ({"anchor", "momentum"} if momentum else {"anchor"})


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_local_sgd_averages_parameters_and_keeps_nothing(dtype):
    workers, given = Workers(Compression.local_sgd(4), 3, dtype), moves(3, 4)
    expected = published(workers.parameters[0], given, 1.0, 0.0)
    for each in given:
        result = workers.round(each)
    assert result.dtype == dtype and workers.states == [None] * 3
    np.testing.assert_allclose(result, expected, atol={"float16": 1e-2}.get(dtype, 1e-5))


@pytest.mark.parametrize(
    "inner, near",
    [
        (Compression.int8, 0.01),
        (Compression.int4, 0.01),
        (Compression.onebit, 0.25),
        (Compression.topk(0.1, min_elements=0), 0.2),
    ],
    ids=["int8", "int4", "onebit", "topk"],
)
def test_compressed_outer_gradients(inner, near):
    for ranks in (2, 4):
        workers, given = Workers(Compression.diloco(8, compression=inner), ranks), moves(ranks, 30)
        start = workers.parameters[0].copy()
        expected = published(start, given, 0.7, 0.9)
        for each in given:
            result = workers.round(each)
        error, way = (np.linalg.norm(expected - other) for other in (result, start))
        assert error < near * way


def test_a_rank_that_has_diverged_is_seen_by_all():
    for training in (Compression.local_sgd(2), Compression.diloco(2)):
        workers, given = Workers(training, 3), moves(3, 1)[0]
        given[1, 0, 0] = np.nan
        assert not np.isfinite(workers.round(given)[0, 0])


def test_phases_count_outer_steps():
    """As the methods that choose for each parameter, or measure before they start."""
    late = after(2, error_feedback(Compression.fp16))
    workers = Workers(Compression.diloco(8, compression=late), 2)
    for each in moves(2, 3):
        before = [state.inner.residual for state in workers.states]
        workers.round(each)
        changed = any(
            np.any(state.inner.residual != old)
            for state, old in zip(workers.states, before, strict=True)
        )
        assert changed == (workers.rounds == 3)

    asked = []

    def prepare(*given: Any) -> Compressor:
        asked.append(given)
        return Compression.bf16._replace(policy=lambda spec: Compression.fp16)

    method = Compression.none._replace(prepare=prepare)
    outer = outer_optimizer(method, 0.7, 0.0, lambda spec: np.zeros(SHAPE, "f4"))
    chosen = outer.prepare("adapter", [], None).of(Spec("w", SHAPE, "float32", 2))
    assert asked == [("adapter", [], None)] and chosen.name == "diloco of fp16"
    assert isinstance(chosen.init(OPS, Spec("w", SHAPE, "float32", 2)), Outer)


def test_the_same_in_every_framework():
    tf, torch = pytest.importorskip("tensorflow"), pytest.importorskip("torch")
    start, change = (np.random.default_rng(i).normal(size=SHAPE).astype("f4") for i in (1, 2))
    results = []
    for ops, make in ((OPS, np.array), (TorchOps(), torch.tensor), (TensorFlowOps(), tf.constant)):
        outer = Compression.diloco(2).outer(lambda spec, make=make: make(start))
        state = outer.init(ops, Spec("w", SHAPE, "float32", 1))
        parameter = make(start - change)
        for _ in range(3):  # one rank: nothing is asked for but their number
            reduced = drive(outer.reduce(ops, parameter, state), lambda request: 1)
            parameter, state = reduced.mean, reduced.state
        results.append(np.asarray(parameter))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda c: c.local_sgd(0), r"local_sgd\(steps=0\): steps must be a whole number, 1"),
        (lambda c: c.diloco(2.5), r"diloco\(steps=2\.5\): steps must be a whole number, 1"),
        (lambda c: c.diloco(outer_lr=0), r"outer_lr=0\): outer_lr must be above 0"),
        (lambda c: c.diloco(outer_lr=float("nan")), r"outer_lr=nan\): outer_lr must be above 0"),
        (lambda c: c.diloco(outer_momentum=1), r"outer_momentum=1\).* 0 or more and below 1"),
        (lambda c: c.diloco(outer_momentum=-0.1), r"outer_momentum=-0\.1\).* 0 or more"),
        (lambda c: c.diloco(compression=c.dgc), r"diloco\(compression=.*dgc.*momentum"),
        (lambda c: c.diloco(compression=c.diloco), "way of training"),
        (lambda c: c.diloco(compression="int8"), "unknown compression='int8'; use one of"),
        (lambda c: as_compressor(c.local_sgd), r"local_sgd\(steps=8\) is a way of training"),
    ],
)
def test_bad_input(make, told):
    with pytest.raises(CompressionError, match=told):
        make(Compression)


def test_names():
    int8 = Compression.int8().name
    assert repr(as_local(Compression.diloco)) == (
        f"Compression.diloco(steps=32, outer_lr=0.7, outer_momentum=0.9, compression={int8})"
    )
    assert as_local(training := Compression.local_sgd(4)) is training
    assert as_local(Compression.int8) is None and as_local(Compression.none) is None
