"""Rows of sparse gradients, gathered between ranks that live in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdx.comm import Allreduce, in_step, through
from hvdx.compression import Compression
from hvdx.compression.rows import gather_rows, row_codec
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps
from hvdx.reduce_op import ReduceOp

METHODS = {
    "fp16": (Compression.fp16, 1e-3, 2),
    "bf16": (Compression.bf16, 5e-3, 2),
    "int8": (Compression.int8(), 0.01, 1),
    "topk": (Compression.topk(0.01), 0.01, 1),
}
RANDOM = np.random.default_rng(0)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def rows(count: int, columns: tuple[int, ...]) -> tuple[Any, Any]:
    """Return what a rank has: numbers, some of them large, and values."""
    where = RANDOM.integers(0, 2**31 - 1, count)
    return where, RANDOM.normal(size=(count, *columns)).astype(np.float32)


def gathered(ops: Any, tensor: Any, codec: Any, ranks: Any) -> list[Any]:
    """Gather, and count the bytes that each rank sends for its rows."""
    sent = []

    def count(request: Any) -> None:
        sent.append(np.asarray(request.requests[0].tensor).nbytes)

    works = []
    for where, values in ranks:
        presence = Allreduce(tensor(np.array([1], np.int32)), "presence", ReduceOp.Sum)
        work = gather_rows(ops, codec, tensor(where), tensor(values), presence)
        works.append(through(work, count, tensor))
    results = in_step(works)
    return [results, sent]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("columns", [(), (1,), (7,), (64,), (3, 100), (600,)], ids=str)
def test_rows_arrive_in_rank_order(name, columns):
    compressor, error, width = METHODS[name]
    ranks = [rows(5, columns), rows(0, columns), rows(2, columns)]
    codec = row_codec(compressor, (2**31 - 1, *columns), "float32")
    results, sent = gathered(NumpyOps(), np.array, codec, ranks)
    size = int(np.prod(columns))
    assert sent[1] == 0 and sent[0] <= 5 * (4 + size * width + size // 256 + 1 + 256)
    if size >= 64:
        assert sent[0] < 5 * (8 + 4 * size) * (0.53 if width == 2 else 0.44)
    for where, values, (present,) in results:
        np.testing.assert_array_equal(where, np.concatenate([r[0] for r in ranks]))
        assert where.dtype == np.int64 and values.dtype == np.float32 and present == [3]
        exact = np.concatenate([r[1] for r in ranks])
        assert values.shape == exact.shape
        np.testing.assert_allclose(values, exact, atol=error * np.abs(exact).max())


def test_frameworks_write_the_same_bytes():
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("tensorflow")
    codec = row_codec(Compression.int8(), (100, 300), "float32")
    ranks = [rows(3, (300,)), rows(4, (300,))]
    expected = gathered(NumpyOps(), np.array, codec, ranks)[0][0]
    for ops, tensor in ((TorchOps(), torch.tensor), (TensorFlowOps(), tf.constant)):
        result = gathered(ops, tensor, codec, ranks)[0][0]
        np.testing.assert_array_equal(np.asarray(result[1]), expected[1])

    signature = [tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, 300], tf.float32)]

    @tf.function(input_signature=signature, autograph=False)
    def alone(where: Any, values: Any) -> Any:
        """A graph does not know how many rows there will be."""
        work = gather_rows(TensorFlowOps(), codec, where, values)
        request = next(work)
        try:
            work.send([request.requests[0].tensor])
        except StopIteration as done:
            return done.value[:2]

    for where, values in (ranks[1], rows(0, (300,))):
        numbers, decoded = alone(where, values)
        np.testing.assert_array_equal(numbers, where)
        np.testing.assert_allclose(decoded, values, atol=0.05)
    np.testing.assert_array_equal(alone(*ranks[1])[1], expected[1][3:])


def test_what_is_not_finite_is_seen():
    where, values = rows(3, (300,))
    values[1, 2] = np.inf
    codec = row_codec(Compression.int8(), (100, 300), "float32")
    result = gathered(NumpyOps(), np.array, codec, [(where, values)] * 2)[0][1][1]
    assert np.isnan(result[[1, 4]]).any(1).all() and np.isfinite(result[[0, 2, 3, 5]]).all()


def test_what_travels_raw():
    assert row_codec(Compression.none, (10, 10), "float32") is None
    assert row_codec(Compression.int8(), (10, 10), "complex64") is None
    assert row_codec(Compression.int8(), (10, 0), "float32") is None
    assert row_codec(Compression.int8(), (2**31, 4), "float32") is None
    chosen = Compression.by_layer({"emb*": Compression.bf16})
    assert chosen.rows is None and Compression.bf16.rows is not None
