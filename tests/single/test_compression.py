"""Compressors between ranks that live in this process, on NumPy, torch and TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from hvdx.comm import Allreduce, in_step, through
from hvdx.compression import (
    Compression,
    CompressionError,
    Compressor,
    Reduced,
    Spec,
    as_compressor,
    from_horovod,
)
from hvdx.compression.state import leaves
from hvdx.errors import HvdxError
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps
from hvdx.reduce_op import ReduceOp

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


class Framework(NamedTuple):
    """A framework's verbs, and the way from NumPy to it."""

    ops: Any
    tensor: Callable[[Any], Any]


@pytest.fixture(scope="module", params=["numpy", "torch", "tensorflow"])
def ops(request: pytest.FixtureRequest) -> Framework:
    if request.param == "numpy":
        return Framework(NumpyOps(), np.array)
    module = pytest.importorskip(request.param)
    if request.param == "torch":
        return Framework(TorchOps(), module.tensor)
    return Framework(TensorFlowOps(), module.constant)


def reduce(ops: Framework, compressor: Compressor, grads: list[Any]) -> list[Reduced]:
    """Reduce one gradient per rank; every rank's result, as arrays."""
    grads = [np.asarray(grad) for grad in grads]
    spec = Spec("weight", grads[0].shape, str(grads[0].dtype))
    state = compressor.init(ops.ops, spec)
    works = [
        through(compressor.reduce(ops.ops, ops.tensor(g), state), make=ops.tensor) for g in grads
    ]
    results = in_step(works)
    owns = [r.own() if callable(r.own) else r.own for r in results]
    return [
        r._replace(mean=np.asarray(r.mean), own=np.asarray(own))
        for r, own in zip(results, owns, strict=True)
    ]


def gradients(ranks: int, dtype: str = "float32", shape: tuple[int, ...] = (3, 5)) -> list[Any]:
    random = np.random.default_rng(ranks)
    return [random.normal(size=shape).astype(dtype) for _ in range(ranks)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_none_is_the_mean(ops, dtype):
    grads = gradients(3, dtype)
    for rank, result in enumerate(reduce(ops, Compression.none, grads)):
        np.testing.assert_array_equal(result.mean, sum(grads) / np.array(3, dtype))
        np.testing.assert_array_equal(result.own, grads[rank])
        assert result.mean.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_fp16_is_the_mean_but_for_rounding(ops, dtype, ranks):
    grads = gradients(ranks, dtype)
    exact = sum(grads) / ranks
    results = reduce(ops, Compression.fp16, grads)
    for result in results:
        assert result.mean.dtype == dtype
        np.testing.assert_allclose(result.mean, exact, rtol=0, atol=4e-3)
        np.testing.assert_array_equal(result.mean, results[0].mean)


def test_fp16_sends_halves(ops):
    sent = []

    def see(request):
        if isinstance(request, Allreduce):
            sent.append((np.asarray(request.tensor).dtype, request.op))

    works = [Compression.fp16.reduce(ops.ops, ops.tensor(g), None) for g in gradients(2)]
    in_step([through(work, see, ops.tensor) for work in works])
    assert sent == [(np.dtype("float16"), ReduceOp.Sum)] * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_fp16_divides_before_it_sums(ops, ranks):
    # The sum of two such gradients is beyond float16, their mean is not.
    grads = [np.full((2,), 60000.0, np.float32)] * ranks
    for result in reduce(ops, Compression.fp16, grads):
        np.testing.assert_allclose(result.mean, [60000.0] * 2, rtol=1e-3)


class Halves:
    """Horovod's own fp16: halves are summed first."""

    @staticmethod
    def compress(tensor):
        return (tensor.half() if hasattr(tensor, "half") else _cast(tensor, "float16")), "float32"

    @staticmethod
    def decompress(tensor, context):
        return tensor.float() if hasattr(tensor, "float") else _cast(tensor, context)


def _cast(tensor, dtype):
    if isinstance(tensor, np.ndarray):
        return tensor.astype(dtype)
    import tensorflow as tf

    return tf.cast(tensor, dtype)


def test_a_sum_of_halves_would_overflow(ops):
    """What fp16 avoids does happen between the ranks of these tests."""
    grads = [np.full((2,), 60000.0, np.float32)] * 2
    for result in reduce(ops, from_horovod(Halves), grads):
        assert np.isinf(result.mean).all()


def test_fp16_saturates_one_ranks_large_value(ops):
    grads = [np.array([1e6, -1e6, 1.0], np.float32), np.zeros(3, np.float32)]
    for result in reduce(ops, Compression.fp16, grads):
        assert result.mean.tolist() == [30000.0, -30000.0, 0.5]


@pytest.mark.parametrize("ranks", [2, 3, 5, 9])
def test_fp16_saturates_where_all_ranks_are_large(ops, ranks):
    # The limit was once one for each rank, so that the sum of the ranks overflowed.
    grads = [np.full((1,), 70000.0, np.float32)] * ranks
    mean = reduce(ops, Compression.fp16, grads)[0].mean
    assert mean.tolist() == pytest.approx([60000.0], rel=2e-3)


def test_fp16_keeps_infinities(ops):
    # One rank's overflow must reach all: loss scaling skips the step on it.
    grads = [np.array([np.inf, 1.0], np.float32), np.ones(2, np.float32)]
    for result in reduce(ops, Compression.fp16, grads):
        assert result.mean.tolist() == [np.inf, 1.0]


def test_fp16_keeps_nan(ops):
    grads = [np.array([np.nan, 1.0], np.float32), np.ones(2, np.float32)]
    for result in reduce(ops, Compression.fp16, grads):
        assert np.isnan(result.mean).tolist() == [True, False]


@pytest.mark.parametrize("ranks", [2, 3])
def test_contributions_average_to_the_mean(ops, ranks):
    """What error feedback builds on: ``own`` is this rank's part of what was applied."""
    results = reduce(ops, Compression.fp16, gradients(ranks))
    mean = sum(result.own for result in results) / ranks
    np.testing.assert_allclose(mean, results[0].mean, rtol=2e-3, atol=1e-6)


def test_the_own_contribution_is_what_was_sent(ops):
    grads = [np.array([1 / 3, 1e6], np.float32), np.zeros(2, np.float32)]
    first, second = reduce(ops, Compression.fp16, grads)
    assert first.own.tolist() == [float(np.float16(np.float32(1 / 3) / 2)) * 2, 60000.0]
    assert second.own.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_fp16_leaves_other_types_alone(ops, dtype):
    grads = [np.array([2, 4], dtype), np.array([4, 8], dtype)]
    for result in reduce(ops, Compression.fp16, grads):
        assert result.mean.tolist() == [3, 6]


def test_none_and_fp16_keep_no_state(ops):
    for compressor in (Compression.none, Compression.fp16):
        assert compressor.init(ops.ops, Spec("weight", (2,), "float32")) is None
        assert reduce(ops, compressor, gradients(2))[0].state is None
        assert compressor.elementwise


def test_a_class_made_for_horovod(ops):
    compressor = as_compressor(Halves)
    assert (repr(compressor), compressor.elementwise) == ("Compression.Halves", False)
    grads = gradients(2)
    halves = [grad.astype("float16") for grad in grads]
    for rank, result in enumerate(reduce(ops, compressor, grads)):
        assert result.mean.dtype == np.float32
        np.testing.assert_array_equal(result.mean, sum(halves) / np.float16(2))
        np.testing.assert_array_equal(result.own, halves[rank])


def test_horovods_none_is_ours():
    horovod = pytest.importorskip("horovod.torch.compression")
    assert as_compressor(horovod.Compression.none) is Compression.none
    assert as_compressor(horovod.Compression.fp16).name == "FP16Compressor"


@pytest.mark.parametrize("value", [Compression.none, Compression.fp16])
def test_ours_stay_themselves(value):
    assert as_compressor(value) is value


def test_nothing_means_none():
    assert as_compressor(None) is Compression.none


class HalfAClass:
    """Lacks ``decompress``."""

    @staticmethod
    def compress(tensor):
        return tensor, None


@pytest.mark.parametrize("value", ["fp16", 16, HalfAClass, Compression])
def test_unknown(value):
    with pytest.raises(CompressionError) as error:
        as_compressor(value)
    for told in (f"{value!r}", "hvd.Compression.none", "hvd.Compression.fp16", "decompress("):
        assert told in str(error.value)
    assert isinstance(error.value, HvdxError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8"])
def test_horovods_two_methods(ops, dtype):
    """Scripts call them themselves; only floats are halved."""
    given = ops.tensor(np.array([1.5, 2.0]).astype(dtype))
    halved, context = Compression.fp16.compress(given)
    assert ops.ops.dtype(halved) == ("float16" if "float" in dtype else dtype)
    restored = Compression.fp16.decompress(halved, context)
    assert ops.ops.dtype(restored) == dtype
    np.testing.assert_array_equal(np.asarray(restored), np.asarray(given))
    same, context = Compression.none.compress(given)
    assert same is given
    assert Compression.none.decompress(same, context) is not None


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [300, 1100, 2000, 5000])
def test_losses_of_signs_stay_bounded(ranks, size):
    """Ranks once read padding as signs and sent its sum on: losses grew 40 times in each step."""
    ops, compressor = NumpyOps(), Compression.onebit(min_elements=0)
    random = np.random.default_rng(0)
    states = [compressor.init(ops, Spec("p", (1, size), "float32", ranks)) for _ in range(ranks)]
    for _ in range(30):
        grads = random.normal(size=(ranks, 1, size)).astype("float32")
        results = in_step(
            [compressor.reduce(ops, g, s) for g, s in zip(grads, states, strict=True)]
        )
        states = [each.state for each in results]
        assert np.abs(results[0].mean).max() < 10
    assert max(np.abs(leaf.tensor).max() for s in states for leaf in leaves(s)) < 30
