"""Killed while it saves, at any moment, a job finds its last checkpoint whole; on any ranks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import hvdx as hvd
from hvdx.checkpoints.folder import Folder

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, run

pytest.importorskip("horovod")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SECONDS = 240

ALONE = """
    import sys
    import numpy as np
    import hvdx as hvd
    checkpoints = hvd.Checkpoints(sys.argv[1], keep=2, random=False)
    told = {"step": 0}
    checkpoints.restore(told=told)
    for step in range(told["step"] + 1, 1_000_000):
        told.update(step=step, values=np.full(200_000, step))
        checkpoints.save(step, told=told)
"""


def test_killed_at_any_moment_the_last_checkpoint_is_whole(tmp_path):
    script, folder, last = tmp_path / "alone.py", tmp_path / "saved", 0
    script.write_text(textwrap.dedent(ALONE))
    draw = random.Random(0)
    for _ in range(6):
        job = subprocess.Popen([sys.executable, str(script), str(folder)], env=ENVIRONMENT)
        deadline = time.monotonic() + SECONDS
        # Two more than there were, and then a moment of its own.
        while len(_steps(folder) - set(range(last + 2))) < 1 and time.monotonic() < deadline:
            time.sleep(draw.random() * 0.02)
        job.send_signal(signal.SIGKILL)
        job.wait()
        told = {}
        step = hvd.Checkpoints(folder).restore(told=told)
        assert step is not None and step > last and told["step"] == step
        assert (told["values"] == step).all()
        last = step
    assert len(list(folder.iterdir())) <= 4  # two, and what the last job left


def _steps(folder):
    return {manifest.step for _, manifest in Folder(folder).found()}


RANKS = """
    import itertools, sys, time
    import torch
    from torch import nn
    import hvdx as hvd

    mode, folder = sys.argv[1:]
    hvd.init(framework="torch")
    rank, size = hvd.rank(), hvd.size()

    def training(seed, **options):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        adam = torch.optim.Adam(model.parameters(), 0.01)
        return model, hvd.DistributedOptimizer(adam, model, **options)

    served, servers = training(mode == "go on", sync="parameter_server")
    owing, owed = training(mode == "go on", compression=hvd.Compression.topk(0.2, min_elements=1))
    plain = torch.optim.Adam(served.parameters(), 0.01)
    parts = {"served": served, "servers": servers, "owing": owing, "owed": owed}
    checkpoints = hvd.Checkpoints(folder, keep=2)

    def train():
        draw = torch.Generator().manual_seed(rank)
        for model, optimizer in ((served, servers), (owing, owed)):
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=draw)
            model(x).sub(x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()

    if mode == "save":
        for step in itertools.count(1):
            train()
            # What any number of ranks is to find.
            whole, pooled = servers.portable_state_dict(), owed.portable_compression_state()
            told = {"state": whole["state"], "pooled": pooled["parameters"]}
            checkpoints.save(step, **parts, told=told)
    told = {}
    step = checkpoints.restore(**parts, told=told)
    pooled = owed.portable_compression_state()["parameters"]
    torch.testing.assert_close(pooled, told["pooled"], rtol=1e-5, atol=1e-7)
    checkpoints.restore(servers=plain)  # into the optimizer without hvdx
    torch.testing.assert_close(plain.state_dict()["state"], told["state"], rtol=0, atol=0)
    train()
    whole = servers.portable_state_dict()["state"]
    assert all(float(each["step"]) == step + 1 for each in whole.values())
    hvd.check_consistency(served)
    hvd.check_consistency(owing)
    if rank == 0:
        print(f"went on from {step} on {size} ranks")
"""


def test_two_ranks_are_killed_while_they_save_and_one_and_three_go_on(tmp_path):
    pytest.importorskip("torch")
    script, folder = tmp_path / "ranks.py", tmp_path / "saved"
    script.write_text(textwrap.dedent(RANKS))
    command = [*HVDX_RUN, "-np", "2", "--", sys.executable, str(script), "save", str(folder)]
    job = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + SECONDS
    while len(_steps(folder)) < 2 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.003)
    _kill_a_rank(job.pid)
    said = job.communicate(timeout=SECONDS)[1]
    assert job.returncode and "killed by signal 9" in said
    latest = hvd.Checkpoints(folder).latest()
    assert latest is not None and latest >= 2
    for ranks in (1, 3):
        command = [*HVDX_RUN, "-np", str(ranks), "--", sys.executable, str(script), "go on"]
        done = run(*command, str(folder))
        assert f"went on from {latest} on {ranks} ranks" in done.stdout, done.stdout + done.stderr


def _kill_a_rank(launcher):
    import psutil

    children = psutil.Process(launcher).children(recursive=True)
    ranks = [each for each in children if "ranks.py" in " ".join(each.cmdline())]
    os.kill(ranks[-1].pid, signal.SIGKILL)
