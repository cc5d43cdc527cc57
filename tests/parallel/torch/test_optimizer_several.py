"""Several losses, optimizers and backward passes before a step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd

sys.path.insert(0, str(Path(__file__).parent))
import copy
import gc
import weakref

from torch.utils.checkpoint import checkpoint
from training import (
    BATCH,
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


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def test_one_loss_for_two_optimizers():
    plain, replica = model(), model()
    made = [[sgd(net[:2].parameters()), sgd(net[2:].parameters())] for net in (plain, replica)]
    for optimizer in made[1]:
        hvd.DistributedOptimizer(optimizer, replica)
    for x, y in data():
        for net, optimizers, part in ((plain, made[0], whole), (replica, made[1], own)):
            net.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2, 4)
def test_optimizers_met_in_another_order_on_each_rank():
    # Backward reaches the first layer's optimizer first on some ranks, the other one on others,
    # and each has a parameter that is never used, so that nothing leaves before the end.
    layers = [nn.ModuleList([nn.Linear(2, 2), nn.Linear(1, 1)]) for _ in range(2)]
    optimizers = [hvd.DistributedOptimizer(sgd(layer.parameters()), layer) for layer in layers]
    for _ in range(3):
        order = layers if hvd.rank() % 2 else layers[::-1]
        hidden = torch.ones(1, 2)
        for layer in order:
            hidden = layer[0](hidden)
        hidden.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        for layer in layers:
            layer.zero_grad()
    for layer in layers:
        hvd.allreduce(layer[0].weight)
        assert layer[1].weight.grad is None


def test_a_generator_and_its_critic():
    # The critic's loss leaves gradients in the generator, and the generator's in the critic.
    def made():
        torch.manual_seed(9)
        return nn.Linear(6, 3).double(), nn.Linear(3, 1).double()

    nets = {"plain": made(), "ours": made()}
    optimizers = {name: [torch.optim.Adam(n.parameters(), 0.01) for n in both]
                  for name, both in nets.items()}  # fmt: skip
    for optimizer, net in zip(optimizers["ours"], nets["ours"], strict=True):
        hvd.DistributedOptimizer(optimizer, net)
    for x, y in data():
        for name, part in (("plain", whole), ("ours", own)):
            (generator, critic), (for_generator, for_critic) = nets[name], optimizers[name]
            fake = generator(part(x))
            for_critic.zero_grad()
            (critic(fake) - critic(part(y))).mean().backward(retain_graph=True)
            for_critic.step()
            for_generator.zero_grad()
            (-critic(fake + 0)).mean().backward(inputs=list(generator.parameters()))
            for_generator.step()
    for one, other in zip(nets["plain"], nets["ours"], strict=True):
        assert_equal(one, other)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("clear", [True, False], ids=["to none", "to zero"])
def test_sums_over_ranks_of_several_backward_passes(clear):
    plain, theirs, replica, ours = pair(op=hvd.Sum)
    for step, (x, y) in enumerate(data(steps=6)):
        plain.zero_grad(set_to_none=clear)
        replica.zero_grad(set_to_none=clear)
        for rank in range(hvd.size()):
            rows = slice(rank * BATCH, (rank + 1) * BATCH)
            loss_of(plain, x[rows], y[rows]).backward()
            plain[:3](x[rows]).square().mean().backward()
        loss_of(replica, own(x), own(y)).backward()
        nn.utils.clip_grad_value_(replica.parameters(), 1e9)
        replica[:3](own(x)).square().mean().backward()  # not all parameters, and a second round
        if step == 2:
            continue  # as a scaler that skips a step
        theirs.step()
        ours.step()
    assert_equal(plain, replica)


def test_more_backward_passes_than_announced():
    plain, theirs, replica, ours = pair(backward_passes_per_step=2)
    for x, y in data(steps=4):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            for _ in range(3):
                loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


def test_passes_per_step_may_change():
    _, _, replica, ours = pair(backward_passes_per_step=2)
    assert ours.backward_passes_per_step == 2
    ours.set_backward_passes_per_step(1)
    x, y = next(data())
    loss_of(replica, own(x), own(y)).backward()
    assert len(set(hvd.allgather_object(replica[0].weight.grad.sum().item()))) == 1


def test_unfrozen_and_added_parameters_are_averaged_by_backward_already():
    # Clipping sees means, in the first step too.
    plain, replica = model(), model()
    made = []
    for net in (plain, replica):
        net[0].requires_grad_(False)
        made.append(sgd([*net[0].parameters(), *net[2].parameters()]))
    hvd.DistributedOptimizer(made[1], replica)
    for step, (x, y) in enumerate(data()):
        for net, optimizer, part in ((plain, made[0], whole), (replica, made[1], own)):
            if step == 3:
                net[0].requires_grad_(True)
            if step == 6:
                optimizer.add_param_group({"params": net[4].parameters()})
            net.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, 0.01)
            optimizer.step()
    assert_equal(plain, replica)


@pytest.mark.ranks(2, 4)
def test_a_rank_without_gradients_while_parameters_are_added():
    _, _, replica, ours = pair()
    extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for step in range(3):
        ours.zero_grad()
        if step == 1:
            ours.add_param_group({"params": [extra]})
        if hvd.rank() != 0:
            x, y = next(data())
            (loss_of(replica, own(x), own(y)) + extra.sum()).backward()
        ours.step()
    assert_replicas(replica)
    assert extra.grad.tolist() == pytest.approx([(hvd.size() - 1) / hvd.size()] * 2)


def test_a_second_optimizer_takes_the_parameters_over():
    plain, theirs, replica, ours = pair()
    train([(plain, theirs, whole), (replica, ours, own)], data(steps=3))
    fresh = sgd(replica[2:].parameters())  # the first one keeps the rest
    hvd.DistributedOptimizer(fresh, replica)
    again = sgd(plain[2:].parameters())
    for x, y in data(steps=3):
        for net, both, part in (
            (plain, (theirs, again), whole), (replica, (ours, fresh), own)
        ):  # fmt: skip
            net.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            for optimizer in both:
                optimizer.step()
    assert_equal(plain, replica)


def test_a_model_goes_with_its_optimizer():
    _, _, replica, ours = pair()
    x, y = next(data())
    loss_of(replica, own(x), own(y)).backward()
    ours.step()
    left = weakref.ref(replica[0].weight)
    del replica, ours
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("passes", [1, 2])
def test_backward_inside_backward(passes):
    # Reentrant checkpoints run a backward of their own for each part: gradients are averaged
    # once, when the outer one ends, and count as one pass.
    plain, theirs, replica, ours = pair(backward_passes_per_step=passes)
    for x, y in data(steps=4):
        theirs.zero_grad()
        ours.zero_grad()
        for _ in range(passes):
            loss_of(plain, x, y).backward()
            hidden = own(x).requires_grad_()
            for part in (replica[:2], replica[2:4]):
                hidden = checkpoint(part, hidden, use_reentrant=True)
            nn.functional.mse_loss(replica[4](hidden), own(y)).backward()
        assert {bucket.rounds for bucket in ours.reducer.buckets} == {1}
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        nn.utils.clip_grad_norm_(replica.parameters(), 0.05)
        theirs.step()
        ours.step()
    assert_equal(plain, replica)


def test_gradients_written_by_hand():
    # As torch.func returns them.
    plain, theirs, replica, ours = pair()

    def gradients(net, x, y):
        parameters = dict(net.named_parameters())

        def loss(values):
            return nn.functional.mse_loss(torch.func.functional_call(net, values, (x,)), y)

        return torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})

    for x, y in data(steps=4):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            for name, grad in gradients(net, part(x), part(y)).items():
                net.get_parameter(name).grad = grad
            optimizer.step()
    assert_equal(plain, replica)


def test_closures_after_several_backward_passes():
    plain, theirs, replica, ours = pair(backward_passes_per_step=2)
    for x, y in data(steps=4):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):

            def closure(net=net, optimizer=optimizer, part=part, x=x, y=y):
                optimizer.zero_grad()
                loss = loss_of(net, part(x), part(y))
                loss.backward()  # one of two: averaged when the closure returns
                return loss

            optimizer.step(closure=closure)
    assert_equal(plain, replica)


def test_gradients_in_odd_memory_order():
    torch.manual_seed(10)
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64).t())  # not contiguous
    twin = nn.Parameter(copy.deepcopy(weight.detach()))
    ours = hvd.DistributedOptimizer(sgd([weight]))
    theirs = sgd([twin])
    for x, _ in data(steps=3):
        for parameter, optimizer, part in ((twin, theirs, whole), (weight, ours, own)):
            optimizer.zero_grad()
            (part(x)[:, :3] @ parameter).square().mean().backward()
            optimizer.step()
    assert weight.grad.stride() == weight.stride() == (1, 3)
    torch.testing.assert_close(weight, twin, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("keep", [lambda grad: grad, torch.Tensor.detach], ids=["itself", "view"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_gradients_that_are_kept_stay_what_they_are(keep, by_hand):
    # As gradient surgery keeps those of one loss while the next one's are computed.
    _, _, replica, ours = pair()
    x, y = next(data())
    kept = []
    for step in range(3):
        ours.zero_grad()
        if by_hand:
            for parameter in replica.parameters():
                parameter.grad = torch.full_like(parameter, float(step + hvd.rank()))
            ours.step()
        else:
            loss_of(replica, own(x) + step, own(y)).backward()
        grads = [parameter.grad for parameter in replica.parameters()]
        kept.append(([keep(grad) for grad in grads], [grad.clone() for grad in grads]))
    for grads, copies in kept:
        assert all(map(torch.equal, grads, copies))


def test_memory_is_taken_once():
    _, _, replica, ours = pair()
    x, y = next(data())
    places = set()
    for step in range(5):
        ours.zero_grad(set_to_none=step % 2 == 0)
        for _ in range(2):
            loss_of(replica, own(x), own(y)).backward()
            nn.utils.clip_grad_norm_(replica.parameters(), 0.1)
        ours.step()
        places.add(tuple(bucket.flat.data_ptr() for bucket in ours.reducer.buckets))
    assert len(places) == 1
