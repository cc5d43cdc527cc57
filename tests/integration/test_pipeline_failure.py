"""A rank of a pipeline over Horovod is killed: the other says so, though Horovod itself ends."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, run

pytest.importorskip("horovod")

SCRIPT = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher would end who still reports
import torch
import hvdx as hvd
from torch import nn

class Dying(nn.Module):
    def forward(self, x):
        if hvd.rank() == 1 and torch.is_grad_enabled() and pipe._step == 2:
            print(f"killed at {time.time()}\\n", end="", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return x

hvd.init(framework="torch")
model, x = nn.Sequential(nn.Linear(6, 6), Dying(), nn.Linear(6, 6)), torch.ones(8, 6)
pipe = hvd.Pipeline(
    model, x, nn.functional.mse_loss, lambda params: torch.optim.SGD(params, 0.1),
    stages=[1, 2], channel="horovod", micro_batches=4,
)
try:
    while True:
        pipe.step(x, x)
except hvd.PipelineError as error:
    print(f"told at {time.time()}: {error}\\n", end="", flush=True)
    raise SystemExit(1)
"""


def test_a_killed_rank_is_named_over_horovod(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    job = run(*HVDX_RUN, "-np", "2", "--", sys.executable, str(script))
    killed = float(re.search(r"killed at ([\d.]+)", job.stdout)[1])
    told = re.search(r"told at ([\d.]+): rank 0, stage 0, .* in step 2: (.*)", job.stdout)
    assert told is not None, job.stdout + job.stderr
    assert "rank 1 has left the job without a word: killed, crashed or cut off" in told[2]
    assert float(told[1]) - killed < 20  # of 0.2: and no deadline is as short
