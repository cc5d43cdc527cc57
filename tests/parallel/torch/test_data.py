"""Samplers and uneven loaders, in every rank."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvdx as hvd_core


def everyone(indices):
    return hvd_core.allgather_object(list(indices))


def joined(parts):
    return list(itertools.chain.from_iterable(parts))


@pytest.mark.parametrize("samples", [24, 25, 3])
def test_a_sampler_is_torchs_but_shuffles_by_itself(hvd, samples):
    sampler = hvd.DistributedSampler(range(samples))
    assert isinstance(sampler, torch.utils.data.distributed.DistributedSampler)
    assert (sampler.rank, sampler.num_replicas) == (hvd.rank(), hvd.size())
    passes = []
    for epoch in range(2):
        shares = everyone(sampler)
        assert sampler.epoch == epoch
        assert {len(share) for share in shares} == {len(sampler)}
        assert {index for share in shares for index in share} == set(range(samples))
        assert sampler.total_size == sum(map(len, shares)) < samples + hvd.size()
        passes.append(shares)
    assert passes[0] != passes[1]
    sampler.set_epoch(0)
    assert everyone(sampler) == passes[0]


def test_a_look_is_no_epoch(hvd):
    # One rank shows a sample picture: it must not run ahead of the others.
    sampler = hvd.DistributedSampler(range(40))
    if hvd.rank() == 0:
        next(iter(sampler))
    assert sorted(joined(everyone(sampler))) == list(range(40))


def test_batches_are_even_and_every_sample_comes_once(hvd):
    for samples in range(4 * hvd.size(), 12 * hvd.size(), 3):
        batches = hvd.DistributedBatchSampler(range(samples), 4)
        taken = everyone(batches)
        assert {len(own) for own in taken} == {len(batches)}
        assert sorted(i for own in taken for batch in own for i in batch) == list(range(samples))
        assert max(len(batch) for own in taken for batch in own) <= 4
    assert everyone(batches) != taken


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_is_resumed_on_another_number_of_ranks(hvd, workers):
    samples = 26
    batches = hvd.DistributedBatchSampler(range(samples), 2, seed=4)
    seen = []
    loader = DataLoader(range(samples), batch_sampler=batches, num_workers=workers)
    for step, batch in enumerate(loader):
        seen += joined(everyone(batch.tolist()))
        batches.record_batch(step)  # a worker has fetched more
        if step == 1:
            break
    state, done = batches.state_dict(), len(seen)
    assert state["processed_num"] == done == 4 * hvd.size()
    for rank in range(3):  # whatever ranks there are now
        rest = hvd.DistributedSampler(range(samples), 3, rank, uneven="join")
        rest.load_state_dict(state)
        assert len(rest) == len(range(rank, samples - done, 3))
        seen += rest
    assert sorted(seen) == list(range(samples))


def test_a_process_set_shares_among_its_ranks(hvd, process_set):
    if process_set.included():
        sampler = hvd.DistributedSampler(range(10), process_set=process_set, uneven="join")
        assert sampler.num_replicas == len(process_set.ranks)
        shares = hvd_core.allgather_object(list(sampler), process_set=process_set)
        assert sorted(joined(shares)) == list(range(10))
    else:
        with pytest.raises(ValueError, match="is not in the process set"):
            hvd.DistributedSampler(range(10), process_set=process_set)


def test_what_is_no_option(hvd):
    with pytest.raises(ValueError, match="'zip' must be one of pad, drop, join"):
        hvd.DistributedSampler(range(4), uneven="zip")
    with pytest.raises(ValueError, match="batch_size=0"):
        hvd.DistributedBatchSampler(range(4), 0)
    with pytest.raises(TypeError, match="Linear is no torch"):
        hvd.uneven([], nn.Linear(1, 1))


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss_of(net, x, y):
    return nn.functional.mse_loss(net(x), y)


def dataset(samples):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def wrapped(hvd):
    replica = model()
    optimizer = torch.optim.SGD(replica.parameters(), 0.1, momentum=0.9)
    return replica, hvd.DistributedOptimizer(optimizer, replica)


@pytest.mark.parametrize("extra", [0, 1, -1])
def test_uneven_shares_train_as_one_process_does(hvd, extra):
    # 2 batches of 4 and a sample more: the others have run out when rank 0 trains on it.
    samples = 8 * hvd.size() + extra
    data = dataset(samples)
    replica, optimizer = wrapped(hvd)
    plain = copy.deepcopy(replica)
    single = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    sampler = hvd.DistributedSampler(data, shuffle=False, uneven="join")
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    steps = hvd.uneven(loader, optimizer)
    weights = []
    for _ in range(2):
        for x, y in steps:
            optimizer.zero_grad()
            loss_of(replica, x, y).backward()
            optimizer.step()
            weights.append(steps.weight)
        for start in range(0, samples, 4 * hvd.size()):
            whole = slice(start, start + 4 * hvd.size())
            single.zero_grad()
            loss_of(plain, *data[whole]).backward()
            single.step()
    for p, q in zip(plain.parameters(), replica.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
    alone = [0.0, float(hvd.size())][hvd.rank() == 0]
    assert len(weights) == (6 if extra == 1 else 4)
    assert weights[2] == alone if extra == 1 else weights[0] == 1


def test_a_rank_without_any_batch_takes_part(hvd):
    # Its own files are empty. What all ranks do in a step, they do all the same.
    replica, optimizer = wrapped(hvd)
    last = hvd.size() - 1
    batches = [] if hvd.rank() == last else [tuple(dataset(4)[:])] * 3
    count = 0
    for x, y in hvd.uneven(batches, optimizer):
        optimizer.zero_grad()
        loss_of(replica, x, y).backward()
        optimizer.step()
        count += 1
        assert hvd.allgather(torch.ones(1)).tolist() == [1.0] * hvd.size()
    assert count == 3
    assert len(set(hvd_core.allgather_object(hvd_core.parameter_hash(replica)))) == 1
    assert list(hvd.uneven([], optimizer)) == []


def test_a_repeated_batch_that_overflows_does_no_harm(hvd):
    replica, optimizer = wrapped(hvd)
    x, y = dataset(2)[:]
    batches = [(x, y)] * (2 if hvd.rank() == 0 else 1)
    steps = hvd.uneven(batches, optimizer)
    for x, y in steps:
        optimizer.zero_grad()
        loss = loss_of(replica, x, y)
        (loss if steps.weight else loss * float("inf")).backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in replica.parameters())
