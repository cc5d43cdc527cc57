"""``sync="parameter_server"``: the same training, with the optimizer's state in parts."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hvdx as hvd

sys.path.insert(0, str(Path(__file__).parent))
from training import (
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

TWO = pytest.mark.ranks(2)
C = hvd.Compression
FOUR = pytest.mark.ranks(4)
SERVERS = [
    pytest.param(None, marks=TWO),
    pytest.param([0], marks=TWO),
    pytest.param([0, 1], marks=FOUR),
]


def state_bytes(optimizer):
    """Count what an optimizer keeps."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize(
    ("kind", "servers"),
    [
        ("adam", None),
        pytest.param("adam", [0], marks=TWO),
        pytest.param("adam", [0, 1], marks=FOUR),
        pytest.param("sgd", None, marks=TWO),
    ],
)
def test_equals_one_process(kind, servers, monkeypatch):
    monkeypatch.setenv("HVDX_BUCKET_MB", "0.001")  # several buckets
    plain, theirs, replica, ours = pair(kind, sync="parameter_server", servers=servers)
    train([(plain, theirs, whole), (replica, ours, own)])
    assert_equal(plain, replica)
    assert_replicas(replica)
    assert len(ours.reducer.buckets) > 1


@TWO
def test_two_ranks_equal_allreduce_to_the_last_bit():
    nets = [model(torch.float32) for _ in range(2)]
    optimizers = [OPTIMIZERS["adam"](net.parameters()) for net in nets]
    hvd.DistributedOptimizer(optimizers[0], nets[0])
    hvd.DistributedOptimizer(optimizers[1], nets[1], sync="parameter_server")
    train([(net, opt, own) for net, opt in zip(nets, optimizers, strict=True)],
          data(torch.float32))  # fmt: skip
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("servers", SERVERS)
def test_memory(servers):
    """A model that is one huge embedding, too: what a server keeps is 1/N of the whole."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(2000, 16), nn.Linear(16, 64), nn.Linear(64, 3))
    plain, ours = (torch.optim.Adam(one.parameters(), 0.01) for one in (copy.deepcopy(net), net))
    hvd.DistributedOptimizer(ours, net, sync="parameter_server", servers=servers)
    words = torch.randint(2000, (8,))
    for optimizer in (plain, ours):
        for group in optimizer.param_groups:
            if optimizer is plain:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
    net(words).sum().backward()
    plain.step()
    ours.step()
    count = hvd.size() if servers is None else len(servers)
    serves = servers is None or hvd.rank() in servers
    held, all_ = state_bytes(ours), state_bytes(plain)
    assert (all_ / count * 0.9 < held <= 1.1 * all_ / count) if serves else held == 0


@TWO
@pytest.mark.parametrize("limit", [0.1, 1e3])
def test_clipping_by_norm_is_that_of_one_process(limit):
    """By torch's own function; and gradients have the means' norms."""
    plain, theirs, replica, ours = pair("sgd", sync="parameter_server")
    for x, y in data(steps=3):
        norms = []
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            told = nn.utils.clip_grad_norm_(net.parameters(), limit)
            norms.append([told, *(p.grad.norm() for p in net.parameters())])
            optimizer.step()
        torch.testing.assert_close(*map(torch.stack, norms), rtol=1e-10, atol=0)
    assert_equal(plain, replica, 1e-10)
    assert_replicas(replica)


@TWO
@pytest.mark.parametrize(("way", "servers"), [("rounds", None), ("rounds", [0]), ("passes", None)])
def test_several_backwards_before_a_step(way, servers):
    passes = 2 if way == "passes" else 1
    options = {"sync": "parameter_server", "servers": servers}
    plain, theirs, replica, ours = pair(backward_passes_per_step=passes, **options)
    batches = list(data(steps=6))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad(set_to_none=first is not batches[0])
            for x, y in (first, second):
                loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


@TWO
def test_sums():
    plain, theirs, replica, ours = pair(sync="parameter_server", op=hvd.Sum)
    for group in ours.param_groups:
        group["lr"] /= hvd.size()
    batches = list(data(steps=4))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            optimizer.zero_grad()
            for x, y in (first, second):
                loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


@TWO
def test_schedules_groups_closures_and_frozen_layers():
    plain = model()
    replica = copy.deepcopy(plain)

    def make(net):
        groups = [
            {"params": net[0].parameters(), "lr": 0.02, "weight_decay": 0.1},
            {"params": [*net[2].parameters(), *net[4].parameters()]},
        ]
        return torch.optim.AdamW(groups, 0.01)

    theirs, ours = make(plain), make(replica)
    for net in (plain, replica):
        net[2].requires_grad_(False)
    hvd.DistributedOptimizer(ours, replica, sync="parameter_server")
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2) for each in (theirs, ours)]
    for step, (x, y) in enumerate(data(steps=6)):
        for net, optimizer, part in ((plain, theirs, whole), (replica, ours, own)):
            if step == 3:
                net[2].requires_grad_(True)
                net[4].requires_grad_(False)
                optimizer.zero_grad()

            def closure(net=net, optimizer=optimizer, part=part, x=x, y=y):
                optimizer.zero_grad()
                loss = loss_of(net, part(x), part(y))
                loss.backward()
                return loss

            if step % 2:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert_equal(plain, replica)
    assert_replicas(replica)


def test_gradients_that_only_some_ranks_have():
    torch.manual_seed(12)
    net = nn.ModuleList([nn.Linear(3, 3) for _ in range(hvd.size() + 2)]).double()
    plain = copy.deepcopy(net)
    ours = torch.optim.Adam(net.parameters(), 0.1)
    theirs = torch.optim.Adam(plain.parameters(), 0.1)
    hvd.DistributedOptimizer(ours, net, sync="parameter_server")
    x = torch.ones(1, 3).double()
    for _ in range(2):
        ours.zero_grad()
        net[1 + hvd.rank()](net[0](x)).sum().backward()
        ours.step()
        theirs.zero_grad()
        losses = [plain[1 + rank](plain[0](x)).sum() for rank in range(hvd.size())]
        (sum(losses) / hvd.size()).backward()
        theirs.step()
    assert_equal(plain, net)
    assert torch.equal(net[-1].weight, plain[-1].weight)  # which no rank has used


@TWO
def test_a_scaler_skips_on_all_ranks(recwarn):
    """An infinity that only one rank owns is seen by all, before and after unscale_()."""
    plain, theirs, replica, ours = pair("adam", sync="parameter_server")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for step, (x, y) in enumerate(data(steps=4)):
        bad = step == 1 and hvd.rank() == 1
        ours.zero_grad()
        loss = loss_of(replica, own(x), own(y)) + (replica[0].weight[0, 0] * 0 if bad else 0)
        scaler.scale(loss * (float("inf") if bad else 1)).backward()
        if step > 1:
            scaler.unscale_(ours)
            nn.utils.clip_grad_norm_(replica.parameters(), 0.5)
        scaler.step(ours)
        scaler.update()
        assert scaler.get_scale() == (4.0 if step else 8.0)
        if step != 1:
            theirs.zero_grad()
            loss_of(plain, x, y).backward()
            if step > 1:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            theirs.step()
    assert_equal(plain, replica, 1e-10)


@pytest.mark.parametrize("servers", SERVERS)
def test_states_are_saved_and_loaded(servers):
    """Whole ones are those of a single process; own ones go on to the last bit."""
    options = {"sync": "parameter_server", "servers": servers}
    plain, theirs, replica, ours = pair("adam", **options)
    pairs = [(plain, theirs, whole), (replica, ours, own)]
    train(pairs, data(steps=3))
    saved, parts = copy.deepcopy(replica.state_dict()), copy.deepcopy(ours.state_dict())
    told = ours.portable_state_dict()
    for number, expected in theirs.state_dict()["state"].items():
        assert told["state"][number].keys() == expected.keys()
        for key, value in expected.items():
            assert told["state"][number][key].shape == value.shape
            torch.testing.assert_close(told["state"][number][key], value, rtol=1e-9, atol=1e-15)
    assert ours.portable_state_dict(root_rank=1) is None or hvd.rank() == 1

    def again(kind, state):
        state = copy.deepcopy(state)  # whose numbers of steps torch shares
        net = model()
        net.load_state_dict(saved)
        optimizer = OPTIMIZERS["adam"](net.parameters())
        if kind == "plain":
            optimizer.load_state_dict(state)
        else:
            strategy = options if kind == "own" else {"sync": "parameter_server"}
            hvd.DistributedOptimizer(optimizer, net, **strategy)
            optimizer.load_state_dict(state)
        return net, optimizer

    resumed = [again(*each) for each in (("own", parts), ("own", told), ("all", told))]
    alone = again("plain", told)
    train([*((*each, own) for each in resumed), (*alone, whole), *pairs], data(steps=2))
    for net, _ in resumed[:2]:
        assert all(map(torch.equal, net.parameters(), replica.parameters()))
    for net in (resumed[2][0], alone[0], replica):
        assert_equal(net, plain)
    ours.load_state_dict(copy.deepcopy(parts))  # while training, too
    replica.load_state_dict(saved)
    train([(replica, ours, own)], data(steps=2))
    assert all(map(torch.equal, resumed[0][0].parameters(), replica.parameters()))


@TWO
def test_states_of_another_rank_are_refused():
    _, _, replica, ours = pair("adam", sync="parameter_server")
    train([(replica, ours, own)], data(steps=1))
    others = hvd.allgather_object(ours.state_dict())[hvd.rank() - 1]
    told = f"of rank {(hvd.rank() - 1) % hvd.size()} of .*this is rank {hvd.rank()}.*portable_st"
    with pytest.raises(ValueError, match=told):
        ours.load_state_dict(others)
    with pytest.raises(ValueError, match="portable_state_dict"):
        hvd.broadcast_optimizer_state(ours, 0)


@TWO
def test_optimizers_that_have_a_state_already():
    plain, theirs, replica, _ = pair("adam")
    train([(plain, theirs, whole)], data(steps=2))
    replica.load_state_dict(plain.state_dict())
    ours = OPTIMIZERS["adam"](replica.parameters())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    hvd.DistributedOptimizer(ours, replica, sync="parameter_server")
    train([(plain, theirs, whole), (replica, ours, own)], data(steps=2))
    assert_equal(plain, replica)
    nets = [model() for _ in range(2)]
    theirs, ours = (torch.optim.Adagrad(net.parameters(), 0.1) for net in nets)  # made with one
    hvd.DistributedOptimizer(ours, nets[1], sync="parameter_server")
    train([(nets[0], theirs, whole), (nets[1], ours, own)], data(steps=2))
    assert_equal(*nets)
    assert state_bytes(ours) < 0.6 * state_bytes(theirs)


@TWO
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype):
    torch.manual_seed(0)
    net = nn.Linear(7, 5).to(dtype)
    plain = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(one.parameters(), 0.5, momentum=0.5) for one in (net, plain)]
    hvd.DistributedOptimizer(optimizers[0], net, sync="parameter_server")
    hvd.DistributedOptimizer(optimizers[1], plain)
    for step in range(3):
        for one, optimizer in zip((net, plain), optimizers, strict=True):
            optimizer.zero_grad()
            x = torch.full((2, 7), hvd.rank() + step + 0.5, dtype=dtype)
            one(x).square().mean().backward()
            optimizer.step()
    assert_equal(net, plain, 0.01)
    assert_replicas(net.float())


@TWO
def test_layouts_of_memory_and_sparse_gradients():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
    table = nn.Embedding(20, 3, sparse=True).double()
    net = nn.ModuleDict({"conv": conv, "table": table})
    plain = copy.deepcopy(net)
    ours = torch.optim.Adam(net.parameters(), 0.1)
    hvd.DistributedOptimizer(ours, net, sync="parameter_server", sparse_as_dense=True)
    plain["table"].sparse = False
    theirs = torch.optim.Adam(plain.parameters(), 0.1)
    images = torch.randn(4, 3, 5, 5).double()
    words = torch.randint(20, (4, 2))
    rows = slice(2 * hvd.rank(), 2 * hvd.rank() + 2)
    for _ in range(3):
        for one, optimizer, part in ((net, ours, rows), (plain, theirs, slice(None))):
            optimizer.zero_grad()
            loss = one["conv"](images[part]).square().mean() + one["table"](words[part]).mean()
            loss.backward()
            optimizer.step()
    assert_equal(plain, net)
    told = ours.portable_state_dict()["state"][0]["exp_avg"]
    torch.testing.assert_close(told, theirs.state[plain["conv"].weight]["exp_avg"])
    table.zero_grad()
    refused = hvd.DistributedOptimizer(
        torch.optim.SGD(table.parameters(), 0.1), table, sync="parameter_server"
    )
    with pytest.raises(ValueError, match=r"'weight' has sparse.*sparse_as_dense=True"):
        table(words[rows]).sum().backward()
    assert refused.param_groups


METHODS = {
    "fp16": (C.fp16, 2e-3),
    "int8": (C.int8(), 0.03),
    "onebit": (C.onebit(), 0.5),
    "onebit by matrix": (C.onebit(scales="matrix"), 0.5),
    "powersgd": (C.powersgd(2, min_elements=0), 0.3),
}


def wide_nets(count):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    return [copy.deepcopy(net) for _ in range(count)]


COMPRESSED = [
    ("int8", None),
    pytest.param("powersgd", [0], marks=TWO),
    pytest.param("powersgd", None, marks=TWO),
    pytest.param("int8", [0, 1], marks=FOUR),
    pytest.param("fp16", None, marks=TWO),
    pytest.param("onebit", None, marks=TWO),
]


@pytest.mark.parametrize(("name", "servers"), COMPRESSED)
def test_compressed_training(name, servers):
    """Push and pull: replicas stay equal, and come to about where they come uncompressed."""
    compression, tolerance = METHODS[name]
    nets = wide_nets(2)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.5) for net in nets]
    hvd.DistributedOptimizer(optimizers[0], nets[0])
    options = {"sync": "parameter_server", "servers": servers, "compression": compression}
    hvd.DistributedOptimizer(optimizers[1], nets[1], **options)
    start = [p.clone() for p in nets[0].parameters()]
    train([(net, opt, own) for net, opt in zip(nets, optimizers, strict=True)],
          data(torch.float32, 12))  # fmt: skip
    assert_replicas(nets[1])
    moved = sum((p - q).square().sum() for p, q in zip(nets[0].parameters(), start, strict=True))
    apart = sum(
        (p - q).square().sum()
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    )
    assert 0 < apart.sqrt() < tolerance * moved.sqrt()


@pytest.mark.parametrize(
    ("name", "servers"),
    [
        ("onebit", None),
        pytest.param("onebit by matrix", [0], marks=TWO),
        pytest.param("powersgd", [0], marks=TWO),
    ],
)
def test_nothing_is_lost(name, servers):
    """Parameters, what owners owe, and what workers owe make up all gradients there were."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(48, 40))
    optimizer = torch.optim.SGD([weight], 1.0)
    hvd.DistributedOptimizer(
        optimizer,
        [("weight", weight)],
        sync="parameter_server",
        servers=servers,
        compression=METHODS[name][0],
    )
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(48, 40)
    for _ in range(5):
        grads = torch.randn(hvd.size(), 48, 40, generator=generator)
        optimizer.zero_grad()
        (weight * grads[hvd.rank()]).sum().backward()
        optimizer.step()
        total += grads.mean(0)
    kept = optimizer.portable_compression_state()["parameters"]["weight"]
    pushed = next(tensor for path, tensor in kept.items() if path.endswith("residual"))
    told = optimizer.portable_state_dict()
    pulled = told["parameter_server"]["owed"]["weight"]
    assert pushed.abs().max() > 0.01
    assert pulled.abs().max() > 0.01 or name == "powersgd"  # of whose mean two factors are all
    torch.testing.assert_close(weight.detach() + pulled, pushed - total, rtol=0, atol=2e-5)

    own_state, owed = optimizer.state_dict(), optimizer.compression_state()
    saved = weight.detach().clone()
    for state in (copy.deepcopy(own_state), told):
        again = nn.Parameter(saved.clone())
        resumed = torch.optim.SGD([again], 1.0)
        hvd.DistributedOptimizer(
            resumed,
            [("weight", again)],
            sync="parameter_server",
            servers=servers,
            compression=METHODS[name][0],
        )
        resumed.load_state_dict(state)
        resumed.load_compression_state(owed)
        for one, opt in ((again, resumed), (weight, optimizer)):
            if one is weight and state is told:
                continue
            opt.zero_grad()
            (one * grads[hvd.rank()]).sum().backward()
            opt.step()
        if state is not told or name == "onebit":
            assert torch.equal(again, weight)


@pytest.mark.parametrize(
    ("servers", "told"),
    [
        ([9], r"servers=\[9\]: rank 9 is not among the \d that train, 0, 1"),
        ([-1], r"rank -1 is not"),
        ([], "empty"),
        ([1, 1], "named twice"),
        (0, "servers=0: give a list"),
        ("0", "servers='0': give a list"),
        ([True], "give a list"),
    ],
)
@TWO
def test_wrong_servers(servers, told):
    net = model()
    with pytest.raises(ValueError, match=told):
        hvd.DistributedOptimizer(
            OPTIMIZERS["sgd"](net.parameters()), net, sync="parameter_server", servers=servers
        )


@TWO
def test_what_is_refused():
    def wrap(optimizer=None, **options):
        options = {"sync": "parameter_server", **options}
        return hvd.DistributedOptimizer(optimizer or OPTIMIZERS["sgd"](net.parameters()), **options)

    net = model()
    with pytest.raises(ValueError, match="sync='ring': use one of 'allreduce', 'parameter_server"):
        wrap(sync="ring")
    with pytest.raises(ValueError, match=r"servers=\[0\] needs sync='parameter_server'"):
        wrap(sync="allreduce", servers=[0])
    with pytest.raises(ValueError, match=r"with compression=Compression\.local_sgd"):
        wrap(compression=C.local_sgd)
    with pytest.raises(ValueError, match="it chooses by the time that allreduces take"):
        wrap(compression=C.auto())
    with pytest.raises(ValueError, match=r"with op=hvd\.Adasum"):
        wrap(op=hvd.Adasum)
    with pytest.raises(ValueError, match="Adafactor is not known to treat every element alone"):
        wrap(torch.optim.Adafactor(net.parameters()))
    with pytest.raises(ValueError, match="LBFGS"):
        wrap(torch.optim.LBFGS(net.parameters()))
    gaps = nn.Parameter(torch.ones(4, 4)[:, ::2])
    with pytest.raises(ValueError, match=r"'noname.0.0' lies in memory with gaps"):
        wrap(torch.optim.SGD([gaps], 0.1))
        gaps.sum().backward()


class Doubled(torch.optim.SGD):
    """A subclass that leaves ``step`` alone."""


@TWO
def test_optimizers_of_ones_own():
    net = model()
    hvd.DistributedOptimizer(Doubled(net.parameters(), 0.1), net, sync="parameter_server")

    class Other(torch.optim.Optimizer):
        elementwise = True

        def step(self):
            pass

    hvd.DistributedOptimizer(Other(net.parameters(), {}), net, sync="parameter_server")


@TWO
@pytest.mark.parametrize("differs", ["servers", "sync"])
def test_ranks_that_differ_are_told(differs):
    net = model()
    last = hvd.rank() == hvd.size() - 1
    options = {"sync": "parameter_server", "servers": [hvd.rank() if differs == "servers" else 0]}
    if differs == "sync" and last:
        options = {}
    ours = hvd.DistributedOptimizer(OPTIMIZERS["sgd"](net.parameters()), net, **options)
    with pytest.raises(hvd.MismatchError, match=r"servers=\[0\]"):
        train([(net, ours, own)], data(steps=1))


@pytest.mark.ranks(4)
def test_among_the_ranks_of_a_set(process_set):
    plain, replica = model(), model()
    theirs, ours = OPTIMIZERS["adam"](plain.parameters()), OPTIMIZERS["adam"](replica.parameters())
    hvd.DistributedOptimizer(
        ours, replica, process_set=process_set, sync="parameter_server", servers=[1]
    )
    inside = hvd.rank() in process_set.ranks
    rows = len(process_set.ranks) * 4
    for x, y in data(steps=3):
        for net, optimizer in ((plain, theirs), (replica, ours)):
            part = own if optimizer is ours or not inside else (lambda t: t[:rows])
            optimizer.zero_grad()
            loss_of(net, part(x), part(y)).backward()
            optimizer.step()
    assert_equal(plain, replica)


@TWO
def test_the_guide(tmp_path, monkeypatch):
    """The examples of docs/synchronization.md, as they stand there."""
    monkeypatch.chdir(hvd.broadcast_object(str(tmp_path)))
    guide = Path(__file__).resolve().parents[3] / "docs" / "synchronization.md"
    blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    net = nn.Linear(40, 40)
    names = {"torch": torch, "hvd": hvd, "model": net}
    for told in ("torch.optim.Adam", "powersgd(rank=4)", "portable_state_dict"):
        (block,) = [block for block in blocks if told in block]
        if "compression" in block:
            names["optimizer"] = torch.optim.Adam(net.parameters())
        exec(block, names)
        net(torch.randn(4, 40)).square().mean().backward()
        names["optimizer"].step()
        assert_replicas(net)
