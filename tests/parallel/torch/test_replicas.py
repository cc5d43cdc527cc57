"""Copies of a model are made equal, whatever it holds."""

from __future__ import annotations

import torch
from torch import nn

import hvdx as hvd


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
