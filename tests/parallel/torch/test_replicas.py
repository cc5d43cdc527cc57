"""Copies of a model are made equal, whatever it holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hvdx as hvd

pytestmark = pytest.mark.ranks(2)


def spread_net():
    torch.manual_seed(hvd.rank())
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).bfloat16())
    net.register_buffer("mask", torch.rand(7) > 0.5)
    net.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
    net.register_buffer("empty", torch.zeros(0))
    return net


def test_every_dtype_is_broadcast():
    net = spread_net()
    assert len(set(hvd.allgather_object(hvd.parameter_hash(net)))) == hvd.size()
    hvd.broadcast_parameters(net, root_rank=1)
    torch.manual_seed(1)
    expected = hvd.broadcast_object(hvd.parameter_hash(net), root_rank=1)
    assert hvd.allgather_object(hvd.parameter_hash(net)) == [expected] * hvd.size()


def test_forms_of_parameters():
    for form in (
        lambda net: net.state_dict(),
        lambda net: net.named_parameters(),
        lambda net: list(net.parameters()),
    ):
        net = nn.Linear(3, 2)
        with torch.no_grad():
            net.weight.fill_(hvd.rank() + 7.0)
            net.bias.fill_(hvd.rank())
        hvd.broadcast_parameters(form(net))
        assert net.weight.unique().tolist() == [7.0]
        assert net.bias.unique().tolist() == [0.0]


def test_large_models_travel_in_pieces(monkeypatch):
    from hvdx.integrations import pytorch

    monkeypatch.setattr(pytorch, "_BROADCAST_BYTES", 100)
    net = spread_net()
    hvd.broadcast_parameters(net)
    assert len(set(hvd.allgather_object(hvd.parameter_hash(net)))) == 1


@pytest.mark.ranks(2, 4)
def test_dictionaries_that_ranks_filled_in_another_order():
    names = ["b", "a", "c"] if hvd.rank() else ["a", "b", "c"]
    held = {name: torch.full((2,), float(hvd.rank() * 10 + ord(name))) for name in names}
    hvd.broadcast_parameters(held, root_rank=0)
    assert {name: tensor[0].item() for name, tensor in held.items()} == {"a": 97, "b": 98, "c": 99}


def test_what_is_no_tensor_is_left_alone():
    held = {"weight": torch.full((2,), float(hvd.rank())), "text": "x" * hvd.rank(), "n": 1}
    hvd.broadcast_parameters(held, root_rank=1)
    assert held["weight"].tolist() == [1.0, 1.0]
    assert held["text"] == "x" * hvd.rank()


def test_parameters_that_are_not_contiguous():
    whole = torch.full((3, 4), float(hvd.rank()))
    hvd.broadcast_parameters([("part", whole[:, ::2].t())], root_rank=1)
    assert whole.tolist() == [[1.0, float(hvd.rank())] * 2] * 3


OPTIONS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Rprop": {"etas": (0.4, 1.3)},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"betas": (0.8, 0.99), "amsgrad": True},
    "SparseAdam": {},
}


def optimizers():
    kinds = {
        kind.__name__: kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    return [kinds[name] for name in sorted(set(kinds) - {"Optimizer", "LBFGS"})]


def stepped(kind, steps):
    """Return an optimizer with ``steps`` behind it, made with options of this rank's own."""
    torch.manual_seed(hvd.rank())
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 2))]
    frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
    own = OPTIONS.get(kind.__name__, {}) if hvd.rank() == 0 else {}
    lr = 0.1 * (1 + hvd.rank())
    groups = [{"params": parameters[:1]}, {"params": [*parameters[1:], frozen], "lr": lr / 10}]
    if kind.__name__ == "SparseAdam":
        groups[1]["params"] = parameters[1:]
    optimizer = kind(groups, lr=lr, **own)
    for _ in range(steps):
        for parameter in parameters:
            grad = torch.randn_like(parameter)
            parameter.grad = grad.to_sparse() if kind.__name__ == "SparseAdam" else grad
        optimizer.step()
    return optimizer


def printed(state) -> str:
    """Spell a state_dict() exactly, tensors with dtype and values."""
    if isinstance(state, torch.Tensor):
        return f"{state.dtype}{state.tolist()}"
    if isinstance(state, dict):
        return str({key: printed(value) for key, value in state.items()})
    if isinstance(state, (list, tuple)):
        return type(state).__name__ + str([printed(value) for value in state])
    return f"{type(state).__name__}:{state!r}"


def test_state_and_options_of_every_optimizer():
    assert len(optimizers()) >= 12
    for kind in optimizers():
        # Rank 0 goes on from a checkpoint; the others start afresh.
        optimizer = stepped(kind, steps=2 if hvd.rank() == 0 else 0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        told = hvd.allgather_object(printed(optimizer.state_dict()))
        assert len(set(told)) == 1, (kind, told)
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert type(optimizer.param_groups[0]["lr"]) is float
        assert optimizer.state_dict()["state"], kind
        for parameter in optimizer.param_groups[0]["params"]:
            grad = torch.ones_like(parameter)
            parameter.grad = grad.to_sparse() if kind.__name__ == "SparseAdam" else grad
        optimizer.step()


@pytest.mark.ranks(2, 4)
def test_the_state_of_a_fresh_optimizer():
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=0.1 * (hvd.rank() + 1))
    hvd.broadcast_optimizer_state(optimizer, root_rank=1)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert not optimizer.state_dict()["state"]


@pytest.mark.ranks(2, 4)
def test_objects_of_part_of_the_job(process_set):
    if process_set.included():
        last = process_set.ranks[-1]
        assert hvd.broadcast_object(hvd.rank(), last, process_set=process_set) == last
        net = nn.Linear(2, 2)
        nn.init.constant_(net.weight, hvd.rank())
        hvd.broadcast_parameters(net, last, process_set)
        assert net.weight.unique().tolist() == [last]
        optimizer = torch.optim.SGD(net.parameters(), lr=hvd.rank() + 1)
        hvd.broadcast_optimizer_state(optimizer, last, process_set=process_set)
        assert optimizer.param_groups[0]["lr"] == last + 1
