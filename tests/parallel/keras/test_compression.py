"""Compressors with state under Keras' optimizer: the same as between ranks in memory."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdx
from hvdx.comm import in_step
from hvdx.compression import Spec, after
from hvdx.compression.state import leaves
from hvdx.integrations import keras_checkpoint
from hvdx.integrations.keras3_state import brought_together
from hvdx.ops import NumpyOps

C = hvdx.Compression
METHODS = {
    "bf16": C.bf16,
    "int8": C.int8(feedback=True),
    "int4": C.int4(),
    "onebit": C.onebit(min_elements=0),
    "onebit by matrix": C.onebit(min_elements=0, scales="matrix"),
    "topk": C.topk(0.1, min_elements=0),
    "randomk": C.randomk(0.2, min_elements=0),
    "powersgd": C.powersgd(2, min_elements=0),
    "dgc": C.dgc(0.1, momentum=0.5, warmup_steps=2, min_elements=0),
    "after": after(2, C.onebit(min_elements=0)),
}
SHAPES = {"weight": (24, 36), "bias": (24,), "odd": (7, 11)}
STEPS = 4
GRAPHS = keras.backend.backend() == "tensorflow"
TWO, TORCH = pytest.mark.ranks(2), pytest.mark.backend("torch")
PATH = "sequential/given"


class Given(keras.layers.Layer):
    """Its weights' gradients are what it is called on."""

    def build(self, shape):
        make = self.add_weight
        self.own = [make(shape=s, initializer="zeros", name=n) for n, s in SHAPES.items()]

    def call(self, x):
        flat = keras.ops.concatenate([keras.ops.reshape(w, (-1,)) for w in self.own])
        return keras.ops.sum(x * flat, axis=-1, keepdims=True)


def optimizer_with(hvd, method):
    return hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=METHODS[method])


def given_gradients():
    keras.backend.clear_session(free_memory=False)  # equal names on all ranks and in all tests
    size = sum(int(np.prod(s)) for s in SHAPES.values())
    return keras.Sequential([keras.Input((size,)), Given()])


def total(y, output):
    return keras.ops.sum(output)


def train(model, optimizer, grads, way="fit", **options):
    """Train on one row of ``grads`` (step, element) per step."""
    if way == "fit":
        model.compile(optimizer, total, **options)
        return go_on(model, grads)
    optimizer.build(model.trainable_variables)
    apply = lambda gs: optimizer.apply(gs, model.trainable_variables)  # noqa: E731
    if way == "graph":
        import tensorflow as tf

        apply = tf.function(apply)
    for step in grads:
        cut = np.split(step, np.cumsum([int(np.prod(s)) for s in SHAPES.values()])[:-1])
        apply([keras.ops.convert_to_tensor(g.reshape(s))
               for g, s in zip(cut, SHAPES.values(), strict=True)])  # fmt: skip
    return [variable.numpy() for variable in model.trainable_variables]


def go_on(model, grads):
    """Train as ``train`` with ``fit``, without tracing anew."""
    model.fit(grads, grads[:, :1], batch_size=1, shuffle=False, verbose=0)
    return [variable.numpy() for variable in model.trainable_variables]


def gradients(rank, steps=STEPS):
    size = sum(int(np.prod(s)) for s in SHAPES.values())
    return np.random.default_rng(rank).normal(size=(steps, size)).astype("float32")


def in_memory(compressor, everyone):
    """Return the weights and states after steps of rate 1 with gradients (rank, step, element)."""
    size, ops = len(everyone), NumpyOps()
    weights, kept, start = [], [], 0
    for name, shape in SHAPES.items():
        spec = Spec(f"{PATH}/{name}", shape, "float32", size)
        chosen = compressor.of(spec)
        states = [chosen.init(ops, spec) for _ in range(size)]
        weight, count = np.zeros(shape, "float32"), int(np.prod(shape))
        for step in range(len(everyone[0])):
            now = chosen.at(step)
            own = [grads[step, start : start + count].reshape(shape) for grads in everyone]
            results = in_step(
                [now.reduce(ops, g, state) for g, state in zip(own, states, strict=True)]
            )
            states = [each.state for each in results]
            weight = weight - results[0].mean
        weights.append(weight)
        kept.append(states)
        start += count
    return weights, kept


def assert_as_in_memory(hvd, method, model, optimizer, result, everyone):
    weights, kept = in_memory(METHODS[method], everyone)
    close = 1e-3 if method == "powersgd" else 1e-5
    for one, other in zip(result, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=close)
    told = optimizer.compression_state()
    assert told["step"] == (len(everyone[0]) if METHODS[method].stateful else 0)
    for name, states in zip(SHAPES, kept, strict=True):
        found = told["parameters"].get(f"{PATH}/{name}", {})
        expected = leaves(states[hvd.rank()])
        assert list(found) == [path for path, *_ in expected]
        for path, tensor, *_ in expected:
            np.testing.assert_allclose(found[path], tensor, atol=10 * close, err_msg=path)
    assert len(set(hvd.allgather_object(hvd.parameter_hash(model)))) == 1


def on_torch(methods, everywhere, **marks):
    """Leave out on TensorFlow, where tests of the verbs suffice, all but these, and mark some."""
    return [
        pytest.param(m, marks=[*[TORCH] * (m not in everywhere), *marks.get(m, [TWO])])
        for m in methods
    ]


@pytest.mark.parametrize(
    "method",
    on_torch(METHODS, ["int8", "onebit by matrix", "randomk", "powersgd", "dgc", "after"], int8=[]),
)
def test_compiled_fit(hvd, method):
    everyone = [gradients(rank) for rank in range(hvd.size())]
    optimizer = optimizer_with(hvd, method)
    model, own = given_gradients(), everyone[hvd.rank()]
    several = {"steps_per_execution": 2} if method == "dgc" and GRAPHS else {}
    if method == "after":  # two traces
        train(model, optimizer, own[:1])
        own = own[1:]
    result = train(model, optimizer, own, **several)
    assert_as_in_memory(hvd, method, model, optimizer, result, everyone)


@TWO
@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("topk", "eager"),
        pytest.param("dgc", "eager", marks=TORCH),
        ("after", "graph" if GRAPHS else "eager"),
    ],
)
def test_loops(hvd, method, way):
    everyone = [gradients(rank) for rank in range(hvd.size())]
    optimizer = optimizer_with(hvd, method)
    model = given_gradients()
    result = train(model, optimizer, everyone[hvd.rank()], way)
    assert_as_in_memory(hvd, method, model, optimizer, result, everyone)


@TWO
def test_what_measures_and_chooses(hvd):
    everyone = [gradients(rank) for rank in range(hvd.size())]
    asked = []

    def choose(spec):
        return METHODS["after" if "weight" in spec.name else "topk"]

    def prepare(adapter, specs, process_set):
        asked.append([spec.name for spec in specs])
        return policy

    policy = C.onebit(min_elements=0)._replace(policy=choose)
    optimizer = keras.optimizers.SGD(1.0)
    measuring = C.onebit(min_elements=0)._replace(name="measuring", prepare=prepare)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=measuring)
    model = given_gradients()
    saved = optimizer_with(hvd, "topk").compression_state()
    odd = {f"{PATH}/odd": {"owed": np.ones(SHAPES["odd"], "f4")}}  # of another method
    optimizer.load_compression_state(
        {**saved, "compressor": "measuring", "kinds": {"owed": "owed"}, "parameters": odd}
    )
    with pytest.warns(UserWarning, match="measuring has chosen another method.* owed is lost"):
        result = train(model, optimizer, everyone[hvd.rank()], "graph" if GRAPHS else "eager")
    assert asked == [[f"{PATH}/{name}" for name in SHAPES]]
    weights, _ = in_memory(policy, everyone)
    for one, other in zip(result, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@TWO
@pytest.mark.backend("tensorflow")
def test_rows_made_dense_are_compressed(hvd):
    """Their shape is unknown to the graph that TensorFlow makes of a step."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Embedding(40, 8), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
    optimizer = keras.optimizers.SGD(0.1)
    compression = METHODS["powersgd"]
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression, sparse_as_dense=True)
    model.compile(optimizer, "mse")
    draw, before = np.random.default_rng(hvd.rank()), model.layers[0].get_weights()[0]
    model.fit(draw.integers(40, size=(8, 5)), draw.normal(size=(8, 1)), batch_size=4, verbose=0)
    assert not np.array_equal(before, model.layers[0].get_weights()[0])
    assert len(set(hvd.allgather_object(hvd.parameter_hash(model)))) == 1


@TWO
def test_accumulation_compresses_sums(hvd):
    everyone = [gradients(rank) for rank in range(hvd.size())]
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=C.onebit(min_elements=0))
    result = train(given_gradients(), optimizer, everyone[hvd.rank()])
    sums = [own.reshape(STEPS // 2, 2, -1).sum(1) for own in everyone]
    weights, _ = in_memory(C.onebit(min_elements=0), sums)
    for one, other in zip(result, weights, strict=True):
        np.testing.assert_allclose(one, other / 2, atol=1e-5)  # Keras takes the mean of them
    assert optimizer.compression_state()["step"] == 2


@TWO
@pytest.mark.parametrize("around", ["wrapped", "inside"])
def test_an_overflow_leaves_states_alone(hvd, around):
    """A step that loss scaling skips has delivered nothing; what is owed has no scale."""
    everyone = [gradients(rank, 3) for rank in range(hvd.size())]
    with_overflow = np.insert(everyone[hvd.rank()], 1, 1.0, axis=0)
    if hvd.rank() == 0:
        with_overflow[1, 5] = np.inf
    inner = keras.optimizers.SGD(1.0)
    scaling = {"initial_scale": 4.0, "dynamic_growth_steps": 2}
    if around == "wrapped":
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(inner, **scaling),
            compression=C.onebit(min_elements=0),
        )
        averaging = optimizer
    else:
        averaging = hvd.DistributedOptimizer(inner, compression=C.onebit(min_elements=0))
        optimizer = keras.optimizers.LossScaleOptimizer(averaging, **scaling)
    result = train(given_gradients(), optimizer, with_overflow)
    weights, kept = in_memory(C.onebit(min_elements=0), everyone)
    for one, other in zip(result, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    told = averaging.compression_state()
    assert told["step"] == 3
    np.testing.assert_allclose(
        told["parameters"][f"{PATH}/odd"]["residual"], kept[2][hvd.rank()].residual, atol=1e-5
    )
    assert float(optimizer.dynamic_scale) == 4.0  # halved, then doubled


@TWO
def test_momentum_twice_is_refused(hvd):
    for optimizer, told in (
        (keras.optimizers.SGD(0.1, momentum=0.9), r"SGD would .*momentum=0\.9"),
        (keras.optimizers.Adam(0.1), r"Adam would .*beta_1=0\.9"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Nadam(0.1)), r"beta_1=0\.9"),
    ):
        with pytest.raises(hvdx.compression.CompressionError, match=told):
            hvd.DistributedOptimizer(optimizer, compression=C.dgc)


@TWO
def test_ranks_with_other_compressors_are_told(hvd):
    chosen = C.topk(0.1) if hvd.rank() == 0 else C.topk(0.2)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=chosen)
    with pytest.raises(hvdx.MismatchError, match=r"topk\(0\.1\)"):
        train(given_gradients(), optimizer, gradients(0), "eager")


@TWO
@pytest.mark.parametrize("method", ["onebit", pytest.param("randomk", marks=TORCH)])
def test_states_go_on(hvd, method):
    """As many ranks go on exactly; what is portable is owed as before."""
    grads = gradients(hvd.rank())
    straight = train(given_gradients(), optimizer_with(hvd, method), grads, "eager")
    first, second = optimizer_with(hvd, method), optimizer_with(hvd, method)
    begun = train(given_gradients(), first, grads[:2], "eager")
    saved = first.compression_state()
    second.load_compression_state(saved)
    rest = train(given_gradients(), second, grads[2:], "eager")
    for whole, one, other in zip(straight, begun, rest, strict=True):
        np.testing.assert_allclose(whole, one + other, atol=1e-6)
    first.load_compression_state(second.compression_state())  # during training
    assert first.compression_state()["step"] == 4

    portable = second.portable_compression_state()
    together = brought_together(hvd.allgather_object(second.compression_state()))
    for name, tensors in portable["parameters"].items():
        for path, array in tensors.items():
            np.testing.assert_allclose(together["parameters"][name][path], array, atol=1e-6)
    third = optimizer_with(hvd, method)
    third.load_compression_state(portable)
    train(given_gradients(), third, np.zeros_like(grads[:0]), "eager")
    again = third.portable_compression_state()["parameters"]
    for name, tensors in portable["parameters"].items():
        for path, array in tensors.items():
            np.testing.assert_allclose(again[name][path], array, atol=1e-6)


@pytest.mark.parametrize("method", on_torch(["onebit", "randomk", "dgc"], ["onebit"], onebit=[]))
def test_ranks_that_are_left_bring_what_they_owe(hvd, method):
    """The last rank is new, and the others are of a job of one rank more."""
    last, size = hvd.size() - 1, hvd.size() + 1
    first, second = optimizer_with(hvd, method), optimizer_with(hvd, method)
    train(given_gradients(), first, gradients(hvd.rank(), 2), "eager")
    saved = first.compression_state()
    saved["parameters"] = {
        name: {path: array for path, array in own.items() if path != "inner.lost"}
        for name, own in saved["parameters"].items()
    }
    kind = "owed" if method == "dgc" else "residual"
    mine = saved["parameters"][f"{PATH}/weight"][kind]
    expected = sum(hvd.allgather_object(mine)[:last]) / size
    if hvd.rank() != last:
        second._averager.states.load({**saved, "ranks": size}, (hvd.rank(), size))
    model = given_gradients()
    second.build(model.trainable_variables)
    zeros = [keras.ops.zeros(s) for s in SHAPES.values()]
    second._averager._layout(second, zeros, model.trainable_variables)
    portable = second.portable_compression_state()["parameters"][f"{PATH}/weight"]
    np.testing.assert_allclose(portable[kind], expected, atol=1e-6)
    assert np.abs(expected).max() > 0.1
    assert second.compression_state()["step"] == 2
    if method == "randomk":
        draws = hvd.allgather_object(int(portable["inner.draw"]))
        assert set(draws) == {int(saved["parameters"][f"{PATH}/weight"]["inner.draw"])}


@TWO
def test_the_elastic_state_keeps_what_is_owed(hvd):
    """Through commits, undone steps, and a job that starts anew."""
    grads = gradients(hvd.rank())
    straight = train(given_gradients(), optimizer_with(hvd, "onebit"), grads, "eager")
    model, optimizer = given_gradients(), optimizer_with(hvd, "onebit")
    model.compile(optimizer, total)
    state = hvd.elastic.KerasState(model, optimizer)
    go_on(model, grads[:2])
    state.save()
    before = optimizer.compression_state()
    go_on(model, grads[:1])  # to be undone
    state.restore()
    assert optimizer.compression_state()["step"] == 2
    optimizer._averager.forget()  # as when the job ends
    after = optimizer.compression_state()
    assert [after[key] for key in ("rank", "ranks")] == [hvd.rank(), hvd.size()]
    for name, own in before["parameters"].items():
        for path, array in own.items():
            np.testing.assert_array_equal(after["parameters"][name][path], array)
    state.reset()
    state.sync()
    ended = go_on(model, grads[2:])
    for one, other in zip(straight, ended, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@TWO
def test_states_that_do_not_fit(hvd):
    Error = hvdx.compression.CompressionError
    optimizer = optimizer_with(hvd, "onebit")
    train(given_gradients(), optimizer, gradients(0, 1), "eager")
    saved = optimizer.compression_state()
    with pytest.raises(Error, match=f"rank {hvd.rank()}: a dict without"):
        optimizer.load_compression_state({"step": 1})
    with pytest.raises(Error, match=r"of compression=topk\(0\.1\)"):
        optimizer.load_compression_state({**saved, "compressor": "topk(0.1)"})
    with pytest.raises(Error, match=r"that of rank 7 of 9, but this is rank \d of 2"):
        optimizer.load_compression_state({**saved, "rank": 7, "ranks": 9})
    saved["parameters"][f"{PATH}/odd"]["residual"] = np.zeros((7, 12), "float32")
    with pytest.raises(Error, match=r"'sequential/given/odd': .*\(7, 12\).*\(7, 11\) here"):
        optimizer.load_compression_state(saved)


@TWO
@TORCH  # hvd.Checkpoints takes the same states on TensorFlow, and this file is Keras' own
def test_checkpoints(hvd, shared, monkeypatch):
    grads = gradients(hvd.rank())

    def fit(method, epochs, *folders):
        model, optimizer = given_gradients(), optimizer_with(hvd, method)
        model.compile(optimizer, total, run_eagerly=True)
        callbacks = [hvd.callbacks.CheckpointCallback(each) for each in folders]
        model.fit(grads, grads[:, :1], batch_size=1, shuffle=False, verbose=0, epochs=epochs,
                  callbacks=callbacks)  # fmt: skip
        return [v.numpy() for v in model.trainable_variables], optimizer.compression_state()

    weights, saved = fit("onebit", 2)
    fit("onebit", 1, shared)
    resumed, state = fit("onebit", 2, shared)
    for one, other in zip(weights, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert state["step"] == 2 * STEPS
    for name, tensors in saved["parameters"].items():
        np.testing.assert_array_equal(state["parameters"][name]["residual"], tensors["residual"])

    everyone = hvdx.allgather_object(saved)
    read = keras_checkpoint._read
    monkeypatch.setattr(  # as if one rank had trained
        keras_checkpoint, "_read", lambda path: {**read(path), "compression": [
            brought_together(everyone)]})  # fmt: skip
    _, state = fit("onebit", 2, shared)
    for name, tensors in state["parameters"].items():
        mean = np.mean([own["parameters"][name]["residual"] for own in everyone], 0)
        np.testing.assert_allclose(tensors["residual"], mean, atol=1e-6)
    with pytest.warns(UserWarning, match=r"the checkpoint is of compression=onebit.* owed .*lost"):
        fit("topk", 2, shared)
