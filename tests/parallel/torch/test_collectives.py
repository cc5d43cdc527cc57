"""Collectives of the shared API on torch tensors and NumPy arrays, in every rank."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hvdx as hvd

REDUCED = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64]
MOVED = [*REDUCED, torch.uint8, torch.int8, torch.int16, torch.bool, torch.complex64]


def ranks() -> range:
    return range(hvd.size())


def test_allreduce_sums():
    for dtype in REDUCED:
        mine = (torch.arange(6).view(2, 3) + hvd.rank()).to(dtype)
        total = hvd.allreduce(mine, op=hvd.Sum, name=f"sum.{dtype}")
        expected = sum(torch.arange(6).view(2, 3) + rank for rank in ranks())
        assert total.dtype == dtype
        torch.testing.assert_close(total, expected.to(dtype))


def test_allreduce_averages_by_default_and_leaves_its_argument_alone():
    mine = torch.full((5,), float(hvd.rank()))
    mean = hvd.allreduce(mine)
    torch.testing.assert_close(mean, torch.full((5,), (hvd.size() - 1) / 2))
    torch.testing.assert_close(mine, torch.full((5,), float(hvd.rank())))


@pytest.mark.parametrize("op", [hvd.Min, hvd.Max, hvd.Product])
def test_other_operators(op):
    mine = torch.tensor([1.0 + hvd.rank(), 3.0 - hvd.rank()])
    everyone = torch.stack([torch.tensor([1.0 + r, 3.0 - r]) for r in ranks()])
    expected = {
        hvd.Min: everyone.min(0).values,
        hvd.Max: everyone.max(0).values,
        hvd.Product: everyone.prod(0),
    }
    torch.testing.assert_close(hvd.allreduce(mine, op=op), expected[op])


def test_scale_factors():
    result = hvd.allreduce(torch.ones(3), op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.25)
    torch.testing.assert_close(result, torch.full((3,), 0.5 * hvd.size()))


def test_a_transposed_tensor_is_reduced_as_it_looks():
    mine = torch.arange(6.0).view(2, 3).t() + hvd.rank()
    expected = torch.arange(6.0).view(2, 3).t() + (hvd.size() - 1) / 2
    torch.testing.assert_close(hvd.allreduce(mine), expected)


def test_allreduce_is_differentiable():
    mine = torch.ones(3, requires_grad=True)
    hvd.allreduce(mine * (hvd.rank() + 1), op=hvd.Sum).sum().backward()
    torch.testing.assert_close(mine.grad, torch.full((3,), float(hvd.size() * (hvd.rank() + 1))))


def test_half_compression_divides_before_it_sums():
    # Horovod's fp16 sums 60000 on every rank and gets inf.
    mean = hvd.allreduce(torch.full((4,), 60000.0), compression=hvd.Compression.fp16)
    torch.testing.assert_close(mean, torch.full((4,), 60000.0), rtol=1e-3, atol=0)


@pytest.mark.ranks(2)
def test_a_horovod_compressor_class_is_accepted(hvd):
    import horovod.torch

    mean = hvd.allreduce(torch.ones(3), compression=horovod.torch.Compression.fp16)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.ones(3))


def test_grouped_allreduce():
    tensors = [torch.full((n,), float(hvd.rank() + n)) for n in (1, 4, 2)]
    means = hvd.grouped_allreduce(tensors, name="group")
    for n, mean in zip((1, 4, 2), means, strict=True):
        torch.testing.assert_close(mean, torch.full((n,), n + (hvd.size() - 1) / 2))


def test_allgather_of_unequal_lengths():
    for dtype in MOVED:
        mine = torch.full((hvd.rank() + 1, 2), hvd.rank()).to(dtype)
        whole = hvd.allgather(mine, name=f"gather.{dtype}")
        expected = torch.cat([torch.full((r + 1, 2), r).to(dtype) for r in ranks()])
        assert whole.dtype == dtype
        assert torch.equal(whole, expected)


def test_grouped_allgather():
    one, two = hvd.grouped_allgather(
        [torch.tensor([hvd.rank()]), torch.tensor([[0.5 * hvd.rank()]])], name="gathers"
    )
    assert one.tolist() == list(ranks())
    assert two.tolist() == [[0.5 * r] for r in ranks()]


def test_broadcast():
    root = hvd.size() - 1
    for dtype in MOVED:
        mine = (torch.arange(4) % 2 + 2 * hvd.rank()).to(dtype)
        result = hvd.broadcast(mine, root, name=f"broadcast.{dtype}")
        assert torch.equal(result, (torch.arange(4) % 2 + 2 * root).to(dtype))


def test_alltoall_in_equal_slices():
    mine = torch.arange(hvd.size()) * 10 + hvd.rank()
    assert hvd.alltoall(mine).tolist() == [hvd.rank() * 10 + r for r in ranks()]


def test_alltoall_in_uneven_slices():
    # Rank r sends r + to rows, each holding its own number, to rank "to".
    splits = [hvd.rank() + to for to in ranks()]
    rows, received = hvd.alltoall(torch.full((sum(splits),), hvd.rank()), splits=splits)
    assert received.tolist() == [r + hvd.rank() for r in ranks()]
    assert rows.tolist() == [r for r in ranks() for _ in range(r + hvd.rank())]


def test_reducescatter():
    mine = torch.arange(2.0 * hvd.size()) + hvd.rank()
    mean = (hvd.size() - 1) / 2
    expected = [2 * hvd.rank() + mean, 2 * hvd.rank() + 1 + mean]
    assert hvd.reducescatter(mine).tolist() == expected


def test_grouped_reducescatter():
    one, two = hvd.grouped_reducescatter(
        [torch.ones(hvd.size()), torch.ones(hvd.size(), 2)], op=hvd.Sum
    )
    assert one.tolist() == [hvd.size()]
    assert two.tolist() == [[hvd.size()] * 2]
    (array,) = hvd.grouped_reducescatter([np.ones(hvd.size())])
    assert isinstance(array, np.ndarray) and array.tolist() == [1.0]


def test_numpy_arrays_and_numbers_travel_through_the_running_core():
    assert hvd.allreduce(np.full(3, float(hvd.rank()))).tolist() == [(hvd.size() - 1) / 2] * 3
    assert hvd.allgather(np.array([hvd.rank()])).tolist() == list(ranks())
    assert float(hvd.allreduce(float(hvd.rank()), op=hvd.Sum)) == sum(ranks())
    rows, received = hvd.alltoall(np.arange(hvd.size()), splits=[1] * hvd.size())
    assert isinstance(rows, np.ndarray)
    assert received.tolist() == [1] * hvd.size()


def test_objects():
    assert hvd.broadcast_object({"from": hvd.rank()}, root_rank=1) == {"from": 1}
    assert hvd.allgather_object("x" * hvd.rank()) == ["x" * r for r in ranks()]


def test_barrier_waits_for_the_slowest_rank(tmp_path):
    come = Path(hvd.broadcast_object(str(tmp_path)), "come")
    if hvd.rank() == 0:
        time.sleep(0.3)
        come.touch()
    hvd.barrier()
    assert come.exists()
    hvd.barrier()  # before rank 0 removes it


def test_join_lets_a_rank_end_early():
    steps = 1 + hvd.rank()  # rank 0 has the least data
    for step in range(steps):
        hvd.allreduce(torch.ones(2), op=hvd.Sum, name=f"uneven.{step}")
    assert hvd.join() == hvd.size() - 1


def test_process_sets(process_set):
    part = process_set
    assert part.included() == (hvd.rank() in part.ranks)
    if part.included():
        total = hvd.allreduce(torch.tensor([float(hvd.rank())]), op=hvd.Sum, process_set=part)
        assert total.tolist() == [sum(part.ranks)]
        assert hvd.allgather_object(hvd.rank(), process_set=part) == part.ranks
        half = hvd.allreduce(torch.ones(2), compression=hvd.Compression.fp16, process_set=part)
        assert half.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="DYNAMIC"):
        hvd.add_process_set([0])


def test_unnamed_operations_pair_up_after_a_process_set_was_used(process_set):
    # Horovod names them by a count over all sets: ranks outside the set fell behind, and the
    # next unnamed operation of all ranks waited for ever.
    if process_set.included():
        hvd.allreduce(torch.ones(1), process_set=process_set)
        hvd.allgather_object("only some", process_set=process_set)
    assert hvd.broadcast(torch.tensor([hvd.rank()]), 0).item() == 0
    assert hvd.allgather_object(1) == [1] * hvd.size()


def test_queries():
    assert hvd.is_initialized()
    assert 0 <= hvd.rank() < hvd.size()
    assert hvd.local_size() == hvd.size()
    assert hvd.local_rank() == hvd.rank()
    assert hvd.cross_size() == 1
    assert hvd.cross_rank() == 0
    assert hvd.is_homogeneous()
    assert hvd.gloo_built()
    assert not hvd.ddl_built()


@pytest.mark.ranks(2)
def test_the_face_has_what_horovod_has(hvd):
    import horovod.torch

    missing = [n for n in dir(horovod.torch) if not n.startswith("_") and not hasattr(hvd, n)]
    assert not missing
    handle = hvd.allreduce_async_(torch.ones(2), name="face")
    assert hvd.synchronize(handle).tolist() == [1.0, 1.0]
