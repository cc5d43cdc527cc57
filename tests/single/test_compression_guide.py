"""docs/compression.md is true: its methods exist, and its bytes are what methods send.

Its examples run between real ranks: test_compression_guide.py of the folders in tests/parallel.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hvdx as hvd

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "compression.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| ([\d.]+) \| ([\d.]+) \|", GUIDE, re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_bytes_an_element(row, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "examples")
    sweep = pytest.importorskip("compression_sweep")
    method = eval(f"hvd.Compression.{row[0]}", {"hvd": hvd})
    for ranks, told in zip((2, 8), row[1:], strict=True):
        sent = sweep.megabytes(method, {"weight": (1024, 1024)}, ranks, steps=1)
        assert sent * 1e6 / 2**20 == pytest.approx(float(told), rel=0.02, abs=0.0005), ranks


def test_methods_exist_and_take_these_options():
    told = set(re.findall(r"hvd\.Compression\.\w+(?:\([^()]*\))?", GUIDE))
    assert len(told) >= 10
    for expression in told:
        eval(expression, {"hvd": hvd})


def test_every_method_is_in_the_guide():
    public = {name for name in vars(hvd.Compression) if not name.startswith("_")}
    assert public <= set(re.findall(r"`(?:hvd\.Compression\.)?(\w+)[(`]", GUIDE)) | set(
        re.findall(r"hvd\.Compression\.(\w+)", GUIDE)
    )


def test_links_lead_somewhere():
    anchors = {re.sub(r"[^a-z0-9 ]", "", h.lower()).replace(" ", "-")
               for h in re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)}  # fmt: skip
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        file, _, anchor = target.partition("#")
        assert not file or (ROOT / "docs" / file).exists(), target
        assert not anchor or file or anchor in anchors, target
