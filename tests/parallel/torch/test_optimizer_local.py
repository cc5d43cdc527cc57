"""Local SGD and DiLoCo: N ranks do as N workers simulated in one process."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hvdx as hvd
from hvdx import world
from hvdx.compression import CompressionError

sys.path.insert(0, str(Path(__file__).parent))
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

C = hvd.Compression
OPERATIONS = ("allreduce_async", "allreduce_async_", "allgather_async", "alltoall_async")


class Simulated:
    """The algorithm as published, on ``workers`` replicas and NumPy arrays of float64."""

    def __init__(self, workers, kind, steps, lr=1.0, momentum=0.0):
        self.nets = [model() for _ in range(workers)]
        self.optimizers = [OPTIMIZERS[kind](net.parameters()) for net in self.nets]
        self.steps, self.lr, self.momentum, self.done = steps, lr, momentum, 0
        self.anchors = [p.detach().numpy().copy() for p in self.nets[0].parameters()]
        self.velocity = [np.zeros_like(a) for a in self.anchors]

    def step(self, x, y, skipping=()):
        for rank, (net, optimizer) in enumerate(zip(self.nets, self.optimizers, strict=True)):
            part = slice(rank * BATCH, (rank + 1) * BATCH)
            optimizer.zero_grad()
            loss_of(net, x[part], y[part]).backward()
            if rank not in skipping:
                optimizer.step()
        self.done += 1
        if self.done % self.steps == 0:
            self.outer_step()

    @torch.no_grad()
    def outer_step(self):
        for place, anchor in enumerate(self.anchors):
            parameters = [list(net.parameters())[place] for net in self.nets]
            grad = np.mean([anchor - p.numpy() for p in parameters], axis=0)
            self.velocity[place] = self.momentum * self.velocity[place] + grad
            anchor -= self.lr * (grad + self.momentum * self.velocity[place])
            for p in parameters:
                p.copy_(torch.tensor(anchor))


def local_step(net, optimizer, x, y):
    optimizer.zero_grad()
    loss_of(net, own(x), own(y)).backward()
    optimizer.step()


def distributed(compression, kind="adam", **options):
    net = model()
    optimizer = OPTIMIZERS[kind](net.parameters())
    assert hvd.DistributedOptimizer(optimizer, net, compression=compression, **options) is optimizer
    return net, optimizer


def vector(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def differ(net):
    return len(set(hvd.allgather_object(hvd.parameter_hash(net)))) > 1


@pytest.mark.ranks(2)
def test_one_step_alone_is_the_mean_of_gradients():
    plain, reference, _, _ = pair()
    net = model()
    ours = torch.optim.SGD(net.parameters(), 0.1)
    reference = torch.optim.SGD(plain.parameters(), 0.1)
    hvd.DistributedOptimizer(ours, net, compression=C.local_sgd(1))
    train([(plain, reference, whole), (net, ours, own)])
    assert_equal(plain, net)


@pytest.mark.parametrize("kind", ["sgd", pytest.param("adam", marks=pytest.mark.ranks(2))])
@pytest.mark.parametrize(
    "training, outer",
    [
        (C.local_sgd(4), {}),
        (C.diloco(4, compression=C.none), {"lr": 0.7, "momentum": 0.9}),
        (C.diloco(4, outer_lr=0.5, outer_momentum=0, compression=C.none), {"lr": 0.5}),
    ],
    ids=["local_sgd", "diloco", "no momentum"],
)
def test_equals_simulated_workers(kind, training, outer, monkeypatch):
    monkeypatch.setenv("HVDX_BUCKET_MB", "0.001")  # several buckets
    simulated = Simulated(hvd.size(), kind, 4, **outer)
    net, ours = distributed(training, kind)
    for number, (x, y) in enumerate(data(steps=10), 1):
        simulated.step(x, y)
        local_step(net, ours, x, y)
        assert_equal(simulated.nets[hvd.rank()], net)
        assert differ(net) == (number % 4 != 0)
    simulated.outer_step()
    ours.flush()  # a round of two steps
    assert_equal(simulated.nets[0], net)
    assert_replicas(net)
    ours.flush()  # of nothing
    assert_equal(simulated.nets[0], net)
    assert ours.communication_seconds > 0


@pytest.mark.ranks(2)
def test_ranks_talk_in_outer_steps_only(monkeypatch):
    horovod, sent = world.core("torch").horovod, []
    for name in OPERATIONS:
        given = getattr(horovod, name)
        monkeypatch.setattr(
            horovod, name, lambda t, *a, f=given, **o: sent.append(t.nbytes) or f(t, *a, **o)
        )
    net, ours = distributed(C.diloco(3))
    exact, theirs = distributed(C.diloco(3, compression=C.none))
    start = vector(net)
    volumes = {}
    for x, y in data(steps=6):
        for one, optimizer in ((net, ours), (exact, theirs)):
            sent.clear()
            local_step(one, optimizer, x, y)
            volumes.setdefault(optimizer, []).append(sum(sent))
        if len(volumes[theirs]) % 3 == 0:
            assert_replicas(net)
    silent = [volumes[each][i] for each in (ours, theirs) for i in (1, 3, 4)]  # 0: ranks meet
    assert silent == [0] * 6
    full = sum(p.numel() * 8 for p in net.parameters())
    assert volumes[theirs][2] == volumes[theirs][5] == full
    assert 0 < volumes[ours][5] < full  # small parameters: one block of 256 each
    reached = vector(exact)
    error, moved = ((reached - other).norm() for other in (vector(net), start))
    assert 0 < error < 0.02 * moved


@pytest.mark.ranks(2)
@pytest.mark.filterwarnings("error:replicas start different")
@pytest.mark.parametrize("steps", [5, 6], ids=["within a round", "after a round"])
def test_saved_and_restored(steps):
    """To the last bit, with what error feedback has left; on each rank."""
    training = C.diloco(3, compression=C.onebit(min_elements=0))
    batches = list(data(steps=10))
    net, ours = distributed(training)
    for x, y in batches[:steps]:
        local_step(net, ours, x, y)
    file = io.BytesIO()
    torch.save([net.state_dict(), ours.state_dict(), ours.compression_state()], file)
    for x, y in batches[steps:]:
        local_step(net, ours, x, y)

    again, resumed = distributed(training)
    file.seek(0)
    weights, inner, outer = torch.load(file)
    again.load_state_dict(weights)
    resumed.load_compression_state(outer)
    resumed.load_state_dict(inner)
    for x, y in batches[steps:]:
        local_step(again, resumed, x, y)
    assert hvd.parameter_hash(again) == hvd.parameter_hash(net)
    kept, found = ours.compression_state(), resumed.compression_state()
    assert list(kept["parameters"]["0.weight"])[:3] == ["anchor", "momentum", "inner.residual"]
    assert found["step"] == kept["step"] == 3
    for name, tensors in kept["parameters"].items():
        for path, tensor in tensors.items():
            assert torch.equal(tensor, found["parameters"][name][path]), (name, path)
    own_state = kept["parameters"]["0.weight"]
    shared = [own_state[path].numpy().tobytes() for path in ("anchor", "momentum")]
    assert len({tuple(each) for each in hvd.allgather_object(shared)}) == 1


@pytest.mark.ranks(2)
def test_portable_state_and_a_new_beginning():
    net, ours = distributed(C.diloco(2, compression=C.onebit(min_elements=0)))
    batches = list(data(steps=5))
    for x, y in batches[:3]:
        local_step(net, ours, x, y)
    with pytest.raises(CompressionError, match="after 1 steps of each rank alone"):
        ours.portable_compression_state()
    ours.flush()
    saved = ours.portable_compression_state()
    assert len(set(hvd.allgather_object(str(saved)))) == 1
    again, resumed = distributed(C.diloco(2, outer_lr=0.6, compression=C.onebit(min_elements=0)))
    again.load_state_dict(net.state_dict())
    resumed.load_compression_state(saved)
    for x, y in batches[3:]:
        local_step(again, resumed, x, y)
    assert_replicas(again)

    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    ours.load_compression_state({})
    state = ours.compression_state()["parameters"]["0.weight"]
    assert bool((state["anchor"] == 1).all())
    assert not state["momentum"].any() and not state["inner.residual"].any()


def test_when_ranks_have_changed():
    """As elastic training restarts: from parameters as they are, with the outer momentum."""
    net, ours = distributed(C.diloco(2, compression=C.none))
    batches = list(data(steps=6))
    for x, y in batches[:3]:
        local_step(net, ours, x, y)
    before = ours.compression_state()["parameters"]["0.weight"]
    ours.reducer.leave()
    hvd.broadcast_parameters(net)
    start = net[0].weight.detach().clone()
    ours.reducer.join()
    local_step(net, ours, *batches[3])
    state = ours.compression_state()
    assert state["steps alone"] == 1
    after = state["parameters"]["0.weight"]
    assert torch.equal(after["momentum"], before["momentum"])
    assert torch.equal(after["anchor"], start) and not torch.equal(before["anchor"], start)
    local_step(net, ours, *batches[4])
    assert_replicas(net)


@pytest.mark.parametrize("clip", [False, True])
def test_a_rank_that_skips_an_overflow_comes_to_the_outer_step(clip):
    """A GradScaler does not call step() then, unless the optimizer says that it can skip."""
    outer = {"lr": 0.7, "momentum": 0.9}
    simulated = Simulated(hvd.size(), "adam", 2, **outer)
    net, ours = distributed(C.diloco(2, compression=C.none))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, (x, y) in enumerate(data(steps=4)):
        overflow = number == 1
        simulated.step(x, y, skipping=[0] if overflow else [])
        ours.zero_grad()
        scaler.scale(loss_of(net, own(x), own(y))).backward()
        if overflow and hvd.rank() == 0:
            next(net.parameters()).grad.fill_(float("inf"))
        if clip:
            scaler.unscale_(ours)
            nn.utils.clip_grad_norm_(net.parameters(), 1e6)
        scaler.step(ours)
        scaler.update()
        assert all(p.grad is not None for p in net.parameters())
        assert_equal(simulated.nets[hvd.rank()], net, 1e-9)
    assert scaler.get_scale() == (512.0 if hvd.rank() == 0 else 1024.0)
    assert_replicas(net)


@pytest.mark.ranks(2)
def test_accumulation_closures_and_horovods_idiom():
    """An inner step is a call of step(), however its gradients came about."""
    simulated = Simulated(hvd.size(), "sgd", 2, lr=0.7, momentum=0.9)
    net, ours = distributed(C.diloco(2, compression=C.none), "sgd", backward_passes_per_step=2)
    for number, (x, y) in enumerate(data(steps=6)):
        simulated.step(x, y)

        def halves(x=x, y=y):
            ours.zero_grad()
            for _ in range(2):
                with ours.no_sync():
                    (loss_of(net, own(x), own(y)) / 2).backward()

        if number % 2:
            ours.step(halves)
        else:
            halves()
            ours.synchronize()  # of no effect
            with ours.skip_synchronize():
                ours.step()
    assert_equal(simulated.nets[0], net)


def test_process_sets(process_set):
    inside = hvd.rank() in process_set.ranks
    net, ours = distributed(C.local_sgd(2), process_set=process_set)
    simulated = Simulated(len(process_set.ranks), "adam", 2)
    for x, y in data(steps=4):
        simulated.step(x, y)
        local_step(net, ours, x, y)
    ours.flush()
    if inside:
        assert_equal(simulated.nets[0], net)
    else:
        assert ours.compression_state()["step"] == 0


@pytest.mark.ranks(2)
def test_parameters_come_and_go():
    """A frozen parameter is averaged as it was left; one unfrozen, or added, from then on."""
    frozen, late, added = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    late.requires_grad_(False)
    ours = torch.optim.SGD([frozen, late], 1.0)
    hvd.DistributedOptimizer(ours, compression=C.diloco(2, 1.0, 0, compression=C.none))
    mean = (hvd.size() - 1) / 2
    for step in range(4):
        if step == 1:
            frozen.requires_grad_(False)
            late.requires_grad_(True)
            frozen.grad = None
        if step == 2:
            ours.add_param_group({"params": [added]})
        live = [p for group in ours.param_groups for p in group["params"] if p.requires_grad]
        ours.zero_grad()
        (hvd.rank() * sum(p.sum() for p in live)).backward()
        ours.step()
    for parameter, steps in ((frozen, 1), (late, 3), (added, 2)):
        assert parameter.tolist() == pytest.approx([-steps * mean] * 3)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_has_a_full_anchor(dtype):
    """Outer steps below the last bit of the parameter add up."""
    parameter = nn.Parameter(torch.ones(5, dtype=dtype))
    ours = torch.optim.SGD([parameter], 1.0)
    hvd.DistributedOptimizer(ours, compression=C.diloco(1, 0.01, 0, compression=C.none))
    for _ in range(40):
        parameter.grad = torch.full_like(parameter, 0.0625)
        ours.step()
    assert parameter.tolist() == pytest.approx([1 - 40 * 0.01 * 0.0625] * 5, rel=8e-3)
    state = ours.compression_state()["parameters"]["noname.0.0"]
    assert list(state) == ["anchor"] and state["anchor"].dtype == torch.float32
    averaged = nn.Parameter(torch.full((3,), float(hvd.rank()), dtype=dtype))
    ours = torch.optim.SGD([averaged], 1.0)
    with pytest.warns(UserWarning, match="replicas start different"):
        hvd.DistributedOptimizer(ours, compression=C.local_sgd(1)).step()
    assert averaged.tolist() == [(hvd.size() - 1) / 2] * 3


@pytest.mark.ranks(2)
def test_what_is_refused():
    def wrap(**options):
        net = model()
        return net, hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net, **options)

    for op in (hvd.Sum, hvd.Adasum):
        with pytest.raises(ValueError, match=r"op=(Sum|Adasum), compression=.*local_sgd"):
            wrap(op=op, compression=C.local_sgd(2))
    with pytest.raises(CompressionError, match="way of training"):
        hvd.allreduce(torch.ones(3), compression=C.diloco)
    net, ours = wrap(compression=C.diloco(2 + hvd.rank()))
    with pytest.raises(hvd.MismatchError, match=r"diloco\(steps=3"):
        local_step(net, ours, *next(data()))
    net, ours = wrap(compression=C.diloco)
    local_step(net, ours, *next(data()))
    state = ours.compression_state()
    with pytest.raises(CompressionError, match="is not what"):
        ours.load_compression_state({"0.weight": {}})
    own_state = {**state["parameters"], "2.bias": {"anchor": torch.zeros(7)}}
    with pytest.raises(CompressionError, match=r"rank \d.*'2\.bias'.*holds anchor \(7,\)"):
        ours.load_compression_state({**state, "parameters": own_state})
    _, theirs = wrap(compression=C.local_sgd)
    with pytest.raises(CompressionError, match=r"compression=diloco of int8.* has .*local_sgd"):
        theirs.load_compression_state(state)
