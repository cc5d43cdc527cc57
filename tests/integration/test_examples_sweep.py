"""The compression sweeps, in their shortest form: real ranks, a table, a picture."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, environment, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_the_sweep_tells_bytes_and_draws(framework, tmp_path):
    for module in ("horovod", "sklearn", "matplotlib", "torch", framework):
        pytest.importorskip(module)
    script = EXAMPLES / f"compression_sweep_{framework}.py"
    picture = tmp_path / "sweep.png"
    told = ["--methods", "none", "fp16", "--epochs", "1", "--png", str(picture)]
    on_torch = environment(KERAS_BACKEND="torch")  # starts sooner than TensorFlow
    job = run(*HVDX_RUN, "-np", "2", "--", sys.executable, str(script), *told, env=on_torch)
    assert job.returncode == 0, job.stdout + job.stderr
    rows = dict(re.findall(r"(none|fp16) +[\d.]+ +([\d.]+)x", job.stdout))
    assert rows == {"none": "1.0", "fp16": "2.0"}, job.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_method_has_its_bytes():
    """What the sweep counts is what the formulas say, of a matrix large enough for them."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(EXAMPLES))
    from compression_sweep import megabytes, method

    shapes, size = {"weight": (512, 1024)}, 512 * 1024
    for ranks, ring in ((2, 1.0), (4, 1.5)):
        for name, each in {"none": 4, "fp16": 2, "bf16": 2, "int8": 257 / 256}.items():
            sent = megabytes(method(name), shapes, ranks, steps=2)
            assert sent == pytest.approx(2 * ring * each * size / 1e6, rel=1e-6), (name, ranks)
    sparse = megabytes(method("topk:density=0.25"), shapes, 2, steps=1)
    assert sparse == (size + 4 * 8) / 1e6  # and a count for each of eight chunks
    with pytest.raises(ValueError, match=r"'topk:deep=3'.*deep"):
        method("topk:deep=3")
    with pytest.raises(ValueError, match="unknown compression='zip'"):
        method("zip")
