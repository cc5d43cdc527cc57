"""Hosts on slow links, on this machine: network namespaces on a switch, rates set by `tc`.

    python benchmarks/rig.py --hosts 2 --rate 100 -- python train.py

starts `train.py` once per host, as rank 0 ... N-1 of one Horovod job. A link's rate holds in
each direction, as a full-duplex cable's does. Needs root, iproute2 and a kernel that has
namespaces and `tbf`; says so where one is missing. Namespaces are removed at the end, and those
that a killed run left behind are removed by the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PREFIX = "hvdxrig"


def missing() -> str | None:
    """Say why there can be no rig here, None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (iproute2)"
    try:
        with network(2, megabits=100):
            return None
    except subprocess.CalledProcessError as error:
        return f"the kernel or container forbids it: {' '.join(error.cmd)}: {error.stderr.strip()}"


class Network:
    """``hosts`` namespaces on one switch; make one with :func:`network`.

    Jobs have ``local`` ranks on each host, numbered host by host.
    """

    def __init__(self, hosts: int, megabits: float | None, local: int = 1) -> None:
        self.hosts, self.local = hosts, local
        self.prefix = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(2)}"
        self._build(megabits)

    def address(self, host: int) -> str:
        """Return the IPv4 address of ``host``, counted from 0."""
        return f"10.79.0.{host + 1}"

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on ``host``."""
        inside = [_tool("ip"), "netns", "exec", self._space(host), *command]
        return subprocess.Popen(inside, text=True, **options)

    def rank(
        self, rank: int, command: Sequence[str], environ: dict[str, str] | None = None, **kw: Any
    ) -> subprocess.Popen[str]:
        """Start a command as a rank of a job, on its host."""
        host, number = divmod(rank, self.local)
        place = {
            "RANK": rank, "WORLD_SIZE": self.hosts * self.local, "LOCAL_RANK": number,
            "LOCAL_WORLD_SIZE": self.local, "GROUP_RANK": host,
            "MASTER_ADDR": self.address(0), "MASTER_PORT": 29400,
            "HOROVOD_GLOO_IFACE": "eth0", "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        told = {**os.environ, **(environ or {}), **{k: str(v) for k, v in place.items()}}
        return self.start(host, command, env=told, **kw)

    def limit(self, megabits: float | None) -> None:
        """Limit every link to ``megabits`` per second in each direction; None lifts it."""
        for host in range(self.hosts):
            for space, device in ((self._space(host), "eth0"), (self._switch, f"port{host}")):
                subprocess.run(
                    [_tool("tc"), "-n", space, "qdisc", "del", "dev", device, "root"],
                    capture_output=True,
                )
                if megabits is not None:
                    burst = max(16_000, int(megabits * 1e6 / 8 * 2e-3))  # 2 ms, a few packets
                    shape = f"tbf rate {int(megabits * 1e6)}bit burst {burst} latency 200ms"
                    _run("tc", "-n", space, "qdisc", "add", "dev", device, "root", *shape.split())

    def sent(self, host: int) -> int:
        """Return the bytes that ``host`` has sent over its link, with all headers."""
        listed = _run("ip", "-n", self._space(host), "-s", "-j", "link", "show", "eth0")
        return int(json.loads(listed)[0]["stats64"]["tx"]["bytes"])

    @property
    def _switch(self) -> str:
        return f"{self.prefix}-switch"

    def _space(self, host: int) -> str:
        return f"{self.prefix}-h{host}"

    def _build(self, megabits: float | None) -> None:
        try:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "bridge0", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge0", "up")
            for host in range(self.hosts):
                self._build_host(host)
            self.limit(megabits)
        except BaseException:
            self.destroy()
            raise

    def _build_host(self, host: int) -> None:
        space, port = self._space(host), f"port{host}"
        _run("ip", "netns", "add", space)
        _run("ip", "-n", space, "link", "set", "lo", "up")
        peer = ["type", "veth", "peer", "eth0", "netns", space]
        _run("ip", "-n", self._switch, "link", "add", port, *peer)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge0", "up")
        _run("ip", "-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")

    def destroy(self) -> None:
        """Remove all namespaces and what runs in them."""
        for name in [self._switch, *map(self._space, range(self.hosts))]:
            _remove(name)


@contextlib.contextmanager
def network(hosts: int, megabits: float | None = None, local: int = 1) -> Iterator[Network]:
    """Provide a network of ``hosts`` on links of ``megabits`` per second, gone afterwards."""
    _sweep()
    with _unwinding():
        made = Network(hosts, megabits, local)
        try:
            yield made
        finally:
            made.destroy()


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C: through all ``finally``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sweep() -> None:
    """Remove what runs that were killed have left: their process is gone."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(f"{PREFIX}-") and not os.path.exists(f"/proc/{name.split('-')[1]}"):
            _remove(name)


def _remove(space: str) -> None:
    ip = _tool("ip")
    listed = subprocess.run([ip, "netns", "pids", space], capture_output=True, text=True).stdout
    for pid in listed.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run([ip, "netns", "del", space], capture_output=True)


def _tool(name: str) -> str:
    return shutil.which(name, path=PATH) or name


def _run(tool: str, *words: str) -> str:
    done = subprocess.run([_tool(tool), *words], check=True, capture_output=True, text=True)
    return done.stdout


def run(made: Network, command: Sequence[str], environ: dict[str, str] | None = None) -> int:
    """Run ``command`` as all ranks; print rank 0's output; return the worst status.

    Where a rank fails the others are ended, and its output is shown too.
    """
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    size = made.hosts * made.local
    ranks = [made.rank(rank, command, environ, **pipe) for rank in range(size)]
    output: list[list[str]] = [[] for _ in ranks]

    def read(rank: int) -> None:
        for line in ranks[rank].stdout or ():
            output[rank].append(line)
            if rank == 0:
                print(line, end="", flush=True)
        if ranks[rank].wait():
            for other in ranks:
                other.terminate()

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(size)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for rank, lines in enumerate(output[1:], start=1):
        if ranks[rank].returncode:
            print(f"--- rank {rank}, exit status {ranks[rank].returncode}", *lines[-30:], sep="\n")
    return max((abs(each.returncode) for each in ranks), default=0)


def main() -> int:
    """Run a command on a rig."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--local", type=int, default=1, help="ranks on each host")
    parser.add_argument("--rate", type=float, help="Mbit/s of each link; unlimited by default")
    parser.add_argument("command", nargs="+")
    told = parser.parse_args()
    reason = missing()
    if reason:
        print(f"no rig here: {reason}", file=sys.stderr)
        return 2
    with network(told.hosts, told.rate, told.local) as made:
        status = run(made, told.command)
        sent = ", ".join(f"host {h}: {made.sent(h) / 1e6:.1f} MB" for h in range(made.hosts))
        print(f"sent {sent}")
    return status


if __name__ == "__main__":
    sys.exit(main())
