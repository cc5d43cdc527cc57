"""The Keras example of docs/compression.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest

import hvdx

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "compression.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.ranks(2)
def test_the_example_of_the_guide():
    (example,) = [block for block in BLOCKS if "keras.optimizers" in block]
    keras.utils.set_random_seed(hvdx.rank())
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(40), keras.layers.Dense(1)])
    x, y = np.random.normal(size=(2, 32, 40)).astype("float32")
    exec(example, {"keras": keras, "model": model, "x": x, "y": y[:, :1]})
    assert len(set(hvdx.allgather_object(hvdx.parameter_hash(model)))) == 1
