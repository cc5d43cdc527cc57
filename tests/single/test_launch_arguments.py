"""The command line of ``hvdx run``."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

pytest.importorskip("horovod")

from hvdx.cli import main
from hvdx.errors import LaunchError
from hvdx.launch.arguments import KEEP, RESTART, parse


def test_flags_are_horovodruns():
    flags = "-np 4 -H h1:2,h2:2 --fusion-threshold-mb 16 --timeline-filename t"
    more = "--network-interfaces eth0 --log-level INFO python train.py --lr 1"
    asked = parse(f"{flags} {more}".split())
    options = asked.horovod
    assert (options.num_proc, options.hosts, options.fusion_threshold_mb) == (4, "h1:2,h2:2", 16)
    assert (options.nics, options.timeline_filename, options.log_level) == ({"eth0"}, "t", "INFO")
    assert asked.command == ["python", "train.py", "--lr", "1"]


@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_the_command_keeps_its_own_flags(dashes):
    command = ["python", "train.py", "-np", "9", KEEP, "--", "-H", "x"]
    asked = parse(["-np", "2", *dashes, *command])
    assert asked.command == command
    assert asked.horovod.num_proc == 2
    assert not asked.keep_rendezvous


def test_a_flag_of_the_command_may_begin_as_horovods_do(monkeypatch):
    """--log might be --log-level: told of before Horovod's parser sees where the command begins."""
    command = ["python", "train.py", "--log", "x"]
    asked = []
    monkeypatch.setattr("hvdx.launch.run_command", lambda line: asked.append(parse(line)) or 0)
    assert CliRunner().invoke(main, ["run", "-np", "2", "--", *command]).exit_code == 0
    assert asked[0].command == command
    with pytest.raises(LaunchError, match=r"--log could match .* Put `--` before your command"):
        parse(["-np", "2", *command])


@pytest.mark.parametrize(
    "arguments",
    [
        [KEEP, "-np", "2", "train"],
        ["-np", "2", KEEP, "train"],
        ["-np", "2", KEEP, "--", "train"],
        ["-np", "2", KEEP, "train", KEEP],
    ],
)
def test_our_flag_counts_before_the_command(arguments):
    asked = parse(arguments)
    assert asked.keep_rendezvous
    assert asked.command[0] == "train"
    assert asked.plain[:2] == ["-np", "2"] and KEEP not in asked.plain[:3]


def test_what_makes_a_job_elastic():
    assert parse(["-np", "2", "train"]).elastic is None
    asked = parse(["-np", "2", "--min-np", "1", "--max-np", "4", "--reset-limit", "9", "train"])
    assert not asked.restart
    assert asked.elastic[:3] == (1, 2, 4) and asked.elastic.resets == 9
    asked = parse(["-np", "2", RESTART, "train", RESTART])
    assert asked.restart and asked.command == ["train", RESTART]
    assert asked.elastic[:3] == (2, 2, 2)


def test_the_caller_gets_its_own_argv_back():
    before = list(sys.argv)
    parse(["-np", "2", "train"])
    with pytest.raises(LaunchError):
        parse(["--nonsense"])
    assert sys.argv == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command to run"),
        (["-np", "2"], "no command to run"),
        (["train"], "-np"),
        (["-np", "two", "train"], "'two'"),
        (["-np", "0", "train"], "-np is 0"),
        (["-np", "2", "--nonsense", "train"], "--nonsense"),
        (["-np", "2", "--cycle-time-ms", "-1", "train"], "cycle_time_ms=-1.0"),
        (["-np", "2", "--config-file", "/nowhere.yaml", "train"], "/nowhere.yaml"),
        (["-np", "2", "-H", "a:1", "-hostfile", "f", "train"], "not allowed with"),
        (["-np", "2", "--min-np", "3", "train"], "--min-np 3, -np 2"),
        (["-np", "2", "--min-np", "0", "--restart", "train"], "--min-np 0"),
        (["-np", "3", "--max-np", "2", "train"], "--max-np 2"),
        (["-np", "2", "--blacklist-cooldown-range", "9", "3", "train"], "9 3"),
        (["-np", "2", "--mpi", "--restart", "train"], "need Gloo"),
    ],
)
def test_what_makes_no_sense_is_told(arguments, message):
    with pytest.raises(LaunchError, match=message):
        parse(arguments)


@pytest.mark.parametrize("content", ["", "- 1", "params: [", "params: 3"])
def test_a_config_file_that_is_none_is_told(tmp_path, content):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(LaunchError, match="--config-file: not what Horovod can read"):
        parse(["-np", "2", "--config-file", str(file), "train"])


def test_help_has_our_flag_and_horovods(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert not exit.value.code
    shown = capsys.readouterr().out
    assert KEEP in shown and "--fusion-threshold-mb" in shown and "usage: hvdx run" in shown


def test_without_horovod_the_remedy_is_named(monkeypatch):
    from hvdx.errors import HorovodMissingError

    monkeypatch.setitem(sys.modules, "horovod.runner.launch", None)
    with pytest.raises(HorovodMissingError, match="hvdx install"):
        parse(["-np", "2", "train"])
