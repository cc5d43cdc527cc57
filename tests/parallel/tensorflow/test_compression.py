"""Compressors with state on a tape: the same as between ranks in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import hvdx
from hvdx.comm import in_step
from hvdx.compression import Spec, after
from hvdx.integrations import tensorflow_tape
from hvdx.integrations.tensorflow2 import TensorFlowAdapter
from hvdx.ops import NumpyOps

C = hvdx.Compression
METHODS = {  # made anew by each tape, as scripts do
    "onebit": lambda: C.onebit(min_elements=0),
    "onebit by matrix": lambda: C.onebit(min_elements=0, scales="matrix"),
    "randomk": lambda: C.randomk(0.2, min_elements=0),
    "after": lambda: after(2, C.dgc(0.1, momentum=0.5, min_elements=0)),
}
SHAPES = [(24, 36), (7, 11)]
STEPS = 4


def gradients(rank: int) -> list[list[np.ndarray]]:
    random = np.random.default_rng(rank)
    return [[random.normal(size=s).astype("f4") for s in SHAPES] for _ in range(STEPS)]


def in_memory(compressor: Any, everyone: list[list[list[np.ndarray]]]) -> list[np.ndarray]:
    """Return the sums of the means over the steps."""
    ops, size, sums = NumpyOps(), len(everyone), []
    for place, shape in enumerate(SHAPES):
        spec = Spec("Variable:0" + "#2" * place, shape, "float32", size)
        states = [compressor.init(ops, spec) for _ in range(size)]
        total = np.zeros(shape, "f4")
        for step in range(STEPS):
            works = [
                compressor.at(step).reduce(ops, own[step][place], state)
                for own, state in zip(everyone, states, strict=True)
            ]
            results = in_step(works)
            states = [each.state for each in results]
            total = total + results[0].mean
        sums.append(total)
    return sums


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("method", "run"),
    [
        ("onebit", "eager"),
        ("onebit by matrix", "graph"),
        ("randomk", "graph"),
        ("after", "eager"),
        ("after", "graph"),
    ],
)
def test_as_between_ranks_in_memory(hvd, method, run):
    everyone = [gradients(rank) for rank in range(hvd.size())]
    variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]

    def step(grads):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * g) for v, g in zip(variables, grads, strict=True)])
        tape = hvd.DistributedGradientTape(tape, compression=METHODS[method]())
        return tape.gradient(loss, variables)

    call = tf.function(step) if run == "graph" else step
    plans = len(tensorflow_tape._plans)
    for own in everyone[hvd.rank()]:
        for variable, mean in zip(variables, call([tf.constant(g) for g in own]), strict=True):
            variable.assign_add(mean)
    assert len(tensorflow_tape._plans) == plans + 1  # found again by each tape
    for variable, total in zip(variables, in_memory(METHODS[method](), everyone), strict=True):
        np.testing.assert_allclose(variable, total, atol=1e-5)
    assert len(set(hvd.allgather_object(b"".join(v.numpy().tobytes() for v in variables)))) == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("run", ["eager", "graph"])
def test_a_tape_goes_on_from_what_was_saved(hvd, run):
    """Exactly on as many ranks; and what is portable is owed as before."""
    grads = gradients(hvd.rank())

    def tape_of(tape):
        return hvd.DistributedGradientTape(tape, compression=C.onebit(min_elements=0))

    def train(steps, load=None, started=False):
        """Return the sum of the means, the tape's variables, and what is owed afterwards."""
        variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]

        def step(grads):
            with tf.GradientTape() as tape:
                pairs = zip(variables, grads, strict=True)
                loss = tf.add_n([tf.reduce_sum(v * g) for v, g in pairs])
            return tape_of(tape).gradient(loss, variables)

        call = tf.function(step) if run == "graph" else step
        if started:  # what this has left is replaced
            call([tf.ones(shape) for shape in SHAPES])
        if load is not None:
            tape_of(tf.GradientTape()).load_compression_state(load, variables)
        for own in steps:
            means = call([tf.constant(grad) for grad in own])
            for variable, mean in zip(variables, means, strict=True):
                variable.assign_add(mean)
        tape = tape_of(tf.GradientTape())
        states = (tape.compression_state(variables), tape.portable_compression_state(variables))
        return [v.numpy() for v in variables], *states

    straight, saved, _ = train(grads)
    begun, middle, portable = train(grads[:2])
    assert middle["step"] == 2 and len(middle["parameters"]) == len(SHAPES)
    for started in (False, True):
        rest, end, _ = train(grads[2:], middle, started)
        for whole, one, other in zip(straight, begun, rest, strict=True):
            np.testing.assert_allclose(whole, one + other, atol=1e-6)
        for name, tensors in saved["parameters"].items():
            np.testing.assert_array_equal(end["parameters"][name]["residual"], tensors["residual"])
    residuals = [tensors["residual"] for tensors in middle["parameters"].values()]
    assert max(np.abs(residual).max() for residual in residuals) > 0.1
    _, _, again = train([], portable)
    for name, tensors in portable["parameters"].items():
        np.testing.assert_allclose(again["parameters"][name]["residual"], tensors["residual"])


@pytest.mark.ranks(2)
def test_states_of_tapes_that_do_not_fit(hvd):
    variable = tf.Variable(tf.zeros((30, 40)))
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=C.onebit(min_elements=0))
    saved = tape.compression_state([variable])
    other = hvd.DistributedGradientTape(tf.GradientTape(), compression=C.topk)
    Error = hvdx.compression.CompressionError
    with pytest.raises(Error, match=f"rank {hvd.rank()}: .*of compression=onebit"):
        other.load_compression_state(saved, [variable])
    with pytest.raises(Error, match=r"rank 7 of 9"):
        tape.load_compression_state({**saved, "rank": 7, "ranks": 9}, [variable])
    with pytest.raises(Error, match="source 0 is a tensor"):
        tape.compression_state([tf.zeros((3, 3))])


ROWS = {
    "fp16": (C.fp16, 1e-3, 2),
    "int4 by layer": (C.by_layer({"emb*": C.int4}), 0.01, 1),
    "powersgd": (C.powersgd, 0.01, 1),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("fp16", "graph"),
        ("int4 by layer", "eager"),
        ("powersgd", "graph"),
        ("fp16", "elastic"),
    ],
)
def test_rows_of_sparse_gradients(hvd, monkeypatch, name, run):
    """Their values travel by a codec, as under PyTorch; ranks have different numbers of them."""
    method, error, width = ROWS[name]
    rank, columns, sent = hvd.rank(), 300, []
    table = tf.Variable(tf.zeros((20, columns)), name="embedding")
    gather = TensorFlowAdapter.allgather

    def watched(self, tensor, *args, **options):
        sent.append((tensor.dtype, tensor.shape[1:].num_elements()))
        return gather(self, tensor, *args, **options)

    def step(rows, factors):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, rows) * factors)
        tape = hvd.DistributedGradientTape(tape, compression=method)
        return tape.gradient(loss, table)

    rows = [[3, 7, 3], [7, 19]]
    factors = [np.random.default_rng(r).normal(size=(len(rows[r]), columns)) for r in range(2)]
    call = tf.function(step) if run == "graph" else step
    with monkeypatch.context() as patch:
        patch.setattr(TensorFlowAdapter, "allgather", watched)
        if run == "elastic":
            patch.setenv("HOROVOD_ELASTIC", "1")
        mean = call(tf.constant(rows[rank]), tf.constant(factors[rank], tf.float32))
    assert isinstance(mean, tf.IndexedSlices)
    expected = np.zeros((20, columns))
    for each, values in zip(rows, factors, strict=True):
        np.add.at(expected, each, values / 2)
    difference = tf.convert_to_tensor(mean).numpy() - expected
    assert 0 < np.abs(difference).max() <= error * np.abs(expected).max()
    padded = 4 + (2 * columns if width == 2 else 512 + 2)
    assert [one for one in sent if one[0] == tf.uint8 and one[1] != 1] == [(tf.uint8, padded)]
    assert tf.float32 not in [dtype for dtype, _ in sent]


@pytest.mark.ranks(2)
def test_what_a_tape_cannot_keep(hvd):
    x = tf.constant(np.ones((3, 3), "f4"))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tf.Variable(x)
        loss = tf.reduce_sum(x * x) + tf.reduce_sum(y)
    stateful = hvd.DistributedGradientTape(tape, compression=C.onebit(min_elements=0))
    with pytest.raises(hvdx.compression.CompressionError, match="source 1 is a tensor"):
        stateful.gradient(loss, [y, x])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("run", ["eager", "graph"])
def test_no_update_is_lost_when_the_network_changes(hvd, links, run):
    """Compression.auto on a link that is slow, then fast; a raw step in between delivers."""
    links(0.1, 1e9)
    shape, random = (96, 64), np.random.default_rng(0)
    grads = random.normal(size=(14, hvd.size(), *shape)).astype("f4")
    table = tf.Variable(tf.zeros(shape))
    auto = C.auto(methods=["onebit"], verbose=False, every=4)

    def step(grad):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(table * grad)
        tape = hvd.DistributedGradientTape(tape, compression=auto)
        return tape.gradient(loss, table)

    call = tf.function(step) if run == "graph" else step
    applied, owing = 0.0, []
    for number, everyone in enumerate(grads):
        applied = applied + call(tf.constant(everyone[hvd.rank()])).numpy().astype("f8")
        tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=auto)
        (state,) = tape.portable_compression_state([table])["parameters"].values()
        true = grads[: number + 1].mean(1, dtype="f8").sum(0)
        np.testing.assert_allclose(applied + state["residual"], true, atol=1e-4)
        owing.append(bool(state["residual"].any()))
    assert owing == [True] * 9 + [False] * 5
