"""Horovod's torch optimizer: what wrapping loses, and what is then not averaged, or not allowed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

trap = pytest.mark.trap


def zeros(count=1, **options):
    return nn.Parameter(torch.zeros(count, **options))


def trained(kind=torch.optim.Adam, **options):
    """Return a parameter and its optimizer after a step, as a checkpoint leaves them."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], **options)
    (parameter * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return parameter, optimizer


@trap(6, AssertionError, "1 entries became 0")
def test_state_is_kept(wrap):
    _, optimizer = trained(lr=0.1)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    after = wrap(optimizer).state_dict()["state"]
    assert after.keys() == before.keys(), f"{len(before)} entries became {len(after)}"
    assert torch.equal(after[0]["exp_avg"], before[0]["exp_avg"])


@trap(12, AssertionError, "not close")
def test_resumed_training_goes_on_as_if_never_stopped(wrap):
    # A checkpoint is loaded into the optimizer, which is wrapped then.
    parameter, optimizer = trained(lr=0.1)
    resumed = nn.Parameter(parameter.detach().clone())
    again = torch.optim.Adam([resumed], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = wrap(again)
    for p, o in ((parameter, optimizer), (resumed, again)):
        (p * torch.tensor([3.0, 2.0, 1.0])).sum().backward()
        o.step()
    torch.testing.assert_close(resumed, parameter)


@trap(6, AssertionError, r"0\.001 == 0\.5")
def test_defaults_are_kept(wrap):
    optimizer = wrap(torch.optim.Adam([zeros()], lr=0.5))
    optimizer.add_param_group({"params": [zeros()]})
    assert optimizer.param_groups[1]["lr"] == 0.5


@trap(6, AssertionError, r"-[12]\.0 == -1\.5")
def test_groups_added_later_are_averaged(wrap, loss):
    later = zeros()
    optimizer = wrap(torch.optim.SGD([zeros()], lr=1.0))
    optimizer.add_param_group({"params": [later], "lr": 1.0})
    loss(later).backward()
    optimizer.step()
    assert later.item() == -1.5


@trap(6, AssertionError, r"-[12]\.0 == -1\.5")
def test_parameters_unfrozen_later_are_averaged(wrap, loss):
    frozen, free = zeros(), zeros()
    frozen.requires_grad_(False)
    optimizer = wrap(torch.optim.SGD([frozen, free], lr=1.0))
    frozen.requires_grad_(True)
    loss(frozen + free).backward()
    optimizer.step()
    assert free.item() == -1.5
    assert frozen.item() == -1.5


@trap(6, TypeError, "set_to_none")
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_set_to_none(wrap, loss, to_none):
    parameter = zeros()
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0))
    for _ in range(2):
        optimizer.zero_grad(set_to_none=to_none)
        loss(parameter).backward()
        optimizer.step()
    assert parameter.item() == -3.0


@trap(6, AssertionError, "inf")
def test_groups_divide_before_they_sum(wrap):
    # Halved first, two gradients of 60000 fit into float16; their sum does not.
    parameter = zeros(dtype=torch.float16)
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), groups=1, gradient_predivide_factor=2.0)
    (parameter * 60000).sum().backward()
    optimizer.step()
    assert parameter.item() == pytest.approx(-60000, rel=1e-3)


@trap(6, AssertionError, "more than backward_passes_per_step times")
def test_two_losses(wrap, loss):
    parameter = zeros()
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0))
    loss(parameter).backward()
    (2 * loss(parameter)).backward()
    optimizer.step()
    assert parameter.item() == -4.5


@trap(6, AssertionError, "more than backward_passes_per_step times")
def test_one_backward_more_than_announced(wrap, loss):
    # The last batches of an epoch seldom divide by backward_passes_per_step.
    parameter = zeros()
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), backward_passes_per_step=2)
    for _ in range(3):
        loss(parameter).backward()
    optimizer.step()
    assert parameter.item() == -4.5


@trap(6, AssertionError, "zero_grad.. was called after loss.backward")
def test_two_optimizers(wrap, loss):
    # The generator's loss runs backward through the discriminator, whose gradients are dropped.
    generator, discriminator = zeros(), zeros()
    one = wrap(torch.optim.SGD([generator], lr=1.0))
    other = wrap(torch.optim.SGD([discriminator], lr=1.0))
    loss(generator + discriminator).backward()
    one.step()
    other.zero_grad()
    loss(discriminator).backward()
    other.step()
    assert (generator.item(), discriminator.item()) == (-1.5, -1.5)


@trap(6, AssertionError, "zero_grad.. was called after loss.backward")
def test_a_batch_is_dropped(wrap, loss):
    parameter = zeros()
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0))
    (loss(parameter) * float("nan")).backward()
    optimizer.zero_grad()
    loss(parameter).backward()
    optimizer.step()
    assert parameter.item() == -1.5


@trap(12, AssertionError, "ranks are .* apart")
@pytest.mark.parametrize(
    ("kind", "more"), [("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {}), ("RMSprop", {})]
)
def test_broadcasting_state_leaves_the_weights_alone(hvd, assert_replicas, kind, more):
    # Only the root has loaded the checkpoint. Horovod makes the others take a step with gradients
    # of zero, for the state's sake; weight decay then moves their weights away from the root's.
    options = {"lr": 0.1, "weight_decay": 0.1, **more}
    parameter, optimizer = trained(getattr(torch.optim, kind), **options)
    if hvd.rank() == 1:
        optimizer = getattr(torch.optim, kind)([parameter], **options)
    hvd.broadcast_parameters([(kind, parameter)], root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_replicas(parameter.detach())


@trap(17, AssertionError, "takes 3072 bytes")
def test_sparse_gradients_stay_smaller_than_the_table(wrap):
    # Horovod gathers all ranks' rows, repeated ones too: with many ranks they outgrow the memory.
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = wrap(torch.optim.SGD(table.parameters(), lr=1.0))
    table(torch.arange(64) % 8).sum().backward()
    optimizer.synchronize()
    grad = table.weight.grad
    parts = [grad._indices(), grad._values()] if grad.is_sparse else [grad]
    size = sum(part.numel() * part.element_size() for part in parts)
    assert size <= 2 * table.weight.numel() * 4, f"the gradient of 128 bytes takes {size} bytes"
    assert (grad.to_dense() if grad.is_sparse else grad).unique().tolist() == [8.0]
