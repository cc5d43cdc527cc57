"""``hvdx bench link``: when it starts ranks, what it shows."""

from __future__ import annotations

import math

import pytest
from click.testing import CliRunner

from hvdx import link
from hvdx.cli import main
from hvdx.compression.auto import Plan
from hvdx.link import Footprint, Line, Link, Message
from hvdx.link_report import Found, Wanted, as_json, in_job, layers, show

WANTED = Wanted("torch", 1.0, 25.0, "bold", None)
RAW, PLAN = Plan("none", {}, 2.0), Plan("powersgd", {"form": "powersgd"}, 0.05)
FOUND = Found(
    Link(2, dict.fromkeys(link.KINDS, Line(1.5e-3, 8e-8))),
    {"powersgd": Footprint(2e-3, (Message(0, "allgather", "", 100), Message(1, "x", "", 40)))},
    [RAW, PLAN],
    PLAN,
    {"none": 25e6, "powersgd": 1e5},
)


@pytest.mark.parametrize("megabytes", [0.1, 25, 1000])
def test_the_model_is_as_large_as_told(megabytes):
    held = sum(4 * math.prod(spec.shape) for spec in layers(megabytes, 2))
    assert held == pytest.approx(megabytes * 1e6, rel=0.1) or len(layers(megabytes, 2)) == 2


def test_the_tables(capsys):
    show(WANTED, FOUND)
    printed = capsys.readouterr().out
    assert "network, 2 ranks" in printed and "1.50" in printed and "12.5" in printed
    assert "powersgd" in printed and "1.91" in printed  # ns an element
    assert "would use powersgd" in printed
    show(WANTED, FOUND._replace(chosen=RAW))
    assert "would compress nothing" in capsys.readouterr().out


def test_the_numbers():
    told = as_json(FOUND)
    assert told["link"]["alltoall"] == {"alpha": 1.5e-3, "beta": 8e-8}
    assert told["plans"]["none"] == {"seconds": 2.0, "bytes_sent": 25e6}
    assert told["chosen"] == "powersgd"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, True),
        ({"SLURM_JOB_ID": "7"}, False),  # the batch script: srun has not started it
    ],
)
def test_inside_of_a_job(environ, expected):
    assert in_job(environ) == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [("-np=0", "0 is not in the range x>=1"), ("--seconds=0", "range x>0"), ("--budget=x", "bold")],
)
def test_bad_options(option, message):
    result = CliRunner().invoke(main, ["bench", "link", option])
    assert result.exit_code == 2
    assert message in result.output
