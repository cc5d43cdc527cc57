"""``hvdx bench link`` starts ranks of its own and prints what they have measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import run

pytest.importorskip("horovod")


def test_link(tmp_path):
    file = tmp_path / "link.json"
    command = [sys.executable, "-m", "hvdx", "bench", "link", "--megabytes", "5"]
    done = run(*command, "--seconds", "0.2", "--budget", "safe", "--json", str(file))
    assert done.returncode == 0, done.stderr
    for told in ("network, 2 ranks", "allreduce float32", "int8", "Compression.auto"):
        assert told in done.stdout
    numbers = json.loads(file.read_text())
    assert numbers["ranks"] == 2
    assert numbers["methods"]["int8"]["seconds_per_element"] > 0
