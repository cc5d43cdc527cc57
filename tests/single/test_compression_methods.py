"""What every method must hold, between ranks that live in this process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hvdx import link
from hvdx.comm import FACTS, Allgather, Rank, Ranks, drive, in_step, through
from hvdx.compression import (
    Compression,
    CompressionError,
    Compressor,
    Spec,
    after,
    as_compressor,
    error_feedback,
    min_size,
    momentum,
)
from hvdx.compression.feedback import Feedback
from hvdx.compression.state import leaves, rebuilt
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps

pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow encountered")

OPS = NumpyOps()
SHAPE = (48, 96)
METHODS = {
    "fp16": Compression.fp16,
    "bf16": Compression.bf16,
    "int8": Compression.int8(),
    "int8 with feedback": Compression.int8(feedback=True),
    "int4": Compression.int4(),
    "int8 at random": Compression.int8(rounding="stochastic"),
    "int4 at random": Compression.int4(rounding="stochastic"),
    "onebit": Compression.onebit(),
    "onebit by matrix": Compression.onebit(scales="matrix"),
    "topk": Compression.topk(0.02),
    "dgc": Compression.dgc(0.02),
    "randomk": Compression.randomk(0.05),
    "powersgd": Compression.powersgd(4),
    "powersgd in turns": Compression.powersgd(4, alternating=True),
}
WITHOUT_FEEDBACK = ("fp16", "bf16", "int8", "int8 at random", "dgc")
WITH_FEEDBACK = [name for name in METHODS if name not in WITHOUT_FEEDBACK]
SIZES = [1, 2, 3, 4]
every = pytest.mark.parametrize("name", METHODS)


class Job:
    """Ranks that reduce one parameter, step after step."""

    def __init__(self, compressor: Compressor, ranks: int, shape: Any = SHAPE) -> None:
        self.compressor = compressor
        spec = Spec("layer.weight", tuple(shape), "float32", ranks)
        self.states = [compressor.init(OPS, spec) for _ in range(ranks)]
        self.sent = 0

    def step(self, grads: list[Any]) -> Any:
        works = [
            through(self.compressor.reduce(OPS, grad, state), see=self._count)
            for grad, state in zip(grads, self.states, strict=True)
        ]
        results = in_step(works)
        self.states = [result.state for result in results]
        for result in results:  # replicas stay equal to the last bit
            np.testing.assert_array_equal(result.mean, results[0].mean)
            assert result.mean.dtype == grads[0].dtype and result.mean.shape == grads[0].shape
        return results[0].mean

    def _count(self, request: Any) -> None:
        """Add up what a rank sends on average."""
        ranks = len(self.states)
        self.sent += link.sent(OPS, request, ranks) / ranks

    def owed(self) -> Any:
        """Return what error feedback still has to deliver to the mean."""
        owed = np.mean([state.residual for state in self.states], 0, dtype=np.float64)
        pieces = [x.tensor for s in self.states for x in leaves(s) if x.kind == "piece"]
        if pieces:
            owed = owed + np.concatenate(pieces)[: owed.size].reshape(owed.shape)
        return owed


def gradients(ranks: int, steps: int, shape: Any = SHAPE, seed: int = 0) -> Any:
    """Return gradients (step, rank, ...) with a common part, as in training."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(1, 1, *shape))
    return (common + random.normal(size=(steps, ranks, *shape))).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("fp16", 1e-3),
        ("bf16", 5e-3),
        ("int8", 0.02),
        ("int8 with feedback", 0.02),
        ("int4", 0.3),
        ("int8 at random", 0.03),
        ("int4 at random", 0.5),
    ],
)
def test_the_mean_is_near(name, bound):
    """One step; the methods that send little deliver it over many: see the next test."""
    for ranks in SIZES:
        grads = gradients(ranks, 1)[0]
        mean = Job(METHODS[name], ranks).step(list(grads))
        assert np.abs(mean - grads.mean(0)).max() <= bound * np.abs(grads).max()


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_nothing_is_lost(name):
    """Gate: what was applied and what is owed add up to the true gradients."""
    for ranks in SIZES:
        job = Job(METHODS[name], ranks)
        applied, true = np.zeros(SHAPE), np.zeros(SHAPE)
        for grads in gradients(ranks, steps=40):
            applied += job.step(list(grads))
            true += grads.mean(0, dtype=np.float64)
        missing = applied + job.owed() - true
        assert np.linalg.norm(missing) / np.linalg.norm(true) <= 1e-5


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_residuals_stay_bounded(name):
    ranks, norms, random = 3, [], np.random.default_rng(0)
    job = Job(METHODS[name], ranks)
    for grads in random.normal(size=(200, ranks, *SHAPE)).astype(np.float32):
        job.step(list(grads))
        norms.append(max(float(np.linalg.norm(state.residual)) for state in job.states))
    assert max(norms[150:]) <= 1.1 * max(norms[50:100])


@pytest.mark.parametrize("name", ["onebit by matrix", "int4"])
def test_an_outlier_is_sent(name):
    """Signs of one size for 1024 elements hold it back for hundreds of steps. With sizes by rows
    and columns, a mean magnitude in place of least squares would send it several times over:
    residuals would grow, and sizes with them."""
    job, random = Job(METHODS[name], 2), np.random.default_rng(0)
    for _ in range(100):
        grads = random.normal(size=(2, *SHAPE)).astype(np.float32)
        grads[:, 20, 30] = 100
        job.step(list(grads))
    assert max(float(np.abs(state.residual).max()) for state in job.states) <= 100


@pytest.mark.parametrize(("method", "factor"), [("onebit", 0.35), ("int4", 0.05)])
def test_without_feedback_codecs_end_elsewhere(method, factor):
    """The negative control. Ranks pull to places of their own, and meet in the middle only
    with what rounding lost: without it, what large elements lose stays lost."""
    random = np.random.default_rng(0)
    target, apart = random.normal(size=SHAPE), random.normal(size=(3, *SHAPE)) ** 3
    apart -= apart.mean(0)
    errors = {}
    for feedback in (True, False):
        job, x = Job(getattr(Compression, method)(feedback=feedback), 3), np.zeros(SHAPE)
        for step in range(300):
            mean = job.step([(x - target + own).astype(np.float32) for own in apart])
            x = x - 0.2 / (1 + step / 50) * mean
        errors[feedback] = np.linalg.norm(x - target) / np.linalg.norm(target)
    assert errors[True] < factor * errors[False], errors


@pytest.mark.parametrize("name", [n for n in METHODS if "powersgd" not in n])
@pytest.mark.parametrize("ranks", [2, 4])
def test_frameworks_agree_to_the_last_bit(name, ranks):
    """Replicas may even differ in framework; PowerSGD's factors come from libraries."""
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("tensorflow")
    compressor = METHODS[name]
    spec = Spec("layer.weight", SHAPE, "float32", ranks)

    def steps(ops: Any, tensor: Any) -> Any:
        states = [compressor.init(ops, spec) for _ in range(ranks)]
        for grads in gradients(ranks, 3):
            works = [
                through(compressor.reduce(ops, tensor(grad), state), make=tensor)
                for grad, state in zip(grads, states, strict=True)
            ]
            results = in_step(works)
            states = [result.state for result in results]
        return np.asarray(results[0].mean)

    expected = steps(OPS, np.array)
    np.testing.assert_array_equal(steps(TorchOps(), torch.tensor), expected)
    np.testing.assert_array_equal(steps(TensorFlowOps(), tf.constant), expected)


@pytest.mark.parametrize("name", ["powersgd", "powersgd in turns"])
def test_frameworks_agree_on_powersgd(name):
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("tensorflow")
    compressor = METHODS[name]
    spec = Spec("layer.weight", SHAPE, "float32", 2)
    means = []
    for ops, tensor in (
        (OPS, np.array),
        (TorchOps(), torch.tensor),
        (TensorFlowOps(), tf.constant),
    ):
        states = [compressor.init(ops, spec) for _ in range(2)]
        for grads in gradients(2, 4):
            works = [
                through(compressor.reduce(ops, tensor(g), s), make=tensor)
                for g, s in zip(grads, states, strict=True)
            ]
            results = in_step(works)
            states = [result.state for result in results]
        means.append(np.asarray(results[0].mean))
    np.testing.assert_allclose(means[1], means[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(means[2], means[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("fp16", "bf16")])
def test_in_a_graph(name):
    """Two steps, of a tensor with more elements than 16 bits count; shapes must be known."""
    tf = pytest.importorskip("tensorflow")
    shape, ops, compressor = (300, 400), TensorFlowOps(), METHODS[name]
    spec = Spec("layer.weight", shape, "float32", 2)
    given = gradients(1, 2, shape)[:, 0]

    def step(ops: Any, twice: Any, grad: Any, state: Any) -> Any:
        def answer(request: Any) -> Any:
            if isinstance(request, FACTS):
                return {Ranks: 2, Rank: 0}.get(type(request))
            return twice(request.tensor) if isinstance(request, Allgather) else request.tensor

        done = drive(compressor.reduce(ops, grad, state), answer)
        return done.mean, done.state

    traced = tf.function(lambda g, s: step(ops, lambda x: tf.concat([x, x], 0), g, s))
    state, expected = compressor.init(ops, spec), compressor.init(OPS, spec)
    for grad in given:
        mean, state = traced(tf.constant(grad), state)
        exact, expected = step(OPS, lambda x: np.concatenate([x, x]), grad, expected)
        assert mean.shape == shape
        atol = 1e-3 if "powersgd" in name else 0
        np.testing.assert_allclose(mean, exact, rtol=0, atol=atol)
        for one, other in zip(leaves(state), leaves(expected), strict=True):
            np.testing.assert_allclose(one.tensor, other.tensor, rtol=atol, atol=atol)
    assert traced.experimental_get_tracing_count() == 1


@every
@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (2,), (7, 11), (3, 5, 2, 2), ()], ids=str)
def test_awkward_shapes(name, shape):
    """Empty ones among them, and some of fewer elements than there are ranks."""
    for ranks in SIZES:
        job = Job(METHODS[name], ranks, shape)
        for grads in gradients(ranks, 3, shape):
            mean = job.step([np.asarray(grad) for grad in grads])
        assert mean.shape == shape and np.isfinite(mean).all()


AWKWARD = {
    "zeros": np.zeros(SHAPE),
    "subnormal": np.full(SHAPE, 1e-41),
    "huge": np.full(SHAPE, 1e35),
    "rank one": np.outer(np.arange(SHAPE[0]), np.arange(SHAPE[1])),
    "one rank idle": np.random.default_rng(0).normal(size=SHAPE),
}


@pytest.mark.parametrize("name", ["int8 with feedback", "int4", "onebit"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [140, 1030, 5000])
def test_padding_is_no_part_of_the_gradient(name, ranks, size):
    """Owners once took what padding decodes to (no sign is a zero) for elements: means of few
    elements came out many times too large, and grew from step to step."""
    job = Job(METHODS[name], ranks, (size,))
    for grads in gradients(ranks, 5, (size,)):
        assert np.abs(job.step(list(grads))).max() <= 8 * np.abs(grads).max()


def test_what_owners_owe_to_rows_that_fell_silent_is_sent():
    """Sizes must count it: by gradients alone such rows are as good as zero, and what the owners'
    rounding has lost of them would stay with the owners. Signs that three ranks do not share are
    written without loss by the ranks, and with it by owners."""
    job, random = Job(METHODS["onebit by matrix"], 3), np.random.default_rng(0)
    true, applied = np.zeros(SHAPE), np.zeros(SHAPE)
    for step in range(60):
        grads = np.sign(random.normal(size=(3, *SHAPE))).astype(np.float32)
        if step:
            grads[:, 1:] = 0
        true, applied = true + grads.mean(0), applied + job.step(list(grads))
    assert np.abs(true - applied)[1:].max() <= 0.05


@every
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_values(name, kind):
    base = AWKWARD[kind].astype(np.float32)
    for ranks in (2, 3):
        job = Job(METHODS[name], ranks)
        for _ in range(3):
            grads = [base] * ranks
            if kind == "one rank idle":
                grads = [np.zeros_like(base), *grads[1:]]
            mean = job.step(grads)
            assert np.isfinite(mean).all()
        if kind == "zeros":
            assert not mean.any()


@every
@pytest.mark.parametrize(("ranks", "bad"), [(2, np.nan), (3, np.nan), (3, np.inf)])
def test_what_is_not_finite_reaches_all_and_leaves_the_residual(name, ranks, bad):
    job = Job(METHODS[name], ranks)
    good = gradients(ranks, 3)
    job.step(list(good[0]))
    poisoned = [grad.copy() for grad in good[1]]
    poisoned[1][5, 7] = bad
    if name != "randomk":  # which sends what its comb meets
        assert not np.isfinite(job.step(poisoned)).all()
    else:
        job.step(poisoned)
    for state in job.states:
        if isinstance(state, Feedback):
            assert np.isfinite(state.residual).all()
    assert np.isfinite(job.step(list(good[2]))).all()


@pytest.mark.parametrize(
    ("name", "ranks", "formula"),
    [
        ("bf16", 2, lambda n: n * 2),
        ("bf16", 4, lambda n: 1.5 * n * 2),
        ("int8", 2, lambda n: n * (1 + 1 / 256)),
        ("int8", 4, lambda n: 1.5 * n * (1 + 1 / 256)),
        ("int4", 4, lambda n: 1.5 * n * (0.5 + 1 / 128)),
        ("onebit", 2, lambda n: n * (1 / 8 + 4 / 1024)),
        ("onebit", 4, lambda n: 1.5 * n * (1 / 8 + 4 / 1024)),
        ("onebit by matrix", 2, lambda n: n * (1 / 8 + 4 / 1024) + 1536),
        ("onebit by matrix", 4, lambda n: 1.5 * n * (1 / 8 + 4 / 1024) + 3 * 1536),
        ("onebit by matrix", 9, lambda n: 16 / 9 * (n * (1 / 8 + 4 / 1024) + 4 * 1536)),
        ("topk", 2, lambda n: 0.02 * n * 4),
        ("topk", 4, lambda n: 3 * 0.02 * n * 4),
        ("randomk", 4, lambda n: 1.5 * 0.05 * n * 4),
        ("powersgd", 4, lambda n: 1.5 * 4 * 4 * (512 + 1024)),
        ("powersgd in turns", 4, lambda n: 1.5 * 4 * 4 * 1024),
    ],
)
def test_bytes_sent(name, ranks, formula):
    shape = (512, 1024)
    job = Job(METHODS[name], ranks, shape)
    job.step(list(gradients(ranks, 1, shape)[0]))
    expected = formula(512 * 1024)
    assert abs(job.sent / expected - 1) <= 0.03, (job.sent, expected)


CODECS = ["bf16", "int8", "int8 with feedback", "int8 at random", "int4", "onebit"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", CODECS)
def test_codecs_never_send_more_than_the_gradient(name, ranks):
    """But are used where they send less."""
    raws = 0
    method = Compression.onebit(min_elements=0) if name == "onebit" else METHODS[name]
    for size in (1, 7, 17, 34, 64, 65, 128, 300, 1000):
        job = Job(method, ranks, (1, size))
        grads = gradients(ranks, 1, (1, size))[0]
        mean = job.step(list(grads))
        raw = 2 * (ranks - 1) / ranks * 4 * size
        assert job.sent <= raw
        if job.sent == raw:
            raws += 1
            np.testing.assert_array_equal(mean, sum(grads) / np.float32(ranks))
            assert not any(np.any(s.residual) for s in job.states if isinstance(s, Feedback))
    assert raws < 9 and (raws or name == "bf16")  # which has blocks of one element


def test_what_is_owed_is_delivered_where_a_codec_no_longer_pays():
    """Eight ranks send raw what two did not; a state may come from there."""
    compressor, shape = Compression.onebit(min_elements=0), (10, 10)
    job = Job(compressor, 8, shape)
    residual = gradients(1, 1, shape)[0, 0]
    job.states = [state._replace(residual=residual) for state in job.states]
    forms = [[leaf.path for leaf in leaves(state)] for state in job.states]
    mean = job.step([np.zeros(shape, np.float32)] * 8)
    np.testing.assert_allclose(mean, residual, rtol=1e-6)
    assert not any(state.residual.any() for state in job.states)
    assert [[leaf.path for leaf in leaves(state)] for state in job.states] == forms
    two = Job(compressor, 2, shape)
    two.step(list(gradients(2, 1, shape)[0]))
    assert two.states[0].residual.any()


def test_halves_are_raw_at_two_bytes():
    grads = gradients(2, 1, (200,))[0].astype(np.float16)
    job = Job(METHODS["bf16"], 2, (200,))
    job.step(list(grads))
    assert job.sent == 400
    job = Job(METHODS["int8"], 2, (100,))
    job.step(list(grads[:, :100]))
    assert job.sent == 200  # 257 as int8, which float32 would make 400


@pytest.mark.parametrize("alternating", [False, True])
def test_powersgd_finds_a_matrix_of_low_rank(alternating):
    """Steps of the same gradient, of the factors' rank, are a power iteration on it."""
    random = np.random.default_rng(0)
    grad = (random.normal(size=(40, 3)) @ random.normal(size=(3, 90))).astype(np.float32)
    job = Job(Compression.powersgd(3, alternating=alternating), 2, grad.shape)
    for _ in range(3):
        mean = job.step([grad * 0.5, grad * 1.5])
        job.states = [s._replace(residual=s.residual * 0) for s in job.states]
    np.testing.assert_allclose(mean, grad, atol=1e-4)


@pytest.mark.parametrize("alternating", [False, True])
def test_powersgd_wakes_up(alternating):
    """A factor of zeros once became the first unit vectors, where this gradient has nothing."""
    job = Job(Compression.powersgd(2, alternating=alternating), 2, (40, 40))
    grad = np.zeros((40, 40), np.float32)
    for _ in range(3):
        assert not job.step([grad, grad]).any()
    grad[30:, 30:] = np.random.default_rng(0).normal(size=(10, 10))
    for _ in range(40):
        job.step([grad, grad])
        assert np.linalg.norm(job.states[0].residual) < 10 * np.linalg.norm(grad)


def test_powersgd_feeds_back_itself():
    job = Job(error_feedback(Compression.powersgd(2)), 1)
    with pytest.raises(CompressionError, match=r"powersgd\(rank=2\)\): it has error feedback"):
        job.compressor.reduce(OPS, gradients(1, 1)[0, 0], job.states[0]).send(None)
        job.step(list(gradients(1, 1)[0]))


def test_deep_gradient_compression_without_momentum_is_top_k_with_feedback():
    jobs = [Job(Compression.dgc(0.02, momentum=0), 3), Job(Compression.topk(0.02), 3)]
    for grads in gradients(3, 10):
        np.testing.assert_array_equal(*(job.step(list(grads)) for job in jobs))


def test_deep_gradient_compression_sends_what_momentum_would_apply():
    """An element that is sent once in a while delivers the sum of its momentum steps."""
    shape, momentum, density = (40, 40), 0.5, 1 / 1600
    job = Job(Compression.dgc(density, momentum, min_elements=0), 2, shape)
    grad = np.zeros(shape, np.float32)
    grad[3, 4], grad[5, 6] = 8.0, 1.0  # the second waits
    assert [float(job.step([grad, grad])[3, 4]) for _ in range(3)] == [8.0, 8.0, 8.0]
    # After 3 steps of 1: velocities 1, 1.5, 1.75 are owed; and 8's own starts afresh each time.
    assert [float(state.owed[5, 6]) for state in job.states] == [4.25, 4.25]
    grad[3, 4] = 0.0
    assert float(job.step([grad, grad])[5, 6]) == 4.25 + 1.875
    assert [float(state.momentum[5, 6]) for state in job.states] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("ranks", "most"), [(2, 1.0), (4, 0.5), (8, 0.25)])
def test_no_more_bytes_than_raw_however_many_ranks(ranks, most, dtype):
    """What all have chosen is gathered: from some density on an allreduce of all is cheaper."""
    shape, width = (64, 64), np.dtype(dtype).itemsize
    raw = 2 * (ranks - 1) / ranks * 64 * 64 * width
    most *= width / 4
    for density in (0.9 * most, most):
        job = Job(Compression.topk(density, min_elements=0), ranks, shape)
        applied, true = 0.0, 0.0
        for grads in gradients(ranks, 3, shape).astype(dtype):
            job.sent = 0.0
            applied = applied + job.step(list(grads)).astype("f8")
            true = true + grads.astype("f8").mean(0)
            assert job.sent <= raw and (job.sent == raw) == (density == most)
        atol = 2e-2 if dtype == "float16" else 1e-4
        np.testing.assert_allclose(applied + job.owed(), true, atol=atol)
        assert job.owed().any() == (density < most)


def test_what_was_owed_is_delivered_where_all_is_sent():
    """As when ranks have come since."""
    few, many = (Job(Compression.topk(0.3, min_elements=0), ranks) for ranks in (2, 8))
    few.step(list(gradients(2, 1)[0]))
    many.states = [few.states[rank % 2] for rank in range(8)]
    owed, grads = many.owed(), gradients(8, 1, seed=1)[0]
    assert owed.any()
    np.testing.assert_allclose(many.step(list(grads)), grads.mean(0) + owed, atol=1e-6)
    assert not many.owed().any()


def test_random_choice_of_all_is_raw():
    job = Job(Compression.randomk(1.0, min_elements=0), 3)
    draws = [int(job.states[0].inner.draw)]
    for grads in gradients(3, 2):
        np.testing.assert_array_equal(job.step(list(grads)), sum(grads) / np.float32(3))
        draws.append(int(job.states[0].inner.draw))
    assert len(set(draws)) == 3


@pytest.mark.parametrize("density", [0.01, 0.03, 0.3, 0.5])
def test_every_element_has_its_turn(density):
    """Drawn anew in each step, one element in forty had none in 360 steps."""
    job, turns = Job(Compression.randomk(density, min_elements=0), 2), math.ceil(1 / density)
    grads, met = np.ones((2, *SHAPE), np.float32), np.zeros(SHAPE)
    for step in range(1, 3 * turns + 1):
        met += job.step(list(grads)) > 0
        assert met.min() >= step // turns
        assert job.owed().max() < turns
    assert np.median(met) <= 4


def test_deep_gradient_compression_of_all_is_momentum():
    """Also in a warm-up among many ranks: an element that is always sent has no old direction."""
    job, velocity = Job(Compression.dgc(0.3, 0.5, min_elements=0), 8), 0.0
    for grads in gradients(8, 3):
        velocity = 0.5 * velocity + grads.mean(0)
        np.testing.assert_allclose(job.step(list(grads)), velocity, atol=1e-5)
    assert not any(state.owed.any() for state in job.states)
    grads[3, 0, 0] = np.nan
    before = job.states[3].momentum.copy()
    assert np.isnan(job.step(list(grads))[0, 0])
    assert job.states[3].momentum[0, 0] == before[0, 0] and np.isfinite(job.states[3].owed).all()


def test_density_warms_up():
    compressor = Compression.dgc(0.001, warmup_steps=8, min_elements=0)
    sent = []
    for step in (0, 1, 2, 4, 6, 8, 100):
        job = Job(compressor.at(step), 2, (100, 100))
        job.step(list(gradients(2, 1, (100, 100))[0]))
        sent.append(job.sent)
    assert sent == [5000 * 2, 5000 * 2, 625 * 4, 157 * 4, 40 * 4, 10 * 4, 10 * 4]
    assert compressor.owns_momentum and not Compression.topk().owns_momentum


def test_after_some_steps():
    compressor = after(2, Compression.onebit())
    job = Job(compressor, 3)
    for step, grads in enumerate(gradients(3, 4)):
        job.compressor = compressor.at(step)
        mean = job.step(list(grads))
        raw = np.array_equal(mean, sum(grads) / np.float32(3))
        assert raw == (step < 2)
        assert job.states[0].residual.any() == (step >= 2)
    assert repr(compressor) == "Compression.after(2, onebit(feedback=True))"


def test_wrappers_keep_phases():
    compressor = min_size(10, error_feedback(after(3, Compression.int8())))
    assert [start for start, _ in compressor.phases] == [0, 3]
    job = Job(compressor.at(0), 2)
    grads = gradients(2, 2)
    np.testing.assert_array_equal(job.step(list(grads[0])), sum(grads[0]) / np.float32(2))
    job.compressor = compressor.at(3)
    assert not np.array_equal(job.step(list(grads[1])), sum(grads[1]) / np.float32(2))


def test_the_global_generators_are_left_alone():
    torch = pytest.importorskip("torch")
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state().clone()
    for compressor in METHODS.values():
        Job(compressor, 2).step(list(gradients(2, 1)[0]))
        spec = Spec("w", SHAPE, "float32", 2)
        compressor.init(TorchOps(), spec)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_names_tell_what_must_be_equal_on_all_ranks():
    for compressor, told in (
        (Compression.topk(0.1, min_elements=7), "topk(0.1, min_elements=7)"),
        (Compression.randomk(0.1, seed=3), "randomk(0.1, seed=3)"),
        (Compression.powersgd(2, seed=3), "powersgd(rank=2, seed=3)"),
        (Compression.dgc(warmup_steps=8), "dgc(density=0.001, momentum=0.9, warmup_steps=8)"),
        (Compression.int8(rounding="stochastic"), "int8(feedback=False, rounding='stochastic')"),
    ):
        assert compressor.name == told


@every
@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "complex64"])
def test_other_types(name, dtype):
    """Floats are compressed in float32; what is no float travels raw."""
    spec = Spec("w", SHAPE, dtype, 3)
    states = [METHODS[name].init(OPS, spec) for _ in range(3)]
    grads = (gradients(3, 1)[0] * 4).astype(dtype)
    works = [METHODS[name].reduce(OPS, g, s) for g, s in zip(grads, states, strict=True)]
    for result in in_step(works):
        assert result.mean.shape == SHAPE
        if "float" in dtype:
            assert result.mean.dtype == dtype
        else:
            np.testing.assert_array_equal(result.mean, sum(grads) / np.asarray(3, dtype))


def test_momentum_of_means():
    """Like the optimizer's, for parameters beside those of deep gradient compression."""
    job, velocity = Job(momentum(0.5, Compression.bf16), 2), 0.0
    plain = Job(Compression.bf16, 2)
    for grads in gradients(2, 3):
        velocity = 0.5 * velocity + plain.step(list(grads))
        np.testing.assert_array_equal(job.step(list(grads)), velocity)
    grads[0][0] = np.nan
    assert np.isnan(job.step(list(grads))).any() and np.isfinite(job.states[0].velocity).all()
    assert job.compressor.owns_momentum
    dgc = Job(Compression.dgc(momentum=0.5), 2, (40,))  # of vectors, which travel raw
    grads = gradients(2, 1, (40,))[0]
    means = [dgc.step(list(grads)) for _ in range(2)]
    np.testing.assert_allclose(means[1], 1.5 * means[0], rtol=1e-6)


def test_a_method_may_be_given_without_calling_it():
    assert repr(as_compressor(Compression.powersgd)) == "Compression.powersgd(rank=4)"
    assert as_compressor(Compression.bf16) is Compression.bf16


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Compression.topk(0), "topk(density=0): density must be above 0 and at most 1"),
        (lambda: Compression.topk(1.5), "topk(density=1.5)"),
        (lambda: Compression.topk("1%"), "topk(density='1%')"),
        (lambda: Compression.topk(float("nan")), "topk(density=nan)"),
        (lambda: Compression.topk(min_elements=-1), "topk(min_elements=-1): min_elements must be"),
        (lambda: Compression.dgc(momentum=1), "dgc(momentum=1): momentum must be 0 or more"),
        (lambda: Compression.dgc(momentum="0.9"), "dgc(momentum='0.9')"),
        (lambda: Compression.dgc(warmup_steps=-1), "dgc(warmup_steps=-1): warmup_steps must be an"),
        (lambda: Compression.dgc(warmup_steps=1.5), "dgc(warmup_steps=1.5)"),
        (lambda: Compression.randomk(-1), "randomk(density=-1)"),
        (lambda: Compression.powersgd(0), "powersgd(rank=0): rank must be an integer from 1"),
        (lambda: Compression.powersgd(2.5), "powersgd(rank=2.5)"),
        (lambda: Compression.powersgd(True), "powersgd(rank=True)"),
        (lambda: Compression.powersgd(min_elements=None), "powersgd(min_elements=None)"),
        (lambda: Compression.int8(rounding="up"), "int8(rounding='up'): use 'nearest' or 'stoch"),
        (lambda: Compression.int4(rounding=None), "int4(rounding=None)"),
        (lambda: after(-1, Compression.topk()), "after(-1, Compression.topk(0.01)): steps must"),
        (lambda: after(1, Compression.none, Compression.topk()), "must keep no state"),
        (lambda: momentum(1.0), "momentum(momentum=1.0)"),
        (lambda: momentum(0.9, Compression.dgc()), "applies momentum itself"),
        (lambda: min_size(0.5, Compression.bf16), "min_elements=0.5"),
    ],
)
def test_options_out_of_range(make, told):
    with pytest.raises(CompressionError) as error:
        make()
    assert told in str(error.value)


def test_states_come_apart_and_together():
    compressor = Compression.onebit(min_elements=0)
    state = compressor.init(NumpyOps(), Spec("w", (3, 5), "float32", 4))
    flat = leaves(state)
    assert [(leaf.path, leaf.kind) for leaf in flat] == [
        ("residual", "owed"),
        ("inner.lost", "piece"),
    ]
    again = rebuilt(state, iter([leaf.tensor + 1 for leaf in flat]))
    assert type(again) is type(state)
    np.testing.assert_array_equal(again.residual, np.ones((3, 5)))
    assert leaves(None) == [] and rebuilt(None, iter([])) is None
