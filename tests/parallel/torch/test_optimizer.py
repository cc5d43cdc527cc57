"""Training on N ranks equals training in one process on all their data."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd
from hvdx.integrations import pytorch_optimizer_reducer

sys.path.insert(0, str(Path(__file__).parent))
from training import (
    BATCH,
    OPTIMIZERS,
    TOLERANCE,
    assert_equal,
    assert_replicas,
    data,
    loss_of,
    model,
    own,
    pair,
    whole,
)  # fmt: skip

MORE = pytest.mark.ranks(2)  # what makes no other collectives


@pytest.fixture(
    params=[pytest.param(None, marks=MORE), "0.0005"], ids=["one bucket", "many buckets"]
)
def bucket_size(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("HVDX_BUCKET_MB", request.param)
        monkeypatch.setattr(
            pytorch_optimizer_reducer, "_LARGE", 50
        )  # some gradients count as large


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=MORE if kind != "adam" else ()) for kind in OPTIMIZERS]
)
def test_n_ranks_equal_one_process(kind, dtype, bucket_size):
    plain = model(dtype)
    replica = copy.deepcopy(plain)
    ours = OPTIMIZERS[kind](replica.parameters())
    theirs = OPTIMIZERS[kind](plain.parameters())
    assert hvd.DistributedOptimizer(ours, replica) is ours
    hvd.broadcast_parameters(replica)
    for step, (x, y) in enumerate(data(dtype)):
        theirs.zero_grad()
        loss_of(plain, x, y).backward()
        theirs.step()
        ours.zero_grad(set_to_none=step % 2 == 0)
        loss_of(replica, own(x), own(y)).backward()
        ours.step()
    assert_equal(plain, replica, TOLERANCE[dtype])
    assert_replicas(replica)


@pytest.mark.ranks(2)
def test_gradients_are_means_when_backward_returns():
    plain, _, replica, ours = pair()
    x, y = next(data())
    loss_of(plain, x, y).backward()
    loss_of(replica, own(x), own(y)).backward()
    for p, q in zip(plain.parameters(), replica.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
    assert ours.communication_seconds > 0


@pytest.mark.ranks(2)
def test_clipping_needs_no_ceremony():
    plain, theirs, replica, ours = pair()
    for x, y in data():
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_horovods_ceremony_works_too():
    plain, theirs, replica, ours = pair()
    for x, y in data():
        theirs.zero_grad()
        loss_of(plain, x, y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        theirs.step()
        ours.zero_grad()
        loss_of(replica, own(x), own(y)).backward()
        rounds = [bucket.rounds for bucket in ours.reducer.buckets]
        ours.synchronize()  # backward has done it: nothing travels twice
        assert [bucket.rounds for bucket in ours.reducer.buckets] == rounds == [1]
        nn.utils.clip_grad_norm_(replica.parameters(), 0.05)
        with ours.skip_synchronize():
            ours.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("how", ["passes", "no_sync", "every backward"])
def test_gradients_accumulate(how):
    options = {"backward_passes_per_step": 3} if how == "passes" else {}
    plain, theirs, replica, ours = pair(**options)
    batches = list(data(steps=12))
    for first in range(0, 12, 3):
        theirs.zero_grad()
        ours.zero_grad()
        for index in range(first, first + 3):
            x, y = batches[index]
            loss_of(plain, x, y).backward()
            quiet = how == "no_sync" and index < first + 2
            with ours.no_sync() if quiet else contextlib.nullcontext():
                loss_of(replica, own(x), own(y)).backward()
        theirs.step()
        ours.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_a_step_before_all_passes_averages_what_there_is():
    plain, theirs, replica, ours = pair(backward_passes_per_step=3)
    for x, y in data(steps=4):
        theirs.zero_grad()
        loss_of(plain, x, y).backward()
        theirs.step()
        ours.zero_grad()
        loss_of(replica, own(x), own(y)).backward()
        ours.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_two_losses_through_one_model():
    plain, theirs, replica, ours = pair()
    for x, y in data():
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            net(part(x)).square().mean().backward()
            optimizer.step()
    assert_equal(plain, replica)


class Forked(nn.Module):
    """Its branches are used by some ranks, or by none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(6, 6).double()
        self.branch = nn.Linear(6, 3).double()
        self.never = nn.Linear(6, 3).double()
        self.other = nn.Linear(6, 3).double()

    def forward(self, x, branch):
        return (self.branch if branch else self.other)(torch.tanh(self.trunk(x)))


def test_unused_parameter_does_not_hang():
    # One rank skips a branch, so that its gradient is None there. The mean counts it as zeros;
    # a parameter that no rank used keeps no gradient: weight decay must not touch it.
    plain, replica = Forked(), Forked()
    theirs = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    ours = torch.optim.SGD(replica.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    hvd.DistributedOptimizer(ours, replica)
    for step, (x, y) in enumerate(data()):
        uses = [(rank + step) % 2 == 0 for rank in range(hvd.size())]
        theirs.zero_grad()
        for rank, branch in enumerate(uses):
            rows = slice(rank * BATCH, (rank + 1) * BATCH)
            loss = nn.functional.mse_loss(plain(x[rows], branch), y[rows])
            (loss / hvd.size()).backward()
        theirs.step()
        ours.zero_grad()
        nn.functional.mse_loss(replica(own(x), uses[hvd.rank()]), own(y)).backward()
        ours.step()
        assert replica.never.weight.grad is None
    assert_equal(plain, replica)
    assert_replicas(replica)


class FailingOnce(torch.autograd.Function):
    """Raises the first time that backward comes through."""

    failed = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if not FailingOnce.failed:
            FailingOnce.failed = True
            raise RuntimeError("out of luck")
        return grad


@pytest.mark.ranks(2)
@pytest.mark.parametrize("large", [1, 10**9], ids=["placed at once", "placed together"])
def test_training_goes_on_after_a_backward_that_failed(large, monkeypatch):
    # Half of the gradients were counted in, and some moved and scaled; the batch is given up
    # with what it left in the gradients, as PyTorch leaves it.
    monkeypatch.setattr(pytorch_optimizer_reducer, "_LARGE", large)
    FailingOnce.failed = False
    plain, theirs, replica, ours = pair()
    left = copy.deepcopy(plain)
    for step, (x, y) in enumerate(data(steps=4)):
        if step == 1:
            theirs.zero_grad()
            ours.zero_grad()
            hidden = FailingOnce.apply(replica[:3](own(x)))
            with pytest.raises(RuntimeError, match="out of luck"):
                nn.functional.mse_loss(replica[3:](hidden), own(y)).backward()
            left.load_state_dict(plain.state_dict())
            nn.functional.mse_loss(left[3:](left[:3](x).detach()), y).backward()
            for parameter, part in zip(plain.parameters(), left.parameters(), strict=True):
                parameter.grad = part.grad
        else:
            theirs.zero_grad()
            ours.zero_grad()
        loss_of(plain, x, y).backward()
        loss_of(replica, own(x), own(y)).backward()
        theirs.step()
        ours.step()
    assert_equal(plain, replica)


def test_a_rank_without_any_gradient_takes_part():
    _, _, replica, ours = pair()
    x, y = next(data())
    if hvd.rank() != 0:
        loss_of(replica, own(x), own(y)).backward()
    ours.step()
    assert_replicas(replica)


@pytest.mark.ranks(2)
def test_shared_parameters():
    def tied():
        torch.manual_seed(4)
        one = nn.Linear(6, 6).double()
        return nn.Sequential(one, nn.Tanh(), one, nn.Linear(6, 3).double())

    plain, replica = tied(), tied()
    theirs = torch.optim.Adam(plain.parameters(), 0.01)
    ours = torch.optim.Adam(replica.parameters(), 0.01)
    hvd.DistributedOptimizer(ours, replica.named_parameters())
    for x, y in data():
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_frozen_and_later_unfrozen_parameters():
    plain, theirs, replica, ours = pair()
    for step, (x, y) in enumerate(data()):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            net[0].weight.requires_grad_(step > 3)
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_parameters_frozen_at_wrapping_and_added_later():
    plain, replica = model(), model()
    made = []
    for net in (plain, replica):
        net[0].requires_grad_(False)
        made.append(torch.optim.SGD(net[2].parameters(), 0.1, momentum=0.9))
    hvd.DistributedOptimizer(made[1])
    for step, (x, y) in enumerate(data()):
        for net, optimizer, part in ((plain, made[0], whole), (replica, made[1], own)):
            if step == 3:
                optimizer.add_param_group({"params": net[4].parameters()})
            if step == 6:
                net[0].requires_grad_(True)
                optimizer.add_param_group({"params": net[0].parameters()})
            net.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_learning_rate_schedulers_before_and_after_wrapping():
    plain, replica = model(), model()
    theirs, ours = OPTIMIZERS["sgd"](plain.parameters()), OPTIMIZERS["sgd"](replica.parameters())
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (theirs, ours)]
    hvd.DistributedOptimizer(ours, replica)
    schedules.append(torch.optim.lr_scheduler.StepLR(ours, 100))
    for x, y in data():
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8**10)
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_state_defaults_and_class_are_kept():
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    x, y = next(data())
    loss_of(net, x, y).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    wrapped = hvd.DistributedOptimizer(optimizer, net)
    assert isinstance(wrapped, torch.optim.Adam)
    assert wrapped.defaults["lr"] == 0.5
    after = wrapped.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][index][key]) for key in state)


@pytest.mark.ranks(2)
def test_state_dict_is_the_plain_optimizers():
    plain, theirs, replica, ours = pair("adam")
    for x, y in data(steps=3):
        ours.zero_grad()
        loss_of(replica, own(x), own(y)).backward()
        ours.step()
    plain.load_state_dict(replica.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch would share it
    for x, y in data(steps=3):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


def test_optimizer_state_is_broadcast():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1 if hvd.rank() == 0 else 0.7)
    if hvd.rank() == 0:  # only the root has trained, as after loading its checkpoint
        x, y = next(data())
        loss_of(net, x, y).backward()
        optimizer.step()
    hvd.broadcast_parameters(net.state_dict())
    hvd.broadcast_optimizer_state(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    moments = [state["exp_avg"].sum().item() for state in optimizer.state.values()]
    assert len(moments) == 6
    assert hvd.allgather_object(moments) == [moments] * hvd.size()
    assert_replicas(net)


@pytest.mark.ranks(2)
def test_mixed_dtypes_and_bfloat16():
    torch.manual_seed(5)
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4).bfloat16()])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    hvd.DistributedOptimizer(optimizer, net)
    for layer in net:
        layer.weight.sum().mul(float(hvd.rank())).backward()
    expected = (hvd.size() - 1) / 2
    for layer in net:
        assert layer.weight.grad.unique().tolist() == [expected]
    optimizer.step()
    assert_replicas(net)


def test_half_gradients_do_not_overflow():
    # Summed first, 60000 on two ranks is inf in float16.
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    hvd.DistributedOptimizer(torch.optim.SGD([parameter], 0.1))
    (parameter * 60000).sum().backward()
    assert parameter.grad.tolist() == pytest.approx([60000.0] * 3, rel=1e-3)


@pytest.mark.ranks(2)
def test_channels_last_gradients():
    torch.manual_seed(7)
    net = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
    reference = copy.deepcopy(net)
    hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net)
    images = torch.randn(2 * hvd.size(), 3, 5, 5, dtype=torch.float64)
    images = hvd.broadcast(images, 0)
    reference(images).square().mean().backward()
    net(images[hvd.rank() :: hvd.size()]).square().mean().backward()
    torch.testing.assert_close(net.weight.grad, reference.weight.grad)
    assert net.weight.grad.stride() == net.weight.stride()


@pytest.mark.ranks(2)
def test_closures():
    plain, theirs, replica, ours = pair()
    for x, y in data():
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):

            def closure(net=net, optimizer=optimizer, part=part, x=x, y=y):
                optimizer.zero_grad()
                loss = loss_of(net, part(x), part(y))
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_equal(plain, replica)


def test_sum_and_predivide():
    for options, factor in (({"op": hvd.Sum}, hvd.size()), ({"gradient_predivide_factor": 2.0}, 1)):
        parameter = nn.Parameter(torch.ones(3))
        hvd.DistributedOptimizer(torch.optim.SGD([parameter], 0.1), **options)
        (parameter * (hvd.rank() + 1.0)).sum().backward()
        mean = (hvd.size() + 1) / 2
        assert parameter.grad.tolist() == pytest.approx([mean * factor] * 3)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_half_compression(op):
    _, _, replica, ours = pair(compression=hvd.Compression.fp16, op=op)
    for x, y in data():
        ours.zero_grad()
        loss_of(replica, own(x), own(y)).backward()
        whole = [p.grad.clone() for p in replica.parameters()]
        reference = copy.deepcopy(replica)
        reference.zero_grad()
        loss_of(reference, x, y).backward()
        factor = hvd.size() if op == hvd.Sum else 1
        for p, grad in zip(reference.parameters(), whole, strict=True):
            torch.testing.assert_close(grad, p.grad * factor, rtol=5e-3, atol=1e-4)
        ours.step()
    assert_replicas(replica)


def test_a_compressor_with_state_is_driven_parameter_by_parameter():
    # Error feedback around rounding to eighths: what is applied plus what is held back equals
    # what was computed, and the state is kept by parameter name.
    from hvdx.comm import Allreduce
    from hvdx.compression import Compressor, Reduced

    def init(ops, spec):
        return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))

    def reduce(ops, grad, held):
        owed = grad + held
        own = (owed * 8).round() / 8
        mean = yield Allreduce(own)
        return Reduced(mean, own, owed - own)

    compressor = Compressor("eighths", init, reduce)
    _, _, replica, ours = pair(compression=compressor)
    applied = [torch.zeros_like(p) for p in replica.parameters()]
    computed = [torch.zeros_like(p) for p in replica.parameters()]
    for x, y in data():
        reference = copy.deepcopy(replica)
        loss_of(reference, own(x), own(y)).backward()
        ours.zero_grad()
        loss_of(replica, own(x), own(y)).backward()
        for total, true, p, q in zip(
            applied, computed, replica.parameters(), reference.parameters(), strict=True
        ):
            total += p.grad
            true += hvd.allreduce(q.grad)
        ours.step()
    names = [name for name, _ in replica.named_parameters()]
    assert set(ours.reducer.kept.states) == set(names)
    for name, total, true in zip(names, applied, computed, strict=True):
        pending = hvd.allreduce(ours.reducer.kept.states[name])
        torch.testing.assert_close(total + pending, true, rtol=1e-12, atol=1e-12)


def test_process_sets(process_set):
    parameter = nn.Parameter(torch.ones(2))
    if process_set.included():
        hvd.DistributedOptimizer(torch.optim.SGD([parameter], 0.1), process_set=process_set)
        (parameter * float(hvd.rank())).sum().backward()
        assert parameter.grad.tolist() == pytest.approx([(len(process_set.ranks) - 1) / 2] * 2)


@pytest.mark.ranks(2)
def test_gradient_of_a_compiled_model():
    plain, theirs, replica, ours = pair()
    compiled = torch.compile(replica, backend="aot_eager")
    for x, y in data(steps=3):
        theirs.zero_grad()
        loss_of(plain, x, y).backward()
        theirs.step()
        ours.zero_grad()
        loss_of(compiled, own(x), own(y)).backward()
        ours.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2)
def test_reentrant_checkpointing():
    from torch.utils.checkpoint import checkpoint

    plain, theirs, replica, ours = pair()
    for x, y in data(steps=3):
        theirs.zero_grad()
        loss_of(plain, x, y).backward()
        theirs.step()
        ours.zero_grad()
        inside = own(x).requires_grad_()
        out = checkpoint(replica[2:], checkpoint(replica[:2], inside, use_reentrant=True),
                         use_reentrant=True)  # fmt: skip
        nn.functional.mse_loss(out, own(y)).backward()
        ours.step()
    assert_equal(plain, replica)
