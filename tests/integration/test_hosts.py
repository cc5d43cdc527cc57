"""Jobs on two hosts over ssh: real processes on hosts made of network namespaces (hosts.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hosts import hosts, missing
from launching import HOROVODRUN, HVDX_RUN, SECONDS, Gate, environment, gone, sums, train

pytest.importorskip("horovod")

#: Prints where this host listens, as seen from inside.
LISTENING = """
import psutil
for entry in psutil.net_connections("inet"):
    if entry.status == "LISTEN": print(*entry.laddr)
"""

#: Prints the answer to a GET without the token, and to a PUT with it.
STRANGER = """
import socket, sys
address, port, token = sys.argv[1], int(sys.argv[2]), sys.argv[3]
for verb, path in (("GET", "/hvdx/x"), ("PUT", f"/{token}:{port}/hvdx/x")):
    with socket.create_connection((address, port), timeout=10) as connection:
        try:
            connection.sendall(f"{verb} {path} HTTP/1.1\\r\\n\\r\\n".encode())
            print(connection.recv(100))
        except ConnectionError:
            print(b"")
"""


@pytest.fixture(scope="module")
def net():
    """Hosts h1 and h2 with sshd, and a stranger without."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with hosts("h1", "h2", "stranger", without_ssh=["stranger"]) as made:
        made.add_interface("h1", "only1")
        yield made


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Ranks inherit the launcher's environment, and it this process'."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


TWO = ("-np", "2", "-H", "h1:1,h2:1")


def test_ranks_on_two_hosts_average_over_the_interface_that_was_named(net, tmp_path):
    flags = ["--verbose", "--network-interfaces", "eth0"]
    job = net.run("h1", *HVDX_RUN, *TWO, *flags, "--", *train(tmp_path))
    assert (job.returncode, sorted(job.stdout.splitlines())) == (0, sums(2)), job.stderr
    assert "the job talks over eth0, from --network-interfaces" in job.stderr
    assert f"the rendezvous listens on {net.addresses['h1']}:" in job.stderr


def test_two_ranks_per_host(net, tmp_path):
    place = "print('place', hvd.rank(), hvd.local_rank(), hvd.cross_rank(), flush=True)"
    command = train(tmp_path, after=place)
    job = net.run("h1", *HVDX_RUN, "--verbose", "-np", "3", "-H", "h2:2,h1:2", "--", *command)
    assert "the job talks over eth0, which leads to h2" in job.stderr
    assert f"the rendezvous listens on {net.addresses['h1']}:" in job.stderr
    places = [f"[{r}]<stdout>:place {r} {r % 2} {r // 2}" for r in range(3)]
    assert (job.returncode, sorted(job.stdout.splitlines())) == (0, sorted(places + sums(3))), (
        job.stderr
    )


def test_ranks_on_two_hosts_watch_each_other(net, tmp_path, monkeypatch):
    monkeypatch.setenv("HVDX_TIMEOUT", "4")
    after = "if hvd.rank() == 1:\n    import time\n    time.sleep(1000)"
    job = net.run("h1", *HVDX_RUN, *TWO, "--", *train(tmp_path, after=after))
    assert job.returncode == 1
    assert "rank 0: waiting for allreduce 'total'" in job.stderr, job.stderr
    assert "but rank 1 has not called it" in job.stderr and "time.sleep(1000)" in job.stderr


def test_the_launcher_may_be_none_of_the_hosts(net, tmp_path):
    job = net.run("h1", *HVDX_RUN, "-np", "2", "-H", "h2:2", "--", *train(tmp_path))
    assert (job.returncode, sorted(job.stdout.splitlines())) == (0, sums(2)), job.stderr


def test_horovodrun_still_launches_on_two_hosts(net, tmp_path):
    flags = ["--gloo", "--network-interfaces", "eth0"]
    job = net.run("h1", *HOROVODRUN, *TWO, *flags, *train(tmp_path))
    assert (job.returncode, sorted(job.stdout.splitlines())) == (0, sums(2)), job.stderr


def test_only_hosts_of_the_job_reach_the_rendezvous(net, tmp_path):
    gate = Gate(tmp_path)
    before = f"""
if os.environ["HOROVOD_RANK"] == "1":
    print(os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], flush=True)
    {gate.code}
"""
    job = net.start("h1", *HVDX_RUN, *TWO, *train(tmp_path, before=before))
    address, _, token = job.stdout.readline().strip().partition(":")[2].partition("/")
    host, _, port = address.partition(":")
    assert host == net.addresses["h1"]

    on_h1 = net.run("h1", sys.executable, "-c", LISTENING).stdout.splitlines()
    assert f"{host} {port}" in on_h1
    mine = [line for line in on_h1 if not line.endswith(" 22")]  # sshd's own
    assert {line.split()[0] for line in mine} == {host}

    asked = (sys.executable, "-c", STRANGER, host, port, token)
    assert net.run("stranger", *asked).stdout == "b''\nb''\n"
    # A host of the job does get answers: without the token 404, with it a PUT is done.
    without, given = net.run("h2", *asked).stdout.splitlines()
    assert "HTTP/1.1 404" in without and "HTTP/1.1 200" in given

    gate.open()
    lines = job.communicate(timeout=SECONDS)[0].splitlines()
    assert job.returncode == 0, lines
    assert set(sums(2)) <= set(lines)


def test_nothing_secret_shows_in_ps_on_either_host(net, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "opensesame")
    gates = [Gate(tmp_path, f"gate{rank}") for rank in range(2)]  # one pipe's end ends all readers
    words = f"echo $HOROVOD_GLOO_RENDEZVOUS_ADDR $MY_PASSWORD; cat {tmp_path}/gate$HOROVOD_RANK"
    job = net.start("h1", *HVDX_RUN, *TWO, "--", "sh", "-c", words)
    told = [job.stdout.readline().strip() for _ in range(2)]
    assert all(line.endswith(" opensesame") for line in told)  # it does get there
    token = told[0].split()[0].partition("/")[2]
    commands = [command_line(pid) for name in ("h1", "h2") for pid in net.pids(name)]
    assert any("sh -s" in line for line in commands)
    assert not [line for line in commands if token in line or "opensesame" in line]
    for gate in gates:
        gate.open()
    job.communicate(timeout=SECONDS)
    assert job.returncode == 0


def command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


PARENT = ("--", "sh", "-c", "sleep 600 & echo $!; wait")


def family(net, job) -> list[psutil.Process]:
    """Return the job's processes on both hosts, when each rank has printed its child's number."""
    printed = {int(job.stdout.readline().partition(":")[2]) for _ in range(2)}
    processes = [psutil.Process(pid) for name in ("h1", "h2") for pid in net.pids(name)]
    assert printed <= {process.pid for process in processes}
    return [p for p in processes if "[listener]" not in " ".join(p.cmdline())]


def test_a_killed_launcher_leaves_nothing_behind_on_any_host(net):
    job = net.start("h1", *HVDX_RUN, *TWO, *PARENT)
    processes = family(net, job)
    launcher = [p for p in processes if p.cmdline()[1:4] == ["-m", "hvdx", "run"]]
    assert len(launcher) == 1
    launcher[0].kill()
    job.wait(timeout=SECONDS)
    assert gone(processes) == []


def test_a_signal_to_the_launcher_ends_all_hosts(net):
    job = net.start("h1", *HVDX_RUN, *TWO, *PARENT)
    processes = family(net, job)
    job.terminate()  # ip, unshare and sh have become the launcher
    job.communicate(timeout=SECONDS)
    assert job.returncode == 143
    assert gone(processes) == []


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("exit 3", 3, "rank 1 on h2 exited with code 3;"),
        ("kill -9 $$", 137, "rank 1 on h2 exited with code 137 (128 + 9: SIGKILL);"),
    ],
)
def test_a_rank_that_fails_on_the_other_host_is_named_with_its_host(net, end, status, told):
    words = f"if [ $HOROVOD_RANK = 1 ]; then {end}; fi; exec sleep 600"
    job = net.run("h1", *HVDX_RUN, *TWO, "--", "sh", "-c", words)
    assert (job.returncode, told in job.stderr) == (status, True), job.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("-H h1:1,stranger:1", "cannot start anything on host 'stranger' over ssh: "),
        ("-H h1:1,h2:1 -p 2222", "cannot start anything on host 'h2' over ssh: "),
        ("-H h1:1,h2:1 --network-interfaces only1", "host 'h2' has no network interface 'only1'"),
        ("-H h1:1,h2:1 --network-interfaces none", "this machine has no network interface 'none'"),
    ],
)
def test_what_cannot_start_names_the_value(net, tmp_path, flags, told):
    mark = tmp_path / "started"
    job = net.run("h1", *HVDX_RUN, "-np", "2", *flags.split(), "touch", str(mark))
    assert job.returncode == 1
    assert told in job.stderr
    assert not mark.exists()


def test_a_folder_that_the_other_host_lacks_is_told(net, tmp_path):
    # Both hosts share this machine's files: the launcher alone sees what it mounts.
    words = f"mount -t tmpfs none {tmp_path} && mkdir {tmp_path}/own && cd {tmp_path}/own"
    words += f" && exec {' '.join(HVDX_RUN)} {' '.join(TWO)} true"
    job = net.run("h1", "unshare", "--mount", "sh", "-c", words)
    assert job.returncode == 1
    assert f"host 'h2' has no folder '{tmp_path}/own'" in job.stderr
