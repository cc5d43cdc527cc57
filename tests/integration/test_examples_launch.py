"""examples/launch and the commands of docs/launching.md, run: real processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from launching import (
    PLACE,
    SECONDS,
    environment,
    free_port,
    run,
    start,
    together,
    told,
    train,
    words,
)

from hvdx.launch import network

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "launch" / "slurm.sh"
KUBERNETES = ROOT / "examples" / "launch" / "kubernetes.yaml"
GUIDE = (ROOT / "docs" / "launching.md").read_text()

#: Slurm's srun, as far as slurm.sh uses it: one task on each node.
SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    assert "=" in command.pop(0), "would take the next word for its value"
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    numbers = dict.fromkeys(["SLURM_PROCID", "SLURM_NODEID"], str(rank))
    own = {{**os.environ, **numbers, "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}}
    tasks.append(subprocess.Popen(command, env=own))
sys.exit(max(task.wait() for task in tasks))
"""

#: A pod as Kubernetes makes it: its host name, and a file of hosts that knows its names.
POD = """
hostname "train-$JOB_COMPLETION_INDEX"
mount --bind "$0/hosts-$JOB_COMPLETION_INDEX" /etc/hosts
exec "$@"
"""


def own_address() -> str:
    """Return an address of this machine that others could reach."""
    own = [address for address in network.addresses() if not address.startswith("127.")]
    if not own:
        pytest.skip("this machine has no network interface besides loopback")
    return own[0]


def commands(launcher: str) -> list[str]:
    """Return the commands of the guide that begin with ``launcher``, comments cut off."""
    return re.findall(rf"^\$ ({launcher} .*?)(?:\s+#.*)?$", GUIDE, re.MULTILINE)


def adapted(command: str, **changes: str) -> list[str]:
    """Split a command of the guide, each word of ``changes`` replaced; all must be in it."""
    parts = command.split()
    assert set(changes) <= set(parts), command
    return [word for each in parts for word in changes.get(each, each).split()]


def directives() -> dict[str, str]:
    """Return what sbatch reads in the script: it stops at the first command."""
    head = SLURM.read_text().split("\nset ")[0]
    found = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", head, re.MULTILINE))
    assert len(found) == SLURM.read_text().count("#SBATCH")
    return found


def test_slurm_script_is_sound():
    asked = directives()
    assert int(asked["nodes"]) >= 2
    assert int(asked["gpus-per-node"]) == int(asked["ntasks-per-node"])
    assert os.access(SLURM, os.X_OK)
    subprocess.run(["bash", "-n", SLURM], check=True)


def test_slurm_script_passes_shellcheck():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, SLURM], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_script_runs(tmp_path):
    for module in ("horovod", "torch"):
        pytest.importorskip(module)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN.format(python=sys.executable))
    (tools / "srun").chmod(0o755)
    batch = {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_CPUS_PER_TASK": directives()["cpus-per-task"],
    }
    told = "token {HVDX_JOB_TOKEN} {OMP_NUM_THREADS}"
    token = f"print('{told}\\n'.format(**os.environ), end='')"
    script = train(tmp_path, before=token)[1]
    job = run("bash", str(SLURM), script, env=environment(**batch))
    lines = sorted(job.stdout.splitlines())
    assert (job.returncode, lines[:2]) == (0, words(2)), job.stderr
    assert re.fullmatch(r"token [0-9a-f]{32} 8", lines[2])
    assert lines[2:] == [lines[2]] * 2, "ranks must share the token"


def test_torchrun(tmp_path):
    for module in ("horovod", "torch"):
        pytest.importorskip(module)
    script = train(tmp_path)[1]
    here = {"torchrun": f"{sys.executable} -m torch.distributed.run", "train.py": script}
    alone, *nodes = commands("torchrun")
    job = run(*adapted(alone, **here, **{"4": "2"}))
    assert (job.returncode, told(job.stdout)) == (0, words(2)), job.stderr
    two = {**here, "4": "1", "10.0.0.1": own_address()}
    port = ["--master-port", str(free_port())]
    jobs = [adapted(node, **two) for node in nodes]
    started = [start(*job[:-1], *port, job[-1]) for job in jobs]
    ends = [each.communicate(timeout=SECONDS) for each in started]
    assert told("".join(out for out, _ in ends)) == words(2), ends


@pytest.mark.parametrize("command", commands("mpirun"))
def test_mpirun(command, tmp_path):
    for module in ("horovod", "torch"):
        pytest.importorskip(module)
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    python, script = train(tmp_path)
    here = {"mpirun": "mpirun --oversubscribe", "python": python, "train.py": script}
    if "-H" in command.split():  # hosts that are this machine
        here |= {"8": "2", "h1:4,h2:4": "localhost:2"}
        here |= {"HVDX_RENDEZVOUS_ADDR=10.0.0.1": f"HVDX_RENDEZVOUS_ADDR={own_address()}"}
    else:
        here |= {"4": "2"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = run(*adapted(command, **here), env=environment(**root, HVDX_JOB_TOKEN="a secret"))
    assert (job.returncode, told(job.stdout)) == (0, words(2)), job.stderr


@pytest.fixture(scope="module")
def manifest():
    """The manifest's objects by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(KUBERNETES.read_text())}


def pods(job: dict, secret: str) -> list[dict[str, str]]:
    """Return the environment that each pod of an indexed Job gets, as Kubernetes makes it."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    common = {}
    for each in container["env"]:
        common[each["name"]] = secret if "valueFrom" in each else each["value"]
        assert isinstance(common[each["name"]], str), "Kubernetes refuses numbers here"
    completions = job["spec"]["completions"]
    return [{**common, "JOB_COMPLETION_INDEX": str(index)} for index in range(completions)]


def test_manifest_is_of_one_piece(manifest):
    job, service = manifest["Job"]["spec"], manifest["Service"]
    pod, name = job["template"]["spec"], manifest["Job"]["metadata"]["name"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    assert service["spec"]["clusterIP"] == "None"  # the word, not null: headless
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    environ = pods(manifest["Job"], "s")[0]
    assert environ["HVDX_SIZE"] == str(job["completions"])
    assert environ["HVDX_RENDEZVOUS_ADDR"] == f"{name}-0.{pod['subdomain']}"
    (token,) = (e for e in pod["containers"][0]["env"] if e["name"] == "HVDX_JOB_TOKEN")
    told = token["valueFrom"]["secretKeyRef"]
    create = f"kubectl create secret generic {told['name']} --from-literal={told['key']}="
    assert create in KUBERNETES.read_text()
    mounts = {each["name"] for each in pod["containers"][0]["volumeMounts"]}
    assert mounts == {each["name"] for each in pod["volumes"]}


def test_pods_of_the_manifest(manifest, tmp_path):
    for module in ("horovod", "torch"):
        pytest.importorskip(module)
    own = own_address()
    job = manifest["Job"]
    job["spec"]["completions"] = 2
    port = str(free_port())  # on a machine of many, the manifest's may be taken
    more = {"HVDX_SIZE": "2", "HVDX_RENDEZVOUS_PORT": port, "HOROVOD_START_TIMEOUT": "60"}
    environs = [{**pod, **more} for pod in pods(job, "a secret")]
    command = train(tmp_path, after=PLACE)
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        for pod in environs:  # hosts cannot be renamed here: rank 0 by its address
            pod["HVDX_RENDEZVOUS_ADDR"] = own
    else:
        # The cluster's DNS tells pod 1 where rank 0 is. It may not yet know when rank 0 starts.
        names = [f"train-{i}.train.default.svc.cluster.local train-{i}" for i in range(2)]
        files = [f"127.0.0.1 localhost\n{own} {name}\n" for name in names]
        (tmp_path / "hosts-0").write_text(files[0])
        (tmp_path / "hosts-1").write_text(f"{files[1]}{own} train-0.train\n")
        command = ["unshare", "--uts", "--mount", "sh", "-ec", POD, str(tmp_path), *command]
    places = ["place 0 0 1 0 2", "place 1 0 1 1 2"]
    assert together(environs, command) == [*places, *words(2)]
