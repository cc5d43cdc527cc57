"""One plan drives a PyTorch and a Keras model with the same weights: their losses are equal."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
pytest.importorskip("tensorflow")
from collections import OrderedDict  # noqa: E402

import numpy as np  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.pipeline.plan import Plan  # noqa: E402

if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another backend", allow_module_level=True)


def test_torch_and_keras_learn_alike_from_one_plan(tmp_path):
    nn = torch.nn
    parts = {
        "enter": nn.Linear(6, 8), "tanh": nn.Tanh(), "hidden": nn.Linear(8, 8), "relu": nn.ReLU(),
        "leave": nn.Linear(8, 2),
    }  # fmt: skip
    one = nn.Sequential(OrderedDict(parts))
    line = [
        keras.layers.Dense(part.out_features, name=name)
        if isinstance(part, nn.Linear) else keras.layers.Activation(name, name=name)
        for name, part in parts.items()
    ]  # fmt: skip
    other = keras.Sequential([keras.Input((6,)), *line])
    for layer in line:
        if layer.weights:  # copies, since TensorFlow may share an array's memory
            part = parts[layer.name]
            layer.set_weights([w.detach().numpy().T.copy() for w in (part.weight, part.bias)])
    draw = np.random.default_rng(0)
    x, y = (draw.normal(size=(20, 12, n)).astype("float32") for n in (6, 2))

    first = hvd.Pipeline(
        one, torch.tensor(x[0]), nn.functional.mse_loss, lambda p: torch.optim.SGD(p, 0.1),
        stages=["hidden", "leave"], place=["cpu"] * 3, micro_batches=4,
    )  # fmt: skip
    first.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    second = hvd.Pipeline(other, x[0], "mse", keras.optimizers.SGD(0.1), stages=plan)
    assert second.plan == plan
    losses = [
        (float(first.step(torch.tensor(a), torch.tensor(b))), float(second.step(a, b)))
        for a, b in zip(x, y, strict=True)
    ]
    first.close()
    second.close()
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-5)
