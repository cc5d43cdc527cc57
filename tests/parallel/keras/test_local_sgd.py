"""Local SGD and DiLoCo: N ranks do as N workers simulated in one process; in compiled fit too."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdx
from hvdx.compression import CompressionError

pytestmark = pytest.mark.ranks(2)
TORCH, TENSORFLOW = map(pytest.mark.backend, ("torch", "tensorflow"))
C = hvdx.Compression
WAYS = {
    "fit": lambda ways, *given: ways.fit(*given),
    "eager fit": lambda ways, *given: ways.fit(*given, run_eagerly=True),
    "loop": lambda ways, *given: ways.loop(*given),
}
SIMULATED = []  # once for all ways


def simulated(make_model, ways, whole, steps, lr, momentum):
    """Return every worker's weights after all batches, as published; and those after a flush."""
    models = [make_model("float64") for _ in range(hvdx.size())]
    inner = [keras.optimizers.SGD(0.1, momentum=0.9) for _ in models]
    anchors = models[0].get_weights()
    velocity = [np.zeros_like(anchor) for anchor in anchors]

    def outer_step():
        everyone = [model.get_weights() for model in models]
        for place, anchor in enumerate(anchors):
            grad = np.mean([anchor - own[place] for own in everyone], axis=0)
            velocity[place] = momentum * velocity[place] + grad
            anchors[place] = anchor - lr * (grad + momentum * velocity[place])
        for model in models:
            model.set_weights(anchors)

    shards = [np.split(part, len(models), axis=1) for part in whole]
    for step in range(len(whole[0])):
        for worker, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            ways.loop(model, optimizer, [part[worker][step : step + 1] for part in shards])
        if (step + 1) % steps == 0:
            outer_step()
    before = [model.get_weights() for model in models]
    outer_step()
    return before, anchors


def assert_close(model, weights, exact):
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=100 * exact)


def differ(model):
    return len(set(hvdx.allgather_object(hvdx.parameter_hash(model)))) > 1


@pytest.mark.parametrize(
    "way",
    [
        "fit",
        pytest.param("eager fit", marks=TENSORFLOW),  # all of torch's are
        pytest.param("loop", marks=TORCH),
    ],
)
def test_equals_simulated_workers(hvd, way, data, make_model, ways, exact):
    batches = data("float64")
    if not SIMULATED:
        SIMULATED.extend(simulated(make_model, ways, batches.whole, 2, 0.7, 0.9))
    before, after = SIMULATED
    model = make_model("float64")
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9),
        compression=C.diloco(2, compression=C.none),
    )
    WAYS[way](ways, model, optimizer, batches.shard)
    assert differ(model)  # 5 steps
    assert_close(model, before[hvd.rank()], exact)
    spent = optimizer.communication_seconds
    optimizer.flush()
    assert_close(model, after, exact)
    assert not differ(model)
    assert optimizer.communication_seconds > spent > 0
    ended = optimizer.communication_seconds
    optimizer.settle()  # as before a checkpoint; of nothing
    assert optimizer.communication_seconds == ended
    assert_close(model, after, exact)


def test_one_step_alone_is_the_mean_of_gradients(hvd, data, make_model, ways, farthest, exact):
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.SGD(0.1), batches.whole)
    optimizer = keras.optimizers.SGD(0.1)
    hvd.DistributedOptimizer(optimizer, compression=C.local_sgd(1))
    ways.loop(together, optimizer, batches.shard)
    assert farthest(alone, together) < exact


@TORCH
def test_ranks_talk_in_outer_steps_only(hvd, data, make_model, ways, farthest):
    """And int8, on layers large enough for it, comes close to what travels raw."""
    batches = data()
    models = [make_model(width=64) for _ in range(2)]
    for model, compression in zip(models, (C.int8, C.none), strict=True):
        training = C.diloco(2, compression=compression)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=training)
        sent = []
        reduce = optimizer._averager.reduce
        optimizer._averager.reduce = lambda *g, r=reduce, s=sent: s.append(1) or r(*g)
        for step in range(4):
            ways.loop(model, optimizer, [part[step : step + 1] for part in batches.shard])
            assert len(sent) == (step + 1) // 2
            assert differ(model) == (step % 2 == 0)
    assert 0 < farthest(*models) < 0.02


def test_saved_and_restored(hvd, data, make_model, ways):
    """To the last bit, within a round and with what error feedback has left."""
    training, batches = C.diloco(2, compression=C.onebit(min_elements=0)), data().shard
    first, rest = ([part[cut] for part in batches] for cut in (slice(3), slice(3, None)))

    def make():
        model, optimizer = make_model(), keras.optimizers.SGD(0.1)
        hvd.DistributedOptimizer(optimizer, compression=training)
        return model, optimizer

    model, optimizer = make()
    ways.fit(model, optimizer, first, run_eagerly=True)
    weights, saved = model.get_weights(), optimizer.compression_state()
    assert saved["steps alone"] == [1]
    with pytest.raises(CompressionError, match="train alone"):
        optimizer.portable_compression_state()
    ways.fit(model, optimizer, rest, run_eagerly=True)

    again, resumed = make()
    again.set_weights(weights)
    resumed.load_compression_state(saved)
    ways.fit(again, resumed, rest, run_eagerly=True)
    assert hvdx.parameter_hash(again) == hvdx.parameter_hash(model)
    kept, found = optimizer.compression_state(), resumed.compression_state()
    for name, arrays in kept["parameters"].items():
        of_matrix = {"inner.residual"} if arrays["anchor"].ndim > 1 else set()
        assert {"anchor", "momentum"} | of_matrix <= set(arrays)
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, found["parameters"][name][path])

    optimizer.flush()
    portable = optimizer.portable_compression_state()
    assert len(set(hvdx.allgather_object(str(portable)))) == 1
    model.set_weights([np.ones_like(each) for each in weights])
    optimizer.load_compression_state({})
    for arrays in optimizer.compression_state()["parameters"].values():
        assert (arrays["anchor"] == 1).all() and not arrays["momentum"].any()


@pytest.mark.parametrize("scaler", [None, "wrapped", "around"])
def test_accumulation_and_overflows(hvd, scaler):
    """A round is of updates; a rank that must skip one comes to the outer step all the same.

    A scaler around the wrapped optimizer lets all ranks skip it.
    """
    variable = keras.Variable(np.zeros(2, "float32"), name="v")
    inner = keras.optimizers.SGD(1.0, gradient_accumulation_steps=None if scaler else 2)
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0) if scaler else inner
    ours = scaled if scaler == "wrapped" else inner
    hvd.DistributedOptimizer(ours, compression=C.local_sgd(2))
    for step in range(4):
        bad = scaler and step == 1 and hvd.rank() == 0
        grad = np.full(2, np.inf if bad else (4.0 if scaler else 1.0) * (hvd.rank() + 1), "f4")
        scaled.apply([keras.ops.convert_to_tensor(grad)], [variable])
    mean = (hvd.size() + 1) / 2
    if scaler == "wrapped":  # rank 0, whose gradients are 1, did without one; its scale is 2 since
        expected = 4 * mean + (2 * 2 - 1 - 2 * 1) / hvd.size()
    elif scaler:  # three steps were taken; the last one is of each rank alone
        expected = 3 * mean + 2 * (hvd.rank() + 1)
    else:
        expected = 2 * mean
    np.testing.assert_allclose(variable.numpy(), -expected, rtol=1e-6)
    ours.flush()
    if scaler == "around":
        np.testing.assert_allclose(variable.numpy(), -5 * mean, rtol=1e-6)


def test_local_variables_stay_out(hvd):
    shared, own = (keras.Variable(np.zeros(2, "float32"), name=name) for name in ("s", "o"))
    optimizer = keras.optimizers.SGD(1.0)
    hvd.DistributedOptimizer(optimizer, compression=C.diloco(1, 1.0, 0, compression=C.none))
    optimizer.register_local_var(own)
    for _ in range(2):
        grads = [keras.ops.convert_to_tensor(np.full(2, hvd.rank(), "float32"))] * 2
        optimizer.apply(grads, [shared, own])
    np.testing.assert_allclose(shared.numpy(), -(hvd.size() - 1.0), rtol=1e-6)
    np.testing.assert_allclose(own.numpy(), -2.0 * hvd.rank())


@pytest.mark.filterwarnings("error:ranks train")
def test_weights_that_are_broadcast_after_the_first_batch(hvd, data, make_model, ways):
    """As the callback does where a model is built by it: the round begins from them."""
    model, optimizer = make_model(seed=hvd.rank()), keras.optimizers.SGD(0.1)
    hvd.DistributedOptimizer(optimizer, compression=C.diloco(2, compression=C.none))
    model.compile(optimizer)
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    callback.set_model(model)
    optimizer._averager.broadcast_follows = True
    for step in range(3):
        ways.loop(model, optimizer, [part[step : step + 1] for part in data().shard])
        callback.on_train_batch_end(step)
        assert differ(model) == (step == 1)


def test_what_is_refused(hvd, data, make_model, ways):
    with pytest.raises(ValueError, match=r"op=Sum, compression=Compression\.local_sgd"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(), compression=C.local_sgd, op=hvd.Sum)
    optimizer = keras.optimizers.SGD(0.1)
    hvd.DistributedOptimizer(optimizer, compression=C.diloco(2 + hvd.rank()))
    with pytest.raises(hvdx.MismatchError, match=r"diloco\(steps=3"):
        ways.loop(make_model(), optimizer, data().shard)
