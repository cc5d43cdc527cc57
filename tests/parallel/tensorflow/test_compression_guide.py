"""The gradient tapes of docs/compression.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import hvdx

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "compression.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.ranks(2)
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="trains a Keras model by tape")
def test_the_examples_of_the_guide():
    example, saving = [block for block in BLOCKS if "GradientTape" in block]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(40), keras.layers.Dense(1)])
    names = {"tf": tf, "model": model, "optimizer": keras.optimizers.SGD(0.01)}
    exec(example, names)
    x, y = (tf.random.normal((8, size), seed=hvdx.rank()) for size in (40, 1))
    losses = [float(names["step"](x, y)) for _ in range(3)]
    assert losses[2] < losses[0]
    assert len(set(hvdx.allgather_object(hvdx.parameter_hash(model)))) == 1
    exec(saving, names)
    assert names["state"]["ranks"] == hvdx.size()
