"""Hosts, slots, and which rank runs where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hvdx.errors import LaunchError

_HOST = re.compile(r"((?:\w[\w.-]*@)?)(\w[\w.-]*):(\d+)")


class Host(NamedTuple):
    """A host of the job."""

    target: str  # what ssh is given: [user@]name
    name: str
    slots: int


class Place(NamedTuple):
    """Where a rank runs, and its numbers there."""

    host: Host
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int

    def environment(self) -> dict[str, str]:
        """Return the variables that tell the rank its place."""
        numbers = {f"HOROVOD_{name.upper()}": str(getattr(self, name)) for name in self._fields[1:]}
        return {"HOROVOD_HOSTNAME": self.host.name, **numbers}


def parse_hosts(text: str) -> list[Host]:
    """Read ``h1:2,h2:4`` or ``user@h1:2``.

    Raises:
        LaunchError: an entry has another form, or a host is listed twice.
    """
    hosts = []
    for entry in text.split(","):
        match = _HOST.fullmatch(entry.strip())
        if not match:
            raise LaunchError(
                f"host {entry.strip()!r} in {text!r} is not of the form name:slots, as in h1:2,h2:2"
            )
        user, name, slots = match.groups()
        hosts.append(Host(user + name, name, int(slots)))
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise LaunchError(f"host {name!r} is listed twice in {text!r}: add up its slots")
    return hosts


def read_hostfile(path: str) -> list[Host]:
    """Read a file with lines ``name slots=4``; blank lines and ``#`` comments are skipped.

    Raises:
        LaunchError: the file cannot be read, or a line has another form.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise LaunchError(f"cannot read the host file {path!r}: {error.strerror}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots="):
            raise LaunchError(f"{path}, line {number}: {line!r} is not of the form 'name slots=4'")
        entries.append(f"{words[0]}:{words[1][len('slots=') :]}")
    if not entries:
        raise LaunchError(f"the host file {path!r} lists no host")
    return parse_hosts(",".join(entries))


def assign(hosts: Sequence[Host], ranks: int) -> list[Place]:
    """Give each rank a place, host by host.

    Unlike horovodrun, which starts a rank in every slot, this starts ``ranks`` of them.

    Raises:
        LaunchError: there are fewer slots than ranks.
    """
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments

    slots = sum(host.slots for host in hosts)
    if ranks > slots:
        listed = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        raise LaunchError(
            f"-np {ranks} asks for more ranks than {listed} has slots ({slots}): "
            f"ask for at most {slots}, or raise the slots with -H name:slots"
        )
    by_name = {host.name: host for host in hosts}
    infos = [HostInfo(host.name, host.slots) for host in hosts]
    return [
        Place(
            by_name[slot.hostname],
            slot.rank,
            slot.size,
            slot.local_rank,
            slot.local_size,
            slot.cross_rank,
            slot.cross_size,
        )
        for slot in get_host_assignments(infos, ranks, ranks)
    ]
