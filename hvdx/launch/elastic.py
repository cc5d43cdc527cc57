"""``hvdx run --min-np ...``: ranks that fail are replaced, hosts come and go, training goes on.

Horovod's own elastic launcher listens on all interfaces, unpickles what it is sent, and lets the
ranks that are left wait while new ones start. Here all goes through hvdx's rendezvous, as plain
text under the job's token, and newcomers join when they are ready:

    launcher                                         rank
    starts it ------------------------------------>  imports its framework, builds its model
    <-- PUT ask_7: 0 ------------------------------  hvd.init(): it is in no world yet
    (all of the present world have asked, or are gone)
    -- place_7: world 3, rank 2 of 4, ... -------->  meets the others, trains
    -- news: 3, hosts are added ------------------>  rank 0 looks at it in state.commit()
    <-- PUT ask_7: 3 ------------------------------  has left world 3, wants the next

A world does not change while its ranks run. They learn that it is over by a collective that
fails, since a rank is gone, or from the news; the launcher then waits until each has asked. Those
that were there keep their order before the newcomers: rank 0 knows where training stands.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import deque
from queue import Empty
from typing import NamedTuple

from hvdx.errors import LaunchError
from hvdx.launch import network
from hvdx.launch.arguments import Arguments
from hvdx.launch.environment import cross
from hvdx.launch.hosts import Host, assign
from hvdx.launch.job import Job, hosts_of
from hvdx.launch.processes import Crew, Ended, Failure, Rank
from hvdx.launch.remote import Scouts, survey
from hvdx.launch.rendezvous import OWN_SCOPE
from hvdx.launch.shell import GRACE_SECONDS
from hvdx.launch.slots import Discovery, Slot, Slots
from hvdx.preemption import grace_seconds
from hvdx.watchdog import timeout_seconds

TICK_SECONDS = 0.2
TOGETHER_SECONDS = 10.0  # newcomers that are ready wait for others that are not
NONE = json.dumps({"world": sys.maxsize}).encode()  # the place of a process given up
REMOVED, ADDED = 1, 2  # the bits of Horovod's HostUpdateResult


class Worker:
    """A process that is a rank, or wants to become one.

    Attributes:
        number: of the process; ranks change.
        slot: where it runs.
        asked: the number of the world that it wants to leave, 0 for a newcomer's; None at first.
        since: when it began to wait.
    """

    def __init__(self, number: int, slot: Slot, process: Rank) -> None:
        self.number = number
        self.slot = slot
        self.process = process
        self.asked: int | None = None
        self.since = 0.0
        self.killed = False
        self.dismissed = False  # its host is no longer offered, or nobody is needed any more


class Seat(NamedTuple):
    """A rank's numbers in a world, in the order in which Horovod asks for them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


def seats(slots: list[Slot]) -> list[Seat]:
    """Number the ranks in these slots, one each, in this order; local ranks go by slot."""
    hosts = list(dict.fromkeys(slot.host for slot in slots))
    own = {host: sorted(slot for slot in slots if slot.host == host) for host in hosts}
    counts = [len(own[host]) for host in hosts]
    told = []
    for rank, slot in enumerate(slots):
        local = own[slot.host].index(slot)
        across = cross(counts, hosts.index(slot.host), local)
        told.append(Seat(rank, len(slots), local, len(own[slot.host]), *across))
    return told


def run(asked: Arguments) -> Ended:
    """Run an elastic job to its end.

    Raises:
        LaunchError: it could not be started.
    """
    options, elastic = asked.horovod, asked.elastic
    assert elastic is not None
    script = options.host_discovery_script
    found: list[list[Host]] = []
    discovery = Discovery(script, options.slots, found.append) if script else None
    hosts = discovery.look() if discovery else hosts_of(options)
    assign(hosts, elastic.first)  # raises where they have too few slots
    may_spread = script and options.nics  # to other machines, though none may be there yet
    address = network.address_of(min(options.nics)) if may_spread else None
    job = Job(asked, survey(hosts, options, address))
    if discovery is not None:
        discovery.start(hosts)
    digits = len(str(elastic.most or elastic.first))
    try:
        with Crew(
            folder=options.output_filename,
            digits=digits,
            timestamps=options.prefix_output_with_timestamp,
        ) as crew:
            return Launcher(job, Slots(hosts, elastic.cooldown), crew, found).run()
    finally:
        if discovery is not None:
            discovery.stop()


class Launcher:
    """Starts processes, and makes worlds of those that are ready.

    Args:
        job: what is started.
        slots: where.
        crew: watches the processes.
        found: hosts that were found since, the newest last; filled by another thread.
    """

    def __init__(self, job: Job, slots: Slots, crew: Crew, found: list[list[Host]]) -> None:
        assert job.asked.elastic is not None
        self._job = job
        self._asked = job.asked.elastic
        self._slots = slots
        self._crew = crew
        self._found = found
        self._listed = list(slots.hosts)  # hosts, as the script tells them
        self._known = {host.name for host in slots.hosts}  # those that can be reached
        self._excuses: dict[str, str] = {}  # why others cannot
        options, address = job.asked.horovod, job.found.address
        self._scouts = Scouts(lambda host: survey([host], options, address))
        self._workers: dict[int, Worker] = {}
        self._world: list[int] = []  # processes by rank; those that are gone are left out
        self._generation = 0
        self._finished = False  # a rank has ended well: no further one is wanted
        self._started = 0
        self._short_since: float | None = None  # too few ranks
        self._news = 0
        self._failures: list[Failure] = []
        self._ended: deque[int] = deque(maxlen=1000)  # one may live on a host that was cut off
        self._gave_up = False
        self._patience = timeout_seconds()
        self._rendezvous = job.rendezvous(
            self._asked.most or self._asked.first, stays=True, told=self._hear
        )

    def run(self) -> Ended:
        """See the job through."""
        try:
            caught = self._see_through()
            self._end(grace_seconds() if caught == signal.SIGTERM else GRACE_SECONDS)
        finally:
            self._rendezvous.close()
        return Ended(self._failures, [], caught, self._gave_up)

    def _see_through(self) -> int | None:
        """Go on until all have ended well, no rank is left, or a signal has come; return that."""
        while True:
            self._look_at_hosts()
            self._fill()
            if (self._finished and not self._world) or not self._advance():
                return None
            try:
                kind, who, code = self._crew.events.get(timeout=TICK_SECONDS)
            except Empty:
                continue
            if kind == "signal":
                return code
            if kind == "asked" and who in self._workers:
                worker = self._workers[who]
                worker.asked, worker.since = code, time.monotonic()
                if who in self._world and code == self._generation:
                    self._end_world()
            elif kind == "exit":
                self._gone(self._workers.pop(who), code)

    def _hear(self, key: str, body: bytes) -> None:
        """Take a rank's word, in the rendezvous' thread."""
        verb, _, number = key.partition("_")
        if verb == "ask" and number.isdecimal() and body.isdigit() and len(body) < 10:
            self._crew.events.put(("asked", int(number), int(body)))

    def _gone(self, worker: Worker, code: int) -> None:
        worker.process.end()  # also what it has left running
        self._ended.append(worker.number)
        self._rendezvous.put(f"place_{worker.number}", NONE)
        member = worker.number in self._world
        if member:
            rank = self._world.index(worker.number)
            self._world.remove(worker.number)
        if code == 0 and (member or not self._generation):
            self._finish()
        elif not worker.dismissed:
            failure = Failure(worker.number, worker.slot.host, code)
            self._failures.append(failure)
            self._slots.ban(worker.slot)
            if member:
                self._end_world()
                _say(f"{_told(failure)}; it was rank {rank}. {len(self._world)} go on")
            else:
                _say(f"{_told(failure)} before it had joined")

    def _finish(self) -> None:
        """Want no further ranks: one has ended well, and failures up to now have been mended."""
        if not self._finished:
            self._failures.clear()
        self._finished = True
        for worker in self._workers.values():
            if worker.number not in self._world:
                self._dismiss(worker)

    # -- processes

    def _look_at_hosts(self) -> None:
        """Take note of hosts that have come or gone."""
        if self._found:
            self._listed = self._found[-1]
            self._found.clear()
            names = {host.name for host in self._listed}
            self._known &= names
            self._excuses = {name: why for name, why in self._excuses.items() if name in names}
        self._scouts.send(host for host in self._listed if host.name not in self._known)
        for host, answer in self._scouts.answers():
            if isinstance(answer, LaunchError):
                if self._excuses.get(host.name) != str(answer):
                    _say(f"left out for now: {answer}".rstrip("."))
                self._excuses[host.name] = str(answer)
            else:
                site = self._job.sites[host.name] = answer.sites[host.name]
                self._rendezvous.admit(site.addresses)
                self._known.add(host.name)
        hosts = [host for host in self._listed if host.name in self._known]
        if hosts == self._slots.hosts:
            return
        self._slots.relist(hosts)
        for worker in self._workers.values():
            if worker.slot not in self._slots.offered() and worker.number not in self._world:
                self._dismiss(worker)

    def _fill(self) -> None:
        """Start processes in free slots."""
        if self._finished:
            return
        wanted = self._asked.most or len(self._slots.offered())
        taken = {worker.slot for worker in self._workers.values()}
        free = [slot for slot in self._slots.usable() if slot not in taken]
        first = self._asked.first if not self._started else wanted
        for slot in free[: max(0, min(first, wanted) - len(self._workers))]:
            number = self._started
            self._started += 1
            own = {
                "HOROVOD_ELASTIC": "1",
                "HOROVOD_HOSTNAME": slot.host,
                "HVDX_WORKER": str(number),
                "HVDX_HOST_SLOT": str(slot.number),
                **self._rendezvous.environment(),
            }
            process = self._crew.start(self._job.start(number, slot.host, own))
            self._workers[number] = Worker(number, slot, process)

    def _dismiss(self, worker: Worker) -> None:
        """End a process that is not wanted any more."""
        worker.dismissed = True
        worker.process.end()

    # -- worlds

    def _advance(self) -> bool:
        """Make the next world if its time has come; False if no further one can be."""
        world = [self._workers[number] for number in self._world]
        if any(worker.asked != self._generation for worker in world):
            self._tell_news(world)
            self._end_laggards(world)
            return True
        offered = set(self._slots.offered())
        for worker in [each for each in world if each.slot not in offered]:
            world.remove(worker)
            self._world.remove(worker.number)
            self._dismiss(worker)
        others = self._newcomers()
        if self._generation and not world:
            return self._give_up("no rank is left that knows where training stands")
        if not self._generation and any(worker.asked is None for worker in others):
            return True  # all that were started shall begin together
        members = world + [worker for worker in others if worker.asked == 0]
        members = members[: self._asked.most]
        if len(members) < (1 if self._finished else self._asked.least):
            return self._wait(len(members), len(others))
        self._short_since = None
        if self._asked.resets is not None and self._generation > self._asked.resets:
            changes = self._generation - 1
            return self._give_up(f"the ranks have changed {changes} times (--reset-limit)")
        self._make_world(members)
        return True

    def _end_laggards(self, world: list[Worker]) -> None:
        """Kill ranks that do not notice that others have left their world: they hang."""
        left = [worker.since for worker in world if worker.asked == self._generation]
        if not left or not self._patience:
            return
        passed = time.monotonic() - min(left)
        offered = set(self._slots.offered())
        for worker in world:
            listed = worker.slot in offered
            patience = self._patience if listed else min(self._patience, GRACE_SECONDS)
            if worker.asked != self._generation and passed > patience and not worker.killed:
                worker.killed = True
                why = "(HVDX_TIMEOUT)" if listed else "and its host is not listed any more"
                _say(
                    f"process {worker.number} on {worker.slot.host} does not answer: others left "
                    f"{patience:g} s ago {why}; it is killed"
                )
                worker.process.kill()

    def _newcomers(self) -> list[Worker]:
        return [
            worker
            for worker in self._workers.values()
            if worker.number not in self._world and not worker.dismissed
        ]

    def _wait(self, members: int, others: int) -> bool:
        """Tell whether to wait for more ranks."""
        now = time.monotonic()
        if self._short_since is None:
            self._short_since = now
            _say(f"{members} ranks are there; waiting for --min-np {self._asked.least}")
        hope = others or self._slots.may_grow() or self._job.asked.horovod.host_discovery_script
        if hope and now < self._short_since + self._asked.timeout:
            return True
        return self._give_up(f"fewer ranks are left than --min-np {self._asked.least}")

    def _give_up(self, why: str) -> bool:
        _say(why)
        self._gave_up = True
        return False

    def _make_world(self, members: list[Worker]) -> None:
        self._generation += 1
        self._news = 0
        self._world = [worker.number for worker in members]
        numbered = zip(members, seats([worker.slot for worker in members]), strict=True)
        values = {(OWN_SCOPE, f"place_{number}"): NONE for number in self._ended}
        for worker, seat in numbered:
            own = f"{worker.slot.host}:{seat.local_rank}"
            values["rank_and_size", own] = ",".join(map(str, seat)).encode()
            place = {"world": self._generation, **seat._asdict()}
            values[OWN_SCOPE, f"place_{worker.number}"] = json.dumps(place).encode()
        self._rendezvous.renew(len(members), values)
        self._job.say(
            f"world {self._generation} has {len(members)} ranks: processes "
            + ", ".join(map(str, self._world))
        )

    def _end_world(self) -> None:
        """Let ranks that still connect give up: one of them is gone, or has left."""
        self._rendezvous.end_round()
        self._rendezvous.put("over", str(self._generation).encode())

    def _tell_news(self, world: list[Worker]) -> None:
        """Let the world know of newcomers, or of hosts that go."""
        now = time.monotonic()
        others = self._newcomers()
        ready = [worker for worker in others if worker.asked == 0]
        room = (self._asked.most or sys.maxsize) > len(world)
        complete = len(ready) == len(others) or any(
            now - worker.since > TOGETHER_SECONDS for worker in ready
        )
        offered = set(self._slots.offered())
        news = REMOVED * any(worker.slot not in offered for worker in world)
        news |= ADDED * bool(ready and room and complete and not self._finished)
        if news and (news | self._news) != self._news:
            self._news |= news
            self._rendezvous.put("news", f"{self._generation} {self._news}".encode())

    def _end(self, grace: float) -> None:
        """End what still runs; after ``grace`` seconds, kill it."""
        for worker in self._workers.values():
            worker.process.end(grace)
        until = time.monotonic() + grace + 2
        while self._workers:
            try:
                kind, who, code = self._crew.events.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                for worker in self._workers.values():
                    worker.process.kill()
                until = time.monotonic() + GRACE_SECONDS
                continue
            if kind == "exit":
                self._workers.pop(who).process.end()
            elif kind == "signal" and code != signal.SIGPIPE:  # asked twice: no grace
                for worker in self._workers.values():
                    worker.process.kill()


def _told(failure: Failure) -> str:
    return str(failure).replace("rank ", "process ", 1)


def _say(text: str) -> None:
    print(f"hvdx run: {text}.", file=sys.stderr, flush=True)
