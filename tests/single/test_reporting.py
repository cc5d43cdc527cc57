"""The lines of a training: what they say is what was counted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

TRAINING = """
import time
import torch
import hvdx as hvd

hvd.init()
net = torch.nn.Linear(1, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net)
for planned in (3, 0):
    report = hvd.TrainingReport(optimizer, epochs=planned)
    outer = time.perf_counter()
    time.sleep(0.2)
    optimizer.communication_seconds += 0.05
    report.batch(600, torch.tensor(2.0, requires_grad=True))
    report.batch(400, 4.0)
    report.pause()
    report.pause()
    time.sleep(0.3)  # as for validation, which does not count
    report.resume()
    report.epoch(accuracy=0.51239)
    print(time.perf_counter() - outer)
time.sleep(0.01)
report.epoch()  # no batch: a count that starts anew, and no division by zero
report.final(0.98765, net)
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    for needed in ("torch", "horovod"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    own = {k: v for k, v in os.environ.items() if not k.startswith(("HOROVOD_", "HVDX_"))}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], capture_output=True, text=True, timeout=120, env=own
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_epoch(lines):
    line, elapsed = lines[0].split("  "), float(lines[1])
    assert line[:3] == ["epoch 1/3", "loss 3.0000", "accuracy 0.5124"]
    speed, rest = line[3].split(" ", 1)
    assert rest == "samples/s on 1 ranks"
    elapsed -= 0.3
    assert 1000 / elapsed - 1 <= float(speed.replace(",", "")) <= 1000 / 0.2
    word, share = line[4].split(" ")
    assert word == "communication"
    assert 5 / elapsed - 0.1 <= float(share.rstrip("%")) <= 25


def test_epochs_without_a_plan(lines):
    assert lines[2].startswith("epoch 1  loss 3.0000  accuracy 0.5124  ")


def test_an_epoch_starts_from_nothing(lines):
    assert lines[4] == "epoch 2  loss 0.0000  0 samples/s on 1 ranks  communication 0.0%"


def test_the_end(lines):
    accuracy, parameters = lines[5].split("  ")
    assert accuracy == "accuracy 0.9877"
    name, value = parameters.removeprefix("parameters ").removesuffix(" (equal)").split("=")
    assert name == "rank0"
    assert len(value) == 16 and int(value, 16) >= 0
