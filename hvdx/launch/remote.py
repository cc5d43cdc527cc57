"""Which hosts are other machines, how to reach them, and over which network they talk.

Before anything starts, each other host is asked over ssh for its interfaces, its addresses and
its route back. So a wrong host, key, folder or interface is one clear message instead of ranks
that wait for each other, and the rendezvous knows whom to admit even if ssh goes over another
network than the data.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from shlex import quote
from typing import NamedTuple

from hvdx.errors import LaunchError
from hvdx.launch import network
from hvdx.launch.hosts import Host
from hvdx.watchdog import timeout_seconds

CONNECT_SECONDS = 10
ALIVE_SECONDS = 5  # at least, between ssh's questions to a host that is silent
ALIVE_COUNT = 3  # it ends when so many are not answered
AGAIN_SECONDS = 10.0  # until a host that did not answer is asked again
LOOPBACK = "127.0.0.1"

_QUESTIONS = """\
{{
[ -d {directory} ] && echo hvdx:folder
for each in /sys/class/net/*; do echo "hvdx:interface ${{each##*/}}"; done
echo "hvdx:address $SSH_CONNECTION"
ip -4 -o address show | sed 's/^/hvdx:listed /'
ip -4 -o route get {launcher} | sed 's/^/hvdx:route /'
}} 2>/dev/null
"""


class Site(NamedTuple):
    """How to start ranks on a host, and where they talk."""

    ssh: list[str] | None  # None: this machine
    interfaces: list[str]  # the first carries Gloo
    addresses: frozenset[str]


class Survey(NamedTuple):
    """The job's network."""

    sites: dict[str, Site]  # by host name
    address: str  # where the rendezvous listens
    reason: str


def survey(
    hosts: Iterable[Host], options: argparse.Namespace, address: str | None = None
) -> Survey:
    """Find out how to reach ``hosts`` and over which network they talk.

    Args:
        hosts: the job's hosts, or some of them.
        options: horovodrun's; ``nics``, ``ssh_port``, ``ssh_identity_file``, ``start_timeout``.
        address: where the rendezvous listens, if that is settled already.

    Raises:
        LaunchError: a host is unknown or not reachable, or lacks an interface or the folder.
    """
    found = {host: _address(host) for host in hosts}
    others = [host for host, address in found.items() if not network.is_local(address)]
    wanted = sorted(options.nics or ())
    if others and address == LOOPBACK:
        raise LaunchError(
            f"host {others[0].name!r} is another machine, but the job has begun on this one alone, "
            "on loopback: let the script tell of one at the start, or give --network-interfaces"
        )
    if not others and address in (None, LOOPBACK):
        for name in wanted:
            network.address_of(name)
        here = Site(None, wanted or [network.loopback()], frozenset({LOOPBACK}))
        reason = "loopback, because all ranks run on this machine"
        return Survey({host.name: here for host in found}, LOOPBACK, reason)

    if address is not None:
        interfaces = wanted or [network.addresses()[address]]
        reason = f"{interfaces[0]}, where the job has begun"
    elif wanted:
        address = network.address_of(wanted[0])
        interfaces, reason = wanted, f"{wanted[0]}, from --network-interfaces"
    else:
        interface, address = network.route_to(found[others[0]])
        interfaces, reason = [interface], f"{interface}, which leads to {others[0].name}"

    seconds = options.start_timeout or int(os.environ.get("HOROVOD_START_TIMEOUT", "30"))
    sites = {}
    with ThreadPoolExecutor(max_workers=min(len(others), 32) or 1) as pool:
        commands = {host: _ssh(host, options) for host in others}
        answers = pool.map(lambda host: _ask(host, commands[host], address, seconds), others)
        for host, answer in zip(others, answers, strict=True):
            own = _interfaces(host, answer, wanted, interfaces[0])
            addresses = frozenset({found[host], *_addresses(answer)})
            sites[host.name] = Site(commands[host], own, addresses)
    for host in found:
        if host not in others:
            sites[host.name] = Site(None, interfaces, frozenset({address}))
    return Survey(sites, address, reason)


class Scouts:
    """Find out how to reach hosts that are listed while a job runs.

    A host may be listed before it answers, or never answer: each is asked in a thread of its own,
    which keeps nobody waiting, and again as long as it is listed.

    Args:
        ask: surveys one host; raises LaunchError.
    """

    def __init__(self, ask: Callable[[Host], Survey]) -> None:
        self._ask = ask
        self._answers: SimpleQueue[tuple[Host, Survey | LaunchError]] = SimpleQueue()
        self._next: dict[Host, float] = {}  # when to ask; those that are being asked: never

    def send(self, hosts: Iterable[Host]) -> None:
        """See to it that these hosts are asked, and no others."""
        self._next = {host: self._next.get(host, 0.0) for host in hosts}
        for host in [host for host, when in self._next.items() if when <= time.monotonic()]:
            self._next[host] = math.inf
            threading.Thread(target=self._go, args=(host,), name="hvdx scout", daemon=True).start()

    def _go(self, host: Host) -> None:
        try:
            self._answers.put((host, self._ask(host)))
        except LaunchError as error:
            self._answers.put((host, error))

    def answers(self) -> Iterator[tuple[Host, Survey | LaunchError]]:
        """Yield what has come of it since, for hosts that are still wanted."""
        with contextlib.suppress(Empty):
            while True:
                host, answer = self._answers.get_nowait()
                if host in self._next:
                    self._next[host] = time.monotonic() + AGAIN_SECONDS
                    yield host, answer


def _address(host: Host) -> str:
    """Return the host's IPv4 address; the name may be an alias of ssh's configuration."""
    address = network.resolve(host.name)
    if address is None:
        command = ["ssh", "-G", host.target]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except FileNotFoundError:
            shown = ""
        alias = re.search(r"^hostname (\S+)$", shown, re.MULTILINE)
        address = network.resolve(alias[1]) if alias else None
    if address is None:
        raise LaunchError(
            f"host {host.name!r} is unknown: neither the resolver nor ssh's configuration has an "
            "IPv4 address for it. Check -H or the host file."
        )
    return address


def _ssh(host: Host, options: argparse.Namespace) -> list[str]:
    """Return the command that runs ``sh -s`` on ``host``.

    horovodrun takes any host key (``StrictHostKeyChecking=no``). The job's environment goes this
    way, so a *changed* key is refused here.
    """
    command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new"]
    command += ["-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    if patience := timeout_seconds():  # after the watchdog, whose message says more
        pause = max(ALIVE_SECONDS, math.ceil(patience / ALIVE_COUNT))
        command += ["-o", f"ServerAliveInterval={pause}"]
        command += ["-o", f"ServerAliveCountMax={ALIVE_COUNT}"]
    if options.ssh_port is not None:
        command += ["-p", str(options.ssh_port)]
    if options.ssh_identity_file is not None:
        command += ["-i", options.ssh_identity_file]
    return [*command, host.target, "sh -s"]


def _ask(host: Host, ssh: list[str], launcher: str, seconds: int) -> list[str]:
    """Return what ``host`` answers, line by line."""
    directory = os.getcwd()
    script = _QUESTIONS.format(directory=quote(directory), launcher=launcher)
    try:
        run = subprocess.run(
            ssh, input=script, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            f"host {host.name!r} is another machine, but ssh is not installed here"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"host {host.name!r} did not answer over ssh within {seconds} s: "
            "check the network, or raise --start-timeout"
        ) from None
    answer = [line[5:] for line in run.stdout.splitlines() if line.startswith("hvdx:")]
    if not answer:
        said = " ".join(run.stderr.split()) or f"exit code {run.returncode}"
        raise LaunchError(
            f"cannot start anything on host {host.name!r} over ssh: {said}. "
            f"`ssh {host.target} true` must work without a password (see also -p and -i)."
        )
    if "folder" not in answer:
        raise LaunchError(f"host {host.name!r} has no folder {directory!r}, where the job starts")
    return answer


def _interfaces(host: Host, answer: list[str], wanted: list[str], ours: str) -> list[str]:
    """Return the interfaces that ``host`` uses: those asked for, else the one that leads here."""
    known = [line.split()[1] for line in answer if line.startswith("interface ")]
    for line in answer:
        route = re.match(r"route .* dev (\S+)", line)
        if route and not wanted:
            return [route[1]]
    chosen = wanted or [ours]
    for name in chosen:
        if name not in known:
            raise LaunchError(
                f"host {host.name!r} has no network interface {name!r}, only {', '.join(known)}: "
                "name one that all hosts have with --network-interfaces"
            )
    return chosen


def _addresses(answer: list[str]) -> Collection[str]:
    """Return the IPv4 addresses from which a host may connect to the rendezvous."""
    found = set()
    for line in answer:
        words = line.split()
        if words[0] == "address" and len(words) == 5:  # client, its port, own, its port
            found.add(words[3])
        elif words[0] == "listed" and "inet" in words:
            found.add(words[words.index("inet") + 1].partition("/")[0])
    return {address for address in found if not address.startswith("127.")}
