"""Types that Horovod lacks, halves that overflow, and loss scaling that races with averaging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

trap = pytest.mark.trap
BFLOAT16 = trap(7, ValueError, "BFloat16Tensor is not supported")


@BFLOAT16
@pytest.mark.parametrize(
    "operation",
    [
        "allreduce",
        "allreduce_",
        "allgather",
        "broadcast",
        "broadcast_",
        "alltoall",
        "reducescatter",
    ],
)
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "async"])
def test_bfloat16(hvd, operation, waits):
    tensor = torch.full((2,), hvd.rank() + 1.0, dtype=torch.bfloat16)
    options = {"root_rank": 1} if operation.startswith("broadcast") else {}
    if not waits:
        operation = f"{operation}_async".replace("__async", "_async_")
    result = getattr(hvd, operation)(tensor, name=f"bfloat16.{operation}", **options)
    if not waits:
        result = hvd.synchronize(result)
        result = result[0] if operation.startswith("alltoall") else result  # the splits follow
    assert result.dtype == torch.bfloat16
    expected = [1.5, 1.5]
    if operation.startswith("broadcast"):
        expected = [2.0, 2.0]
    elif operation.startswith("allgather"):
        expected = [1.0, 1.0, 2.0, 2.0]
    elif operation.startswith("alltoall"):
        expected = [1.0, 2.0]
    elif operation.startswith("reducescatter"):
        expected = [1.5]
    assert result.tolist() == expected


@BFLOAT16
def test_bfloat16_gradients(wrap, loss):
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0))
    loss(parameter).backward()
    optimizer.step()
    assert parameter.tolist() == [-1.5, -1.5]


@trap(7, ValueError, "Tensor is not supported")
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64], ids=str)
def test_buffers_of_any_type_are_broadcast(hvd, dtype):
    module = nn.Module()
    module.register_buffer("own", torch.full((3,), float(hvd.rank())).to(dtype))
    hvd.broadcast_parameters(module.state_dict(), root_rank=1)
    assert torch.equal(module.own, torch.ones(3, dtype=dtype))


@trap(9, AssertionError, "inf")
def test_the_mean_of_large_halves(hvd):
    large = torch.full((2,), 60000.0, dtype=torch.float16)
    assert hvd.allreduce(large, name="large").tolist() == pytest.approx([60000.0] * 2, rel=1e-3)


@trap(9, AssertionError, "inf")
def test_the_mean_of_large_halves_in_groups(hvd):
    large = torch.full((2,), 60000.0, dtype=torch.float16)
    handle = hvd.grouped_allreduce_async([large, large], name="large group")
    for mean in hvd.synchronize(handle):
        assert mean.tolist() == pytest.approx([60000.0] * 2, rel=1e-3)


@trap(9, AssertionError, "inf")
def test_half_compression_of_large_values(hvd):
    large = torch.full((2,), 60000.0)
    mean = hvd.allreduce(large, name="squeezed", compression=hvd.Compression.fp16)
    assert mean.tolist() == pytest.approx([60000.0] * 2, rel=1e-3)


@trap(9, AssertionError, "inf")
def test_half_compression_of_large_gradients(hvd, wrap):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), compression=hvd.Compression.fp16)
    (parameter * 60000).sum().backward()
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-60000.0] * 2, rel=1e-3)


def rounded(to):
    """Compress to multiples of ``to``, and add to each gradient what the last one still owes.

    A compressor with a parameter and a state. Horovod's are two functions of a tensor: told no
    parameter's name, they have nothing to keep a state by.
    """
    from hvdx.comm import Allreduce
    from hvdx.compression import Compressor, Reduced

    def init(ops, spec):
        return torch.zeros(spec.shape)

    def reduce(ops, grad, owed):
        grad = grad + owed
        own = (grad / to).round() * to
        mean = yield Allreduce(own)
        return Reduced(mean, own, grad - own)

    return Compressor(f"rounded to {to}", init, reduce)


@trap(9, AttributeError, "'Compressor' object has no attribute 'compress'")
def test_compression_with_parameters_and_state(wrap, loss):
    # Each gradient alone rounds to nothing; what is held back arrives with the second one.
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), compression=rounded(to=4.0))
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        loss(parameter).backward()
        optimizer.step()
        seen.append(parameter[0].item())
    # Rank 0 owes 1, 2 (sends 0 or 4), ...: after four steps both have sent all they had.
    assert seen[-1] == -6.0
    assert seen[0] == 0.0


def scaler(scale=4.0):
    return torch.amp.GradScaler("cpu", init_scale=scale)


@trap(8, AssertionError, r"== \[-1\.5, -1\.5\]")
def test_scaled_losses_need_no_ceremony(wrap, loss, late, everyone):
    # Horovod unscales rank 0's gradient while it waits to be sent, and rank 1's after it is sent.
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaling = wrap(torch.optim.SGD([parameter], lr=1.0)), scaler()
    late()
    scaling.scale(loss(parameter)).backward()
    late()
    scaling.step(optimizer)
    scaling.update()
    assert everyone(parameter.item()) == [-1.5, -1.5]


@trap(8, AssertionError, "inf")
def test_an_overflow_on_one_rank_skips_the_step_on_all(hvd, wrap, loss, late, everyone):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaling = wrap(torch.optim.SGD([parameter], lr=1.0)), scaler()
    late()
    factor = float("inf") if hvd.rank() == 1 else 1.0
    scaling.scale(loss(parameter) * factor).backward()
    scaling.step(optimizer)
    scaling.update()
    assert everyone((parameter.item(), scaling.get_scale())) == [(0.0, 2.0)] * 2


@trap(8, AssertionError, r"== \[-0\.5, -0\.5\]")
def test_clipping_needs_no_ceremony(wrap, loss, late, everyone):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0))
    late()
    loss(parameter).backward()
    late()
    nn.utils.clip_grad_norm_([parameter], 0.5)
    optimizer.step()
    assert [round(value, 3) for value in everyone(parameter.item())] == [-0.5, -0.5]
