"""Units of Keras models that move between the stages of one process."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip(os.environ["KERAS_BACKEND"])
import numpy as np  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PlanError  # noqa: E402
from hvdx.integrations import keras3_moves  # noqa: E402


def load_models():
    path = Path(__file__).parent / "test_pipeline_keras.py"
    spec = importlib.util.spec_from_file_location("pipeline_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_models()
layers = keras.layers


def everything():
    """Dropout, running statistics, a layer called twice, a skip."""
    x = keras.Input((6,), name="x")
    a = layers.Dense(8, "tanh", name="enter")(x)
    tied = layers.Dense(8, "tanh", name="tied")
    b = layers.Dropout(0.3, name="drop")(tied(a))
    c = layers.BatchNormalization(name="norm", momentum=0.5)(b + a)
    d = tied(c) + a
    return keras.Model(x, layers.Dense(1, name="leave")(d))


def optimizers():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.8)
    return {
        "adam": lambda: keras.optimizers.Adam(schedule, amsgrad=True),
        "nadam": lambda: keras.optimizers.Nadam(0.01, use_ema=True),
        "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    }


def steps(pipe, data, cuts=()):
    """Train, moving units before every second step."""
    cuts = list(cuts)
    for number, (x, y) in enumerate(data):
        if number % 2 and cuts:
            pipe.rebalance(cuts.pop(0))
        loss = pipe.step(x, y)
    return float(loss)


def test_moves_change_no_bit():
    """Two stages of each thread, one of which may be without variables."""
    data, told = models.batches(4), []
    for moving in (False, True):
        model = models.made(everything)
        pipe = models.pipeline(model, data[0][0], schedule="zbv", place=["cpu"] * 2)
        cuts = [[1, 1, 1, len(pipe.units) - 3], ["norm", "tied#2", "leave"]] if moving else []
        loss = steps(pipe, data, cuts)
        assert pipe.moves == len(cuts)
        pipe.close()
        told.append((loss, models.weights(model)))
    assert told[0][0] == told[1][0]
    models.assert_same(told[0][1], told[1][1])


@pytest.mark.parametrize("kind", optimizers())
def test_an_optimizer_is_built_for_other_variables(kind):
    """As on two ranks that give each other a variable: each goes on as if it had always had it."""
    draw = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4,), "c": (2, 3), "d": (3,)}
    grads = [
        {n: draw.normal(size=s).astype("float32") for n, s in shapes.items()} for _ in range(6)
    ]

    def apply(optimizer, variables, given):
        gradients = [keras.ops.convert_to_tensor(given[n]) for n in variables]
        if keras.backend.backend() == "torch":
            import torch

            with torch.no_grad():
                return optimizer.apply(gradients, list(variables.values()))
        return optimizer.apply(gradients, list(variables.values()))

    def fresh():
        return {n: keras.Variable(np.ones(s, "float32"), name=n) for n, s in shapes.items()}

    whole, expected = optimizers()[kind](), fresh()
    whole.build(list(expected.values()))
    for each in grads:
        apply(whole, expected, each)
    variables = fresh()
    owners = [optimizers()[kind]() for _ in range(2)]
    for own, names in zip(owners, ("ab", "cd"), strict=True):
        own.build([variables[n] for n in names])
    for number, each in enumerate(grads):
        names = ("ab", "cd") if number < 3 else ("abc", "d")
        if number == 3:
            states = {}
            for own, old in zip(owners, ("ab", "cd"), strict=True):
                states.update(keras3_moves.slots_of(own, {n: variables[n] for n in old}))
            for own, new in zip(owners, names, strict=True):
                keras3_moves.rebuild(own, {n: variables[n] for n in new}, states)
        for own, which in zip(owners, names, strict=True):
            apply(own, {n: variables[n] for n in which}, each)
    models.assert_same({n: v.numpy() for n, v in variables.items()},
                       {n: v.numpy() for n, v in expected.items()})  # fmt: skip
    assert [len(own._trainable_variables) for own in owners] == [3, 1]
    assert int(owners[0].iterations) == 6
    for own, names in zip(owners, ("abc", "d"), strict=True):  # nothing of old ones is left
        new = optimizers()[kind]()
        new.build([variables[n] for n in names])
        assert len(own.variables) == len(new.variables)


def test_frozen_layers_move_and_are_freed():
    data, told = models.batches(6), []
    for moving in (False, True):
        model = models.made(models.sequential)
        pipe = models.pipeline(model, data[0][0], place=["cpu"] * 2)
        for number, (x, y) in enumerate(data):
            model.get_layer("dense1").trainable = number not in (2, 3)
            if moving and number == 3:
                pipe.rebalance([1, 3])
            loss = pipe.step(x, y)
        pipe.close()
        told.append((float(loss), models.weights(model)))
    assert told[0][0] == told[1][0]
    models.assert_same(told[0][1], told[1][1])


def test_what_cannot_move_is_told():
    x = models.batches(1)[0][0]
    pipe = models.pipeline(models.made(everything), x, place=["cpu"] * 2)
    with pytest.raises(PlanError, match="no unit is named 'nine'"):
        pipe.rebalance(["nine"])
    with pytest.raises(PlanError, match="no unit has a time"):
        pipe.rebalance()
    pipe.close()
    with pytest.raises(PlanError, match="rebalance='always': use 'auto'"):
        models.pipeline(models.made(everything), x, rebalance="always")


def test_the_best_cuts_for_what_was_observed():
    x, y = models.batches(1, rows=64)[0]
    pipe = models.pipeline(
        models.made(models.sequential), x, place=["cpu"] * 2, rebalance=hvd.Rebalance(every=1)
    )
    with pytest.raises(PlanError, match="no step has been observed"):
        pipe.rebalance()
    for _ in range(3):
        pipe.step(x, y)
    assert pipe.rebalance() == pipe.plan and len(pipe.plan.place) == 2
    pipe.step(x, y)
    pipe.close()
