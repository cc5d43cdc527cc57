"""Every compressor under PyTorch's optimizer: the same as between ranks in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvdx
from hvdx.comm import in_step
from hvdx.compression import Spec, after
from hvdx.ops import NumpyOps

C = hvdx.Compression
METHODS = {
    "bf16": C.bf16,
    "int8": C.int8(),
    "int4": C.int4(),
    "onebit": C.onebit(),
    "topk": C.topk(0.1, min_elements=0),
    "randomk": C.randomk(0.2, min_elements=0),
    "powersgd": C.powersgd(2, min_elements=0),
    "dgc": C.dgc(0.1, momentum=0.5, min_elements=0),
    "after": after(2, C.onebit()),
}
SHAPES = {"weight": (24, 36), "bias": (24,), "odd": (7, 11)}


def train(hvd, compression, grads, **options):
    """Return the parameters after a step of rate 1 for each of ``grads`` (step, name)."""
    parameters = {name: torch.nn.Parameter(torch.zeros(s)) for name, s in SHAPES.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    named = list(parameters.items())
    optimizer = hvd.DistributedOptimizer(optimizer, named, compression=compression, **options)
    for step in grads:
        optimizer.zero_grad()
        sum((parameters[n] * torch.tensor(g)).sum() for n, g in step.items()).backward()
        optimizer.step()
    return {name: p.detach().numpy() for name, p in parameters.items()}, optimizer


def same(one, other):
    """Tell whether states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def gradients(rank, steps=4):
    random = np.random.default_rng(rank)
    return [{n: random.normal(size=s).astype("f4") for n, s in SHAPES.items()}
            for _ in range(steps)]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_as_between_ranks_in_memory(hvd, method):
    compressor, size = METHODS[method], hvd.size()
    everyone = [gradients(rank) for rank in range(size)]
    result, _ = train(hvd, compressor, everyone[hvd.rank()])
    ops = NumpyOps()
    for name, shape in SHAPES.items():
        states = [compressor.init(ops, Spec(name, shape, "float32", size)) for _ in range(size)]
        expected = np.zeros(shape, "f4")
        for step in range(4):
            works = [
                compressor.at(step).reduce(ops, own[step][name], state)
                for own, state in zip(everyone, states, strict=True)
            ]
            results = in_step(works)
            states = [each.state for each in results]
            expected = expected - results[0].mean
        exact = 1e-3 if method == "powersgd" else 1e-5
        np.testing.assert_allclose(result[name], expected, atol=exact, err_msg=name)
    hashes = hvd.allgather_object([p.tobytes() for p in result.values()])
    assert all(each == hashes[0] for each in hashes)


@pytest.mark.parametrize("method", ["onebit", "powersgd"])
def test_a_skipped_step_leaves_what_is_kept_alone(hvd, method):
    """Loss scaling skips it, so that it has delivered nothing; and its scale falls."""
    grads = gradients(hvd.rank(), 3)
    plain, _ = train(hvd, METHODS[method], grads)
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES.values()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    named = list(zip(SHAPES, parameters, strict=True))
    hvd.DistributedOptimizer(optimizer, named, compression=METHODS[method])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    optimizer.loss_scale = scaler.get_scale
    bad = gradients(7, 1)[0]
    if hvd.rank() == 0:
        bad["weight"][3, 4] = np.inf
    for step in (grads[0], bad, grads[1], grads[2]):
        before = optimizer.compression_state()
        optimizer.zero_grad()
        loss = sum((p * torch.tensor(step[n])).sum() for n, p in named)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(optimizer.compression_state(), before) == (step is bad)
    assert scaler.get_scale() == 2.0
    for name, parameter in named:  # powers of two change no bit
        np.testing.assert_array_equal(parameter.detach(), plain[name], err_msg=name)


def test_several_backward_passes(hvd):
    """The second reduction of a step compresses with what the first has left."""
    grads = gradients(hvd.rank(), 2)
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES.values()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    named = list(zip(SHAPES, parameters, strict=True))
    hvd.DistributedOptimizer(optimizer, named, compression=C.int8())
    for step in grads:
        sum((p * torch.tensor(step[n])).sum() for n, p in named).backward()
    optimizer.step()
    mean = {n: np.mean([sum(s[n] for s in gradients(r, 2)) for r in range(hvd.size())], 0)
            for n in SHAPES}  # fmt: skip
    for name, parameter in named:
        np.testing.assert_allclose(-parameter.detach(), mean[name], atol=0.2)


def test_momentum_twice_is_refused(hvd):
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    for optimizer, told in (
        (torch.optim.SGD([parameter], 0.1, momentum=0.9), r"momentum=0\.9"),
        (torch.optim.Adam([parameter], 0.1), r"betas=\(0\.9"),
    ):
        with pytest.raises(hvdx.compression.CompressionError, match=told):
            hvd.DistributedOptimizer(optimizer, compression=C.dgc)


def test_ranks_with_other_compressors_are_told(hvd):
    grads = gradients(0, 1)
    chosen = C.topk(0.1) if hvd.rank() == 0 else C.topk(0.2)
    with pytest.raises(hvdx.MismatchError, match=r"topk\(0\.1\)"):
        train(hvd, chosen, grads)


def test_a_single_operation_has_no_state(hvd):
    x = torch.ones(3000)
    np.testing.assert_allclose(hvd.allreduce(x, compression=C.int8()), 1.0, atol=0.01)
    with pytest.raises(hvdx.compression.CompressionError, match="keeps state"):
        hvd.allreduce(x, compression=C.onebit())
