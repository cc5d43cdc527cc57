"""Compressors on a GPU send the bytes that they send on a CPU, and do not wait for it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from hvdx.comm import FACTS, Allgather, Owners, Ranks, Together, together
from hvdx.compression import Compression, Spec
from hvdx.ops import NumpyOps, ops_for

METHODS = {
    "fp16": Compression.fp16,
    "bf16": Compression.bf16,
    "int8": Compression.int8(),
    "int8 with feedback": Compression.int8(feedback=True),
    "int8 at random": Compression.int8(rounding="stochastic"),
    "int4": Compression.int4(),
    "int4 at random": Compression.int4(rounding="stochastic"),
    "onebit": Compression.onebit(),
    "topk": Compression.topk(0.01),
    "dgc": Compression.dgc(0.01),
    "randomk": Compression.randomk(0.01),
    "powersgd": Compression.powersgd(2),
    "powersgd in turns": Compression.powersgd(2, alternating=True),
}
SHAPE, STEPS = (260, 300), 3  # no whole number of blocks; indices need more than 16 bits


def gradients():
    random = np.random.default_rng(5)
    grads = [random.standard_normal(SHAPE).astype("f4") for _ in range(STEPS)]
    grads[0][7] = np.round(grads[0][7])  # equals, among which top-k must choose alike
    grads[1][3, 4] = 1e6
    return grads


class Sent:
    """Answers as if other ranks had sent the same; keeps what was sent."""

    def __init__(self, ranks, concat):
        self.ranks, self.concat, self.payloads = ranks, concat, []

    def run(self, work):
        answer = None
        while True:
            try:
                answer = self.reply(work.send(answer))
            except StopIteration as done:
                return done.value

    def reply(self, request):
        if isinstance(request, FACTS):
            return {Ranks: self.ranks, Owners: None}.get(type(request), 1)
        if isinstance(request, Together):
            return [self.reply(each) for each in request.requests]
        self.payloads.append(request.tensor + 0)  # a copy: it may be written over
        if isinstance(request, Allgather):
            return self.concat([request.tensor] * self.ranks)
        return request.tensor + 0


def sent(method, ranks, tensor, concat, guard=contextlib.nullcontext):
    """Return the payloads and means of a few steps, as NumPy arrays."""
    compressor, means, payloads = METHODS[method], [], []
    grads = [tensor(each) for each in gradients()]
    kind = ops_for(type(grads[0])) if not isinstance(grads[0], np.ndarray) else NumpyOps()
    ops, spec = kind.beside(grads[0]), Spec("layer.weight", SHAPE, "float32", ranks)
    state = compressor.of(spec).init(ops, spec)
    for step, grad in enumerate(grads):
        answers = Sent(ranks, concat)
        with guard() if step else contextlib.nullcontext():  # first calls may wait for libraries
            work = compressor.of(spec).at(step).reduce(ops, grad, state)
            reduced = answers.run(together([work], ops))[0]
        state = reduced.state
        payloads += answers.payloads
        means.append(reduced.mean)
    if isinstance(grads[0], np.ndarray):
        return payloads, means
    return [each.cpu().numpy() for each in payloads], [each.cpu().numpy() for each in means]


@contextlib.contextmanager
def unwaited():
    """Let torch raise where it would wait for the GPU."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_payloads_are_those_of_a_cpu_and_of_numpy(device, method, ranks):
    exact = not method.startswith("powersgd")  # which multiplies matrices
    # QR, cuSOLVER's, and no part of the others.
    guard = unwaited if exact else contextlib.nullcontext
    here = sent(method, ranks, lambda g: torch.tensor(g, device=device), torch.cat, guard)
    for there in (
        sent(method, ranks, torch.from_numpy, torch.cat),
        sent(method, ranks, np.copy, np.concatenate),
    ):
        for ours, theirs in zip(here, there, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one.dtype == other.dtype and one.shape == other.shape
                assert not exact or one.tobytes() == other.tobytes()
        for one, other in zip(here[1], there[1], strict=True):
            assert np.linalg.norm(one - other) <= 1e-2 * np.linalg.norm(other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_to_all(device, bad):
    grad = torch.ones(SHAPE, device=device)
    grad[5, 5] = bad
    ops, spec = ops_for(torch.Tensor).beside(grad), Spec("w", SHAPE, "float32", 2)
    compressor = METHODS["int4"].of(spec)
    state = compressor.init(ops, spec)
    reduced = Sent(2, torch.cat).run(together([compressor.reduce(ops, grad, state)], ops))[0]
    assert not bool(reduced.mean.isfinite().all())
    assert bool(reduced.state.residual.isfinite().all())
