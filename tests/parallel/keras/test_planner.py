"""``place="auto"`` of Keras models: the same plan everywhere, and the same bits as by hand."""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest

import hvdx as hvd
from hvdx.errors import PlanError
from hvdx.pipeline.plan import Plan

pytestmark = pytest.mark.ranks(2)
ROWS = 16


def made():
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((12,)),
        *(keras.layers.Dense(12, activation="tanh", name=f"d{number}") for number in range(3)),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.1, seed=1, name="drop"),
        keras.layers.Dense(3, name="head"),
    ])  # fmt: skip


def batch():
    draw = np.random.default_rng(5)
    return draw.normal(size=(ROWS, 12)).astype("float32"), draw.integers(0, 3, ROWS)


def pipeline(model, x, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"seed": 7, "batchnorm": "sync", **options}
    return hvd.Pipeline(model, x, loss, keras.optimizers.Adam(1e-2), **options)


def learnt(pipe, path):
    """Losses of some steps, and the arrays of a checkpoint."""
    x, y = batch()
    losses = [float(pipe.step(x, y)) for _ in range(4)]
    pipe.save(path)
    hvd.barrier()
    pipe.close()
    told = hvd.load_state(path)
    return losses, {(kind, n): v for kind in ("model", "optimizer") for n, v in told[kind].items()}


def test_training_is_that_of_the_plan_given_by_hand(shared, capfd):
    (x, y), model = batch(), made()
    before = [np.array(keras.ops.convert_to_numpy(each)) for each in model.variables]
    drawn = random.getstate()
    # Fewer schedules: TensorFlow compiles each trial's units anew.
    pipe = pipeline(model, x, place="auto", target=y, micro_batches=4, schedule="1f1b")
    assert drawn == random.getstate()
    after = [keras.ops.convert_to_numpy(each) for each in model.variables]
    assert all(map(np.array_equal, before, after))
    assert len({each.to_json() for each in hvd.allgather_object(pipe.plan)}) == 1
    assert ("* is taken" in capfd.readouterr().err) == (hvd.rank() == 0)
    if hvd.rank() == 0:
        pipe.plan.save(shared / "plan.json")
    losses, arrays = learnt(pipe, shared / "auto.safetensors")
    plan = Plan.load(shared / "plan.json")
    given = learnt(pipeline(made(), x, stages=plan), shared / "given.safetensors")
    assert losses == given[0]
    assert len(arrays) == len(given[1])  # Keras numbers the names of the second model's layers
    assert all(map(np.array_equal, arrays.values(), given[1].values()))


def test_what_cannot_be_planned_is_told():
    x, _ = batch()
    with pytest.raises(PlanError, match="without target= it has nothing for the loss"):
        pipeline(made(), x, place="auto", micro_batches=4, schedule="1f1b")
    with pytest.raises(PlanError, match="give loss= and optimizer="):
        hvd.Pipeline(made(), x, place="auto")
