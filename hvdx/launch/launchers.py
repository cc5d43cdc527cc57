"""Who started this process, told by its environment.

The innermost launcher wins: ``torchrun`` under ``srun`` leaves both sets of variables.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

from hvdx.errors import LaunchError
from hvdx.launch.slurm import expand_counts, expand_nodes

_PORTS = range(20000, 30000)  # below those that Linux hands out for outgoing connections


class Job(NamedTuple):
    """What a launcher tells about a rank and its job."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    machine: str  # the same for all ranks of a machine, and only for those
    counts: tuple[int, ...] | None  # ranks per machine, where the launcher tells
    node: int | None  # this machine's place in ``counts``
    server: str | None  # where rank 0 runs; None: not told
    hosts: tuple[str, ...] | None  # all machines, where the launcher tells
    port: int  # first candidate for the rendezvous
    identity: str  # what only this job has, though it may be no secret

    @property
    def one_machine(self) -> bool:
        """Whether all ranks run on this machine."""
        return self.local_size == self.size


def recognise(environ: Mapping[str, str], *, mpi_built: bool) -> Job | None:
    """Return what a foreign launcher tells; None if no launcher started this process.

    None also where MPI connects the ranks, because Horovod was built with it.

    Raises:
        LaunchError: a variable is missing, malformed or contradicts another.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ and "MASTER_ADDR" in environ:
        return _torchrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return None if mpi_built else _open_mpi(environ)
    # The batch script itself is a task too, but of no step: srun has not started it.
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        return _slurm(environ)
    if "PMI_RANK" in environ:
        return None if mpi_built else _hydra(environ)
    if "HVDX_SIZE" in environ:
        return _kubernetes(environ)
    return None


def integer(environ: Mapping[str, str], name: str, low: int, high: int, launcher: str) -> int:
    """Return a variable that must be a number from ``low`` to ``high``.

    Raises:
        LaunchError: it is not; the message has the variable and its value.
    """
    value = environ.get(name)
    if value is None:
        raise LaunchError(f"{launcher} started this process, but {name} is not set")
    if not value.strip().isdecimal() or not low <= int(value) <= high:
        raise LaunchError(
            f"{name}={value!r} must be a number from {low} to {high}: "
            f"check how {launcher} started this process"
        )
    return int(value)


def _world(
    environ: Mapping[str, str], launcher: str, rank: str, size: str, local: str, locals_: str
) -> tuple[int, int, int, int]:
    """Return rank, size, local rank and local size, read from the variables named."""
    world = integer(environ, size, 1, 1 << 20, launcher)
    own = integer(environ, rank, 0, world - 1, launcher)
    neighbours = integer(environ, locals_, 1, world, launcher)
    return own, world, integer(environ, local, 0, neighbours - 1, launcher), neighbours


def _torchrun(environ: Mapping[str, str]) -> Job:
    rank, size, local_rank, local_size = _world(
        environ, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    )
    group = integer(environ, "GROUP_RANK", 0, size - 1, "torchrun")
    taken = integer(environ, "MASTER_PORT", 1, 65535, "torchrun")
    # torchrun's own store listens on MASTER_PORT.
    port = _port(environ, "torchrun", taken + 1 if taken < 65000 else taken - 100)
    server = environ.get("HVDX_RENDEZVOUS_ADDR") or environ["MASTER_ADDR"]
    identity = f"{environ.get('TORCHELASTIC_RUN_ID')} {environ['MASTER_ADDR']} {taken}"
    return Job(
        launcher="torchrun",
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        machine=str(group),
        counts=None,
        node=None,
        server=server,
        hosts=None,
        port=port,
        identity=identity,
    )


def _open_mpi(environ: Mapping[str, str]) -> Job:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
    return _mpi(environ, [f"OMPI_COMM_WORLD_{name}" for name in names], job)


def _hydra(environ: Mapping[str, str]) -> Job:
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return _mpi(environ, names, environ.get("PMI_JOBID", ""))


def _mpi(environ: Mapping[str, str], names: Sequence[str], job: str) -> Job:
    rank, size, local_rank, local_size = names
    numbers = _world(environ, "mpirun", rank, size, local_rank, local_size)
    server = environ.get("HVDX_RENDEZVOUS_ADDR")
    if server is None and numbers[1] != numbers[3]:
        raise LaunchError(
            "mpirun does not tell where rank 0 runs: name its host or address for all ranks, "
            "`mpirun -x HVDX_RENDEZVOUS_ADDR=h1 ...`, or start the job with `hvdx run`"
        )
    # All ranks of a machine have the same mpirun, or its daemon, for a parent.
    identity = f"{job or os.getppid()} {server}"
    return Job(
        "mpirun",
        *numbers,
        machine=socket.gethostname(),
        counts=None,
        node=None,
        server=server,
        hosts=None,
        port=_port(environ, "mpirun", _derived(identity)),
        identity=identity,
    )


def _slurm(environ: Mapping[str, str]) -> Job:
    def of_step(step: str, job: str) -> str:
        return step if step in environ else job

    nodes_in = of_step("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    counts_in = of_step("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    size_in = of_step("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    for name in (nodes_in, counts_in, "SLURM_JOB_ID"):
        if not environ.get(name):
            raise LaunchError(f"srun started this process, but {name} is not set")
    nodes = expand_nodes(environ[nodes_in], nodes_in)
    counts = expand_counts(environ[counts_in], counts_in)
    size = integer(environ, size_in, 1, 1 << 20, "srun")
    if len(nodes) != len(counts) or sum(counts) != size:
        raise LaunchError(
            f"Slurm's variables contradict each other: {nodes_in}={environ[nodes_in]!r} has "
            f"{len(nodes)} nodes, {counts_in}={environ[counts_in]!r} has {len(counts)} with "
            f"{sum(counts)} tasks, {size_in} is {size}. Was one of them exported by hand?"
        )
    index = integer(environ, "SLURM_NODEID", 0, len(nodes) - 1, "srun")
    identity = f"{environ['SLURM_JOB_ID']} {environ['SLURM_STEP_ID']}"
    return Job(
        launcher="srun",
        rank=integer(environ, "SLURM_PROCID", 0, size - 1, "srun"),
        size=size,
        local_rank=integer(environ, "SLURM_LOCALID", 0, counts[index] - 1, "srun"),
        local_size=counts[index],
        machine=nodes[index],
        counts=tuple(counts),
        node=index,
        server=environ.get("HVDX_RENDEZVOUS_ADDR") or nodes[0],
        hosts=tuple(nodes),
        port=_port(environ, "srun", _derived(identity)),
        identity=identity,
    )


def _kubernetes(environ: Mapping[str, str]) -> Job:
    launcher = "an indexed Kubernetes Job"
    size = integer(environ, "HVDX_SIZE", 1, 1 << 20, launcher)
    rank = integer(environ, "JOB_COMPLETION_INDEX", 0, size - 1, launcher)
    server = environ.get("HVDX_RENDEZVOUS_ADDR")
    if size > 1 and not server:
        raise LaunchError(
            "HVDX_SIZE is set, but HVDX_RENDEZVOUS_ADDR is not: give the name under which the "
            "pod with index 0 is reached, as in job-0.service"
        )
    identity = f"{server} {size}"
    return Job(
        launcher=launcher,
        rank=rank,
        size=size,
        local_rank=0,
        local_size=1,
        machine=f"pod-{rank}",
        counts=(1,) * size,
        node=rank,
        server=server,
        hosts=None,
        port=_port(environ, launcher, _derived(identity)),
        identity=identity,
    )


def _port(environ: Mapping[str, str], launcher: str, otherwise: int) -> int:
    if "HVDX_RENDEZVOUS_PORT" in environ:
        return integer(environ, "HVDX_RENDEZVOUS_PORT", 1, 65535, launcher)
    return otherwise


def _derived(identity: str) -> int:
    """Return a port that all ranks of a job derive alike, and other jobs rarely."""
    return _PORTS[int.from_bytes(sha256(identity.encode()).digest()[:4], "big") % len(_PORTS)]
