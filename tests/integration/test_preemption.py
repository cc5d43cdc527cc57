"""Schedulers end jobs by SIGTERM: all ranks stop after the same step, save, and leave with 143."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, SECONDS, environment, start

pytest.importorskip("horovod")

#: Each rank says when it is ready, and how many steps it had done when it saved.
TORCH = """
import os, time
import torch
import hvdx as hvd

hvd.init()
model = torch.nn.Linear(3, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)

def save():
    time.sleep(hvd.rank())  # who has saved waits for who has not
    print(f"saved after {step} by rank {hvd.rank()}\\n", end="", flush=True)

preemption = hvd.Preemption(save)
for step in range(1_000_000):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    preemption.check()
    if step == 3:
        print(f"ready {os.getpid()}\\n", end="", flush=True)
    time.sleep(0.005)
"""
KERAS = """
import os, time
import keras, numpy
import hvdx as hvd

hvd.init()
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), "mse")
steps = 0

def save():
    time.sleep(hvd.rank())
    print(f"saved after {steps} by rank {hvd.rank()}\\n", end="", flush=True)

class Count(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        global steps
        steps += 1
        if steps == 3:
            print(f"ready {os.getpid()}\\n", end="", flush=True)
        time.sleep(0.005)

data = numpy.ones((64, 3), "float32")
preempted = hvd.callbacks.PreemptionCallback(save)
model.fit(data, data[:, :1], batch_size=2, epochs=1_000_000, verbose=0,
          callbacks=[Count(), preempted])
"""
SCRIPTS = {"torch": TORCH, "tensorflow": KERAS}


@pytest.mark.parametrize(("framework", "whom"), [("torch", "a rank"), ("tensorflow", "launcher")])
def test_all_ranks_save_after_the_same_step(tmp_path, framework, whom):
    pytest.importorskip(framework)
    script = tmp_path / "train.py"
    script.write_text(SCRIPTS[framework])
    environ = environment(KERAS_BACKEND="tensorflow")
    job = start(*HVDX_RUN, "-np", "2", "--", sys.executable, str(script), env=environ)
    ranks = [int(job.stdout.readline().split()[-1]) for _ in range(2)]
    if whom == "launcher":
        job.send_signal(signal.SIGTERM)
    else:
        os.kill(ranks[1], signal.SIGTERM)
    out, said = job.communicate(timeout=SECONDS)
    saved = re.findall(r"saved after (\d+) by rank (\d)", out)
    assert job.returncode == 143, out + said
    assert sorted(rank for _, rank in saved) == ["0", "1"], out + said
    assert len({steps for steps, _ in saved}) == 1
    assert "hvdx: SIGTERM came to rank" in said
    assert "Traceback" not in said and "StallError" not in said
    if whom == "launcher":
        assert "hvdx run: SIGTERM ended the job" in said
    else:
        assert "has left after SIGTERM" in said


def test_a_job_that_saves_too_long_is_killed(tmp_path):
    words = "trap '' TERM; echo ready; while true; do sleep 0.1; done"
    command = ("--", "sh", "-c", words)
    job = start(*HVDX_RUN, "-np", "1", *command, env=environment(HVDX_GRACE="1"))
    assert job.stdout.readline() == "[0]<stdout>:ready\n"
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=SECONDS)
    assert job.returncode == 143
