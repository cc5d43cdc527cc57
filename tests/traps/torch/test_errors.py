"""Errors say what is wrong: which tensor, which rank, what each rank has, and what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trap = pytest.mark.trap


@trap(5, AssertionError, "Mismatched .*(shape|type)")
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "async"])
@pytest.mark.parametrize(
    ("submit", "own"),
    [
        (lambda rank: torch.ones(2 + rank), [r"(2,)", r"(3,)"]),
        (lambda rank: torch.ones(2, dtype=(torch.float32, torch.float64)[rank]),
         ["float32", "float64"]),
    ],
    ids=["shapes", "dtypes"],
)  # fmt: skip
def test_different_tensors(hvd, waits, submit, own):
    with pytest.raises(Exception) as error:
        if waits:
            hvd.allreduce(submit(hvd.rank()), name="odd")
        else:
            hvd.synchronize(hvd.allreduce_async(submit(hvd.rank()), name="odd"))
    told = str(error.value)
    for part in ("'odd'", "rank 0", "rank 1", *own):
        assert part in told, told


@trap(5, AssertionError, "same name as another tensor")
def test_a_name_that_is_in_use(hvd, everyone):
    told = None
    if hvd.rank() == 0:
        handle = hvd.allreduce_async(torch.ones(1), name="twice")
        with pytest.raises(Exception) as error:
            hvd.allreduce_async(torch.ones(1), name="twice")
        told = str(error.value)
    told, _ = everyone(told)
    if hvd.rank() == 1:
        handle = hvd.allreduce_async(torch.ones(1), name="twice")
    assert hvd.synchronize(handle).item() == 1.0
    for part in ("'twice'", "rank 0"):
        assert part in told, told


START = """
import torch
try:
    import {face} as hvd
    hvd.init()
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


@trap(5, AssertionError, "AttributeError: module 'horovod.torch' has no attribute 'init'")
def test_an_extension_that_was_not_built(hvd, everyone, tmp_path, monkeypatch):
    told = None
    if hvd.rank() == 0:
        import horovod

        built = Path(horovod.__file__).parent
        shutil.copytree(built, tmp_path / "horovod", ignore=shutil.ignore_patterns("*.so"))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        told = subprocess.run(
            [sys.executable, "-c", START.format(face=hvd.__name__)], capture_output=True, text=True
        ).stdout
    told, _ = everyone(told)
    for part in ("HorovodMissingError", "torch", "hvdx install"):
        assert part in told, told
