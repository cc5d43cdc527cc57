"""Replicas that start different are noticed, once, before they have trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd

sys.path.insert(0, str(Path(__file__).parent))
import warnings

from training import data, loss_of, model, own


def step(net, optimizer):
    x, y = next(data())
    loss_of(net, own(x), own(y)).backward()
    optimizer.step()
    optimizer.zero_grad()


def warned(call, *arguments):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(*arguments)
    return [str(each.message) for each in told]


def wrapped(net, lr=0.1, **options):
    return hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr), net, **options)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_parameters_that_were_not_broadcast(op):
    net = model()
    with torch.no_grad():
        net[2].bias[3] += 1e-9 * (hvd.rank() == hvd.size() - 1)  # one bit is enough
    optimizer = wrapped(net, op=op)
    (told,) = warned(step, net, optimizer)
    assert "1 of 6 parameters are not equal" in told
    assert f"The first is '2.bias': ranks [{hvd.size() - 1}] hold" in told
    assert "hvd.broadcast_parameters(model, root_rank=0)" in told
    assert not warned(step, net, optimizer)


@pytest.mark.ranks(2)
def test_parameters_that_were():
    torch.manual_seed(hvd.rank())
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3).half()).double()
    optimizer = wrapped(net)
    hvd.broadcast_parameters(net)  # after wrapping is early enough
    assert not warned(step, net, optimizer)


@pytest.mark.ranks(2)
def test_parameters_added_later():
    net = model()
    optimizer = wrapped(net)
    assert not warned(step, net, optimizer)
    late = nn.Parameter(torch.full((2,), float(hvd.rank())))
    optimizer.add_param_group({"params": [late]})
    (told,) = warned(step, net, optimizer)
    assert "1 of 1 parameters" in told


def test_options_that_differ():
    net = model()
    optimizer = wrapped(net, lr=0.1 * (1 + hvd.rank()))
    (told,) = warned(step, net, optimizer)
    assert "lr of group 0 is rank 0: 0.1, rank 1: 0.2" in told
    assert "broadcast_optimizer_state" in told
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert not warned(step, net, optimizer)  # told once


def test_ranks_outside_the_process_set_may_differ(process_set):
    torch.manual_seed(int(hvd.rank() in process_set.ranks))
    net = nn.Linear(6, 3).double()
    assert not warned(step, net, wrapped(net, process_set=process_set))
