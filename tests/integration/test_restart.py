"""Horovod stops and starts again while a model trains, as in elastic training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, run

pytest.importorskip("horovod")

#: Two ranks; then rank 0 and a new process in the place of rank 1; then rank 0 alone.
TRAIN = """
import os, sys
import torch
import hvdx as hvd

LATE = "LATE" in os.environ

def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)

def new():
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    return net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

def loss(net, x):
    return net(x).square().mean()

def step(net, optimizer, x):
    loss(net, x).backward()
    optimizer.step()
    optimizer.zero_grad()

def train(steps, ranks):
    for number in steps:
        for one, optimizer in wrapped:
            step(one, optimizer, batch(number, hvd.rank()))
        step(*plain, torch.cat([batch(number, rank) for rank in range(ranks)]))

def check():
    for one, _ in wrapped:
        told = hvd.allgather_object(hvd.parameter_hash(one))
        assert len(set(told)) == 1, told
    for p, q in zip(averaged[0].parameters(), plain[0].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)

def wrap():
    hvd.DistributedOptimizer(averaged[1], averaged[0])
    hvd.DistributedOptimizer(combined[1], combined[0], op=hvd.Adasum)
    kept = hvd.Compression.randomk(0.5, min_elements=0)  # whose draws must be equal on all ranks
    hvd.DistributedOptimizer(squeezed[1], squeezed[0], compression=kept)

averaged, combined, squeezed, plain = new(), new(), new(), new()
wrapped = averaged, combined, squeezed
hvd.init(framework="torch")
me = hvd.rank()
if not LATE:
    for net, _ in wrapped:  # those that wrap() makes take their places
        hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net)
    wrap()
    for _ in range(3):
        hvd.allreduce(torch.ones(1))
    train(range(3), 2)
    check()
    for net, _ in wrapped:
        loss(net, batch(9, me)).backward()  # given up
    hvd.shutdown()
    for net, optimizer in wrapped:
        try:
            optimizer.step()
        except hvd.NotInitializedError:
            optimizer.zero_grad()
        else:
            raise AssertionError("trained on alone")
    if me == 1:
        os.environ["LATE"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    hvd.init(framework="torch")
else:
    wrap()
    for number in range(3):
        step(*plain, torch.cat([batch(number, rank) for rank in range(2)]))
for net, optimizer in wrapped:
    hvd.broadcast_parameters(net)
    hvd.broadcast_optimizer_state(optimizer)
train(range(3, 6), 2)
check()
hvd.shutdown()
if me == 0:
    for name in ("SIZE", "LOCAL_SIZE"):
        os.environ["HOROVOD_" + name] = "1"
    hvd.init(framework="torch")
    assert hvd.size() == 1
    train(range(6, 9), 1)
    check()
print("equal", flush=True)
"""


def test_optimizers_go_on_with_the_ranks_that_are_there(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    job = run(*HVDX_RUN, "--keep-rendezvous", "-np", "2", "--", sys.executable, str(script))
    told = sorted(job.stdout.splitlines())
    assert (job.returncode, told) == (0, [f"[{r}]<stdout>:equal" for r in range(2)]), job.stderr
