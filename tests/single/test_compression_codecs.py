"""Codecs write the same bytes on every framework, and read back what they should."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from hvdx.compression import codecs
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

COLUMNS, PADDING = 4096, 100
CODECS = {
    "bf16": codecs.bfloat16(),
    "int8": codecs.integers(8, 256),
    "int4": codecs.integers(4, 128),
    "onebit": codecs.signs(1024),
    "int8 stochastic": codecs.integers(8, 256, stochastic=True),
    "int4 stochastic": codecs.integers(4, 128, stochastic=True),
}
EXACT = [name for name in CODECS if name != "bf16"]  # whose NaN have bits of the library's choice

#: SHA-256 of the payload of `awkward()`, as first written: a wire format may not change unseen.
GOLDEN = {
    "int8": "e91166e67b36deeb",
    "int4": "b99d320a0dcb9482",
    "onebit": "56a34d3dd7badaff",
    "int8 stochastic": "dc1efd022ca05f51",
    "int4 stochastic": "63cce8ca5405d3b0",
}


def awkward() -> np.ndarray:
    """Rows with every kind of block: wide range, zeros, subnormals, ties, huge, not finite."""
    random = np.random.Generator(np.random.Philox(1))
    rows = random.normal(size=(3, COLUMNS)) * 10.0 ** random.integers(-30, 30, size=(3, COLUMNS))
    rows = rows.astype(np.float32)
    rows[0, :1024] = 0.0
    rows[0, 1024:1280] = np.arange(256) / 2 - 64  # ties
    rows[0, 2000:2100] = -0.0
    rows[0, 3072:] = random.normal(size=1024)
    rows[1, 5] = np.nan
    rows[1, 3000] = -np.inf
    rows[2, :1024] = np.float32(1e-40) * random.normal(size=1024)
    rows[2, 1100:1200] = 3.4e38
    rows.reshape(-1)[-PADDING:] = 0
    return rows


def used(rows: np.ndarray) -> int:
    return rows.size - PADDING


def written(ops: Any, codec: codecs.Codec, rows: Any, count: int, key: int = 12345) -> Any:
    """Return the bytes of ``rows``."""
    keys = [ops.constant(key, "int32")] if codec.noisy else []
    return codec.encode(ops, rows, count, *keys)


@pytest.fixture(params=["numpy", "torch", "tensorflow", "tf.function", "XLA"])
def way(request: pytest.FixtureRequest) -> Any:
    """Return functions that encode and decode arrays."""
    if request.param == "numpy":
        ops = NumpyOps()
        return (
            lambda codec, rows: written(ops, codec, rows, used(rows)),
            lambda codec, data: codec.decode(ops, data, COLUMNS),
        )
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        ops = TorchOps()
        return (
            lambda codec, rows: written(ops, codec, torch.tensor(rows), used(rows)).numpy(),
            lambda codec, data: codec.decode(ops, torch.tensor(data), COLUMNS).numpy(),
        )
    tf = pytest.importorskip("tensorflow")
    ops = TensorFlowOps()

    def run(call: Any) -> Any:
        if request.param == "tensorflow":
            return call().numpy()
        compiled = tf.function(call, autograph=False, jit_compile=request.param == "XLA")
        return compiled().numpy()

    return (
        lambda codec, rows: run(lambda: written(ops, codec, tf.constant(rows), used(rows))),
        lambda codec, data: run(lambda: codec.decode(ops, tf.constant(data), COLUMNS)),
    )


@pytest.mark.parametrize("name", EXACT)
def test_the_bytes_are_those_of_the_format(name, way):
    encode, decode = way
    codec, rows = CODECS[name], awkward()
    data = encode(codec, rows)
    assert data.dtype == np.uint8 and data.shape == (3, codec.row_bytes(COLUMNS))
    assert hashlib.sha256(data.tobytes()).hexdigest()[:16] == GOLDEN[name]
    expected = codec.decode(NumpyOps(), data, COLUMNS)
    np.testing.assert_array_equal(decode(codec, data), expected)


@pytest.mark.parametrize("name", EXACT)
def test_large_tensors_are_treated_in_pieces(name, monkeypatch):
    monkeypatch.setattr("hvdx.ops.shared.PIECE", 2048)
    codec, rows = CODECS[name], awkward()
    for ops, tensor in ((NumpyOps(), np.array), (TorchOps(), pytest.importorskip("torch").tensor)):
        assert len(ops.pieces(tensor(rows).reshape(-1, codec.block), codec.block)) == 6
        data = written(ops, codec, tensor(rows), used(rows))
        assert hashlib.sha256(np.asarray(data).tobytes()).hexdigest()[:16] == GOLDEN[name]
        back = np.asarray(codec.decode(ops, data, COLUMNS))
        monkeypatch.setattr("hvdx.ops.shared.PIECE", 2**18)
        np.testing.assert_array_equal(back, np.asarray(codec.decode(ops, data, COLUMNS)))
        monkeypatch.setattr("hvdx.ops.shared.PIECE", 2048)


def test_bfloat16_is_rounded_to_even(way):
    encode, decode = way
    codec, rows = CODECS["bf16"], awkward()
    numbers = decode(codec, encode(codec, rows))
    finite = np.isfinite(rows)
    np.testing.assert_array_equal(np.isfinite(numbers), finite & (np.abs(rows) < 3.396e38))
    bits = rows[finite].view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    np.testing.assert_array_equal(numbers[finite].view(np.uint32), rounded.astype(np.uint32))


@pytest.mark.parametrize(("name", "largest"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_integers_err_by_half_a_step_at_most(name, largest):
    """Of a scale that is at most twice the best one."""
    codec, ops, random = CODECS[name], NumpyOps(), np.random.default_rng(0)
    rows = (random.normal(size=(2, COLUMNS)) * 1e-3).astype(np.float32)
    back = codec.decode(ops, codec.encode(ops, rows, rows.size), COLUMNS)
    blocks = rows.reshape(-1, codec.block)
    peak = np.abs(blocks).max(1, keepdims=True)
    assert (np.abs(back.reshape(blocks.shape) - blocks) <= peak * largest * 1.001).all()
    assert (np.abs(back) <= np.abs(rows).max() * 1.001).all()


def test_signs_carry_the_mean_magnitude():
    codec, ops, random = CODECS["onebit"], NumpyOps(), np.random.default_rng(0)
    rows = random.normal(size=(2, COLUMNS)).astype(np.float32)
    rows.reshape(-1)[-PADDING:] = 0
    back = codec.decode(ops, codec.encode(ops, rows, used(rows)), COLUMNS)
    flat, decoded = rows.reshape(-1)[:-PADDING], back.reshape(-1)[:-PADDING]
    np.testing.assert_array_equal(np.sign(decoded), np.sign(flat))
    for start in range(0, len(flat), codec.block):  # the last one is shorter: padding counts not
        block = flat[start : start + codec.block]
        mean = np.abs(block.astype(np.float64)).mean()
        np.testing.assert_allclose(np.abs(decoded[start : start + len(block)]), mean, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_has_no_bias(bits):
    """Nor where rounding to the nearest has one: beyond the last code, and below half a step."""
    codec, nearest = CODECS[f"int{bits} stochastic"], CODECS[f"int{bits}"]
    ops, draws, most = NumpyOps(), 4000, 2 ** (bits - 1) - 1
    block = np.linspace(-1, 1, codec.block, dtype=np.float32) * np.float32(most + 0.9)
    block[:8] = np.linspace(-1, 1, 8) * 0.4
    rows = np.tile(block, (draws, 1))
    back = codec.decode(ops, written(ops, codec, rows, rows.size), codec.block)
    step = 2.0  # the scale that has room for most + 0.9
    assert (np.abs(back - rows) < step).all()
    error = (back - rows).mean(0, dtype=float)
    spread = np.sqrt(np.abs(rows[0] % step * (step - rows[0] % step)) / draws) + 1e-3
    assert (np.abs(error) < 5 * spread).all()
    biased = nearest.decode(ops, nearest.encode(ops, rows[:1], codec.block), codec.block)
    assert np.abs(biased - rows[0]).max() > 0.8 > np.abs(error).max()


def test_another_key_rounds_otherwise():
    codec, ops = CODECS["int8 stochastic"], NumpyOps()
    rows = np.random.default_rng(0).normal(size=(1, COLUMNS)).astype(np.float32)
    one, same, other = (written(ops, codec, rows, COLUMNS, key).copy() for key in (1, 1, 2))
    assert (one == same).all()
    assert 0.2 < (one != other).mean() < 0.6


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_nan_and_its_neighbours_are_not(name, bad):
    codec = CODECS[name]
    rows = np.ones((1, 2 * codec.block), np.float32)
    rows[0, 3] = bad
    data = written(NumpyOps(), codec, rows, rows.size)
    back = codec.decode(NumpyOps(), data, 2 * codec.block)[0]
    assert np.isnan(back[: codec.block]).all()
    assert np.isfinite(back[codec.block :]).all()


def test_the_usual_scale_would_not_be_portable():
    """Why scales have a floor and are powers of two: TensorFlow flushes subnormals to zero."""
    tf = pytest.importorskip("tensorflow")
    block = np.float32(1e-40) * np.arange(-8, 8, dtype=np.float32)
    codes = np.rint(block / (np.abs(block).max() / np.float32(127)))
    tensor = tf.constant(block)
    theirs = tf.round(tensor / (tf.reduce_max(tf.abs(tensor)) / 127.0)).numpy()
    assert np.abs(codes).max() == 127
    assert not np.array_equal(theirs, codes)


@pytest.mark.parametrize("block", [100, 2048])
def test_blocks_of_signs_that_would_overflow(block):
    with pytest.raises(ValueError, match=f"block={block}"):
        codecs.signs(block)
