"""Which slots an elastic job may use: those of the hosts there are, less those that failed."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hvdx.errors import LaunchError
from hvdx.launch.hosts import Host, parse_hosts

LOOK_SECONDS = 1.0
SCRIPT_SECONDS = 60.0


class Slot(NamedTuple):
    """Room for one rank: on a host with a GPU per rank, one GPU."""

    host: str
    number: int


class Slots:
    """The slots of hosts that come and go.

    Horovod bans the whole host of a process that fails. Here only its slot is: where the host
    itself is gone, its other ranks fail, too.

    Args:
        hosts: those there are at first.
        cooldown: for how many seconds a slot is not used after a failure: the first number,
            doubled with each failure of the slot up to the second; None: for ever.
    """

    def __init__(self, hosts: Sequence[Host], cooldown: tuple[int, int] | None) -> None:
        self.hosts = list(hosts)
        self._cooldown = cooldown
        self._failures: dict[Slot, int] = {}
        self._until: dict[Slot, float] = {}

    def relist(self, hosts: Sequence[Host]) -> None:
        """Offer these hosts; one that was gone may be another machine: it begins anew."""
        before = {host.name for host in self.hosts}
        self.hosts = list(hosts)
        for slot in [slot for slot in self._until if slot.host not in before]:
            self._until.pop(slot)
            self._failures.pop(slot, None)

    def offered(self) -> list[Slot]:
        """Return the slots of all hosts, banned or not, host by host."""
        return [Slot(host.name, index) for host in self.hosts for index in range(host.slots)]

    def usable(self) -> list[Slot]:
        """Return those in which a rank may be started now."""
        now = time.monotonic()
        return [slot for slot in self.offered() if self._until.get(slot, now) <= now]

    def ban(self, slot: Slot) -> None:
        """Do not use a slot for a while, in which a rank has failed."""
        if self._cooldown is None:
            self._until[slot] = float("inf")
            return
        low, high = self._cooldown
        failures = self._failures[slot] = self._failures.get(slot, 0) + 1
        self._until[slot] = time.monotonic() + min(high, low * 2.0 ** min(failures - 1, 32))

    def may_grow(self) -> bool:
        """Tell whether a slot that is banned now may be used later."""
        now = time.monotonic()
        return any(now < self._until.get(slot, now) < float("inf") for slot in self.offered())


class Discovery:
    """Asks a script, again and again, which hosts there are.

    It prints one host a line, ``name`` or ``name:slots``.

    Args:
        script: a shell command.
        slots: of a host for which it tells no number.
        found: called, in a thread of this class, with hosts that differ from those before.
    """

    def __init__(self, script: str, slots: int | None, found: Callable[[list[Host]], None]) -> None:
        self._script = script
        self._slots = slots
        self._found = found
        self._last: list[Host] = []
        self._stopped = threading.Event()

    def look(self) -> list[Host]:
        """Ask once.

        Raises:
            LaunchError: the script fails, or prints something else; the message has it.
        """
        command = ["sh", "-c", self._script]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=SCRIPT_SECONDS)
        except subprocess.TimeoutExpired:
            raise LaunchError(
                f"--host-discovery-script {self._script!r} has not ended after "
                f"{SCRIPT_SECONDS:.0f} s"
            ) from None
        if run.returncode:
            said = " ".join(run.stderr.split())[-300:]
            raise LaunchError(
                f"--host-discovery-script {self._script!r} ended with {run.returncode}: {said}"
            )
        entries = []
        for line in filter(None, map(str.strip, run.stdout.splitlines())):
            if ":" not in line and self._slots is None:
                raise LaunchError(
                    f"--host-discovery-script {self._script!r} tells no number of slots of "
                    f"{line!r}: print {line}:2, say, or give --slots-per-host"
                )
            entries.append(line if ":" in line else f"{line}:{self._slots}")
        return parse_hosts(",".join(entries)) if entries else []

    def start(self, hosts: list[Host]) -> None:
        """Go on asking, in a thread; ``hosts`` are known."""
        self._last = hosts
        threading.Thread(target=self._run, name="hvdx hosts", daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                hosts = self.look()
            except LaunchError:  # a moment's trouble ends no job: it was right at the start
                continue
            if hosts != self._last:
                self._last = hosts
                self._found(hosts)
