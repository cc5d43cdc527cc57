"""Elastic jobs of ``hvdx run``: a rank is killed, another joins, nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hosts import hosts, missing
from launching import HVDX_RUN, environment, gone, run

SAMPLES, EPOCHS = 48, 4
CHURN = Path(__file__).parents[2] / "benchmarks" / "elastic_churn.py"

#: What the jobs share. Epoch 1: the rank on 127.0.0.1 dies. Then there is a second slot.
COMMON = """
import json, os, signal, sys, time
import numpy as np
from hvdx import launch
folder, samples, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hosts = os.path.join(folder, "hosts")

def after_step(state, hvd, epoch, step):
    # Rank 0 tells about every call of train(), which follows every change of the ranks.
    if os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1" and epoch == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if hvd.size() == 1 and epoch == 2 and step == 0:
        with open(hosts, "w") as file:
            file.write("localhost:2\\n")
        until = time.monotonic() + 120
        while launch.news() is None and time.monotonic() < until:  # the newcomer is ready
            time.sleep(0.05)
        time.sleep(1)  # state.commit() asks once a second

def note(hvd, state):
    if hvd.rank() == 0:
        print("called with", hvd.size(), "ranks in epoch", state.epoch, flush=True)

def finish(hvd, state, parameters):
    same = len(set(hvd.allgather_object(hvd.parameter_hash(parameters)))) == 1
    if hvd.rank() == 0:
        with open(os.path.join(folder, "result"), "w") as file:
            json.dump({"size": hvd.size(), "same": same, "seen": state.seen,
                       "finite": bool(np.isfinite(state.loss))}, file)
"""

TORCH = """
import torch
import hvdx.torch as hvd

hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(1, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9), model)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
owing = torch.nn.Linear(64, 1, bias=False)  # its gradient is noise, and what is held back counts
torch.nn.init.zeros_(owing.weight)
onebit = hvd.Compression.onebit(min_elements=0)
sender = torch.optim.SGD(owing.parameters(), 1.0)
sender = hvd.DistributedOptimizer(sender, owing, compression=onebit)
sampler = hvd.elastic.ElasticSampler(range(samples))
loader = torch.utils.data.DataLoader(range(samples), batch_size=2, sampler=sampler)

@hvd.elastic.run
def train(state):
    note(hvd, state)
    while state.epoch < epochs:
        for step, batch in enumerate(loader):
            optimizer.zero_grad()
            loss = (model(batch[:, None].float()) - 2 * batch[:, None]).square().mean()
            loss.backward()
            optimizer.step()
            noise = torch.randn(64)
            sender.zero_grad()
            owing(noise).backward()
            sender.step()
            state.due = state.due + hvd.allreduce(noise, name="due")
            state.loss = loss.item()
            parts = hvd.allgather_object([state.epoch, batch.tolist()])
            state.seen.extend([epoch, index] for epoch, part in parts for index in part)
            sampler.record_batch(step, len(batch))
            after_step(state, hvd, state.epoch, step)
            if step % 2:
                state.commit()
        state.epoch += 1
        schedule.step()
        sampler.set_epoch(state.epoch)
        state.commit()

state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, schedule=schedule, epoch=0,
                               seen=[], loss=0.0, owing=owing, sender=sender, due=torch.zeros(64),
                               conserve=True)
train(state)
held = sender.compression_state()["parameters"]["weight"]["residual"].reshape(-1)
held = hvd.allreduce(held, name="held")
# All that was to be applied has been applied, or is held back by ranks that are there.
assert torch.allclose(held - owing.weight.detach()[0], state.due, atol=1e-4), (held, state.due)
assert held.abs().max() > 0.1
assert schedule.last_epoch == epochs, schedule.last_epoch
assert schedule.optimizer is optimizer
finish(hvd, state, model)
"""

KERAS = """
import keras
import hvdx.keras as hvd

hvd.init()
keras.utils.set_random_seed(hvd.rank())
x = np.arange(samples, dtype="float32")[:, None]
data = hvd.DistributedDataset(x, 2 * x, batch_size=2)
model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
# Of so few elements nothing is held back; but states are kept, and carried to other ranks.
optimizer = hvd.DistributedOptimizer(optimizer, compression=hvd.Compression.onebit(min_elements=0))
model.compile(optimizer, "mse")

class Seen(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        inputs = data[batch][0][:, 0].astype(int).tolist()
        parts = hvd.allgather_object([state.data.epoch, inputs])
        state.seen.extend([epoch, index] for epoch, part in parts for index in part)
        state.loss = float(logs["loss"])
        after_step(state, hvd, state.epoch, batch)

@hvd.elastic.run
def train(state):
    note(hvd, state)
    state.model.fit(state.data, epochs=epochs - state.epoch, verbose=0, callbacks=[
        Seen(),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.UpdateEpochStateCallback(state),
        hvd.elastic.CommitStateCallback(state, batches_per_commit=2),
    ])

state = hvd.elastic.KerasState(model, data=data, batch=0, epoch=0, seen=[], loss=0.0)
train(state)
finish(hvd, state, model)
"""


@pytest.mark.parametrize("kind", ["torch", "keras on tensorflow"])
def test_a_job_survives_a_killed_rank_and_takes_another_in(kind, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(COMMON + (TORCH if kind == "torch" else KERAS))
    (tmp_path / "hosts").write_text("localhost:1\n127.0.0.1:1\n")
    discover = tmp_path / "discover.sh"
    discover.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    discover.chmod(0o755)
    environ = {"KERAS_BACKEND": kind.split()[-1]} if kind != "torch" else {}
    done = elastic(discover, script, tmp_path, **environ)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    result = json.loads((tmp_path / "result").read_text())
    assert result["size"] == 2
    assert result["same"], "replicas differ"
    assert result["finite"]
    calls = [line.split("called ")[1] for line in done.stdout.splitlines() if "called " in line]
    assert [call.split()[1] for call in calls] == ["2", "1", "2"], told
    # Every sample exactly once in every epoch, whoever trained on it.
    assert sorted(result["seen"]) == [[e, i] for e in range(EPOCHS) for i in range(SAMPLES)]


#: Process 1 leaves the first world, shows up for the second, and dies instead of connecting. One
#: of the others is refused at the address it finds, the other waits to be connected to: Gloo has
#: the lower address listen (it compares ports in network order, so that 256 is low).
DIES_CONNECTING = """
import os, signal, struct, time, urllib.error, urllib.request
import torch
import hvdx.torch as hvd
from hvdx import launch, world

def put_or_get(key, value=None):
    place = [os.environ["HOROVOD_GLOO_RENDEZVOUS_" + name] for name in ("ADDR", "PORT")]
    verb = "GET" if value is None else "PUT"
    request = urllib.request.Request("http://%s:%s/global/%s" % (*place, key), value, method=verb)
    return urllib.request.urlopen(request).read()

def address(ip, port):
    return struct.pack("=HHI120xQ", 2, port, ip, 0)

def die_connecting():
    world.cut_off()
    hvd.shutdown()
    launch.prepare()
    put_or_get("rank_1", b"here")
    refused, silent = address(0x0100007F, 1), address(0x0101017F, 1)
    put_or_get("1", refused + silent)
    for other in ("0", "2"):
        while True:
            try:
                put_or_get(other)
                break
            except urllib.error.HTTPError:  # it has not come yet
                time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

hvd.init()

@hvd.elastic.run
def train(state):
    for state.step in range(state.step, 6):
        if os.environ["HVDX_WORKER"] == "1" and state.step == 3:
            die_connecting()
        hvd.allreduce(torch.ones(1), name="step")
        state.commit()

state = hvd.elastic.TorchState(step=0)
train(state)
print("process", os.environ["HVDX_WORKER"], "made step", state.step, "of", hvd.size(), flush=True)
"""


def test_a_rank_that_dies_while_others_connect_does_not_take_them_along(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(DIES_CONNECTING)
    patient = environment(HOROVOD_GLOO_TIMEOUT_SECONDS="3600", HVDX_TIMEOUT="3600")
    flags = ["-np", "3", "--min-np", "2"]
    done = run(*HVDX_RUN, *flags, "--", sys.executable, str(script), env=patient)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "process 1 on localhost was killed by signal 9 (SIGKILL); it was rank 1. 2 go" in told
    assert sorted(done.stdout.splitlines()) == [
        f"[{n}]<stdout>:process {n} made step 5 of 2" for n in (0, 2)
    ]


#: Epoch 1: h2 dies, with all that runs there. Epoch 2: rank 0 waits until there is a rank again.
HOST_DIES = """
def after_step(state, hvd, epoch, step):
    if os.environ["HOROVOD_HOSTNAME"] == "h2" and epoch == 1 and step == 3:
        open(os.path.join(folder, "dies"), "w").close()
        time.sleep(600)
    if hvd.size() == 1 and epoch == 2 and step == 0:
        open(os.path.join(folder, "alone"), "w").close()
        until = time.monotonic() + 120
        while launch.news() is None and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1)
"""


def test_a_job_goes_on_without_a_host_and_takes_it_back(tmp_path):
    """Over ssh, on hosts made of network namespaces."""
    pytest.importorskip("torch")
    if reason := missing():
        pytest.skip(reason)
    script = tmp_path / "train.py"
    script.write_text(COMMON + HOST_DIES + TORCH)
    flags = ["-np", "2", "--min-np", "1", "-H", "h1:1,h2:1", "--blacklist-cooldown-range", "1", "1"]
    rank = [sys.executable, str(script), str(tmp_path), str(SAMPLES), str(EPOCHS)]
    with hosts("h1", "h2") as net:
        job = net.start("h1", *HVDX_RUN, *flags, "--", *rank, env=environment())
        _come(tmp_path / "dies", job)
        for pid in net.pids("h2"):
            with contextlib.suppress(ProcessLookupError):  # ended with another
                os.kill(pid, signal.SIGKILL)
        _come(tmp_path / "alone", job)
        assert net.pids("h2") == set()
        net.serve_ssh("h2")
        told = job.communicate(timeout=240)[0]
        assert gone(_others(net)) == []
    assert job.returncode == 0, told
    lost = (
        "process 1 on h2 exited with code 255 (ssh's own, if the connection broke); it was rank 1"
    )
    assert f"{lost}. 1 go on" in told, told
    result = json.loads((tmp_path / "result").read_text())
    assert (result["size"], result["same"]) == (2, True), told
    assert sorted(result["seen"]) == [[e, i] for e in range(EPOCHS) for i in range(SAMPLES)]


def _others(net) -> list[psutil.Process]:
    """Return the hosts' processes, but for those that wait for ssh."""
    found = []
    for pid in [pid for name in net.addresses for pid in net.pids(name)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if "[listener]" not in " ".join(process.cmdline()):
                found.append(process)
    return found


def _come(path: Path, job) -> None:
    """Wait until a rank has made this file."""
    until = time.monotonic() + 240
    while not path.exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until, f"{path.name} never came"
        time.sleep(0.05)


def elastic(discover: Path, script: Path, folder: Path, **environ: str):
    launcher = [*HVDX_RUN, "-np", "2", "--min-np", "1", "--max-np", "2"]
    launcher += ["--host-discovery-script", str(discover), "--"]
    rank = [sys.executable, str(script), str(folder), str(SAMPLES), str(EPOCHS)]
    return run(*launcher, *rank, env=environment(**environ), timeout=480)


@pytest.mark.parametrize(("framework", "ranks"), [("torch", 3), ("tape", 2)])
def test_every_sample_is_trained_on_once_though_rank_0_dies(framework, ranks):
    """With compression; counted by parameters, which go back and are shared like all others."""
    pytest.importorskip({"tape": "tensorflow"}.get(framework, framework))
    command = [sys.executable, str(CHURN), "--short", "--exact-only", "--framework", framework]
    command += ["--ranks", str(ranks), "--least", str(ranks - 1), "--kills", "1", "--seed", "1"]
    done = run(*command, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills" in done.stdout and "rank 0: 1)" in done.stdout
    assert "lost or twice: 0" in done.stdout
