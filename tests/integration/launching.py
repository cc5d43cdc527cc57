"""Start jobs, look at their processes, and let tests and ranks wait for each other."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

HVDX_RUN = (sys.executable, "-m", "hvdx", "run")
#: horovodrun asks the frameworks' extensions, in turn, whether they have Gloo. TensorFlow's, the
#: first, would take longer to import than most jobs take.
HOROVODRUN = (
    sys.executable,
    "-c",
    "import sys; sys.modules['horovod.tensorflow'] = None; "
    "from horovod.runner.launch import run_commandline; run_commandline()",
)
SECONDS = 240  # that anything may take, on a busy machine
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}

#: A rank that meets the others: before() runs before init, after() when all are up.
TRAIN = """
import os
import torch
import hvdx as hvd

{before}
hvd.init(framework="torch")
{after}
total = hvd.allreduce(torch.full((4,), float(hvd.rank() + 1)), op=hvd.Sum, name="total")
# In one piece: ranks may share a pipe.
print(f"rank {{hvd.rank()}} of {{hvd.size()}} got {{total.tolist()}}\\n", end="", flush=True)
"""


#: What a rank runs, ``after`` all are up, to print where it stands.
PLACE = (
    "print('place', hvd.rank(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), "
    "hvd.cross_size(), flush=True)"
)


def train(folder: Path, *, before: str = "", after: str = "") -> list[str]:
    """Return the command of a rank that does one allreduce."""
    script = folder / "train.py"
    script.write_text(TRAIN.format(before=before, after=after))
    return [sys.executable, str(script)]


def sums(size: int) -> list[str]:
    """Return the lines that :func:`train` prints, prefixed, in rank order."""
    total = [size * (size + 1) / 2] * 4
    return [f"[{r}]<stdout>:rank {r} of {size} got {total}" for r in range(size)]


def words(size: int) -> list[str]:
    """What the ranks of a job print, without the prefix that only `hvdx run` gives."""
    return [line.partition(":")[2] for line in sums(size)]


def environment(**more: str) -> dict[str, str]:
    """Return this process' environment without what a launcher may have set."""
    foreign = ("HOROVOD_", "HVDX_", "SLURM_", "OMPI_", "PMI")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**own, **QUIET, **more}


def start(*command: str, **options: Any) -> subprocess.Popen[str]:
    """Start a launcher in a process group of its own."""
    settings: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment(),
        "start_new_session": True,
    }
    return subprocess.Popen(command, **{**settings, **options})


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    settings: dict[str, Any] = {"env": environment(), "timeout": SECONDS}
    return subprocess.run(command, capture_output=True, text=True, **{**settings, **options})


def told(output: str) -> list[str]:
    """Return what ranks print, sorted, though some launchers' ranks write into each other's lines.

    torchrun's do: its ranks' output is unbuffered, so that a line and its end are two writes.
    """
    return sorted(re.findall(r"rank \d+ of \d+ got \[.*?\]", output))


def together(environs: Iterable[dict[str, str]], command: Sequence[str]) -> list[str]:
    """Run one process per environment; return their lines, sorted."""
    ranks = [start(*command, env=environment(**environ)) for environ in environs]
    lines: list[str] = []
    for rank in ranks:
        out, said = rank.communicate(timeout=SECONDS)
        assert rank.returncode == 0, said
        lines += out.splitlines()
    return sorted(lines)


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Gate:
    """Where ranks wait until the test lets them pass (a named pipe)."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self.path = folder / name
        os.mkfifo(self.path)

    @property
    def code(self) -> str:
        """What a rank runs to wait."""
        return f"open({str(self.path)!r}).read()"

    def open(self) -> None:
        """Let the one waiting rank pass; waits for it.

        Raises:
            TimeoutError: nobody came.
        """
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
                os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
                return
            time.sleep(0.02)
        raise TimeoutError(f"nobody waits at {self.path}")


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(processes: list[psutil.Process]) -> bool:
    """Return whether the first of these, the launcher, still runs."""
    try:
        return bool(processes) and processes[0].status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return address and port of all sockets, TCP and UDP, on which processes listen."""
    wanted = set(pids)
    return {
        (entry.laddr.ip, entry.laddr.port)
        for entry in psutil.net_connections("inet")
        if entry.pid in wanted and (entry.status == psutil.CONN_LISTEN or not entry.raddr)
    }


class Watch:
    """Collects where a job's process tree listens, again and again, until it ends."""

    def __init__(self, pid: int) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.rounds = 0
        self._pid = pid
        self._grown = threading.Condition()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while alive(processes := tree(self._pid)):
            found = listening(process.pid for process in processes)
            with self._grown:
                self.seen |= found
                self.rounds += 1
                self._grown.notify_all()

    def wait(self, enough: Callable[[set[tuple[str, int]]], bool]) -> set[tuple[str, int]]:
        """Wait until what was seen is enough; return it."""
        with self._grown:
            assert self._grown.wait_for(lambda: enough(self.seen), SECONDS), self.seen
            return set(self.seen)


def gone(processes: Iterable[psutil.Process], seconds: float = SECONDS) -> list[psutil.Process]:
    """Wait for processes to end; return those that did not."""
    return psutil.wait_procs(list(processes), timeout=seconds)[1]
