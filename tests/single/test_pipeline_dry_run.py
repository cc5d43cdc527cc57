"""``hvd.plan`` and ``hvdx plan``: plans for ranks that are not there."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch")
from click.testing import CliRunner  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.cli import main  # noqa: E402
from hvdx.errors import PlanError  # noqa: E402
from hvdx.pipeline.plan import Link, Plan  # noqa: E402

SCRIPT = """
import torch
from beside import WIDE

def model():
    layers = [torch.nn.Linear(WIDE, WIDE) for _ in range(8)]
    return torch.nn.Sequential(*layers)

sample = torch.ones(32, WIDE)
if __name__ == "__main__":
    raise SystemExit("this would train")
"""


def made():
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))


def test_a_plan_for_ranks_that_are_not_there():
    model, x = made(), torch.ones(32, 64)
    plan = hvd.plan(model, sample=x, ranks=4, by="time", micro_batches=4)
    assert set(plan.place) == {0, 1, 2, 3} and plan.step > 0
    assert hvd.plan(model, x, 4, by="params", schedule="1f1b").cuts == ("2", "4", "6")
    slow = hvd.plan(model, x, 4, schedule="1f1b", link=Link(latency=1.0))
    assert slow.step > 2 * 3 * 1.0  # forth and back over three hops
    pipe = hvd.Pipeline(model, x, stages=hvd.plan(model, x, 2, schedule="zbv"))
    torch.testing.assert_close(pipe(x), model(x))
    pipe.close()


def test_plans_that_cannot_be():
    with pytest.raises(PlanError, match="9 stages, but the model has 8 units"):
        hvd.plan(made(), torch.ones(32, 64), 9, schedule="1f1b")
    with pytest.raises(PlanError, match="ranks=0: give a whole number from 1"):
        hvd.plan(made(), torch.ones(32, 64), 0)
    with pytest.raises(TypeError, match="str is no model that a pipeline can cut"):
        hvd.plan("model", None, 2)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("WIDE = 64\n")
    path = tmp_path / "model.py"
    path.write_text(SCRIPT)
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_the_command_prints_and_draws(script, tmp_path):
    files = [tmp_path / "plan.html", tmp_path / "plan.json"]
    options = ["--ranks", 2, "--place", "stages", "--schedule", "1f1b", "--by", "params"]
    options += ["--micro-batches", 3]
    told = run(script, *options, "--output", files[0], "--save", files[1])
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    assert lines[0].split() == ["stage", "rank", "units", "ms", "parameters", "sends", "first"]
    assert [line.split()[2] for line in lines[1:3]] == ["4", "4"]
    assert re.match(r"1f1b, 3 micro-batches: [\d.]+ ms per step, [\d.]+% of it idle; at", lines[4])
    assert re.findall(r"[FB]\d", lines[6]) == ["F0", "F1", "B0", "F2", "B1", "B2"]
    assert ">plan: 1f1b, step" in files[0].read_text()
    assert Plan.load(files[1]).cuts == ("4",)


def test_the_command_compares_replicas_and_stages(script, tmp_path):
    kept = tmp_path / "plan.json"
    told = run(script, "--ranks", 2, "--link", "1kbit,1us", "--save", kept).output
    lines = told.splitlines()
    assert re.fullmatch(r"\d+ plans, \* is the quickest", lines[0])
    assert lines[1].split()[:4] == ["replicas", "micro-batches", "schedule", "checkpoint"]
    marked = [line for line in lines if line.startswith("* ")]
    plan = Plan.load(kept)
    # Gradients of 130 kB would travel for minutes, activations of a few rows for seconds.
    assert len(marked) == 1 and marked[0].split()[1] == "1x2" and len(plan.place) > 1
    assert re.search(r"^data parallel \(2x1\) .* ms; stages \(1x2\) .* ms: take stages", told, re.M)
    assert re.search(rf"^{plan.schedule}, {plan.micro_batches} micro-batches: ", told, re.M)
    assert hvd.Pipeline(made(), torch.ones(32, 64), stages=plan).plan == plan


def test_the_command_draws_what_zbv_will_do(script, tmp_path):
    trace = tmp_path / "trace.json"
    options = ["--ranks", 2, "--place", "stages", "--schedule", "zbv", "--output", trace]
    assert run(script, *options).exit_code == 0
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 4 * 8 * 3  # stages, micro-batches; F, I and W


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("model = 1", [], "model.py has no 'sample': let it name the model and a batch"),
        ("model, sample = 1, 2", [], "int is no model that a pipeline can cut"),
        ("model = 1 / 0", [], "model.py fails: ZeroDivisionError: division by zero"),
        (SCRIPT, ["--model", "other"], "has no 'other'"),
        (SCRIPT, ["--schedule", "fast"], "schedule='fast': use one of"),
        (SCRIPT, ["--place", "stages", "--memory", "10K"], "not enough memory for 2 stages"),
        (SCRIPT, ["--memory", "10K"], "no plan fits into memory=10 KiB a rank. The smallest"),
        (SCRIPT, ["--memory", "much"], "memory 'much': give a size such as 500M or 2G"),
        (SCRIPT, ["--link", "quick"], "link 'quick': give bandwidth and latency, such as 100mbit"),
        (SCRIPT, ["--output", "/missing/plan.html"], "No such file or directory"),
    ],
)
def test_the_command_says_what_is_wrong(script, text, options, told):
    script.write_text(text)
    done = run(script, "--ranks", 2, *options)
    assert done.exit_code == 1
    assert told in done.output and "Traceback" not in done.output
