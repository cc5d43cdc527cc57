"""``Compression.auto`` under PyTorch's optimizer, on links that are as fast as told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvdx
from hvdx.compression import after, review
from hvdx.compression import auto as choosing

SHAPES = {"large": (128, 96), "other": (64, 128), "bias": (96,)}
SLOW, FAST = 0.1, 1e9


def train(hvd, steps=3):
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 2))
    hvd.broadcast_parameters(model)
    auto = hvdx.Compression.auto("balanced", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=auto)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 128)).square().mean().backward()
        optimizer.step()
    return model, optimizer.compression_state()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("megabits", [SLOW, FAST])
def test_replicas_stay_equal(hvd, links, megabits):
    links(megabits)
    model, state = train(hvd)
    assert len(set(hvd.allgather_object(hvd.parameter_hash(model)))) == 1
    owed = {name for name, own in state["parameters"].items() if own["residual"].any()}
    assert owed == ({"0.weight"} if megabits == SLOW else set())  # what is small travels raw


class Given:
    """Parameters whose gradients are given; SGD of rate 1 adds up what is applied."""

    def __init__(self, hvd, compression, **options):
        self.hvd, self.true = hvd, 0.0
        self.parameters = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()}
        named = list(self.parameters.items())
        optimizer = torch.optim.SGD(self.parameters.values(), lr=1.0)
        self.optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=named, compression=compression, **options
        )
        self.random = [np.random.default_rng(rank) for rank in range(hvd.size())]

    def step(self, poison=False):
        everyone = [
            [torch.from_numpy(random.normal(size=s).astype("f4")) for s in SHAPES.values()]
            for random in self.random
        ]
        own = everyone[self.hvd.rank()]
        self.optimizer.zero_grad()
        sum((p * g).sum() for p, g in zip(self.parameters.values(), own, strict=True)).backward()
        self.optimizer.step()
        means = [torch.stack(each).double().mean(0) for each in zip(*everyone, strict=True)]
        self.true = self.true + torch.cat([mean.flatten() for mean in means])

    def applied(self):
        return -torch.cat([p.detach().double().flatten() for p in self.parameters.values()])

    def owed(self):
        """Return what is owed to training, portable and so equal on all ranks."""
        state = self.optimizer.portable_compression_state()["parameters"]
        return torch.cat(
            [
                state.get(name, {}).get("residual", torch.zeros(shape)).double().flatten()
                for name, shape in SHAPES.items()
            ]
        )

    def turns(self):
        return {bucket.turn for bucket in self.optimizer.reducer.buckets}


@pytest.mark.parametrize("method", ["onebit", pytest.param("powersgd", marks=pytest.mark.ranks(2))])
def test_no_update_is_lost_when_the_network_changes(hvd, links, method):
    """The link is slow, then fast, then slow again; raw steps in between deliver what is owed."""
    links(SLOW, FAST, SLOW)
    given = Given(hvd, hvdx.Compression.auto(methods=["int8", method], verbose=False, every=4))
    seen, owing = [], []
    for _ in range(5 + 4 + 1 + 4 + 3):
        given.step()
        seen.append(given.turns())
        owing.append(bool(given.owed().any()))
        torch.testing.assert_close(given.applied() + given.owed(), given.true, rtol=0, atol=1e-4)
    raw, all_of_it = {str(review.RAW)}, {str(review.RAW - 1)}
    assert seen[8] == all_of_it and seen[9:13] == [raw] * 4
    assert owing[:9] == [True] * 9 and owing[9:13] == [False] * 4 and owing[-1]
    assert seen[0] == seen[13] == seen[-1] and seen[0].isdisjoint(raw | all_of_it)
    told = [parameter.detach().numpy().tobytes() for parameter in given.parameters.values()]
    assert len(set(hvd.allgather_object(told[0] + told[1]))) == 1


@pytest.mark.ranks(2)
def test_what_a_step_that_is_not_finite_was_to_deliver_is_delivered_later(hvd, links):
    links(SLOW, FAST)
    given = Given(hvd, hvdx.Compression.auto(methods=["onebit"], verbose=False, every=2))
    for _ in range(7):
        given.step()
    assert given.turns() == {"0"}
    owed, before = given.owed(), given.applied()
    given.optimizer.zero_grad()
    for parameter in given.parameters.values():
        (parameter * (float("inf") if hvd.rank() else 1.0)).sum().backward()
    given.optimizer.reducer.synchronize()
    assert all(not parameter.grad.isfinite().all() for parameter in given.parameters.values())
    given.optimizer.zero_grad()  # as a loss scaler does, which skips the step
    assert torch.equal(given.owed(), owed) and owed.any()
    assert torch.equal(given.applied(), before)
    given.step()
    assert not given.owed().any()
    torch.testing.assert_close(given.applied(), given.true, rtol=0, atol=1e-4)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("pays", [False, True])
def test_steps_are_tried_with_and_without(hvd, links, monkeypatch, capfd, pays):
    """Prediction is not believed where steps are no quicker: gradients then travel raw."""
    links(10)
    monkeypatch.setattr(review, "_PAYS", 1e9 if pays else 0.0)
    monkeypatch.setattr(choosing, "SAVES", 1.0 if pays else -1e9)  # what was tried before says else
    given = Given(hvd, after(1, hvdx.Compression.auto(methods=["onebit"], seconds=0.5, every=0)))
    seen = []
    for _ in range(1 + 5 + 6 + 2):
        given.step()
        seen.append(given.turns())
        torch.testing.assert_close(given.applied() + given.owed(), given.true, rtol=0, atol=1e-4)
    first, *turns = [turn.pop() for turn in seen]
    assert first == turns[3] == ("1" if pays else "2")
    assert turns[4:10] == ["2", "1"] * 3
    assert turns[10:] == (["2", "2", "2"] if pays else ["0", "1", "1"])
    assert bool(given.owed().any()) == pays
    told = capfd.readouterr().err
    if hvd.rank() == 0:
        assert "a step takes" in told and "predicted to save" in told
        assert ("travel raw from here" in told) != pays
    else:
        assert "Compression.auto" not in told


@pytest.mark.ranks(2)
def test_it_really_measures_in_training(hvd, links):
    measured = links(SLOW, None)  # a slow one at first, so that there is something to choose
    auto = hvdx.Compression.auto(methods=["onebit"], seconds=0.05, verbose=False, every=2)
    given = Given(hvd, auto)
    for _ in range(60):  # how many there are between two looks depends on what it finds
        given.step()
        torch.testing.assert_close(given.applied() + given.owed(), given.true, rtol=0, atol=1e-4)
        if len(measured) > 3:  # alike on all ranks
            break
    assert len(measured) >= 3
    assert hvd.allgather_object(measured) == [measured] * hvd.size()
