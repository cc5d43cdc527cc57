"""The examples in a short form: spread in any way, and killed, GPTs learn the same; trials; digits.

As many of them as can share a launch do.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, SECONDS, environment, gone, run, start, tree

from hvdx.metrics.log import read

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DRIVER = Path(__file__).with_name("run_examples.py")
SIZES = {"width": 32, "depth": 2, "heads": 2, "length": 32, "batch_size": 8}
OPTIONS = [word for name, size in SIZES.items()
           for word in (f"--{name.replace('_', '-')}", str(size))]  # fmt: skip
GUIDE = (EXAMPLES.parent / "docs" / "metrics.md").read_text()
DIGITS = ["--epochs", "1", "--batch-size", "128"]
TRIALS = [*DIGITS, "--rates", "0.1", "0.03"]

pytest.importorskip("horovod")
pytest.importorskip("sklearn")


def gpt(script, log, *options, steps=6):
    """Return the words of a GPT's command."""
    return [
        script,
        *OPTIONS,
        "--steps",
        f"{steps}",
        "--every",
        "2",
        "--metrics",
        f"{log}",
        *options,
    ]


def command(ranks, *examples):
    return [*HVDX_RUN, "-np", str(ranks), "--", sys.executable, str(DRIVER), json.dumps(examples)]


def said_by(ranks, *examples):
    """Run examples in one launch; return what rank 0 prints, by example."""
    job = run(*command(ranks, *examples), env=environment(), timeout=300)
    assert job.returncode == 0, job.stdout + job.stderr
    parts = re.split(r"^\[0\]<stdout>:--- .*$", job.stdout, flags=re.MULTILINE)
    return parts[1:]


def recorded(log, kind="interval"):
    return [told for told in read(log) if told["kind"] == kind] if log.exists() else []


def losses(log):
    """Return steps and losses, and those of the unseen text."""
    kept = [told for told in read(log) if told["kind"] in ("interval", "evaluation")]
    return [value for told in kept for value in (told["step"], *told["values"].values())]


def unsplit():
    """Train the PyTorch model by nothing but PyTorch."""
    sys.path.insert(0, str(EXAMPLES))
    import torch
    from gpt import GPT, loss
    from gpt_shared import Text, rate

    told = Namespace(**SIZES, seed=0, steps=6, lr=2e-3)
    torch.manual_seed(0)
    model, text = GPT(told.length, told.width, told.depth, told.heads), Text(told)
    optimizer, found, unseen = torch.optim.AdamW(model.parameters()), [], text.unseen()
    for step in range(told.steps):
        optimizer.param_groups[0]["lr"] = rate(step, told)
        x, y = map(torch.from_numpy, text.batch(step))
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        found.append(value.item())
    with torch.no_grad():
        last = loss(model(torch.from_numpy(unseen[0])), torch.from_numpy(unseen[1])).item()
    return [sum(found[i : i + 2]) / 2 for i in (0, 2, 4)], last


def test_pytorch_on_four_ranks(tmp_path):
    """Two trials of two ranks; digits; a GPT by data, by stages, by both and compressed."""
    pytest.importorskip("torch")
    picture = tmp_path / "run.html"
    hybrid = ["--stages", "2", "--replicas", "2"]
    ways = {
        "data": [],
        "stages": ["--stages", "4", "--timeline", str(picture), "--generate", "import "],
        "hybrid": hybrid,
        "compressed": [*hybrid, "--compression", "fp16"],
    }
    logs = {name: tmp_path / f"{name}.jsonl" for name in ways}
    (guide,) = re.findall(r"```python\n(# train_measured\.py\n.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "guide.py").write_text(guide.replace("run.jsonl", str(tmp_path / "guide.jsonl")))
    trials, digits, measured, *said = said_by(
        4,
        ["trials_torch.py", *TRIALS, "--metrics", str(tmp_path / "trials")],
        ["digits_torch.py", *DIGITS],
        [str(tmp_path / "guide.py")],
        *(gpt("gpt.py", logs[name], *way) for name, way in ways.items()),
    )
    assert_searched(trials, "(0, 1)", "(2, 3)")
    for rate in ("0.1", "0.03"):
        header, *rest = read(tmp_path / "trials" / f"rate_{rate}.jsonl")
        assert (header["ranks"], header["options"]) == (2, {"rate": float(rate)}) and rest
    assert "(equal)" in digits
    assert (
        measured.count("samples/s on 4 ranks  communication ") == 5 and " reached after" in measured
    )
    expected, unseen = unsplit()
    for name, log in logs.items():
        rough = 0.02 if name == "compressed" else 1e-5
        assert [told["step"] for told in recorded(log)] == [2, 4, 6]
        found = [told["values"]["loss"] for told in recorded(log)]
        assert found == pytest.approx(expected, rel=rough), name
        last = recorded(log, "evaluation")[-1]
        assert last["values"]["val_loss"] == pytest.approx(unseen, rel=rough), name
        assert recorded(log)[-1]["samples"] == 2 * SIZES["batch_size"] * SIZES["length"], name
    sent = {name: recorded(log)[-1]["megabytes_per_step"]["mean"] for name, log in logs.items()}
    assert 0 < sent["compressed"] < sent["hybrid"] < sent["data"]
    assert "bubble" in recorded(logs["hybrid"])[-1] and "step 6  loss " in said[0]
    assert "]<stdout>:import " in said[1] and "</html>" in picture.read_text()
    drawn = run(sys.executable, "-m", "hvdx", "report", *map(str, logs.values()))
    assert drawn.returncode == 0 and (tmp_path / "data.png").read_bytes()[1:4] == b"PNG"


def assert_searched(said, *ranks):
    """Check the table of a search: both rates, and the best first."""
    rows = re.findall(r"(0\.\d+) +\d+\.\d+ +(0\.\d+) +[\d.]+  (\(.*\))", said)
    assert sorted(row[0] for row in rows) == ["0.03", "0.1"], said
    assert sorted(row[2] for row in rows) == sorted(ranks)
    assert max(rows, key=lambda row: float(row[1]))[1] == rows[0][1]
    assert f"best: {rows[0][0]}" in said


def test_killed_and_started_again_it_goes_on_as_if_nothing_had_been(tmp_path):
    """To the last bit: the log has all digits. PowerSGD owes training something at any time."""
    pytest.importorskip("torch")
    killed, again, whole = (tmp_path / name for name in ("killed", "again", "whole"))
    way = ["--compression", "powersgd:min_elements=0"]
    saving = [*way, "--checkpoint", str(tmp_path / "saved")]
    job = start(*command(2, gpt("gpt.py", killed, *saving, steps=40)), env=environment())
    deadline = time.monotonic() + SECONDS
    while not (killed.exists() and killed.read_text().count('"evaluation"') >= 3):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.005)
    ranks = [each for each in tree(job.pid) if each.cmdline()[1:2] == [str(DRIVER)]]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    said = job.communicate(timeout=SECONDS)[1]
    assert job.returncode and "killed by signal 9" in said and not gone(ranks)
    said_by(
        2,
        gpt("gpt.py", again, *saving, steps=40),
        gpt("gpt.py", whole, *way, steps=40),
    )
    told, expected = losses(again), losses(whole)
    assert 0 < len(told) < len(expected) and told == expected[-len(told) :]


def test_keras_on_two_ranks(tmp_path):
    """Two trials of one rank; digits; a GPT by data, by stages and on replicas, resumed."""
    pytest.importorskip("tensorflow")
    pytest.importorskip("keras")
    small = ["--depth", "1", "--micro-batches", "2"]
    kept = ["--stages", "2", "--checkpoint", str(tmp_path / "saved")]
    ways = {
        "data": ["--generate"],
        "stages": kept,
        "resumed": kept,
        "replicas": ["--stages", "1", "--replicas", "2"],
    }
    logs = {name: tmp_path / name for name in ways}
    trials, digits, *said = said_by(
        2,
        ["trials_keras.py", *TRIALS, "--groups", "0/1"],
        ["digits_keras.py", *DIGITS],
        *(
            gpt("gpt_keras.py", logs[name], *small, *way, steps=8 if name == "resumed" else 6)
            for name, way in ways.items()
        ),
    )
    assert_searched(trials, "(0,)", "(1,)")
    assert "(equal)" in digits and "]<stdout>:The " in said[0]
    for name in ("stages", "replicas"):
        assert losses(logs[name]) == pytest.approx(losses(logs["data"]), rel=1e-4), name
    assert [told["step"] for told in recorded(logs["resumed"])] == [8]
    assert (tmp_path / "saved" / "stages.safetensors").exists()
