"""docs/pipeline.md: its script trains, and the plain model loads what it has written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hvdx

pytest.importorskip("horovod")
GUIDE = Path(__file__).parents[2] / "docs" / "pipeline.md"


def test_the_script_trains_on_two_ranks(tmp_path):
    torch = pytest.importorskip("torch")
    script = re.search(r"```python\n(# train_stages\.py\n.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    told = "print(f'{loss.item():.6f}\\n', end='', flush=True)\n"
    (tmp_path / "train_stages.py").write_text(script + told)
    job = subprocess.run(
        [sys.executable, "-m", "hvdx", "run", "-np", "2", "--", sys.executable, "train_stages.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    losses = re.findall(r"\[\d\]<stdout>:([\d.]+)", job.stdout)
    assert job.returncode == 0 and len(losses) == 2, job.stderr
    assert len(set(losses)) == 1 and float(losses[0]) < 5.0  # it begins at about 10
    nn = torch.nn
    plain = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    plain.load_state_dict(hvdx.load_state(tmp_path / "model.safetensors")["model"])
