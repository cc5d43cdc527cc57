"""Tests on an NVIDIA GPU: ``make test-gpu``; where there is none they are skipped.

What they do themselves can be tried without one, by ``HVDX_GPU_TESTS_ON=cpu``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")

ON = os.environ.get("HVDX_GPU_TESTS_ON", "cuda")
HERE = Path(__file__).parent
SECONDS = 300


def missing() -> str:
    """Say why there is nothing to test on; empty if there is."""
    if ON == "cpu" or torch.cuda.is_available():
        return ""
    built = "was built without CUDA" if torch.version.cuda is None else "finds no GPU"
    return f"needs an NVIDIA GPU: torch {torch.__version__} {built}"


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.gpu)
        if why := missing():
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def device():
    return torch.device("cuda:0" if ON == "cuda" else ON)


@pytest.fixture
def run():
    """Run a script of this folder, or of the examples, on some ranks; return what they print."""

    launcher = [sys.executable, "-m", "hvdx", "run"]

    def start(ranks, script, *arguments, **environment):
        foreign = ("HOROVOD_", "HVDX_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        arguments = map(str, arguments)
        done = subprocess.run(
            [*launcher, "-np", str(ranks), "--", sys.executable, str(HERE / script), *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return start
