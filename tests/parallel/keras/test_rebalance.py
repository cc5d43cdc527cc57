"""Units of Keras models that move between ranks while training: not a bit changes."""

from __future__ import annotations

import keras
import pytest
from pipelines import load_single, models

import hvdx as hvd

alone = load_single("test_pipeline_moves_keras")
FOUR, TWO, TORCH = pytest.mark.ranks(4), pytest.mark.ranks(2), pytest.mark.backend("torch")
CUTS = {
    2: [["leave"], ["tied"], ["norm"]],
    4: [["tied", "norm", "leave"], ["drop", "norm", "leave"]],
}


def train(path, moving, **options):
    """Move units before every second step; return moves, losses and all of a checkpoint."""
    data = models.batches(7)
    options = {"micro_batches": 4, "seed": 7, "loss": "mse", **options}
    optimizer = keras.optimizers.Nadam(0.01)
    model = models.made(alone.everything)
    pipe = hvd.Pipeline(model, data[0][0], optimizer=optimizer, **options)
    cuts, losses = list(CUTS[len(pipe.plan.place)]), []
    for number, (x, y) in enumerate(data):
        if moving and number % 2 and cuts:
            pipe.rebalance(cuts.pop(0))
        model.get_layer("enter").trainable = number not in (3, 4)
        losses.append(float(pipe.step(x, y)))
    assert pipe.optimizer is optimizer
    moves = pipe.moves
    pipe.save(path)
    hvd.barrier()
    pipe.close()
    told = hvd.load_state(path)
    state = {(kind, n): v for kind in ("model", "optimizer") for n, v in told[kind].items()
             if not n.startswith("variable")}  # Nadam's product has a name by number  # fmt: skip
    for name, own in told.get("compression", {}).get("parameters", {}).items():
        state.update({("compression", name, path): v for path, v in own.items()})
    return moves, losses, state


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=[TWO, TORCH]),
        pytest.param({"channel": "horovod", "clip_norm": 0.05}, marks=[TWO, TORCH]),
        pytest.param({"place": [[0, 2], [3, 1]],
                      "compression": hvd.Compression.topk(0.5, min_elements=1)}, marks=FOUR),
    ],
)  # fmt: skip
def test_moves_change_no_bit(options, shared):
    """A layer called twice, dropout, running statistics, Nadam's product, a frozen layer."""
    _, losses, expected = train(shared / "still.safetensors", False, **options)
    moves, found, state = train(shared / "moved.safetensors", True, **options)
    assert moves >= 2 and found == losses
    models.assert_same(state, expected)


@TWO
def test_a_rank_without_variables_gets_some():
    """Its optimizer was never built, and goes on where that of the other rank is."""
    data = models.batches(4)

    def build():
        x = keras.Input((6,))
        h = keras.layers.Dense(6, "tanh", name="first")(x)
        h = keras.layers.Dense(6, "tanh", name="second")(h)
        return keras.Model(x, keras.layers.Activation("tanh", name="last")(h))

    told = []
    for moving in (False, True):
        optimizer = keras.optimizers.Adam(0.01)
        options = {"micro_batches": 4, "seed": 7, "stages": ["last"], "loss": "mse"}
        pipe = hvd.Pipeline(models.made(build), data[0][0], optimizer=optimizer, **options)
        assert optimizer.built == (hvd.rank() == 0)
        for number, (x, y) in enumerate(data):
            if moving and number:
                pipe.rebalance(["second"] if number < 3 else ["last"])
            loss = float(pipe.step(x, y))
        assert pipe.moves == (2 if moving else 0)
        pipe.close()
        told.append(loss)
    assert told[0] == told[1]
