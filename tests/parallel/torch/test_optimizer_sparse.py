"""Sparse gradients travel sparse, or as dense ones where that is asked for; the mean is sparse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd

sys.path.insert(0, str(Path(__file__).parent))
from training import assert_replicas

ROWS = 12


class Bag(nn.Module):
    """An embedding with sparse gradients and a dense layer behind it."""

    def __init__(self, sparse=True):
        super().__init__()
        torch.manual_seed(8)
        self.table = nn.Embedding(ROWS, 3, sparse=sparse).double()
        self.head = nn.Linear(3, 2).double()

    def forward(self, words):
        return self.head(self.table(words)).square().mean()


def words(step, rank):
    """As many words on each rank, some twice, some on several ranks."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, ROWS, (4,), generator=generator)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "as dense"])
@pytest.mark.parametrize("kind", ["sgd", pytest.param("sparse adam", marks=pytest.mark.ranks(2))])
def test_n_ranks_equal_one_process(kind, dense):
    plain, replica = Bag(), Bag()
    stepped = []
    for net in (plain, replica):
        tables, heads = list(net.table.parameters()), list(net.head.parameters())
        if kind == "sgd":
            made = [torch.optim.SGD([*tables, *heads], 0.5)]
        else:
            made = [torch.optim.SparseAdam(tables, 0.1), torch.optim.Adam(heads, 0.1)]
        stepped.append(made)
    theirs, ours = stepped
    for optimizer in ours:
        hvd.DistributedOptimizer(optimizer, replica, sparse_as_dense=dense)
    for step in range(6):
        for optimizer in (*theirs, *ours):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        plain(torch.cat([words(step, rank) for rank in range(hvd.size())])).backward()
        replica(words(step, hvd.rank())).backward()
        assert replica.table.weight.grad.is_sparse
        mean = plain.table.weight.grad.to_dense()
        torch.testing.assert_close(replica.table.weight.grad.to_dense(), mean)
        for optimizer in (*theirs, *ours):
            optimizer.step()
    for p, q in zip(plain.parameters(), replica.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert_replicas(replica)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", ["fp16", "bf16", "int8", "by_layer"])
def test_rows_travel_compressed(method):
    # Uneven numbers of rows, and once none at all, from one rank.
    chosen = getattr(hvd.Compression, method)
    if method == "by_layer":
        chosen = chosen({"*table*": hvd.Compression.bf16})
    plain, net = Bag().float(), Bag().float()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    hvd.DistributedOptimizer(optimizer, net, compression=chosen)
    for step in range(3):
        for each in (plain, net):
            each.zero_grad()
        spoken = [words(step, rank)[: (4 if step else 0) - rank % 2] for rank in range(hvd.size())]
        for own in spoken:
            (plain(own) / hvd.size()).backward() if len(own) else None
        if len(spoken[hvd.rank()]):
            net(spoken[hvd.rank()]).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
        if plain.table.weight.grad is not None:
            mean, ours = plain.table.weight.grad.to_dense(), net.table.weight.grad.to_dense()
            assert mean.count_nonzero() and (ours != 0).any(1).equal((mean != 0).any(1))
            torch.testing.assert_close(ours, mean, rtol=0, atol=0.02 * float(mean.abs().max()))
        plain.load_state_dict(net.state_dict())
    assert_replicas(net)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "as dense"])
def test_a_rank_that_uses_no_word_learns_the_others(dense):
    # From the first step on, and though nothing tells such a rank that the gradient is sparse.
    net = Bag()
    optimizer = torch.optim.SparseAdam(list(net.table.parameters()), 0.1)
    hvd.DistributedOptimizer(optimizer, net, sparse_as_dense=dense)
    for step in range(3):
        optimizer.zero_grad()
        if hvd.rank() != step % hvd.size():
            net(words(step, hvd.rank())).backward()
        optimizer.step()
        assert net.table.weight.grad.is_sparse
        assert_replicas(net)
    assert optimizer.state[net.table.weight]["step"] == 3


@pytest.mark.ranks(2)
def test_no_rank_uses_a_word():
    net = Bag()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    hvd.DistributedOptimizer(optimizer, net)
    net(words(0, hvd.rank())).backward()
    optimizer.step()
    optimizer.zero_grad()
    net.head(torch.ones(1, 3).double()).sum().backward()
    assert net.table.weight.grad is None
    net.table(words(0, 0)[:0]).sum().backward()  # a sparse gradient without a row
    assert net.table.weight.grad.is_sparse
    assert not net.table.weight.grad.to_dense().any()
    optimizer.step()
    assert_replicas(net)


@pytest.mark.ranks(2)
def test_only_rows_with_a_gradient_travel():
    big = nn.Embedding(100_000, 8, sparse=True)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(big.parameters(), 1.0), big)
    with torch.no_grad():
        big.weight.zero_()
    big(torch.tensor([5, 7 + hvd.rank()])).sum().backward()
    (bucket,) = optimizer.reducer.buckets
    assert not hasattr(bucket, "flat")
    grad = big.weight.grad
    assert grad.is_coalesced()
    assert grad.indices().tolist() == [[5, *range(7, 7 + hvd.size())]]
    assert grad.values()[:, 0].tolist() == pytest.approx([1.0] + [1 / hvd.size()] * hvd.size())


@pytest.mark.ranks(2)
def test_gradients_that_become_sparse_later():
    # Ranks agreed on a dense gradient at the first step: it keeps travelling dense.
    parameter = nn.Parameter(torch.zeros(6, 2))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], 1.0))
    parameter.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if hvd.rank() == 0:
        nn.functional.embedding(torch.tensor([1, 1]), parameter, sparse=True).sum().backward()
    optimizer.synchronize()
    assert parameter.grad.is_sparse
    assert parameter.grad.to_dense()[:, 0].tolist() == pytest.approx(
        [0, 2 / hvd.size(), 0, 0, 0, 0]
    )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_dtypes_and_sums(dtype):
    table = nn.Embedding(4, 2, sparse=True).to(dtype)
    hvd.DistributedOptimizer(torch.optim.SGD(table.parameters(), 1.0), table, op=hvd.Sum)
    for passes in range(1, 3):  # a second backward adds to the sum
        table(torch.tensor([1])).sum().backward()
        assert table.weight.grad.to_dense()[:, 0].tolist() == [0, passes * hvd.size(), 0, 0]
        if dtype != torch.float32:
            return  # torch cannot add such sparse tensors
