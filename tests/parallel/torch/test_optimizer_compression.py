"""Every compressor under PyTorch's optimizer: the same as between ranks in memory."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch

import hvdx
from hvdx.comm import in_step
from hvdx.compression import Spec, after
from hvdx.ops import NumpyOps

C = hvdx.Compression
METHODS = {
    "bf16": C.bf16,
    "int8": C.int8(),
    "int4": C.int4(),
    "onebit": C.onebit(min_elements=0),
    "onebit by matrix": C.onebit(min_elements=0, scales="matrix"),
    "topk": C.topk(0.1, min_elements=0),
    "randomk": C.randomk(0.2, min_elements=0),
    "powersgd": C.powersgd(2, min_elements=0),
    "dgc": C.dgc(0.1, momentum=0.5, min_elements=0),
    "after": after(2, C.onebit(min_elements=0)),
}
SHAPES = {"weight": (24, 36), "bias": (24,), "odd": (7, 11), "one": (1,), "empty": (0, 3)}


def wrapped(hvd, compression, values=None, **options):
    """Return parameters by name, and their optimizer of rate 1."""
    parameters = {
        name: torch.nn.Parameter(torch.zeros(shape) if values is None else values[name].clone())
        for name, shape in SHAPES.items()
    }
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    named = list(parameters.items())
    return parameters, hvd.DistributedOptimizer(
        optimizer, named, compression=compression, **options
    )


def go(parameters, optimizer, grads):
    """Take a step for each of ``grads`` (step, name); return copies of the parameters."""
    for step in grads:
        optimizer.zero_grad()
        sum((parameters[n] * torch.tensor(g)).sum() for n, g in step.items()).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def train(hvd, compression, grads, **options):
    """Return the parameters after a step for each of ``grads``."""
    parameters, optimizer = wrapped(hvd, compression, **options)
    return {name: p.numpy() for name, p in go(parameters, optimizer, grads).items()}


def same(one, other):
    """Tell whether states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def near(one, other):
    """Tell whether only float32's rounding lies between tensors, of values of about 1."""
    one, other = one.detach(), other.detach()
    return bool((one - other).norm() <= 1e-6 * max(other.norm(), 1.0))


def gradients(rank, steps=4):
    random = np.random.default_rng(rank)
    return [{n: random.normal(size=s).astype("f4") for n, s in SHAPES.items()}
            for _ in range(steps)]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.ranks(2) if name in ("bf16", "int4", "after") else ())
        for name in METHODS
    ],
)
def test_as_between_ranks_in_memory(hvd, method):
    compressor, size = METHODS[method], hvd.size()
    everyone = [gradients(rank) for rank in range(size)]
    result = train(hvd, compressor, everyone[hvd.rank()])
    ops = NumpyOps()
    for name, shape in SHAPES.items():
        states = [compressor.init(ops, Spec(name, shape, "float32", size)) for _ in range(size)]
        expected = np.zeros(shape, "f4")
        for step in range(4):
            works = [
                compressor.at(step).reduce(ops, own[step][name], state)
                for own, state in zip(everyone, states, strict=True)
            ]
            results = in_step(works)
            states = [each.state for each in results]
            expected = expected - results[0].mean
        exact = 1e-3 if method == "powersgd" else 1e-5
        np.testing.assert_allclose(result[name], expected, atol=exact, err_msg=name)
    hashes = hvd.allgather_object([p.tobytes() for p in result.values()])
    assert all(each == hashes[0] for each in hashes)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", ["onebit", "powersgd"])
def test_a_skipped_step_leaves_what_is_kept_alone(hvd, method):
    """Loss scaling skips it, so that it has delivered nothing; and its scale falls."""
    grads = gradients(hvd.rank(), 3)
    plain = train(hvd, METHODS[method], grads)
    parameters, optimizer = wrapped(hvd, METHODS[method])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    optimizer.loss_scale = scaler.get_scale
    bad = gradients(7, 1)[0]
    if hvd.rank() == 0:
        bad["weight"][3, 4] = np.inf
    for step in (grads[0], bad, grads[1], grads[2]):
        before = optimizer.compression_state()
        optimizer.zero_grad()
        loss = sum((p * torch.tensor(step[n])).sum() for n, p in parameters.items())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(optimizer.compression_state(), before) == (step is bad)
    assert scaler.get_scale() == 2.0
    for name, parameter in parameters.items():  # powers of two change no bit
        np.testing.assert_array_equal(parameter.detach(), plain[name], err_msg=name)


@pytest.mark.ranks(2)
def test_parameters_without_a_gradient(hvd):
    """On one rank: others' means, and what it owes; on all: nothing, and all stays owed."""
    parameters, optimizer = wrapped(hvd, C.onebit(min_elements=0))
    values = go(parameters, optimizer, gradients(hvd.rank(), 1))
    before = optimizer.compression_state()["parameters"]
    step = gradients(hvd.rank(), 1)[0]
    del step["odd"]
    if hvd.rank() == 0:
        del step["weight"]
    after = go(parameters, optimizer, [step])
    now = optimizer.compression_state()["parameters"]
    assert parameters["odd"].grad is None and parameters["weight"].grad is not None
    assert same(after["odd"], values["odd"]) and not same(after["weight"], values["weight"])
    assert same(now["odd"], before["odd"]) and not same(now["weight"], before["weight"])


@pytest.mark.ranks(2)
def test_several_backward_passes(hvd):
    """The second reduction of a step compresses with what the first has left."""
    grads = gradients(hvd.rank(), 2)
    parameters, optimizer = wrapped(hvd, C.int8())
    for step in grads:
        sum((p * torch.tensor(step[n])).sum() for n, p in parameters.items()).backward()
    optimizer.step()
    mean = {n: np.mean([sum(s[n] for s in gradients(r, 2)) for r in range(hvd.size())], 0)
            for n in SHAPES}  # fmt: skip
    for name, parameter in parameters.items():
        np.testing.assert_allclose(-parameter.detach(), mean[name], atol=0.2)


@pytest.mark.ranks(2)
def test_momentum_twice_is_refused(hvd):
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    for optimizer, told in (
        (torch.optim.SGD([parameter], 0.1, momentum=0.9), r"momentum=0\.9"),
        (torch.optim.Adam([parameter], 0.1), r"betas=\(0\.9"),
    ):
        with pytest.raises(hvdx.compression.CompressionError, match=told):
            hvd.DistributedOptimizer(optimizer, compression=C.dgc)


@pytest.mark.ranks(2)
def test_ranks_with_other_compressors_are_told(hvd):
    grads = gradients(0, 1)
    chosen = C.topk(0.1) if hvd.rank() == 0 else C.topk(0.2)
    with pytest.raises(hvdx.MismatchError, match=r"topk\(0\.1\)"):
        train(hvd, chosen, grads)


@pytest.mark.ranks(2)
def test_a_single_operation_has_no_state(hvd):
    x = torch.ones(3000)
    np.testing.assert_allclose(hvd.allreduce(x, compression=C.int8()), 1.0, atol=0.01)
    with pytest.raises(hvdx.compression.CompressionError, match="keeps state"):
        hvd.allreduce(x, compression=C.onebit(min_elements=0))


# -- what is kept: saved, loaded, moved


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", ["onebit", "powersgd", "dgc", "randomk", "after"])
def test_training_goes_on_to_the_last_bit(hvd, method):
    grads, state = gradients(hvd.rank(), 6), torch.random.get_rng_state()
    parameters, optimizer = wrapped(hvd, METHODS[method])
    values = go(parameters, optimizer, grads[:3])
    saved = through_a_file(optimizer.compression_state())
    assert saved["step"] == 3 and (saved["rank"], saved["ranks"]) == (hvd.rank(), hvd.size())
    expected = go(parameters, optimizer, grads[3:])
    again, other = wrapped(hvd, METHODS[method], values)
    other.load_compression_state(saved)
    assert same(other.compression_state(), saved)  # before ranks have met
    assert same(go(again, other, grads[3:]), expected)
    again = wrapped(hvd, METHODS[method], values)[0]
    with torch.no_grad():  # in the midst of training, too
        for name, parameter in parameters.items():
            parameter.copy_(again[name])
    optimizer.load_compression_state(saved)
    assert same(go(parameters, optimizer, grads[3:]), expected)
    assert same(optimizer.compression_state(), other.compression_state())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("method", "loaded_by"),
    [
        ("onebit", "rank 0"),
        pytest.param("onebit", "all", marks=pytest.mark.ranks(2)),
        pytest.param("dgc", "all", marks=pytest.mark.ranks(2)),
        pytest.param("dgc", "rank 0", marks=pytest.mark.ranks(2)),
    ],
)
def test_the_portable_state_is_what_is_owed(hvd, method, loaded_by):
    parameters, optimizer = wrapped(hvd, METHODS[method])
    values = go(parameters, optimizer, gradients(hvd.rank(), 3))
    portable = optimizer.portable_compression_state()
    everyone = hvd.allgather_object(optimizer.compression_state())
    assert all(same(each, portable) for each in hvd.allgather_object(portable))
    for name, tensors in portable["parameters"].items():
        for path, tensor in tensors.items():
            ranks = [own["parameters"][name] for own in everyone]
            exact = sum(own[path].double() for own in ranks) / len(ranks)
            if "inner.lost" in ranks[0]:
                lost = torch.cat([own["inner.lost"] for own in ranks])
                exact += lost[: exact.numel()].view(exact.shape)
            assert near(tensor, exact), (name, path)
    again, other = after_one_idle_step(
        hvd, METHODS[method], values, portable if loaded_by == "all" or hvd.rank() == 0 else None
    )
    if method == "onebit":  # what is owed has been applied, or is still owed
        now = other.portable_compression_state()
        assert now["step"] == portable["step"] + 1
        assert {"weight", "odd"} <= set(portable["parameters"])
        for name, held in portable["parameters"].items():
            before, moved = held["residual"].double(), again[name] - values[name]
            left = now["parameters"][name]["residual"] - moved.double()
            assert near(left, before), name


def after_one_idle_step(hvd, compression, values, saved):
    parameters, optimizer = wrapped(hvd, compression, values)
    if saved is not None:
        optimizer.load_compression_state(saved)
    go(parameters, optimizer, [{name: np.zeros(shape, "f4") for name, shape in SHAPES.items()}])
    return parameters, optimizer


def test_what_a_lost_rank_owed_is_told(hvd):
    """As after a crash in elastic training: all ranks but the last have what they owed."""
    parameters, optimizer = wrapped(hvd, C.onebit(min_elements=0))
    values, last = go(parameters, optimizer, gradients(hvd.rank(), 3)), hvd.size() - 1
    saved = optimizer.compression_state()
    told = pytest.warns(UserWarning, match=rf"ranks \[{last}\] of {hvd.size()} is lost")
    with told if hvd.rank() == 0 else contextlib.nullcontext():
        again, other = after_one_idle_step(
            hvd, C.onebit(min_elements=0), values, saved if hvd.rank() < last else None
        )
    now = other.portable_compression_state()
    assert {"weight", "odd"} <= set(saved["parameters"])
    for name, held in saved["parameters"].items():
        own = held["residual"].double() / hvd.size() * (hvd.rank() < last)
        pieces = hvd.allgather_object(held.get("inner.lost"))
        expected = hvd.allreduce(own, op=hvd.Sum)
        if pieces[0] is not None:
            pieces[last] = torch.zeros_like(pieces[last])
            expected += torch.cat(pieces)[: expected.numel()].view(expected.shape)
        left = now["parameters"][name]["residual"] - (again[name] - values[name]).double()
        assert near(left, expected), name


@pytest.mark.ranks(2)
def test_states_of_different_steps_are_told(hvd):
    parameters, optimizer = wrapped(hvd, C.onebit(min_elements=0))
    for step in gradients(hvd.rank(), 2):
        go(parameters, optimizer, [step])
        if hvd.rank() == 0 or optimizer.compression_state()["step"] == 1:
            saved = optimizer.compression_state()
    parameters, optimizer = wrapped(hvd, C.onebit(min_elements=0))
    optimizer.load_compression_state(saved)
    with pytest.raises(hvdx.MismatchError, match="rank 0: 2, rank 1: 1"):
        go(parameters, optimizer, gradients(0, 1))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"compressor": "topk(0.1)"},
            r"compression=topk\(0\.1\), but .*=onebit\(feedback=True, min",
        ),
        ({"rank": 5, "ranks": 7}, "rank 5 of 7, .*portable_compression_state"),
        (
            {"parameters": {"head": {"residual": torch.zeros(3)}}},
            "parameter 'head'.* another model",
        ),
        ({"parameters": {"odd": {"residual": torch.zeros(3)}}}, r"'odd': residual .*\(3,\)"),
        ({"kinds": None}, "not what compression_state"),
    ],
    ids=["codec", "ranks", "name", "shape", "form"],
)
def test_states_that_do_not_fit_are_refused(hvd, change, told):
    parameters, optimizer = wrapped(hvd, C.onebit(min_elements=0))
    go(parameters, optimizer, gradients(hvd.rank(), 1))
    saved = {**optimizer.compression_state(), **change}
    if saved["kinds"] is None:
        del saved["kinds"]
    for one in (optimizer, wrapped(hvd, C.onebit(min_elements=0))[1]):
        with pytest.raises(hvdx.compression.CompressionError, match=f"rank {hvd.rank()}: .*{told}"):
            one.load_compression_state(saved)


# -- compressors that choose


@pytest.mark.ranks(2)
def test_a_policy_chooses_by_parameter(hvd):
    methods = {"weight": C.onebit(min_elements=0), "odd": C.int8()}
    prepared = []

    def prepare(adapter, specs, process_set):
        prepared.append(([spec.name for spec in specs], adapter.ranks(process_set)))
        return C.none._replace(
            elementwise=False, policy=lambda spec: methods.get(spec.name, C.none)
        )

    grads = gradients(hvd.rank(), 2)
    result = train(hvd, C.onebit(min_elements=0)._replace(name="chosen", prepare=prepare), grads)
    assert prepared == [([*reversed(SHAPES)], hvd.size())]
    for name in SHAPES:
        alone = train(hvd, methods.get(name, C.none), grads)[name]
        np.testing.assert_allclose(result[name], alone, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.ranks(2)
def test_where_all_choose_none_buckets_travel_as_without_compression(hvd):
    chosen = C.onebit(min_elements=0)._replace(name="chosen", prepare=lambda *given: C.none)
    parameters, optimizer = wrapped(hvd, chosen)
    values = go(parameters, optimizer, gradients(hvd.rank(), 2))
    assert [bucket.compressor for bucket in optimizer.reducer.buckets] == [C.none]
    assert same(values, go(*wrapped(hvd, C.none), gradients(hvd.rank(), 2)))
