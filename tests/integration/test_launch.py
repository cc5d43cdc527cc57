"""Jobs on one machine: what ranks see, how a job ends, and that nothing is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import (
    HOROVODRUN,
    HVDX_RUN,
    SECONDS,
    Gate,
    environment,
    gone,
    run,
    start,
    sums,
    train,
    tree,
)

pytest.importorskip("horovod")
SHOW = "import os; print(*sorted(f'{k}={v}' for k, v in os.environ.items() if k[:7] == 'HOROVOD'))"


def shell(words: str) -> list[str]:
    return ["--", "sh", "-c", words]


def test_ranks_average_over_gloo(tmp_path):
    job = run(*HVDX_RUN, "-np", "3", "--", *train(tmp_path))
    assert (job.returncode, sorted(job.stdout.splitlines())) == (0, sums(3)), job.stderr


def test_horovodrun_still_launches_the_same_script(tmp_path):
    job = run(*HOROVODRUN, "-np", "2", *train(tmp_path))
    assert (job.returncode, sorted(job.stdout.splitlines())) == (0, sums(2)), job.stderr


def test_ranks_see_what_horovodrun_would_set():
    flags = ["-np", "2", "--fusion-threshold-mb", "1", "--timeline-filename", "t.json"]
    flags += ["--log-level", "WARNING", "--stall-check-warning-time-seconds", "7"]
    flags += ["--no-hierarchical-allreduce", "--gloo-timeout-seconds", "9"]
    seen = []
    for launcher in (HVDX_RUN, HOROVODRUN):
        job = run(*launcher, *flags, sys.executable, "-c", SHOW)
        ranks = {}
        for line in sorted(job.stdout.splitlines()):
            prefix, _, words = line.partition(":")
            ranks[prefix] = dict(word.split("=", 1) for word in words.split(" "))
            for name in ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"):
                assert ranks[prefix].pop(name)
        seen.append(ranks)
    assert seen[0] == seen[1]
    assert seen[0]["[1]<stdout>"]["HOROVOD_FUSION_THRESHOLD"] == str(1 << 20)


def test_output_is_prefixed_whatever_the_bytes(tmp_path):
    out = tmp_path / "out"
    words = r"printf 'one\ntwo\r\377\303\251 no newline'; echo oops >&2"
    job = run(*HVDX_RUN, "-np", "1", "--output-filename", str(out), *shell(words))
    expected = "[0]<stdout>:one\n[0]<stdout>:two\r[0]<stdout>:\ufffd\u00e9 no newline"
    assert job.stdout == expected.replace("\r", "\n")  # as Python reads text
    assert job.stderr == "[0]<stderr>:oops\n"
    assert (out / "rank.0" / "stdout").read_text() == job.stdout
    assert (out / "rank.0" / "stderr").read_text() == job.stderr


def test_much_output_arrives_whole_and_in_order():
    count = "import sys\nfor i in range(30000): print(i, '.' * 50)"
    job = run(*HVDX_RUN, "-np", "2", "--", sys.executable, "-c", count)
    for rank in range(2):
        lines = [ln for ln in job.stdout.splitlines() if ln.startswith(f"[{rank}]")]
        assert lines == [f"[{rank}]<stdout>:{i} {'.' * 50}" for i in range(30000)]


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("exit 3", 3, "rank 1 on localhost exited with code 3;"),
        ("kill -9 $$", 137, "rank 1 on localhost was killed by signal 9 (SIGKILL);"),
        ("kill -ABRT $$", 134, "rank 1 on localhost was killed by signal 6 (SIGABRT);"),
    ],
)
def test_the_first_rank_that_fails_ends_the_job_and_is_named(tmp_path, end, status, told):
    gate = Gate(tmp_path)
    words = f"if [ $HOROVOD_RANK = 1 ]; then cat {gate.path}; {end}; else exec sleep 600; fi"
    job = start(*HVDX_RUN, "-np", "3", *shell(words))
    gate.open()
    _, said = job.communicate(timeout=SECONDS)
    assert (job.returncode, told in said) == (status, True), said


def test_a_rank_killed_in_the_middle_of_training_ends_the_job(tmp_path):
    gate = Gate(tmp_path)
    once = f"if hvd.rank() == 1:\n    {gate.code}\n    os.kill(os.getpid(), 9)"
    job = start(*HVDX_RUN, "-np", "2", "--", *train(tmp_path, after=once))
    gate.open()
    _, said = job.communicate(timeout=SECONDS)
    assert job.returncode != 0
    assert "rank 1 on localhost was killed by signal 9" in said


def test_a_rank_that_ends_well_waits_for_nobody(tmp_path):
    gate = Gate(tmp_path)
    words = f"if [ $HOROVOD_RANK = 1 ]; then cat {gate.path}; echo late; else echo early; fi"
    job = start(*HVDX_RUN, "-np", "2", *shell(words))
    assert job.stdout.readline() == "[0]<stdout>:early\n"
    gate.open()
    assert job.communicate(timeout=SECONDS)[0] == "[1]<stdout>:late\n"
    assert job.returncode == 0


def test_a_command_that_does_not_exist_is_told():
    job = run(*HVDX_RUN, "-np", "2", "no-such-command")
    assert job.returncode == 127
    assert "exited with code 127 (command not found)" in job.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("-np 4 -H localhost:2 touch {mark}", "-np 4 asks for more ranks than localhost:2 has"),
        ("-np 2 -H no-such-host.invalid:2 touch {mark}", "host 'no-such-host.invalid' is unknown"),
        ("-np 2 --network-interfaces eth77 touch {mark}", "no network interface 'eth77'"),
        ("-np 2 --min-np 1 -H localhost:1 touch {mark}", "more ranks than localhost:1 has"),
        ("-np two touch {mark}", "'two'"),
        ("", "no command to run"),
    ],
)
def test_what_cannot_start_says_why_and_starts_nothing(tmp_path, arguments, told):
    mark = tmp_path / "started"
    job = run(*HVDX_RUN, *arguments.format(mark=mark).split())
    assert job.returncode == 1
    assert job.stderr.startswith("hvdx run: ") and told in job.stderr
    assert not mark.exists()


#: A rank with a child of its own, which keeps the output pipe open; it prints the child's number.
PARENT = "sleep 600 & echo $!; wait"


def family(job, ranks: int):
    """Return the processes of a job whose ranks have each printed a process number."""
    printed = {int(job.stdout.readline().partition(":")[2]) for _ in range(ranks)}
    processes = tree(job.pid)
    assert printed <= {process.pid for process in processes}
    return processes


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_to_the_launcher_ends_ranks_and_their_children(number, status):
    job = start(*HVDX_RUN, "-np", "2", *shell(PARENT))
    processes = family(job, 2)
    job.send_signal(number)
    job.communicate(timeout=SECONDS)
    assert job.returncode == status
    assert gone(processes) == []


def test_ranks_that_ignore_sigterm_are_killed():
    words = "trap '' TERM; echo $$; while true; do sleep 0.1; done"
    job = start(*HVDX_RUN, "-np", "2", *shell(words), env=environment(HVDX_GRACE="2"))
    processes = family(job, 2)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=SECONDS)
    assert job.returncode == 143
    assert gone(processes) == []


def test_a_killed_launcher_leaves_nothing_behind():
    job = start(*HVDX_RUN, "-np", "2", *shell(PARENT))
    processes = family(job, 2)
    os.kill(job.pid, signal.SIGKILL)
    job.wait(timeout=SECONDS)
    assert gone(processes) == []


def test_a_reader_that_goes_away_ends_the_job():
    # With a buffer, something is left in it when the reader goes.
    buffered = environment(PYTHONUNBUFFERED="")
    job = start(*HVDX_RUN, "-np", "2", *shell("while true; do echo $$; done"), env=buffered)
    processes = family(job, 1)
    job.stdout.close()
    job.wait(timeout=SECONDS)
    assert job.returncode == 128 + signal.SIGPIPE
    assert gone(processes) == []


def test_secrets_of_the_environment_do_not_show_in_ps(tmp_path):
    gate = Gate(tmp_path)
    words = f"echo $HOROVOD_GLOO_RENDEZVOUS_ADDR; cat {gate.path}"
    job = start(*HVDX_RUN, "-np", "1", *shell(words), env=environment(MY_PASSWORD="opensesame"))
    token = job.stdout.readline().strip().partition("/")[2]
    assert len(token) >= 32
    commands = [" ".join(process.cmdline()) for process in tree(job.pid)]
    assert len(commands) >= 3  # launcher, rank, and the watcher beside it
    gate.open()
    job.communicate(timeout=SECONDS)
    assert not [line for line in commands if token in line or "opensesame" in line]


def test_init_again_after_shutdown_needs_the_rendezvous(tmp_path):
    again = """
for _ in range(10):
    hvd.shutdown()
    hvd.init(framework="torch")
"""
    command = train(tmp_path, after=again)
    kept = run(*HVDX_RUN, "--keep-rendezvous", "-np", "2", "--", *command)
    assert (kept.returncode, sorted(kept.stdout.splitlines())) == (0, sums(2)), kept.stderr
    closed = run(*HVDX_RUN, "-np", "2", "--", *command)
    assert closed.returncode == 1
    assert "init() was called again, but the rendezvous closed" in closed.stderr
    assert "--keep-rendezvous" in closed.stderr


def test_mpi_is_handed_over_to_horovodrun():
    job = run(*HVDX_RUN, "--mpi", "-np", "1", "true")
    assert "--mpi and --jsrun are horovodrun's own; it takes over" in job.stderr
    if job.returncode:  # the reason is then horovodrun's
        assert "MPI support has not been built" in job.stderr


def test_the_launcher_loads_no_framework():
    listed = "import sys, hvdx.launch.command, horovod.runner.launch; print(*sys.modules)"
    loaded = run(sys.executable, "-c", listed).stdout.split()
    assert "hvdx.launch.processes" in loaded
    assert not {"torch", "tensorflow", "keras"} & set(loaded)


def test_the_parallel_tests_driver_tells_a_rank_that_fails_and_one_that_hangs(tmp_path):
    here = Path(__file__).parent.parent / "parallel"
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    (tmp_path / "torch").mkdir()
    file = tmp_path / "torch" / "test_it.py"
    driver = (sys.executable, str(here / "run.py"), "2", "--tests", str(tmp_path))
    for body, told in (  # all other tests show what it says of those that pass
        ("assert hvdx.rank() == 0", "[1]<stdout>:E   assert 1 == 0"),
        ("hvdx.rank() and hvdx.barrier() or time.sleep(99)", "time.sleep"),
    ):
        file.write_text(
            "import time, hvdx, pytest\n"
            "@pytest.mark.timeout(60)\n"  # Horovod starts in it, however busy the machine is
            f"def test_before(): hvdx.barrier()\ndef test_this(): {body}\n"
        )
        limit = ["--test-limit", "5"] if "sleep" in body else []
        job = run(*driver, *limit, cwd=tmp_path)
        assert job.stdout.splitlines()[-1].endswith(" passed, 1 failed"), job.stdout
        assert told in job.stdout
        assert job.returncode == 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]
