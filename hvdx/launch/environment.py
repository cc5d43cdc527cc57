"""Make this process a rank, whoever started it.

Horovod reads its place in the job from ``HOROVOD_*``. Under ``hvdx run`` and ``horovodrun`` they
are there; under ``torchrun``, ``srun``, ``mpirun`` or an indexed Kubernetes Job they are derived
from what that launcher sets, and rank 0 serves the rendezvous from a thread of its own. (Horovod's
calls release the GIL, so the thread can answer while rank 0 itself waits in ``init``.)
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from hashlib import sha256
from typing import NamedTuple, TypeVar

from hvdx.errors import LaunchError
from hvdx.launch import network
from hvdx.launch.client import ask, check_open, take_place
from hvdx.launch.launchers import Job, integer, recognise
from hvdx.launch.rendezvous import Rendezvous, rendezvous_environment, stays_open

CANDIDATE_PORTS = 8
POLL_SECONDS = 0.02

T = TypeVar("T")

_served: list[Rendezvous] = []  # rank 0's; it must outlive init()


class Launch(NamedTuple):
    """Who started this process, and its place in the job.

    Where MPI connects the ranks (launcher ``mpirun``, Horovod built with MPI), the numbers are
    not known before Horovod starts: they stay at their defaults.
    """

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cross_rank: int = 0
    cross_size: int = 1


def prepare(environ: MutableMapping[str, str] | None = None, *, mpi_built: bool = False) -> Launch:
    """Set the variables that Horovod reads, if the launcher did not; call before Horovod starts.

    Args:
        environ: the environment to read and change; the process' own by default.
        mpi_built: whether Horovod was built with MPI, which then connects ranks under mpirun.

    Raises:
        LaunchError: the environment is malformed or contradicts itself, the rendezvous cannot be
            served or found, or it has closed since an earlier ``init()``.
    """
    environ = os.environ if environ is None else environ
    check_open(environ)
    if "HVDX_WORKER" in environ:
        take_place(environ)
    if "HOROVOD_RANK" in environ or "HOROVOD_SIZE" in environ:
        return _given(environ)
    job = recognise(environ, mpi_built=mpi_built)
    if job is None:
        environ.setdefault("HOROVOD_GLOO_IFACE", network.loopback())
        return Launch("mpirun" if mpi_built and _under_mpi(environ) else "none")
    if job.size == 1:
        environ.setdefault("HOROVOD_GLOO_IFACE", network.loopback())
        launch = Launch(job.launcher)
        _tell(environ, job, launch, {})
        return launch
    stays = stays_open(environ) or environ.get("HVDX_KEEP_RENDEZVOUS", "0") not in ("", "0")
    found = _serve(environ, job, stays) if job.rank == 0 else _find(environ, job, stays)
    counts, index = _machines(environ, job, found)
    launch = Launch(
        job.launcher,
        job.rank,
        job.size,
        job.local_rank,
        job.local_size,
        *cross(counts, index, job.local_rank),
    )
    _tell(environ, job, launch, found)
    return launch


def cross(counts: Sequence[int], index: int, local_rank: int) -> tuple[int, int]:
    """Return cross rank and size: the place among ranks of this local rank, by machine.

    Machines with fewer ranks have none of the higher local ranks.

    Args:
        counts: ranks per machine.
        index: this rank's machine.
        local_rank: this rank's number there.
    """
    having = [machine for machine, ranks in enumerate(counts) if ranks > local_rank]
    return having.index(index), len(having)


def _given(environ: Mapping[str, str]) -> Launch:
    """Read the place that ``hvdx run``, ``horovodrun`` or an earlier call has set."""
    launcher = "hvdx run" if "HVDX_RENDEZVOUS" in environ else "horovodrun"
    size = integer(environ, "HOROVOD_SIZE", 1, 1 << 20, launcher)
    rank = integer(environ, "HOROVOD_RANK", 0, size - 1, launcher)
    rest = {}
    for kind in ("local", "cross"):
        upper = f"HOROVOD_{kind.upper()}"
        count = integer(environ, f"{upper}_SIZE", 1, size, launcher)
        rest[f"{kind}_size"] = count
        rest[f"{kind}_rank"] = integer(environ, f"{upper}_RANK", 0, count - 1, launcher)
    if size > 1 and not environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"):
        raise LaunchError(
            f"HOROVOD_SIZE={environ['HOROVOD_SIZE']!r}, but HOROVOD_GLOO_RENDEZVOUS_ADDR is not "
            "set: start the job with `hvdx run`, which sets both"
        )
    return Launch(environ.get("HVDX_LAUNCHER", launcher), rank, size, **rest)


def _tell(
    environ: MutableMapping[str, str], job: Job, launch: Launch, found: Mapping[str, str]
) -> None:
    """Set Horovod's variables."""
    numbers = {
        f"HOROVOD_{name.upper()}": str(value)
        for name, value in launch._asdict().items()
        if name != "launcher"
    }
    # Decides what "local" means, so it must tell machines apart.
    host = socket.gethostname() if job.one_machine else re.sub(r"[^\w.-]", "-", job.machine)
    environ.update(numbers, HOROVOD_HOSTNAME=host, HVDX_LAUNCHER=job.launcher, **found)
    environ["HOROVOD_CONTROLLER"] = environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
    environ.setdefault("NCCL_SOCKET_IFNAME", environ["HOROVOD_GLOO_IFACE"])


def _serve(environ: MutableMapping[str, str], job: Job, stays: bool) -> dict[str, str]:
    """Start the rendezvous on rank 0; return the variables that lead to it."""
    interface, address = _own_address(job)
    environ.setdefault("HOROVOD_GLOO_IFACE", interface)
    if job.one_machine:
        admitted: set[str] | None = {"127.0.0.1"}
    elif job.hosts is None:
        admitted = None
    else:
        resolved = {host: network.resolve(host) for host in job.hosts}
        for host, known in resolved.items():
            if known is None:
                raise LaunchError(f"rank 0: host {host!r} of the job is unknown to the resolver")
        admitted = {address, *(known for known in resolved.values() if known)}
    token, ports = _token(environ, job), _candidates(environ, job)
    for port in ports:
        try:
            rendezvous = Rendezvous(
                job.size, address=address, port=port, token=token, admitted=admitted, stays=stays
            )
            break
        except LaunchError as error:
            if port == ports[-1]:
                raise LaunchError(
                    f"rank 0, started by {job.launcher}: {error}. "
                    "Choose a free port for all ranks with HVDX_RENDEZVOUS_PORT."
                ) from None
    rendezvous.start()
    rendezvous.put("ready", b"1")
    _served.append(rendezvous)
    return rendezvous.environment()


def _own_address(job: Job) -> tuple[str, str]:
    """Return interface and address where rank 0 listens: where the others look for it."""
    if job.one_machine:
        return network.loopback(), "127.0.0.1"
    assert job.server is not None
    server = network.resolve(job.server) or _resolve_own(job.server)
    if server is None:
        raise LaunchError(f"rank 0: its own host {job.server!r} is unknown to the resolver")
    if not server.startswith("127."):
        own = network.addresses().get(server)
        return (own, server) if own else network.route_to(server)  # a service's address
    # Debian maps a machine's own name to loopback. The others know better.
    other = next(filter(None, map(network.resolve, (job.hosts or ())[1:])), None)
    if other is None:
        raise LaunchError(
            f"rank 0: its host {job.server!r} resolves to {server}, where no other machine "
            "reaches it: give its address to all ranks with HVDX_RENDEZVOUS_ADDR"
        )
    return network.route_to(other)


def _resolve_own(server: str) -> str | None:
    """Return this machine's address if ``server`` is its own name, to which DNS adds a domain.

    A pod starts before the cluster's DNS knows it; its /etc/hosts has the short name.
    """
    own = socket.gethostname()
    return network.resolve(own) if server.split(".")[0] == own.split(".")[0] else None


def _find(environ: MutableMapping[str, str], job: Job, stays: bool) -> dict[str, str]:
    """Wait for rank 0's rendezvous; return the variables that lead to it."""
    host = "127.0.0.1" if job.one_machine else job.server
    assert host is not None
    token, ports = _token(environ, job), _candidates(environ, job)

    def look() -> dict[str, str] | None:
        address = network.resolve(host)
        for port in ports if address else ():
            variables = rendezvous_environment(str(address), port, token, stays=stays)
            try:
                if ask(variables, "GET", "ready"):
                    return variables
            except (OSError, LaunchError):  # nobody there yet, or some other service
                continue
        return None

    listed = f"port {ports[0]}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}"
    found = _wait(
        environ,
        look,
        f"rank {job.rank}, started by {job.launcher}: found no rendezvous of this job at {host}, "
        f"{listed}. Is rank 0 running, and is the port open between the hosts? "
        "HVDX_RENDEZVOUS_ADDR, HVDX_RENDEZVOUS_PORT and HVDX_JOB_TOKEN must agree on all ranks.",
    )
    address = found["HOROVOD_GLOO_RENDEZVOUS_ADDR"].partition(":")[0]
    interface = network.loopback() if job.one_machine else network.route_to(address)[0]
    environ.setdefault("HOROVOD_GLOO_IFACE", interface)
    return found


def _machines(
    environ: Mapping[str, str], job: Job, found: Mapping[str, str]
) -> tuple[list[int], int]:
    """Return the ranks per machine and this rank's machine; ask the others if need be."""
    if job.one_machine:
        return [job.size], 0
    if job.counts is not None and job.node is not None:
        return list(job.counts), job.node
    own = f"{job.machine} {job.local_rank} {job.local_size}"
    ask(found, "PUT", f"place_{job.rank}", own.encode())

    def everyone() -> list[str] | None:
        """Rank 0 reads what all have put and publishes machine numbers, one per rank."""
        if job.rank == 0:
            told = [_served[-1].get(f"place_{rank}") for rank in range(job.size)]
            places = [place.decode() for place in told if place is not None]
            if len(places) < job.size:
                return None
            machines = list(dict.fromkeys(place.split(" ")[0] for place in places))
            numbers = [str(machines.index(place.split(" ")[0])) for place in places]
            _served[-1].put("machines", ",".join(numbers).encode())
        published = ask(found, "GET", "machines")
        return None if published is None else published.decode().split(",")

    numbers = _wait(
        environ,
        everyone,
        f"rank {job.rank}, started by {job.launcher}: not all {job.size} ranks have come to the "
        "rendezvous. Did all of them start?",
    )
    index = int(numbers[job.rank])
    counts = [numbers.count(str(machine)) for machine in range(max(map(int, numbers)) + 1)]
    if counts[index] != job.local_size:
        raise LaunchError(
            f"rank {job.rank}: {job.launcher} says that {job.local_size} ranks run on this "
            f"machine, but {counts[index]} ranks have named it ({job.machine})"
        )
    return counts, index


def _token(environ: Mapping[str, str], job: Job) -> str:
    """Return the job's token: from the user's secret, else from what names the job.

    The latter keeps jobs apart and strangers' accidents out. It is no secret.
    """
    seed = environ.get("HVDX_JOB_TOKEN") or f"{job.launcher} {job.identity}"
    return sha256(f"hvdx {seed}".encode()).hexdigest()[:32]


def _candidates(environ: Mapping[str, str], job: Job) -> range:
    """Return the ports where the rendezvous may be.

    With a secret, only one: a stranger who sits on it must stop the job, not see the token.
    """
    exact = "HVDX_RENDEZVOUS_PORT" in environ or environ.get("HVDX_JOB_TOKEN")
    return range(job.port, job.port + (1 if exact else CANDIDATE_PORTS))


def _wait(environ: Mapping[str, str], look: Callable[[], T | None], otherwise: str) -> T:
    """Return what ``look`` finds within the start time-out."""
    seconds = 60
    if "HOROVOD_START_TIMEOUT" in environ:
        seconds = integer(environ, "HOROVOD_START_TIMEOUT", 1, 1 << 20, "the launcher")
    until = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > until:
            raise LaunchError(f"{otherwise} Waited {seconds} s (HOROVOD_START_TIMEOUT).")
        time.sleep(POLL_SECONDS)
    return found


def _under_mpi(environ: Mapping[str, str]) -> bool:
    return "OMPI_COMM_WORLD_RANK" in environ or "PMI_RANK" in environ
