"""The GPU benchmarks run, and buckets do leave while backward goes on."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("script", ["codecs.py", "allreduce.py", "overlap.py"])
def test_benchmarks(run, device, script, tmp_path):
    path = tmp_path / "figures.json"
    told = run(1, f"../../benchmarks/gpu/{script}", "--short", "--device", device, "--json", path)
    found = json.loads(path.read_text())
    assert found["on"] in told
    assert ("nothing about GPUs" in found["on"]) == (device.type != "cuda")
    if script == "overlap.py":
        (row,) = found["rows"]
        assert row["left while backward had work to do"] > 0
