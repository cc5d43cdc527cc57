"""Three ranks, two of them replicas: they learn what one process learns; a killed one is named."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, run

pytest.importorskip("horovod")
pytest.importorskip("torch")

SCRIPT = """
import copy, os, pathlib, signal, sys, time
import torch
import hvdx as hvd

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the launcher, which ends the job likewise
hvd.init()
folder, rank = pathlib.Path(sys.argv[1]), hvd.rank()
nn = torch.nn

class Trap(nn.Module):
    set = False

    def forward(self, x):
        if Trap.set and rank == 1:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tanh(x)

def sgd(params):
    return torch.optim.SGD(params, 0.1, momentum=0.9)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), Trap(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
plain, x = copy.deepcopy(model), torch.randn(12, 6, dtype=torch.float64)
y, optimizer = x.sum(1, keepdim=True), sgd(plain.parameters())
pipe = hvd.Pipeline(
    model, x, nn.functional.mse_loss, sgd, place=[[0, 1], [2]], micro_batches=5, leaves=[Trap]
)
for _ in range(10):
    loss = nn.functional.mse_loss(plain(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(pipe.step(x, y), loss.detach(), rtol=1e-10, atol=1e-10)
pipe.save(folder / "model.safetensors")
hvd.barrier()
saved = hvd.load_state(folder / "model.safetensors")["model"]
torch.testing.assert_close(saved, dict(plain.state_dict()), rtol=1e-10, atol=1e-10)
Trap.set = True
try:
    pipe.step(x, y)
except hvd.PipelineError as error:
    (folder / f"rank{rank}").write_text(f"{time.time()} {error}")
os._exit(1)
"""


def test_unequal_replicas_learn_and_name_a_rank_that_is_killed(tmp_path):
    script = tmp_path / "mesh.py"
    script.write_text(textwrap.dedent(SCRIPT))
    job = run(*HVDX_RUN, "-np", "3", "--", sys.executable, str(script), str(tmp_path))
    notes = {rank: tmp_path / f"rank{rank}" for rank in (0, 2)}
    assert all(note.exists() for note in notes.values()), job.stdout + job.stderr
    killed = float((tmp_path / "killed").read_text())
    for note in notes.values():
        when, _, told = note.read_text().partition(" ")
        assert "rank 1 is gone: its connection broke" in told
        assert float(when) - killed < 20  # of 0.1: and no deadline is as short
