"""The elastic launcher: slots, numbers of ranks, and worlds made of small processes.

The processes speak the protocol of ``hvd.init()`` and ``state.commit()`` without a framework.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("horovod")

from hvdx.errors import LaunchError
from hvdx.launch import client
from hvdx.launch.elastic import NONE, seats
from hvdx.launch.hosts import Host
from hvdx.launch.remote import Scouts, Survey
from hvdx.launch.rendezvous import Rendezvous
from hvdx.launch.slots import Discovery, Slot, Slots

#: A rank that tells where it stands, and does what the file with its number says.
RANK = """
import os, sys, time
from hvdx.launch import client

folder, number = sys.argv[1], os.environ["HVDX_WORKER"]

def told(what):
    with open(os.path.join(folder, "told"), "a") as file:
        file.write(f"{number} {what}\\n")

def order():
    path = os.path.join(folder, number)
    over = False
    while True:
        if not over and client.is_over():
            over = True
            told("over")
        if client.news() is not None:
            return "leave"
        if os.path.exists(path):
            with open(path) as file:
                text = file.read()
            os.unlink(path)
            return text
        time.sleep(0.02)

told(f"pid {os.getpid()}")
while True:
    client.take_place(os.environ)
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    place = " ".join(os.environ["HOROVOD_" + name] for name in names)
    told(f"world {os.environ['HVDX_WORLD']}: {place}")
    if (asked := order()) != "leave":
        sys.exit(int(asked))
"""


class Job:
    """A job of such ranks."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        (folder / "told").touch()
        command = [sys.executable, "-m", "hvdx", "run", *flags, "--", sys.executable]
        foreign = ("HVDX_RENDEZVOUS", "HVDX_WORKER", "HOROVOD_")
        own = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.process = subprocess.Popen(
            [*command, str(folder / "rank.py"), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own,
        )  # fmt: skip

    def wait(self, *lines: str) -> None:
        """Wait until ranks have told all these."""
        until = time.monotonic() + 100
        while not set(lines) <= set(said := (self.folder / "told").read_text().splitlines()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, said
            time.sleep(0.02)

    def order(self, number: int, what: str) -> None:
        """Have a process end with a code, or leave its world."""
        part = self.folder / f"{number}.part"
        part.write_text(what)
        part.rename(self.folder / str(number))

    def kill(self, number: int) -> None:
        """Kill a process."""
        lines = (self.folder / "told").read_text().splitlines()
        pid = next(line.split()[2] for line in lines if line.startswith(f"{number} pid"))
        os.kill(int(pid), signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Return the exit status, and what the launcher said."""
        _, said = self.process.communicate(timeout=100)
        return self.process.returncode, said


@pytest.fixture
def jobs(tmp_path):
    made = []

    def make(*flags):
        made.append(Job(tmp_path, *flags))
        return made[-1]

    yield make
    for job in made:
        with contextlib.suppress(ProcessLookupError):
            job.process.kill()
        job.process.communicate()


def test_a_rank_is_replaced_while_the_others_go_on(jobs):
    flags = ("--min-np", "2", "--max-np", "3", "--blacklist-cooldown-range", "1", "1")
    job = jobs("-np", "3", *flags)
    job.wait(*(f"{n} world 1: {n} 3 {n} 3 0 1" for n in range(3)))
    job.kill(0)
    job.wait("1 over", "2 over")  # which they look at while they connect
    for number in (1, 2):  # they notice by a collective
        job.order(number, "leave")
    # The others move up, and the newcomer, though its slot is the first, comes last.
    job.wait("1 world 2: 0 2 0 2 0 1", "2 world 2: 1 2 1 2 0 1")
    job.wait("1 world 3: 0 3 1 3 0 1", "2 world 3: 1 3 2 3 0 1", "3 world 3: 2 3 0 3 0 1")
    for number in (1, 2, 3):
        job.order(number, "0")
    code, said = job.end()
    assert code == 0, said
    assert "process 0 on localhost was killed by signal 9 (SIGKILL); it was rank 0. 2 go" in said


def test_hosts_come_and_go(jobs, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    job = jobs("-np", "2", "--min-np", "1", "--host-discovery-script", f"cat {hosts}")
    job.wait("0 world 1: 0 2 0 1 0 2", "1 world 1: 1 2 0 1 1 2")
    hosts.write_text("127.0.0.1:2\n")
    job.wait("1 world 2: 0 1 0 1 0 1")
    job.wait("1 world 3: 0 2 0 2 0 1", "2 world 3: 1 2 1 2 0 1")
    job.order(1, "0")
    job.order(2, "0")
    assert job.end()[0] == 0


def test_too_few_ranks_end_the_job_with_the_cause(jobs):
    job = jobs("-np", "2", "--min-np", "2")
    job.wait("0 world 1: 0 2 0 2 0 1", "1 world 1: 1 2 1 2 0 1")
    job.order(1, "5")
    job.order(0, "leave")
    code, said = job.end()
    assert (code, "fewer ranks are left than --min-np 2" in said) == (5, True), said


def test_a_rank_that_hangs_is_killed(jobs, monkeypatch):
    monkeypatch.setenv("HVDX_TIMEOUT", "1")
    job = jobs("-np", "2", "--min-np", "1")
    job.wait("0 world 1: 0 2 0 2 0 1", "1 world 1: 1 2 1 2 0 1")
    job.order(1, "leave")  # process 0 does not notice
    job.wait("1 world 2: 0 1 0 1 0 1")
    job.order(1, "0")
    code, said = job.end()
    assert code == 0, said
    assert "process 0 on localhost does not answer: others left 1 s ago (HVDX_TIMEOUT)" in said


def test_changes_are_limited(jobs):
    job = jobs("-np", "1", "--min-np", "1", "--reset-limit", "0")
    job.wait("0 world 1: 0 1 0 1 0 1")
    job.order(0, "leave")
    code, said = job.end()
    assert code == 1 and "(--reset-limit)" in said, said


def test_local_ranks_go_by_slot_and_ranks_by_seniority():
    slots = [Slot("h2", 1), Slot("h1", 3), Slot("h2", 0), Slot("h2", 5)]
    told = seats(slots)
    assert [(seat.rank, seat.local_rank, seat.local_size) for seat in told] == [
        (0, 1, 3), (1, 0, 1), (2, 0, 3), (3, 2, 3)
    ]  # fmt: skip
    assert [(seat.cross_rank, seat.cross_size) for seat in told] == [(0, 1), (1, 2), (0, 2), (0, 1)]


def test_slots_that_failed_are_banned():
    slots = Slots([Host("h1", "h1", 2)], None)
    slots.ban(Slot("h1", 0))
    assert slots.usable() == [Slot("h1", 1)]
    assert not slots.may_grow()


def test_slots_come_back_later_each_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    slots = Slots([Host("h1", "h1", 1)], (10, 35))
    for wait in (10, 20, 35, 35):
        slots.ban(Slot("h1", 0))
        assert slots.usable() == [] and slots.may_grow()
        now += wait - 1
        assert slots.usable() == []
        now += 1
        assert slots.usable() == [Slot("h1", 0)]


def test_a_host_that_is_listed_again_begins_anew():
    h1, h2 = Host("h1", "h1", 1), Host("h2", "h2", 1)
    slots = Slots([h1, h2], None)
    slots.relist([h1])
    for host in (h1, h2):  # a rank on the host that was taken away may end later
        slots.ban(Slot(host.name, 0))
    slots.relist([h1, h2])
    assert slots.usable() == [Slot("h2", 0)]


def test_hosts_that_do_not_answer_are_asked_again(monkeypatch):
    monkeypatch.setattr("hvdx.launch.remote.AGAIN_SECONDS", 0.02)
    asked = []

    def ask(host):
        asked.append(host.name)
        if host.name == "never" or asked.count(host.name) < 3:
            raise LaunchError(f"{host.name} is not there")
        return Survey({}, "", host.name)

    scouts, never, late = Scouts(ask), Host("never", "never", 1), Host("late", "late", 1)
    heard, until = [], time.monotonic() + 60
    while not any(isinstance(answer, Survey) for _, answer in heard):
        assert time.monotonic() < until
        scouts.send([never, late])
        heard += scouts.answers()
        time.sleep(0.01)
    assert [str(answer) for host, answer in heard if host == late][:2] == ["late is not there"] * 2
    scouts.send([])
    time.sleep(0.1)
    before = len(asked)
    scouts.send([])
    assert len(asked) == before and list(scouts.answers()) == []


def test_a_process_that_was_given_up_ends():
    rendezvous = Rendezvous(1, stays=True).start()
    environ = {**rendezvous.environment(), "HVDX_WORKER": "3", "HVDX_WORLD": "2"}
    rendezvous.put("place_3", NONE)
    try:
        with pytest.raises(LaunchError, match="process 3 of the job: the launcher has given it up"):
            client.take_place(environ)
    finally:
        rendezvous.close()


def test_a_rank_does_not_train_for_ever_without_a_launcher(monkeypatch):
    monkeypatch.setattr(client, "_silent_since", None)  # and again afterwards
    rendezvous = Rendezvous(1, stays=True).start()
    environ = {**rendezvous.environment(), "HVDX_WORLD": "1"}
    rendezvous.put("news", b"1 2")
    assert client.news(environ) == (1, 2)
    rendezvous.close()
    monkeypatch.setenv("HVDX_TIMEOUT", "1000")
    assert client.news(environ) is None
    monkeypatch.setenv("HVDX_TIMEOUT", "0.01")
    time.sleep(0.02)
    with pytest.raises(LaunchError, match=r"has not answered for 0.01 s \(HVDX_TIMEOUT"):
        client.news(environ)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no >&2; exit 3", "ended with 3: no"),
        ("echo h1", "no number of slots of 'h1'"),
        ("echo h1:x", "'h1:x'"),
    ],
)
def test_a_script_that_tells_no_hosts_is_refused(script, message):
    with pytest.raises(LaunchError, match=message):
        Discovery(script, None, lambda hosts: None).look()


def test_a_script_is_asked_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("hvdx.launch.slots.LOOK_SECONDS", 0.02)
    file = tmp_path / "hosts"
    file.write_text("h1\nh2:3\n")
    found, told = [], threading.Event()
    discovery = Discovery(f"cat {file}", 2, lambda hosts: (found.append(hosts), told.set()))
    first = discovery.look()
    assert first == [Host("h1", "h1", 2), Host("h2", "h2", 3)]
    discovery.start(first)
    part = tmp_path / "part"
    part.write_text("h2:3\n")
    part.rename(file)
    assert told.wait(60)
    discovery.stop()
    assert found[0] == [Host("h2", "h2", 3)]
