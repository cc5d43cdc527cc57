"""``hvdx plan --link``: profiles as files, tables, pictures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hvdx.cli import main
from hvdx.errors import PlanError
from hvdx.link import Line
from hvdx.pipeline.ir import Graph, Unit
from hvdx.scaling.profile import Parameter, Profile

PROFILE = Profile(
    "two layers", 16, 0.01, 0.02, 0.001,
    (Parameter("a", (512, 512)), Parameter("b", (512, 512)), Parameter("c", (512,), "float16")),
    "by hand", 2.0, 1e6, 0.02,
    {"allgather": Line(1e-3, 1e-9)},
    {"int8": ((2, 1e-9), (4, 2e-9), (16, 5e-9)), "powersgd=4": ((2, 1e-9),)},
    Graph.chain(
        [Unit(n, makes={"y": 4096}, parameters={n: 512 * 512 * 4}, kept_bytes=8192,
              forward=0.005, inputs=0.005, weights=0.005) for n in "ab"],
        4096,
    ),
)  # fmt: skip
JOB = ["--hosts", 4, "--link", "1gbit,5us"]
SCRIPT = """
import torch
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
def sample():
    return torch.randn(8, 64)
"""


def run(*arguments: str):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    PROFILE.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_a_profile_is_what_was_saved(file):
    loaded = Profile.load(file)
    assert vars(loaded) == {**vars(PROFILE)} | {"software": loaded.software}
    assert dict(loaded.software) == PROFILE.software


def test_what_lies_between_measured_ranks_is_on_a_line():
    assert [PROFILE.codec("int8", n) for n in (2, 3, 4, 10, 16)] == pytest.approx(
        [1e-9, 1.5e-9, 2e-9, 3.5e-9, 5e-9]
    )
    assert PROFILE.codec("int8", 1024) == pytest.approx(5e-9 + 0.25e-9 * 1008)
    assert PROFILE.codec("powersgd=4", 1024) == 1e-9
    falling = Profile(
        "x", 1, 1, 1, 0, (Parameter("a", (1,)),), codecs={"m": ((2, 2e-9), (4, 1e-9))}
    )
    assert falling.codec("m", 1024) == 1e-9  # noise does not make it cost less than nothing


def test_a_faster_machine():
    faster = PROFILE.paced(0.1)
    assert faster.alone == pytest.approx(0.1 * PROFILE.alone)
    assert faster.codec("int8", 2) == pytest.approx(1e-10)
    assert faster.software == PROFILE.software
    assert faster.graph.units[0].inputs == pytest.approx(5e-4)


def told(**changed) -> dict:
    whole = {"hvdx_profile": 1, "name": "x", "batch": 1, "forward": 1.0, "backward": 2,
             "update": 0, "parameters": [["w", [4, 4]]]}  # fmt: skip
    whole.update(changed)
    return {name: value for name, value in whole.items() if value is not ...}


def test_a_profile_by_hand(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(told()))
    loaded = Profile.load(tmp_path / "p.json")
    assert loaded.alone == 3 and loaded.bytes == 64 and loaded.slots == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "no profile: it has no key 'hvdx_profile'"),
        ("{", "no JSON"),
        (told(hvdx_profile=2), "another version"),
        (told(backward=...), "has no 'backward'; it needs name, batch"),
        (told(forward="fast"), "forward='fast': give a number from 0"),
        (told(forward=-1), "forward=-1"),
        (told(forward=0, backward=0), "a step must take time"),
        (told(batch=0), "batch=0: give a whole number"),
        (told(speed=3), "a profile has no 'speed'"),
        (told(parameters=[]), "nothing to train"),
        (told(parameters=[["w", [0, 4]]]), r"parameter 'w' has shape \[0, 4\]"),
        (told(parameters=[["w"]]), "parameters cannot be read"),
        (told(codecs={"int8": []}), "codecs 'int8' are empty"),
        (told(codecs={"int8": 3}), "codecs cannot be read"),
        (told(software={"allgather": {"alpha": 1}}), "software cannot be read"),
        (told(graph={"units": [{"nam": "x"}]}), "graph cannot be read"),
    ],
)
def test_profiles_that_are_none(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(PlanError, match=message) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)


def test_a_thousand_ranks_from_a_file(file, tmp_path):
    pytest.importorskip("matplotlib")
    picture, numbers = tmp_path / "curves.png", tmp_path / "curves.json"
    done = run("--ranks", 1024, "--hosts", 128, "--link", "25gbit,5us", "--inner", "200gbit,2us",
               "--profile", file, "--ways", "ring,hierarchical,int8,servers=1,stages=2+int8",
               "--output", picture, "--json", numbers)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "1024 ranks on 128 hosts; 2.94 GB/s and 5 us between hosts" in done.output
    assert "servers=1 is never quicker than ring here" in done.output
    found = json.loads(numbers.read_text())
    rows = {(each["way"], each["ranks"]): each for each in found["predictions"]}
    assert rows["ring", 1]["efficiency"] == 1
    assert rows["ring", 1024]["step"] > rows["ring", 512]["step"]
    assert ("stages=2+int8", 1) not in rows and rows["stages=2+int8", 2]["sent"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_is_measured_and_kept(tmp_path):
    pytest.importorskip("torch")
    script, kept = tmp_path / "model.py", tmp_path / "kept.json"
    script.write_text(SCRIPT)
    job = ["--ranks", 16, "--hosts", 4, "--link", "1gbit,50us", "--ways", "ring,topk=0.1,diloco"]
    first = run(script, *job, "--save", kept)
    assert first.exit_code == 0, first.output
    again = run("--profile", kept, *job)
    assert again.output == first.output
    profile = Profile.load(kept)
    assert (profile.batch, profile.slots) == (8, 2.0) and set(profile.codecs) == {
        "topk=0.1",
        "diloco",
    }
    assert [each.shape for each in profile.parameters[:2]] == [(64, 64), (64,)]
    assert profile.forward > 0 and profile.backward > 0 and profile.update > 0 and profile.kept > 0


def test_ways_that_cannot_be_are_left_out_unless_they_are_asked_for(file):
    job = ["--profile", file, "--ranks", 16, "--hosts", 4, "--link", "1gbit,5us"]
    done = run(*job)
    assert done.exit_code == 0 and "left out: stages=4" in done.output
    done = run(*job, "--ways", "stages=4")
    assert done.exit_code == 1 and "hvdx plan: " in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", 4, "--link", "fast"], "link 'fast': give bandwidth and latency"),
        ([*JOB, "--inner", "1"], "link '1': give"),
        (["--hosts", 7, "--link", "1gbit,5us"], "16 ranks on 7 hosts"),
        (["--hosts", 4], "--hosts 4 needs --link"),
        ([*JOB, "--ways", "int9"], "no 'int9'; use ring"),
        ([*JOB, "--ways", "fp16"], "does not tell what 'fp16' computes, only"),
        ([*JOB, "--output", "x.svg"], "drawn as .png"),
        ([*JOB, "--json", "/nowhere/x.json"], "No such file or directory"),
        ([], "--profile needs --hosts"),
    ],
)
def test_one_clear_message(file, arguments, message):
    done = run("--ranks", 16, "--profile", file, *arguments)
    assert done.exit_code in (1, 2)
    assert message in done.output and "Traceback" not in done.output


def test_neither_script_nor_profile():
    done = run("--ranks", 16, *JOB)
    assert done.exit_code == 1 and "give a script that has the model, or --profile" in done.output
    assert "give a SCRIPT" in run("--ranks", 16).output
