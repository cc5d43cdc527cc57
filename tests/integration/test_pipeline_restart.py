"""A rank of a pipeline is killed: the job begins again on the ranks that are left, planned anew."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, environment, run

pytest.importorskip("horovod")

SAVED, KILLED, STEPS = 4, 6, 9

#: What both scripts do. Rank 1 dies in the first run; of the second, all that is left is on file.
COMMON = f"""
import json, os, signal, sys
import numpy as np
import hvdx as hvd

folder, STEPS = sys.argv[1], {STEPS}
again = int(os.environ.get("HVDX_RESTARTS", "0"))

def batch(step):
    draw = np.random.default_rng(step)
    x = draw.normal(size=(8, 6)).astype("float32")
    return x, np.tanh(x[:, :4])

def train(pipe, path, tensors):
    if os.path.exists(path):
        pipe.load(path)
    told = {{"ranks": hvd.size(), "stages": len(set(pipe.plan.place)), "first": pipe.steps}}
    losses = []
    while pipe.steps < STEPS:
        if not again and hvd.rank() == 1 and pipe.steps == {KILLED}:
            os.kill(os.getpid(), signal.SIGKILL)
        losses.append(float(pipe.step(*map(tensors, batch(pipe.steps)))))
        if hvd.rank() == 0:
            with open(os.path.join(folder, f"run{{again}}"), "w") as file:
                json.dump({{**told, "losses": losses}}, file)
        if pipe.steps % {SAVED} == 0:
            pipe.save(path)
"""

TORCH = """
import torch
from torch import nn

hvd.init(framework="torch")
torch.manual_seed(1)
model = nn.Sequential(*(each for _ in range(3) for each in (nn.Linear(6, 6), nn.Tanh())),
                      nn.Linear(6, 4))
pipe = hvd.Pipeline(model, torch.zeros(8, 6), nn.functional.mse_loss,
                    lambda params: torch.optim.Adam(params, 0.01), micro_batches=4)
train(pipe, os.path.join(folder, "model.pt"), torch.as_tensor)
"""

KERAS = """
import random
import keras

hvd.init()
random.seed(1)  # keras.utils.set_random_seed() would import TensorFlow, too
layers = [keras.layers.Dense(6, activation="tanh") for _ in range(3)]
model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(4)])
pipe = hvd.Pipeline(model, np.zeros((8, 6), "f4"), loss="mse",
                    optimizer=keras.optimizers.Adam(0.01), micro_batches=4)
train(pipe, os.path.join(folder, "model.npz"), lambda array: array)
"""


@pytest.mark.parametrize("kind", ["torch", "keras on torch"])
def test_a_job_goes_on_with_the_ranks_that_are_left(kind, tmp_path):
    backend = kind.split()[-1]
    needed = ["torch"] if kind == "torch" else ["keras", backend]
    if any(find_spec(package) is None for package in needed):
        pytest.skip(f"needs {' and '.join(needed)}")
    script = tmp_path / "train.py"
    script.write_text(COMMON + (TORCH if kind == "torch" else KERAS))
    rank = [sys.executable, str(script), str(tmp_path)]
    environ = environment(KERAS_BACKEND=backend)
    command = [*HVDX_RUN, "-np", "3", "--min-np", "2", "--restart", "--", *rank]
    job = run(*command, env=environ, timeout=400)
    assert job.returncode == 0, job.stderr
    assert "killed by signal 9 (SIGKILL); the job begins again, time 1, on 2 ranks" in job.stderr
    first, second = (json.loads((tmp_path / f"run{number}").read_text()) for number in (0, 1))
    assert (first["ranks"], first["stages"], first["first"]) == (3, 3, 0)
    assert (second["ranks"], second["stages"], second["first"]) == (2, 2, SAVED)
    assert len(second["losses"]) == STEPS - SAVED
    # Nothing is lost but the steps since the checkpoint, which are trained again alike.
    lost = first["losses"][SAVED:]
    assert lost == pytest.approx(second["losses"][: len(lost)], rel=1e-4)
    assert len(lost) >= KILLED - SAVED - 1  # rank 1 may die before rank 0 has noted the last


def test_too_few_slots_end_the_job_with_the_first_cause(tmp_path):
    code = "import os, time; os.environ['HOROVOD_RANK'] == '1' and os._exit(7); time.sleep(60)"
    command = [*HVDX_RUN, "-np", "3", "--min-np", "2", "--restart", "--", sys.executable, "-c"]
    job = run(*command, code)
    assert job.returncode == 7
    assert "rank 1 on localhost exited with code 7; the job begins again, time 1" in job.stderr
    assert "fewer slots are left than --min-np 2" in job.stderr


def test_restarts_are_limited(tmp_path):
    command = [*HVDX_RUN, "-np", "1", "--restart", "--blacklist-cooldown-range", "1", "1"]
    command += ["--reset-limit", "1", "--", sys.executable, "-c"]
    job = run(*command, "import os; print(os.environ['HVDX_RESTARTS']); os._exit(3)")
    assert (job.returncode, job.stdout.split()) == (3, ["[0]<stdout>:0", "[0]<stdout>:1"])
    assert "the job has begun again 1 times (--reset-limit)" in job.stderr
