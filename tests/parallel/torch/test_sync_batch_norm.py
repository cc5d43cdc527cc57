"""SyncBatchNorm on N ranks equals BatchNorm in one process on all ranks' batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hvdx.torch as hvd

CHANNELS = 3

pytestmark = pytest.mark.ranks(2)


def layers(seed: int = 0, **options) -> tuple[nn.Module, nn.Module]:
    """Return our layer and torch's, with the same parameters."""
    torch.manual_seed(seed)
    ours = hvd.SyncBatchNorm(CHANNELS, **options)
    theirs = nn.BatchNorm2d(CHANNELS, **options)
    if ours.affine:
        nn.init.uniform_(ours.weight)
        nn.init.uniform_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batches(lengths: list[int], dtype: torch.dtype = torch.float32, step: int = 0) -> list:
    torch.manual_seed(100 + step)  # far from zero, where sums of squares would cancel
    return [
        (torch.randn(length, CHANNELS, 4, 2, dtype=torch.float64) * 3 + 50).to(dtype)
        for length in lengths
    ]


def compare(ours, theirs, lengths, dtype=torch.float32, step=0, **tolerance):
    """Do one step of both; ``x**2`` makes the gradients differ between elements."""
    parts = batches(lengths, dtype, step)
    mine = parts[hvd.rank()].requires_grad_()
    whole = torch.cat([part.detach() for part in parts]).requires_grad_()
    result, expected = ours(mine), theirs(whole)
    assert result.dtype == dtype
    place = sum(lengths[: hvd.rank()])
    own = slice(place, place + lengths[hvd.rank()])
    (result.float() ** 2 * torch.arange(1.0, 3)).sum().backward()
    (expected.float() ** 2 * torch.arange(1.0, 3)).sum().backward()
    torch.testing.assert_close(result, expected[own], **tolerance)
    torch.testing.assert_close(mine.grad, whole.grad[own], **tolerance)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        total = hvd.allreduce(one.grad, op=hvd.Sum)
        torch.testing.assert_close(total, other.grad, **tolerance)
        one.grad = other.grad = None
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.5, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_it_equals_one_process(options):
    ours, theirs = layers(**options)
    for step in range(2):
        compare(ours, theirs, [4] * hvd.size(), step=step, rtol=1e-4, atol=1e-4)


@pytest.mark.ranks(2, 4)
def test_in_double_precision():
    ours, theirs = (layer.double() for layer in layers())
    compare(ours, theirs, [4] * hvd.size(), torch.float64, rtol=1e-10, atol=1e-10)


@pytest.mark.ranks(2, 4)
def test_batches_of_unequal_size_and_an_empty_one():
    ours, theirs = layers()
    lengths = [2 * rank for rank in range(hvd.size())]  # rank 0 has none
    compare(ours, theirs, lengths, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, theirs = layers()
    compare(ours, theirs, [4] * hvd.size(), dtype, rtol=2e-2, atol=2e-2)
    ours.to(dtype)
    result = ours(batches([4], dtype)[0])
    assert result.dtype == dtype
    assert abs(result.float().mean()) < 2


def test_evaluation_uses_running_statistics_on_this_rank_alone():
    ours, theirs = layers()
    compare(ours, theirs, [4] * hvd.size(), rtol=1e-4, atol=1e-4)
    ours.eval()
    theirs.eval()
    if hvd.rank() == 0:
        given = batches([3], step=7)[0]
        torch.testing.assert_close(ours(given), theirs(given))


def test_evaluation_without_running_statistics_takes_all_batches():
    ours, theirs = (layer.eval() for layer in layers(track_running_stats=False))
    compare(ours, theirs, [4] * hvd.size(), rtol=1e-4, atol=1e-4)


def test_vectors_and_volumes():
    for shape in ((4, CHANNELS), (2, CHANNELS, 2, 2, 2)):
        layer = hvd.SyncBatchNorm(CHANNELS)
        result = hvd.allgather(layer(torch.randn(shape) + hvd.rank()))
        others = [dim for dim in range(len(shape)) if dim != 1]
        torch.testing.assert_close(result.mean(others), torch.zeros(3), rtol=0, atol=1e-5)


def test_an_input_that_needs_no_gradient():
    ours, _ = layers()
    (ours(batches([2])[0]) ** 2).sum().backward()
    assert ours.weight.grad is not None


@pytest.mark.ranks(2, 4)
def test_process_sets(process_set):
    if not process_set.included():
        return
    ours = hvd.SyncBatchNorm(CHANNELS, process_set=process_set)
    given = torch.randn(4, CHANNELS, 2) + 3 * process_set.rank()
    result = hvd.allgather(ours(given), process_set=process_set)
    torch.testing.assert_close(result.mean((0, 2)), torch.zeros(3), rtol=0, atol=1e-5)


def test_wrong_inputs():
    layer = hvd.SyncBatchNorm(CHANNELS)
    with pytest.raises(ValueError, match="2D"):
        layer(torch.ones(3))
    own = torch.ones(int(hvd.rank() == 0), CHANNELS)
    with pytest.raises(ValueError, match=r"rank \d.*1 values per channel"):
        layer(own)
