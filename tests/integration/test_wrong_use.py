"""Wrong use of whole jobs: an error on every rank that says what to do, within seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, run

pytest.importorskip("horovod")
SECONDS = 60  # of 5, on a busy machine: no job waits for a deadline

#: Each rank notes its error and how long it took from the moment when all had imported what they
#: need. It then waits for the others' notes: the launcher ends all when the first one fails.
RANK = """
import os, sys, time
from pathlib import Path
import hvdx as hvd

folder = Path({folder!r})
rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])

def all_write(kind, text=""):
    (folder / f"{{kind}}.part{{rank}}").write_text(text)
    (folder / f"{{kind}}.part{{rank}}").rename(folder / f"{{kind}}{{rank}}")
    while not all((folder / f"{{kind}}{{other}}").exists() for other in range(size)):
        time.sleep(0.01)

{imports}
all_write("ready")
start = time.monotonic()
try:
    {act}
except Exception as error:
    told = f"{{type(error).__name__}} {{time.monotonic() - start:.1f}} {{error}}"
    all_write("told", told)
    raise
"""


def told_by(folder: Path, *, imports: str, act: str) -> list[str]:
    """Run two ranks that fail; return each one's error, after a look at how long it took."""
    script = folder / "train.py"
    script.write_text(RANK.format(folder=str(folder), imports=imports, act=act))
    job = run(*HVDX_RUN, "-np", "2", "--", sys.executable, str(script))
    assert job.returncode == 1, job.stdout + job.stderr
    assert "exited with code 1" in job.stderr
    errors = []
    for rank in range(2):
        kind, seconds, error = (folder / f"told{rank}").read_text().split(" ", 2)
        assert float(seconds) < SECONDS
        errors.append(f"{kind}: {error}")
    return errors


def test_a_collective_before_init(tmp_path):
    pytest.importorskip("torch")
    errors = told_by(tmp_path, imports="import torch", act="hvd.allreduce(torch.ones(1))")
    expected = "NotInitializedError: Horovod has not been initialized; call hvd.init() first"
    assert errors == [expected] * 2


def test_ranks_start_different_frameworks(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    imports = "__import__(('torch', 'tensorflow')[rank])"
    errors = told_by(tmp_path, imports=imports, act="hvd.init()")
    expected = (
        "MismatchError: ranks start different frameworks (rank 0: torch, rank 1: tensorflow); "
        "say hvd.init(framework=...) alike on all"
    )
    assert errors == [expected] * 2


def test_more_ranks_than_slots(tmp_path):
    started = tmp_path / "started"
    start = time.monotonic()
    job = run(*HVDX_RUN, "-np", "3", "-H", "localhost:2", "--", "touch", str(started))
    assert time.monotonic() - start < SECONDS
    assert job.returncode == 1
    assert job.stderr.startswith("hvdx run: ")
    assert "asks for more ranks than" in job.stderr
    assert "Traceback" not in job.stderr
    assert not started.exists()


@pytest.fixture
def bare(environment):
    """An environment that has everything but Horovod."""
    return environment(without=["horovod*"])


def test_init_without_horovod(bare):
    pytest.importorskip("torch")
    code = """
import time, torch, hvdx as hvd
start = time.monotonic()
for call in (hvd.init, lambda: __import__("hvdx.torch"), hvd.nccl_built):
    try:
        call()
    except hvd.HorovodMissingError as error:
        assert isinstance(error, ImportError)
        print(error)
assert time.monotonic() - start < 60
"""
    told = bare.run(code).splitlines()
    assert told == [
        f"Horovod is not installed for {bare.python}; build it with: hvdx install"
    ] * 3  # fmt: skip


def test_run_without_horovod(bare):
    start = time.monotonic()
    job = bare.hvdx("run", "-np", "2", "--", "true")
    assert time.monotonic() - start < SECONDS
    assert job.returncode == 1
    assert job.stderr.startswith("hvdx run: ") and "hvdx install" in job.stderr
    assert "Traceback" not in job.stderr
