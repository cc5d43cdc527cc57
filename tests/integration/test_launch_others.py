"""Jobs that torchrun, Slurm or Kubernetes started: real processes, a real allreduce.

The commands that docs/launching.md shows are tried in test_examples_launch.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import (
    PLACE,
    SECONDS,
    Gate,
    Watch,
    environment,
    free_port,
    run,
    start,
    together,
    told,
    train,
    words,
)

pytest.importorskip("horovod")
pytest.importorskip("torch")


def test_ranks_of_torchrun_on_one_machine_listen_on_loopback_only(tmp_path):
    gate = Gate(tmp_path)
    before = f"""
if os.environ["RANK"] == "0":
    print(os.getpid(), flush=True)
else:
    {gate.code}
"""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    job = start(*torchrun, "--nproc-per-node", "2", *train(tmp_path, before=before)[1:])
    watch = Watch(int(job.stdout.readline()))
    seen = watch.wait(lambda seen: len(seen) >= 2)  # rendezvous, and Gloo waiting for rank 1
    gate.open()
    out, said = job.communicate(timeout=SECONDS)
    assert (job.returncode, told(out)) == (0, words(2)), said
    assert {address for address, _ in seen | watch.seen} == {"127.0.0.1"}


def slurm(rank: int, node: int, local: int) -> dict[str, str]:
    """What srun sets for three tasks on two nodes (here, two addresses of loopback)."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "3",
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_TASKS_PER_NODE": "2,1",
    }


def test_srun_with_unequal_nodes_and_cyclic_ranks(tmp_path):
    lines = together([slurm(0, 0, 0), slurm(1, 1, 0), slurm(2, 0, 1)], train(tmp_path, after=PLACE))
    assert lines == ["place 0 0 2 0 2", "place 1 0 1 1 2", "place 2 1 2 0 1", *words(3)]


def test_an_environment_that_contradicts_itself_ends_with_one_clear_message(tmp_path):
    job = run(*train(tmp_path), env=environment(**slurm(0, 0, 0) | {"SLURM_NTASKS": "5"}))
    assert job.returncode == 1
    assert job.stderr.splitlines()[-1].startswith("hvdx.errors.LaunchError: Slurm's variables")


def test_a_lone_process_needs_no_launcher(tmp_path):
    job = run(*train(tmp_path))
    assert (job.returncode, job.stdout.splitlines()) == (0, words(1)), job.stderr


def test_a_process_started_twice_is_told(tmp_path):
    # Two ranks 0 of one job: the second finds the port taken.
    port = {"HVDX_RENDEZVOUS_PORT": str(free_port())}
    patient = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "300"}  # else it gives up before the second is up
    first = start(*train(tmp_path), env=environment(**slurm(0, 0, 0), **port, **patient))
    watch = Watch(first.pid)
    watch.wait(lambda seen: len(seen) > 0)
    second = run(*train(tmp_path), env=environment(**slurm(0, 0, 0), **port))
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"127.0.0.1:{port['HVDX_RENDEZVOUS_PORT']}" in second.stderr
    assert "in use" in second.stderr
