"""``hvdx run --restart`` where hosts are cut off; jobs and ssh are stood in for."""

from __future__ import annotations

import pytest

pytest.importorskip("horovod")

from hvdx.errors import LaunchError
from hvdx.launch import restarts
from hvdx.launch.arguments import parse
from hvdx.launch.processes import Ended, Failure

WELL = Ended([], [0], None)


@pytest.fixture
def job(monkeypatch):
    """Run a job whose runs end as told, and whose hosts answer as told.

    Returns how it ended, its hosts by run, and how often a host was asked in vain.
    """
    monkeypatch.setattr(restarts, "LOOK_SECONDS", 0.0)

    def run(least: int, failures: list[Failure], silent: int) -> tuple[Ended, list[list[str]], int]:
        runs: list[list[str]] = []
        left = [silent]

        def survey(hosts, options):
            if runs and left[0] and any(host.name == "h2" for host in hosts):
                left[0] -= 1
                raise LaunchError("host 'h2' did not answer.")

        class Job:
            def __init__(self, asked, found):
                pass

            def run(self, places, folder, own):
                runs.append([place.host.name for place in places])
                return WELL if len(runs) > 1 else Ended(failures, [], None)

        monkeypatch.setattr(restarts, "survey", survey)
        monkeypatch.setattr(restarts, "Job", Job)
        command = ["-np", "4", "--min-np", str(least), "--restart", "-H", "h1:2,h2:2"]
        return restarts.run(parse([*command, "--", "true"])), runs, silent - left[0]

    return run


ALL = ["h1", "h1", "h2", "h2"]


@pytest.mark.parametrize(
    "failures",
    [
        [Failure(0, "h1", 1), Failure(1, "h1", 1)],  # by their watchdogs
        [Failure(2, "h2", 255), Failure(3, "h2", 255), Failure(0, "h1", 1)],  # ssh noticed first
    ],
)
def test_a_host_that_is_cut_off_costs_no_other_slot(job, failures, capsys):
    assert job(2, failures, silent=1000) == (WELL, [ALL, ["h1", "h1"]], 1)
    assert "left out for now: host 'h2' did not answer" in capsys.readouterr().err


def test_a_host_that_is_needed_is_waited_for(job):
    assert job(4, [Failure(0, "h1", 1)], silent=5) == (WELL, [ALL, ALL], 5)


def test_where_all_hosts_answer_the_first_failure_costs_its_slot(job):
    assert job(2, [Failure(0, "h1", 1), Failure(2, "h2", -9)], silent=0) == (
        WELL, [ALL, ["h1", "h2"]], 0
    )  # fmt: skip


def test_what_else_was_killed_where_a_host_is_cut_off_costs_its_slot(job):
    failures = [Failure(0, "h1", 1), Failure(1, "h1", -9)]
    assert job(1, failures, silent=1000) == (WELL, [ALL, ["h1"]], 1)
