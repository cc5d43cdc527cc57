"""The GPT examples in a short form: spread in any way, and killed, they learn the same."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, SECONDS, environment, gone, run, start, tree

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = {"width": 32, "depth": 2, "heads": 2, "length": 32, "batch_size": 8}
OPTIONS = [word for name, size in SIZES.items()
           for word in (f"--{name.replace('_', '-')}", str(size))]  # fmt: skip

pytest.importorskip("horovod")


def command(script, log, *options, steps=6, alone=False):
    launcher = [] if alone else [*HVDX_RUN, "-np", "2", "--"]
    job = [*launcher, sys.executable, str(EXAMPLES / script), *OPTIONS]
    return [*job, "--steps", str(steps), "--every", "2", "--log", str(log), *options]


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def trained(script, log, *options, **how):
    job = run(*command(script, log, *options, **how), env=environment())
    assert job.returncode == 0, job.stdout + job.stderr
    return lines(log), job.stdout


def losses(told):
    return [line[name] for line in told for name in ("step", "loss", "unseen")]


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
        found.append(value.item() / math.log(2))
    with torch.no_grad():
        last = loss(model(torch.from_numpy(unseen[0])), torch.from_numpy(unseen[1])).item()
    return [sum(found[i : i + 2]) / 2 for i in (0, 2, 4)], last / math.log(2)


def test_spread_by_data_or_by_stages_it_learns_what_one_process_does(tmp_path):
    pytest.importorskip("torch")
    expected, unseen = unsplit()
    picture = tmp_path / "run.html"
    stages = ["--stages", "2", "--timeline", str(picture), "--generate", "import "]
    for name, way in (("data", []), ("stages", stages)):
        told, said = trained("gpt.py", tmp_path / name, *way)
        assert [line["step"] for line in told] == [2, 4, 6]
        assert [line["loss"] for line in told] == pytest.approx(expected, rel=1e-5)
        assert told[-1]["unseen"] == pytest.approx(unseen, rel=1e-5)
        assert "step 6/6  " in said
    assert "]<stdout>:import " in said and "</html>" in picture.read_text()


def test_killed_and_started_again_it_goes_on_as_if_nothing_had_been(tmp_path):
    """To the last bit: the log has all digits. PowerSGD owes training something at any time."""
    pytest.importorskip("torch")
    way = ["--compression", "powersgd:min_elements=0"]
    expected = losses(trained("gpt.py", tmp_path / "whole", *way, steps=40)[0])
    saving = [*way, "--checkpoint", str(tmp_path / "saved")]
    job = start(*command("gpt.py", tmp_path / "killed", *saving, steps=40))
    deadline = time.monotonic() + SECONDS
    while len(lines(tmp_path / "killed")) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    ranks = [each for each in tree(job.pid) if each.cmdline()[1:2] == [str(EXAMPLES / "gpt.py")]]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    said = job.communicate(timeout=SECONDS)[1]
    assert job.returncode and "killed by signal 9" in said and not gone(ranks)
    told = losses(trained("gpt.py", tmp_path / "again", *saving, steps=40)[0])
    assert len(told) < len(expected) and told == expected[-len(told) :]


def test_keras_learns_the_same_by_data_and_in_stages_of_one_process(tmp_path):
    pytest.importorskip("tensorflow")
    pytest.importorskip("keras")
    small = ["--depth", "1", "--micro-batches", "2"]
    data, said = trained("gpt_keras.py", tmp_path / "data", *small, "--generate")
    stages = ["--stages", "2", "--checkpoint", str(tmp_path / "saved")]
    told, _ = trained("gpt_keras.py", tmp_path / "stages", *small, *stages, alone=True)
    assert losses(told) == pytest.approx(losses(data), rel=1e-4)
    assert "]<stdout>:The " in said and (tmp_path / "saved" / "stages.safetensors").exists()
