"""A method for each parameter."""

from __future__ import annotations

import numpy as np
import pytest

from hvdx.comm import in_step
from hvdx.compression import (
    Compression,
    CompressionError,
    Compressor,
    Spec,
    after,
    as_compressor,
    error_feedback,
    min_size,
    momentum,
)
from hvdx.ops import NumpyOps

OPS = NumpyOps()


def spec(name: str, shape: tuple[int, ...] = (64, 64)) -> Spec:
    return Spec(name, shape, "float32", 2)


def rules(**more: object) -> Compressor:
    return Compression.by_layer(
        {"*.bias": Compression.none, "head.*": Compression.int8, "*": Compression.topk(0.1)}, **more
    )


def test_the_first_pattern_that_matches_counts():
    chosen = {name: rules().of(spec(name)) for name in ("a.bias", "head.bias", "head.w", "a.w")}
    assert [c.name for c in chosen.values()] == [
        "none", "none", "int8(feedback=False)", "topk(0.1)",
    ]  # fmt: skip
    assert Compression.by_layer({}, default=Compression.bf16).of(spec("w")) is Compression.bf16
    assert Compression.by_layer({}).of(spec("w")) is Compression.none
    assert repr(rules(default=Compression.fp16)) == (
        "Compression.by_layer({'*.bias': none, 'head.*': int8(feedback=False), '*': topk(0.1)}, "
        "default=fp16)"
    )


def test_a_function_chooses():
    def choose(name, shape, dtype):
        assert dtype == "float32"
        return Compression.powersgd if len(shape) == 2 and "head" not in name else None

    compressor = Compression.by_layer(choose)
    assert compressor.of(spec("w")).name == "powersgd(rank=4)"
    assert compressor.of(spec("head")) is Compression.none
    assert compressor.of(spec("w", (3,))) is Compression.none
    assert repr(compressor) == f"Compression.by_layer({choose.__qualname__})"


def test_what_it_keeps_is_what_it_chose_keeps():
    assert rules().stateful and not rules().elementwise and not rules().owns_momentum
    assert not Compression.by_layer({"*": Compression.int8}).stateful
    assert rules().init(OPS, spec("a.bias")) is None
    assert rules().init(OPS, spec("a.w")).residual.shape == (64, 64)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda c: min_size(5000, c), "topk(0.1)"),
        (error_feedback, "topk(0.1)"),
        (lambda c: after(2, c), "after(2, topk(0.1))"),
        (lambda c: after(2, min_size(5000, c)), "after(2, topk(0.1))"),
    ],
)
def test_wrappers_wrap_what_is_chosen(wrap, name):
    compressor = wrap(Compression.by_layer({"*": Compression.topk(0.1)})).of(spec("w"))
    assert compressor.name == name and compressor.policy is None
    direct = wrap(Compression.topk(0.1))
    assert [start for start, _ in compressor.phases] == [start for start, _ in direct.phases]
    grads = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    means = []
    for each in (compressor, direct):
        works = [each.at(5).reduce(OPS, g, each.init(OPS, spec("w"))) for g in grads]
        try:
            means.append(in_step(works)[0].mean)
        except CompressionError as error:  # feedback twice
            means.append(str(error))
    np.testing.assert_array_equal(*means)


def test_phases_are_those_of_what_is_chosen():
    compressor = Compression.by_layer({"a": after(3, Compression.int8())}, Compression.bf16)
    assert compressor.of(spec("a")).at(0).init(OPS, spec("a")) is None
    assert [start for start, _ in compressor.of(spec("a")).phases] == [0, 3]
    assert compressor.of(spec("b")).at(0) is Compression.bf16


def test_one_may_hold_another():
    inner = Compression.by_layer({"*.w": Compression.bf16}, Compression.fp16)
    outer = Compression.by_layer({"head.*": inner})
    assert outer.of(spec("head.w")) is Compression.bf16
    assert outer.of(spec("head.b")) is Compression.fp16
    assert outer.of(spec("w")) is Compression.none


def test_each_is_prepared_with_its_own_parameters():
    seen = {}

    def measuring(name: str) -> Compressor:
        def prepare(adapter, specs, process_set):
            seen[name] = [each.name for each in specs]
            return Compression.bf16

        return Compression.none._replace(name=name, prepare=prepare)

    compressor = Compression.by_layer(
        {"a*": measuring("A"), "b*": Compression.fp16, "x*": measuring("X")}, measuring("rest")
    )
    names = ["a1", "b1", "c1", "a2"]
    ready = compressor.prepare(None, [spec(name) for name in names], None)
    assert seen == {"A": ["a1", "a2"], "rest": ["c1"]}  # and nothing for X to measure
    assert [ready.of(spec(name)).name for name in names] == ["bf16", "fp16", "bf16", "bf16"]
    assert Compression.by_layer({"a*": Compression.fp16}).prepare is None
    wrapped = min_size(10, compressor).prepare(None, [spec(name) for name in names], None)
    assert wrapped.of(spec("a1")).name == "bf16"


def test_all_or_none_apply_momentum():
    mixed = {"emb*": Compression.dgc(), "*": Compression.int8}
    with pytest.raises(CompressionError) as error:
        Compression.by_layer(mixed)
    for told in ("dgc(density=0.001, momentum=0.9)", "int8", "hvd.compression.momentum(0.9"):
        assert told in str(error.value)
    compressor = Compression.by_layer(
        {"emb*": Compression.dgc(), "*": momentum(0.9, Compression.int8())}, momentum(0.9)
    )
    assert compressor.owns_momentum
    assert compressor.of(spec("w")).name == "momentum(0.9, int8(feedback=False))"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Compression.by_layer({"*.w": "int9"}), "'*.w': unknown compression='int9'"),
        (lambda: Compression.by_layer({}, default=3), "default: unknown compression=3"),
        (lambda: Compression.by_layer({3: None}), "{3: ...}): a pattern of names must be a string"),
        (lambda: Compression.by_layer([Compression.int8]), "give a compressor by pattern"),
        (lambda: Compression.by_layer(lambda *a: "x").of(spec("w1")), "for 'w1': unknown compr"),
        (
            lambda: Compression.by_layer(lambda *a: Compression.dgc).of(spec("w1")),
            "for 'w1', which applies momentum itself",
        ),
        (
            lambda: in_step([Compression.by_layer({}).reduce(OPS, np.ones(3), None)]),
            "chooses by a parameter's name",
        ),
        (lambda: as_compressor(Compression.by_layer), "by_layer: call it"),
    ],
)
def test_what_cannot_be(make, told):
    with pytest.raises(CompressionError) as error:
        make()
    assert told in str(error.value)
