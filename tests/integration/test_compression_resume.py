"""A rank is killed in the midst of training with compression; training goes on as if it had not.

Four ranks start again from their checkpoint; then two of them, then three, go on from what any
number of ranks can load.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, environment, run

pytest.importorskip("horovod")
torch = pytest.importorskip("torch")

SAVED, KILLED = 10, 15
STEPS = int(os.environ.get("RESUMED_STEPS", "15"))  # after the checkpoint
METHODS = ["onebit", "powersgd"]

#: What the jobs share. Each trains one model with each method.
COMMON = f"""
import os, signal, sys
import torch
import hvdx as hvd

folder, METHODS, SAVED, KILLED, STEPS = sys.argv[1], {METHODS}, {SAVED}, {KILLED}, {STEPS}
pair, three = hvd.ProcessSet([0, 1]), hvd.ProcessSet([0, 1, 2])
hvd.init(framework="torch", process_sets=[pair, three])
rank = hvd.rank()

def new(method, ranks=None):
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(40, 48), torch.nn.ReLU(), torch.nn.Linear(48, 30))
    compression = {{"onebit": hvd.Compression.onebit(),
                   "powersgd": hvd.Compression.powersgd(2, min_elements=0)}}[method]
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    return net, hvd.DistributedOptimizer(optimizer, net, compression=compression, process_set=ranks)

def train(net, optimizer, steps):
    told = []
    for step in steps:
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        (net(x) - x[:, :30].tanh()).square().mean().backward()
        if "KILL" in os.environ and step == KILLED and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        told.append([p.grad.numpy().tobytes() for p in net.parameters()])
    return told, [p.detach().numpy().tobytes() for p in net.parameters()]

def state(optimizer):
    return optimizer.compression_state()["parameters"]

def save(name, **values):
    torch.save(values, os.path.join(folder, name))

def load(name):
    return torch.load(os.path.join(folder, name))
"""

CHECKPOINT = """
for method in METHODS:
    net, optimizer = new(method)
    train(net, optimizer, range(SAVED))
    portable = optimizer.portable_compression_state()
    save(f"{method}.{rank}", net=net.state_dict(), optimizer=optimizer.state_dict(),
         compression=optimizer.compression_state(), portable=portable)
hvd.barrier()
train(net, optimizer, range(SAVED, SAVED + STEPS))
"""

RESUME = """
for method in METHODS:
    net, optimizer = new(method)
    train(net, optimizer, range(SAVED))
    expected = train(net, optimizer, range(SAVED, SAVED + STEPS))
    again, other = new(method)
    saved = load(f"{method}.{rank}")
    again.load_state_dict(saved["net"])
    other.load_state_dict(saved["optimizer"])
    other.load_compression_state(saved["compression"])
    resumed = train(again, other, range(SAVED, SAVED + STEPS))
    assert resumed == expected, method
    one, two = state(optimizer), state(other)
    assert all(torch.equal(one[n][path], two[n][path]) for n in one for path in one[n])
    save(f"{method}.4.{rank}", compression=optimizer.compression_state(),
         portable=optimizer.portable_compression_state())
    print("resumed", method, flush=True)
hvd.barrier()
"""

MOVE = """
def move(method, before, ranks):
    net, optimizer = new(method, ranks)
    optimizer.load_compression_state(load(f"{method}.{before}.0")["portable"])
    (0 * sum(p.sum() for p in net.parameters())).backward()  # sends nothing but what is owed
    save(f"{method}.moved{ranks.size()}.{rank}", compression=optimizer.compression_state(),
         means={n: p.grad.clone() for n, p in net.named_parameters()})
    optimizer.step()
    train(net, optimizer, range(3))
    save(f"{method}.{ranks.size()}.{rank}", compression=optimizer.compression_state(),
         portable=optimizer.portable_compression_state())

for before, ranks in ((4, pair), (2, three)):
    for method in METHODS:
        if ranks.included():
            move(method, before, ranks)
    hvd.barrier()
"""


def job(folder, code, **environ):
    script = folder / "train.py"
    script.write_text(COMMON + code)
    command = [*HVDX_RUN, "-np", "4", sys.executable, str(script), str(folder)]
    return run(*command, env=environment(**environ))


def owed(folder, method, tag, ranks):
    """Return by name what training is owed, by the definition, from every rank's own state."""
    states = [torch.load(folder / f"{method}.{tag}.{rank}")["compression"]["parameters"]
              for rank in range(ranks)]  # fmt: skip
    result = {}
    for name in (name for name, own in states[0].items() if own):  # biases travel raw
        total = sum(own[name]["residual"].double() for own in states) / ranks
        if "inner.lost" in states[0][name]:
            lost = torch.cat([own[name]["inner.lost"] for own in states])
            total += lost[: total.numel()].view(total.shape)
        result[name] = total
    return result


def test_a_killed_rank_and_other_numbers_of_ranks(tmp_path):
    killed = job(tmp_path, CHECKPOINT, KILL="1")
    assert killed.returncode != 0 and "killed by signal 9" in killed.stderr, killed.stderr
    resumed = job(tmp_path, RESUME + MOVE)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("resumed") == 4 * len(METHODS)
    for before, ranks in ((4, 2), (2, 3)):
        for method in METHODS:
            old = owed(tmp_path, method, before, before)
            new = owed(tmp_path, method, f"moved{ranks}", ranks)
            means = torch.load(tmp_path / f"{method}.moved{ranks}.0")["means"]
            assert old.keys() == new.keys()
            for name, tensor in old.items():
                assert tensor.any(), (method, name)
                error = (new[name] + means[name].double() - tensor).norm()
                assert error <= 1e-6 * tensor.norm(), (method, name, before, ranks, error)
