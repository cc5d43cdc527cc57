"""Replicas that drift apart are told, with the first parameter that differs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hvdx as hvd
from hvdx import consistency
from hvdx.errors import MismatchError


def test_one_bit_of_one_rank_is_found_and_equal_nan_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).to(torch.bfloat16))
    model[1].running_mean.fill_(hvd.rank())  # each rank's own, as it may be
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    hvd.check_consistency(model)
    with pytest.raises(MismatchError, match=r"The first is '1\.running_mean'"):
        hvd.check_consistency(model.state_dict())
    last = hvd.size() - 1
    before = model[2].weight.detach().clone()
    if hvd.rank() == last:
        model[2].weight.detach().view(torch.int16)[1, 3] ^= 1
        model[2].bias.data += 1
    told = rf"2 of 6 .*first is '2\.weight', bfloat16 \(2, 5\): ranks \[{last}\].* at \(1, 3\): "
    with pytest.raises(MismatchError, match=f"{told}{before[1, 3].item()} on rank 0, "):
        hvd.check_consistency(model)


def test_opposite_changes_and_places_in_long_tensors_count(monkeypatch):
    monkeypatch.setattr(consistency, "_ELEMENTS", 8)
    values = torch.arange(21, dtype=torch.int32)
    if hvd.rank() == 1:
        values[17] += 5
        values[19] -= 5
    with pytest.raises(MismatchError, match=r"at \(17,\): 17 on rank 0, 22 on rank 1"):
        hvd.check_consistency({"values": values})
    hvd.check_consistency({"flags": torch.tensor([True, False]), "none": torch.zeros(0)})
    with pytest.raises(MismatchError, match=r"hold different parameters: .*'b' float32 \(\)"):
        hvd.check_consistency({"a" if hvd.rank() else "b": torch.zeros(())})


@pytest.mark.ranks(2)
def test_calls_are_counted_for_each_model():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for each in (model, other):
        nn.init.constant_(each.weight, float(hvd.rank()))
    hvd.check_consistency(model, every=3)
    hvd.check_consistency(other, every=3)
    hvd.check_consistency(model, every=3)
    with pytest.raises(MismatchError, match="'weight'"):
        hvd.check_consistency(model, every=3)
    with pytest.raises(ValueError, match="every=0"):
        hvd.check_consistency(model, every=0)
    with pytest.raises(ValueError, match=r"every=2.* this is a dict: give the model"):
        hvd.check_consistency(dict(model.state_dict()), every=2)
