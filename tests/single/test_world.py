"""Before ``hvd.init()``, and a job of one process that no launcher started."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

import hvdx as hvd
from hvdx.errors import HvdxError, NotInitializedError


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


def alone(code: str) -> str:
    """Run ``code`` in a process that no launcher started; return what it prints."""
    foreign = ("HOROVOD_", "HVDX_", "SLURM_", "OMPI_", "PMI", "KERAS_BACKEND")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**own, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BEFORE = {
    "rank": hvd.rank,
    "size": hvd.size,
    "local_rank": hvd.local_rank,
    "local_size": hvd.local_size,
    "cross_rank": hvd.cross_rank,
    "cross_size": hvd.cross_size,
    "is_homogeneous": hvd.is_homogeneous,
    "barrier": hvd.barrier,
    "join": hvd.join,
    "allreduce": lambda: hvd.allreduce(1.0),
    "grouped_allreduce": lambda: hvd.grouped_allreduce([1.0, 2.0]),
    "allgather": lambda: hvd.allgather(1.0),
    "grouped_allgather": lambda: hvd.grouped_allgather([1.0]),
    "broadcast": lambda: hvd.broadcast(1.0, root_rank=0),
    "alltoall": lambda: hvd.alltoall(1.0),
    "reducescatter": lambda: hvd.reducescatter(1.0),
    "broadcast_object": lambda: hvd.broadcast_object("text"),
    "allgather_object": lambda: hvd.allgather_object("text"),
    "add_process_set": lambda: hvd.add_process_set([0]),
    "global_process_set": lambda: hvd.global_process_set,
    "start_timeline": lambda: hvd.start_timeline("timeline.json"),
    "stop_timeline": hvd.stop_timeline,
}


@pytest.mark.parametrize("call", BEFORE.values(), ids=BEFORE)
def test_before_init(call):
    with pytest.raises(NotInitializedError, match=r"not been initialized.*hvd\.init\(\)") as error:
        call()
    assert isinstance(error.value, ValueError) and isinstance(error.value, HvdxError)


def test_before_init_with_tensors():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for call in (
        lambda: hvd.allreduce(torch.ones(1)),
        lambda: hvd.broadcast_parameters(layer),
        lambda: hvd.broadcast_optimizer_state(optimizer),
        lambda: hvd.parameter_hash(layer),
    ):
        with pytest.raises(NotInitializedError, match=r"hvd\.init\(\)"):
            call()


def test_not_initialized():
    assert not hvd.is_initialized()
    assert not hvd.is_initialized("torch")
    hvd.shutdown()  # nothing to stop is no error


ONE_PROCESS = """
import numpy as np
import {framework} as framework
import hvdx as hvd

hvd.init()
numbers = (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(),
           hvd.cross_size())
assert numbers == (0, 1, 0, 1, 0, 1), numbers
assert hvd.is_initialized() and hvd.is_initialized({framework!r}) and hvd.is_homogeneous()
tensor = framework.{make}
for result in (hvd.allreduce(tensor), hvd.allreduce(tensor, op=hvd.Sum, name="sum"),
               hvd.allgather(tensor), hvd.broadcast(tensor, 0), hvd.alltoall(tensor),
               hvd.reducescatter(tensor), hvd.grouped_allreduce([tensor])[0],
               hvd.allreduce(tensor, compression=hvd.Compression.fp16)):
    assert type(result) is type(tensor), type(result)
    assert np.asarray(result).tolist() == [1.5, -2.0], result
assert hvd.allreduce(np.float64(3.5)).tolist() == 3.5
assert hvd.allgather_object({{"a": 1}}) == [{{"a": 1}}]
assert hvd.broadcast_object("text") == "text"
hvd.barrier()
hvd.init()  # again: no error
assert hvd.size() == 1
{more}
hvd.shutdown()
assert not hvd.is_initialized()
try:
    hvd.size()
except hvd.NotInitializedError:
    print("done")
"""
TRAIN = """
net = framework.nn.Linear(2, 1, bias=False)
before = net.weight.detach().clone()
optimizer = hvd.DistributedOptimizer(framework.optim.SGD(net.parameters(), 0.5), net)
net(tensor).sum().backward()
optimizer.step()
assert framework.equal(net.weight, before - 0.5 * tensor)
"""


@pytest.mark.parametrize(
    ("framework", "make", "more"),
    [("torch", "tensor([1.5, -2.0])", TRAIN), ("tensorflow", "constant([1.5, -2.0])", "")],
)
def test_a_job_of_one_process(framework, make, more):
    needs("horovod", framework)
    assert alone(ONE_PROCESS.format(framework=framework, make=make, more=more)) == "done\n"


def test_the_other_core_is_not_running():
    needs("horovod", "torch")
    code = """
import torch
import hvdx as hvd
hvd.init()
try:
    hvd.world.core("tensorflow")
except hvd.NotInitializedError as error:
    print(error)
"""
    told = alone(code)
    assert "core for tensorflow is not initialized (that for torch is)" in told
    assert "hvd.init(framework=('torch', 'tensorflow'))" in told


def test_a_core_that_horovod_started_is_adopted():
    needs("horovod", "torch")
    code = """
import horovod.torch
import hvdx as hvd
assert not hvd.is_initialized()
horovod.torch.init()
assert hvd.is_initialized() and hvd.size() == 1
horovod.torch.shutdown()
print(hvd.is_initialized())
"""
    assert alone(code) == "False\n"


def test_horovod_that_failed_to_start_can_be_started_again():
    needs("horovod", "torch")
    code = """
import os
import hvdx as hvd
from hvdx.errors import ConnectError
os.environ |= dict.fromkeys(("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"), "gloo")
os.environ["HOROVOD_GLOO_IFACE"] = "nowhere0"
for _ in range(2):
    try:
        hvd.init(framework="torch")
    except ConnectError as error:
        print(error)
assert not hvd.is_initialized()
del os.environ["HOROVOD_GLOO_IFACE"]
hvd.init(framework="torch")
print(hvd.size())
"""
    *failed, size = alone(code).splitlines()
    assert size == "1"
    assert len(failed) == 2
    assert all("rank 0: Horovod did not start" in each and "nowhere0" in each for each in failed)
