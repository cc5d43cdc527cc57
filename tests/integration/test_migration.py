"""docs/migration.md: its diffs are those of the scripts, and the scripts train on two ranks.

Each pattern runs twice: as written for Horovod with nothing but the import changed, by the very
command of the guide, and as the guide leaves it. Patterns of one framework share a launch.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HOROVODRUN, HVDX_RUN, SECONDS, environment, run

from hvdx.launch import network

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "migration"
GUIDE = (ROOT / "docs" / "migration.md").read_text()

#: Short forms: pattern and arguments of its scripts.
PATTERNS = {
    "torch_mnist": ["--epochs", "3"],
    "keras_mnist": ["--epochs", "3"],
    "tensorflow_tape": ["--steps", "62"],
    "torch_amp": ["--epochs", "3"],
    "torch_elastic": ["--epochs", "3"],
}


def code_of(script: str) -> str:
    """Return a script without its docstring."""
    return script.split('"""', 2)[2]


def changed_import(before: Path, folder: Path) -> Path:
    """Copy a Horovod script and change its import with the command of the guide."""
    script = folder / before.name
    script.write_text(before.read_text())
    (command,) = re.findall(r"^\$ (sed .*) train\.py$", GUIDE, re.MULTILINE)
    subprocess.run(f"{command} {script}", shell=True, check=True)
    return script


def launch(
    scripts: dict[Path, list[str]], *launcher: str, folder: Path
) -> dict[str, dict[str, list]]:
    """Run scripts on two ranks, one after the other; return what rank 0 reports of each.

    Args:
        scripts: with their arguments.
        launcher: its words.
        folder: for what they write.
    """
    needed = {"torch": ["torch"], "keras": ["tensorflow", "keras"], "tensorflow": ["tensorflow"]}
    frameworks = {script.stem.partition("_")[0] for script in scripts}
    for module in ("horovod", "sklearn", *(each for name in frameworks for each in needed[name])):
        pytest.importorskip(module)
    command = [sys.executable, Path(__file__).with_name("run_scripts.py"), folder]
    for script, arguments in scripts.items():
        command += ["--", script, *arguments]
    path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = environment(PYTHONPATH=path)
    job = run(*launcher, *map(str, command), env=env, timeout=4 * SECONDS)
    assert job.returncode == 0, job.stdout + job.stderr
    lines = re.findall(r"^\[0\]<stdout>: ?report (.*)$", job.stdout, re.MULTILINE)
    reports = {report["script"]: report for report in map(json.loads, lines)}
    assert list(reports) == [script.stem for script in scripts], job.stdout + job.stderr
    return reports


def check(report: dict[str, list]) -> None:
    """Raise unless the replicas are equal and the loss has fallen."""
    assert len(report["hashes"]) == 2
    assert len(set(report["hashes"])) == 1, "replicas differ"
    assert report["losses"][-1] < 0.8 * report["losses"][0], report["losses"]


def variants(pattern: str, folder: Path) -> dict[Path, list[str]]:
    """Return the script with only its import changed and, where it differs, the guide's."""
    after = SCRIPTS / f"{pattern}.py"
    first = changed_import(SCRIPTS / f"{pattern}_horovod.py", folder)
    same = code_of(first.read_text()) == code_of(after.read_text())
    return dict.fromkeys([first] if same else [first, after], PATTERNS[pattern])


LAUNCHER = (*HVDX_RUN, "-np", "2", "--")


def test_patterns_of_tensorflow(tmp_path):
    scripts = {**variants("keras_mnist", tmp_path), **variants("tensorflow_tape", tmp_path)}
    for report in launch(scripts, *LAUNCHER, folder=tmp_path).values():
        check(report)


def test_patterns_of_torch_and_that_the_check_can_fail(tmp_path):
    scripts = variants("torch_mnist", tmp_path)
    alone = tmp_path / "torch_without_optimizer.py"
    whole = (SCRIPTS / "torch_mnist.py").read_text()
    text, cut = re.subn(r"^optimizer = hvd.*\n", "", whole, flags=re.MULTILINE)
    assert cut == 1
    alone.write_text(text)
    scripts |= {alone: PATTERNS["torch_mnist"], **variants("torch_amp", tmp_path)}
    reports = launch(scripts, *LAUNCHER, folder=tmp_path)
    unaveraged = reports.pop(alone.stem)
    assert len(reports) == len(scripts) - 1 >= 3
    for report in reports.values():
        check(report)
    with pytest.raises(AssertionError, match="replicas differ"):
        check(unaveraged)


def test_torch_elastic(tmp_path):
    discover = tmp_path / "discover.sh"
    discover.write_text("#!/bin/sh\necho localhost:2\n")
    discover.chmod(0o755)
    # Without an interface horovodrun waits for a second host.
    launcher = (*HOROVODRUN, "-np", "2", "--network-interfaces", network.loopback())
    launcher += ("--host-discovery-script", str(discover))
    scripts = variants("torch_elastic", tmp_path)
    for report in launch(scripts, *launcher, folder=tmp_path).values():
        check(report)


def test_only_the_import_changes(tmp_path):
    for pattern in PATTERNS:
        before = SCRIPTS / f"{pattern}_horovod.py"
        after = changed_import(before, tmp_path).read_text().splitlines()
        pairs = zip(before.read_text().splitlines(), after, strict=True)
        changed = [pair for pair in pairs if pair[0] != pair[1]]
        assert len(changed) == 1
        assert changed[0][0].startswith("import horovod.")
        assert changed[0][1] == changed[0][0].replace("horovod", "hvdx")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_guide_shows_the_diff(pattern):
    before, after = (SCRIPTS / f"{pattern}{end}.py" for end in ("_horovod", ""))
    lines = [path.read_text().splitlines(keepends=True) for path in (before, after)]
    start = [text.index('"""\n', 1) + 1 for text in lines]  # leave the docstrings out
    shown = [text[cut:] for text, cut in zip(lines, start, strict=True)]
    wanted = "".join(difflib.unified_diff(*shown, before.name, after.name, n=2))
    # Numbers of lines are of no use to readers.
    wanted = re.sub(r"^@@ .* @@$", "@@", wanted, flags=re.MULTILINE)
    block = f"```diff\n{wanted}```\n"
    assert block in GUIDE, f"docs/migration.md lacks this block:\n{block}"


def test_every_script_is_in_the_guide():
    names = {path.name for path in SCRIPTS.glob("*.py")} - {"digits28.py"}
    assert names == {f"{pattern}{end}.py" for pattern in PATTERNS for end in ("_horovod", "")}
    for name in names | {"digits28.py"}:
        assert f"../examples/migration/{name}" in GUIDE
