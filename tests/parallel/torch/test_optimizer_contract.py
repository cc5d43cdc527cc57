"""Horovod's arguments, methods and messages, as its users' scripts and suites know them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd

sys.path.insert(0, str(Path(__file__).parent))
import copy
import pickle
import warnings

from training import (
    BATCH,
    OPTIMIZERS,
    assert_equal,
    assert_replicas,
    data,
    loss_of,
    model,
    own,
    pair,
    train,
    whole,
)

pytestmark = pytest.mark.ranks(2)


def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


@pytest.mark.parametrize("groups", [1, 2, 100, "lists", "mixed"])
def test_groups_are_averaged_together(groups, monkeypatch):
    monkeypatch.setenv("HVDX_BUCKET_MB", "0.0001")
    plain, replica = model(), model()
    if groups == "mixed":
        for net in (plain, replica):
            net[2].to(torch.float32)
            net.insert(2, Cast(torch.float32))
            net.insert(4, Cast(torch.float64))
    theirs, ours = optimizer_of(plain), optimizer_of(replica)
    layers = [list(layer.parameters()) for layer in replica if list(layer.parameters())]
    told = groups if isinstance(groups, int) else [[*layers[0], *layers[1]], []]
    hvd.DistributedOptimizer(ours, replica, groups=told, gradient_predivide_factor=2.0)
    train([(plain, theirs, whole), (replica, ours, own)], data(steps=4))
    assert_equal(plain, replica, 1e-6 if groups == "mixed" else 1e-12)
    members = [sorted(bucket.names) for bucket in ours.reducer.buckets]
    if groups == "lists":
        assert ["0.bias", "0.weight", "2.bias", "2.weight"] in members
    elif groups == "mixed":  # one operation has one dtype
        assert ["0.bias", "0.weight"] in members and ["3.bias", "3.weight"] in members
    else:
        assert len(members) == min(groups, 6)


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def test_num_groups_is_the_older_name():
    net = model()
    with pytest.warns(DeprecationWarning, match="groups"):
        ours = hvd.DistributedOptimizer(optimizer_of(net), net, num_groups=2)
    net(torch.ones(1, 6).double()).sum().backward()
    assert len(ours.reducer.buckets) == 2


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (-1, "groups=-1"),
        (0, "groups=0"),
        ("two", "groups is a str"),
        ([nn.Parameter(torch.ones(1))], r"groups\[0\] is a Parameter"),
        ([[1]], r"groups\[0\] holds a int"),
        ([[nn.Parameter(torch.ones(1))] * 2], "twice"),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_wrong_groups(groups, told):
    with pytest.raises(ValueError, match=told):
        hvd.DistributedOptimizer(optimizer_of(nn.Linear(1, 1)), groups=groups)


@pytest.mark.parametrize("wrong", [-1, "x"])
def test_wrong_num_groups(wrong):
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError):
        hvd.DistributedOptimizer(optimizer_of(nn.Linear(1, 1)), num_groups=wrong)


def test_names():
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    both = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="two parameters are named 'weight'"):
        hvd.DistributedOptimizer(both, [*one.named_parameters(), *two.named_parameters()])
    with pytest.raises(ValueError, match="2 parameters of the optimizer are not in"):
        hvd.DistributedOptimizer(both, one.named_parameters())
    with pytest.raises(ValueError, match=r"not parameters\(\)"):
        hvd.DistributedOptimizer(both, one.parameters())
    hvd.DistributedOptimizer(both)  # names are not needed
    sum(layer.weight.sum() for layer in (one, two)).backward()
    both.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_dtypes_that_have_no_average(dtype):
    net = nn.ParameterDict({"odd": nn.Parameter(torch.ones(2, dtype=dtype))})
    with pytest.raises(ValueError, match=f"'odd' is {str(dtype)[6:]}; .*hvd.allreduce"):
        hvd.DistributedOptimizer(optimizer_of(net), net)
    frozen = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    hvd.DistributedOptimizer(torch.optim.SGD([frozen, nn.Parameter(torch.ones(1))], 0.1))


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_predivide_factors_are_positive(factor):
    with pytest.raises(ValueError, match="gradient_predivide_factor"):
        hvd.DistributedOptimizer(optimizer_of(nn.Linear(1, 1)), gradient_predivide_factor=factor)


def test_wrapped_optimizers_keep_their_class_and_pickle_as_plain_ones():
    net = model()
    ours = hvd.DistributedOptimizer(torch.optim.Adam(net.parameters(), 0.01), net)
    assert type(ours) is torch.optim.Adam
    loss_of(net, *next(data())).backward()
    ours.step()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is torch.optim.Adam and not hasattr(twin, "reducer")
        assert twin.state_dict()["state"].keys() == ours.state_dict()["state"].keys()
    copied = pickle.loads(pickle.dumps(net))
    assert_equal(net, copied)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_checkpoints_load_after_wrapping(kind):
    plain, theirs, replica, ours = pair(kind, backward_passes_per_step=2)
    pairs = [(plain, theirs, whole), (replica, ours, own)]
    train(pairs, data(steps=2))
    saved = copy.deepcopy((replica.state_dict(), ours.state_dict()))
    train(pairs, data(steps=1))
    x, y = next(data())
    loss_of(replica, own(x), own(y)).backward()  # one of two passes: overtaken by the checkpoint
    for net, optimizer in ((plain, theirs), (replica, ours)):
        net.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
    train(pairs, data(steps=3))
    assert_equal(plain, replica)
    plain_again = OPTIMIZERS[kind](plain.parameters())
    plain_again.load_state_dict(ours.state_dict())  # and the other way round


def test_a_warning_tells_of_calls_that_are_not_needed():
    _, _, replica, ours = pair()
    x, y = next(data())
    loss_of(replica, own(x), own(y)).backward()
    ours.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours.step()
    assert len(told) == 1
    assert "optimizer.step() called without optimizer.skip_synchronize()" in str(told[0].message)
    assert told[0].filename == __file__
    ours.zero_grad()
    loss_of(replica, own(x), own(y)).backward()
    ours.synchronize()
    with warnings.catch_warnings(), ours.skip_synchronize():
        warnings.simplefilter("error")
        ours.step()
    assert_replicas(replica)


def test_synchronize_twice_and_zero_grad_at_any_time():
    plain, theirs, replica, ours = pair()
    for x, y in data(steps=3):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            net(part(x)).sum().backward()
            optimizer.zero_grad()  # Horovod refuses it here
            loss_of(net, part(x), part(y)).backward()
            if optimizer is ours:
                before = [p.grad.clone() for p in net.parameters()]
                ours.synchronize()
                ours.synchronize()
                assert all(map(torch.equal, before, (p.grad for p in net.parameters())))
                with ours.skip_synchronize():
                    ours.step()
            else:
                optimizer.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2, 4)
def test_gradients_that_only_some_ranks_have():
    # Horovod's suite: each rank trains a branch of its own, and step() must not wait for ever.
    torch.manual_seed(12)
    net = nn.ModuleList([nn.Linear(2, 2) for _ in range(hvd.size() + 1)])
    ours = hvd.DistributedOptimizer(optimizer_of(net), net.named_parameters())
    for _ in range(2):
        ours.zero_grad()
        net[1 + hvd.rank()](net[0](torch.ones(1, 2))).sum().backward()
        ours.step()
    assert_replicas(net)


def test_requires_grad_turned_off_and_on():
    nets = [nn.Linear(2, 2), nn.Linear(2, 1)]
    for net in nets:
        hvd.broadcast_parameters(net)
    optimizers = [hvd.DistributedOptimizer(optimizer_of(net), net) for net in nets]
    for step in range(6):
        for place, net in enumerate(nets):
            net.requires_grad_(step % 2 == place)
            net.zero_grad(set_to_none=False)
        nets[1](nets[0](torch.rand(3, 2))).sum().backward()
        optimizers[step % 2].step()
        for place, net in enumerate(nets):
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            assert all(grad.any() for grad in grads) == (step % 2 == place) or not grads
    for net in nets:
        assert_replicas(net)


@pytest.mark.ranks(2, 4)
def test_ranks_outside_the_process_set_train_alone(process_set):
    plain, replica = model(), model()
    theirs, ours = OPTIMIZERS["adam"](plain.parameters()), OPTIMIZERS["adam"](replica.parameters())
    hvd.DistributedOptimizer(ours, replica, process_set=process_set)
    members = len(process_set.ranks) * BATCH  # they are the first ranks
    seen = (lambda t: t[:members]) if hvd.rank() in process_set.ranks else own
    for x, y in data(steps=3):
        for net, optimizer, part in ((plain, theirs, seen), (replica, ours, own)):
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            if optimizer is ours:
                optimizer.synchronize()
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
    assert_equal(plain, replica)


def test_process_sets_that_horovod_does_not_know():
    with pytest.raises(ValueError, match=r"process set \[0\] is not known.*add_process_set"):
        hvd.DistributedOptimizer(optimizer_of(nn.Linear(1, 1)), process_set=hvd.ProcessSet([0]))
    ours = hvd.DistributedOptimizer(
        optimizer_of(nn.Linear(1, 1)), process_set=hvd.global_process_set
    )
    assert ours.reducer.ranks == hvd.size()
