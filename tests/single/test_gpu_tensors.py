"""What can be shown of GPUs without one: fake CUDA tensors, which have a device but no values.

An operation on tensors of two devices raises, and so does whatever needs a value on the host: a
GPU would be waited for.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from hvdx.comm import FACTS, Allgather, Owners, Ranks, Together, together  # noqa: E402
from hvdx.compression import Compression, Spec  # noqa: E402
from hvdx.compression.state import leaves  # noqa: E402
from hvdx.ops import NumpyOps, TorchOps, ops_for  # noqa: E402

METHODS = {
    "none": Compression.none,
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
SHAPE = (260, 300)  # no whole number of blocks; indices need more than 16 bits


class Indexing(TorchFunctionMode):
    """Index by ATen's operations: Python's own way asks for a driver, even for fake tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        x, where = args
        place = 0
        for each in where if isinstance(where, tuple) else (where,):
            if isinstance(each, int):
                x, place = x.select(place, each), place - 1
            elif isinstance(each, slice):
                x = torch.ops.aten.slice(x, place, each.start, each.stop, each.step or 1)
            elif each is None:
                x = x.unsqueeze(place)
            else:
                x = torch.ops.aten.index(x, [*[None] * place, each])
            place += 1
        return x


class NoTravel(TorchDispatchMode):
    """Refuse copies between host and GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in [*args, result] if isinstance(each, torch.Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        assert not (copies and len({each.device.type for each in tensors}) > 1), function
        return result


def reply(request, ranks):
    if isinstance(request, FACTS):
        return {Ranks: ranks, Owners: None}.get(type(request), 1)
    if isinstance(request, Together):
        return [reply(each, ranks) for each in request.requests]
    assert request.tensor.device.type == "cuda"
    if isinstance(request, Allgather):
        return torch.cat([request.tensor] * ranks)
    return request.tensor.clone()


def run(work, ranks):
    answer = None
    while True:
        try:
            answer = reply(work.send(answer), ranks)
        except StopIteration as done:
            return done.value


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_compressors_stay_on_the_gpu_and_do_not_wait_for_it(method, ranks):
    compressor = METHODS[method]
    spec = Spec("layer.weight", SHAPE, "float32", ranks)
    with FakeTensorMode(), Indexing():
        grad = torch.empty(SHAPE, device="cuda")
        ops = ops_for(torch.Tensor).beside(grad)
        state = compressor.of(spec).init(ops, spec)
        for step in range(2):
            with NoTravel():
                work = compressor.of(spec).at(step).reduce(ops, grad.clone(), state)
                reduced = run(together([work], ops), ranks)[0]
                if callable(reduced.own):
                    reduced.own()
            state = reduced.state
            assert reduced.mean.device == grad.device
            assert tuple(reduced.mean.shape) == SHAPE
            assert all(leaf.tensor.device == grad.device for leaf in leaves(state))


def test_what_waits_is_noticed():
    with FakeTensorMode():
        x = torch.empty(8, device="cuda")
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(x.sum() > 0)
        with pytest.raises(Exception, match="device"):
            x + torch.zeros(8)
        with pytest.raises(AssertionError, match="copy"), NoTravel():
            torch.as_tensor([1.0, 2.0], device="cuda")


@pytest.mark.parametrize("size, count", [(1, 1), (9, 9), (70_000, 700), (5000, 4000)])
def test_gpus_choose_the_largest_without_waiting_as_cpus_do(size, count):
    random = np.random.default_rng(0)
    x = np.round(random.standard_normal(size) * 4).astype("f4")  # many equals
    special = np.array([np.inf, np.nan, -0.0, -np.inf, 1e-40], "f4")[:size]
    x[-len(special) :] = special
    bits = TorchOps().abs_bits(torch.from_numpy(x))
    found = TorchOps()._largest_unseen(bits, count)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found, NumpyOps().largest(x, count))
