"""Gradients through collectives, as Horovod defines them, for every way gradients come in."""

from __future__ import annotations

import pytest
import torch

import hvdx.torch as hvd

N = hvd.size


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def weights(result: torch.Tensor) -> torch.Tensor:
    """Return what to multiply a result by: 1, 2, ... by element, times this rank's number + 1."""
    places = torch.arange(1, result.numel() + 1).view(result.shape)
    return (places * (hvd.rank() + 1)).to(result.dtype)


def backward(result: torch.Tensor) -> None:
    (result * weights(result)).sum().backward()


def summed(result: torch.Tensor) -> torch.Tensor:
    """Return the sum over the ranks of what :func:`weights` gives them."""
    mine = weights(result) / (hvd.rank() + 1)
    return mine * sum(range(1, N() + 1))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_allreduce(dtype):
    for op, share in ((hvd.Sum, 1.0), (hvd.Average, 1.0 / N())):
        x = leaf(2, 3, dtype=dtype)
        result = hvd.allreduce(x, op=op)
        backward(result)
        torch.testing.assert_close(x.grad, (summed(result) * share).to(dtype))


@pytest.mark.ranks(2)
def test_allreduce_with_factors_and_compression():
    x = leaf(3)
    result = hvd.allreduce(x, op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.25)
    backward(result)
    torch.testing.assert_close(x.grad, summed(result) * 0.5)
    for compression in (hvd.Compression.fp16, hvd.Compression.none):
        x = leaf(3)
        result = hvd.allreduce(x, compression=compression)
        backward(result)
        torch.testing.assert_close(x.grad, summed(result) / N())


@pytest.mark.ranks(2)
def test_expanded_and_transposed_gradients():
    x = leaf(3)
    hvd.allreduce(x, op=hvd.Sum).sum().backward()  # the gradient of sum() is expanded
    assert x.grad.tolist() == [N()] * 3
    x = leaf(2, 3)
    result = hvd.allreduce(x, op=hvd.Sum).t()
    backward(result)
    torch.testing.assert_close(x.grad, summed(result).t())
    base = leaf(3, 2)
    result = hvd.allreduce(base.t(), op=hvd.Sum)  # nor is the input contiguous
    backward(result)
    torch.testing.assert_close(base.grad, summed(result).t())


@pytest.mark.ranks(2)
def test_grouped_allreduce():
    for op, share in ((hvd.Sum, 1.0), (hvd.Average, 1.0 / N())):
        x, y, fixed = leaf(3), leaf(2, 2, dtype=torch.bfloat16), torch.ones(2)
        one, two, three = hvd.grouped_allreduce([x, y, fixed], op=op)
        ((one * weights(one)).sum() + (two * weights(two)).sum() + three.sum()).backward()
        torch.testing.assert_close(x.grad, summed(one) * share)
        torch.testing.assert_close(y.grad, (summed(two) * share).bfloat16())
    x, y = leaf(3), leaf(2)
    one, _ = hvd.grouped_allreduce([x, y], op=hvd.Sum)
    one.sum().backward()  # without the second
    assert (x.grad.tolist(), y.grad.tolist()) == ([N()] * 3, [0.0] * 2)


@pytest.mark.ranks(2)
def test_operators_without_a_gradient_say_so():
    for op in (hvd.Min, hvd.Max, hvd.Product):
        result = hvd.allreduce(leaf(2), op=op)
        with pytest.raises(NotImplementedError, match=rf"op=hvd\.{op.name}\) has no gradient"):
            result.sum().backward()


def test_allgather_of_unequal_lengths():
    lengths = [rank + 1 for rank in range(N())]
    begin = sum(lengths[: hvd.rank()])
    for dtype in (torch.float32, torch.bfloat16):
        x = leaf(hvd.rank() + 1, 2, dtype=dtype)
        result = hvd.allgather(x)
        backward(result)
        expected = (summed(result) / N())[begin : begin + hvd.rank() + 1]
        torch.testing.assert_close(x.grad, expected.to(dtype))


def test_grouped_allgather():
    x, y = leaf(hvd.rank() + 1), leaf(2, 2)
    one, two = hvd.grouped_allgather([x, y])
    ((one * weights(one)).sum() + (two * weights(two)).sum()).backward()
    begin = sum(range(1, hvd.rank() + 1))
    expected = (summed(one) / N())[begin : begin + hvd.rank() + 1]
    torch.testing.assert_close(x.grad, expected)
    expected = (summed(two) / N())[2 * hvd.rank() : 2 * hvd.rank() + 2]
    torch.testing.assert_close(y.grad, expected)


@pytest.mark.ranks(2)
def test_broadcast():
    for dtype in (torch.float32, torch.bfloat16):
        x = leaf(3, dtype=dtype)
        result = hvd.broadcast(x, 1)
        backward(result)
        expected = summed(result) / N() * (hvd.rank() == 1)
        torch.testing.assert_close(x.grad, expected.to(dtype))


def test_alltoall():
    x = leaf(N(), 2)
    result = hvd.alltoall(x)
    result.mul(hvd.rank() + 1).sum().backward()  # row r went to rank r
    torch.testing.assert_close(x.grad[:, 0], torch.arange(1.0, N() + 1))
    # Rank r sends r rows to each.
    x = leaf(N() * hvd.rank(), 2)
    result, received = hvd.alltoall(x, [hvd.rank()] * N())
    assert not received.requires_grad
    result.mul(hvd.rank() + 1).sum().backward()
    expected = torch.arange(1.0, N() + 1).repeat_interleave(hvd.rank())
    torch.testing.assert_close(x.grad[:, 0], expected)


def test_reducescatter():
    rows = N() + 1
    mine = slice(0, 2) if hvd.rank() == 0 else slice(hvd.rank() + 1, hvd.rank() + 2)
    places = torch.arange(1.0, rows + 1)
    for op, share in ((hvd.Average, 1.0), (hvd.Sum, float(N()))):
        for factors in ((1.0, 1.0), (2.0, 0.25)):
            x = leaf(rows)
            options = {"prescale_factor": factors[0], "postscale_factor": factors[1]}
            result = hvd.reducescatter(x, op=op, **options)
            grad = places[mine].clone()
            result.backward(grad)
            torch.testing.assert_close(x.grad, places * share * factors[0] * factors[1])
            assert torch.equal(grad, places[mine]), "the gradient given is left alone"
            x, y = leaf(rows), leaf(rows, dtype=torch.bfloat16)
            one, two = hvd.grouped_reducescatter([x, y], op=op, **options)
            (one.sum() + two.float().sum()).backward()
            expected = torch.full((rows,), share * factors[0] * factors[1])
            torch.testing.assert_close(x.grad, expected)
            torch.testing.assert_close(y.grad, expected.bfloat16())


def test_process_sets(process_set):
    if not process_set.included():
        return
    members = len(process_set.ranks)
    options = {"process_set": process_set}
    x = leaf(2)
    hvd.allreduce(x, op=hvd.Sum, **options).sum().backward()
    assert x.grad.tolist() == [members] * 2
    x = leaf(process_set.rank() + 1)
    hvd.allgather(x, **options).sum().backward()
    assert x.grad.tolist() == [1.0] * (process_set.rank() + 1)
    x = leaf(members)
    hvd.reducescatter(x, op=hvd.Sum, **options).sum().backward()
    assert x.grad.tolist() == [members] * members
    x = leaf(members)
    hvd.alltoall(x, [1] * members, **options)[0].sum().backward()
    assert x.grad.tolist() == [1.0] * members


@pytest.mark.ranks(2)
def test_second_derivatives():
    x = leaf(2, dtype=torch.float64)
    (first,) = torch.autograd.grad(
        hvd.allreduce(x**3, op=hvd.Sum).sum(), x, create_graph=True
    )  # fmt: skip
    first.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2,), 6.0 * N(), dtype=torch.float64))


def test_names_pair_up_where_only_some_ranks_want_a_gradient():
    x = torch.ones(2, requires_grad=hvd.rank() == 0)
    for call in (hvd.allreduce, hvd.allgather, hvd.alltoall, hvd.reducescatter):
        call(x.repeat(N()))


@pytest.mark.ranks(2)
def test_without_grad_there_is_none():
    x = leaf(2)
    with torch.no_grad():
        assert not hvd.allreduce(x).requires_grad
    for given in (x, x.bfloat16(), leaf(2, 3).t(), leaf(2, dtype=torch.bfloat16)):
        for start in (hvd.allreduce_async, hvd.allgather_async, hvd.reducescatter_async):
            assert not hvd.synchronize(start(given)).requires_grad
        assert not hvd.synchronize(hvd.grouped_allreduce_async([given]))[0].requires_grad
        assert not hvd.synchronize(hvd.broadcast_async(given, 0)).requires_grad
