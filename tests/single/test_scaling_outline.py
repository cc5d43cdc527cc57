"""What compressors send, as told by tensors without values: the same as with values."""

from __future__ import annotations

import numpy as np
import pytest

from hvdx.buckets import width
from hvdx.comm import FACTS, in_step, through
from hvdx.compression.base import Spec
from hvdx.compression.plans import Form
from hvdx.compression.state import leaves
from hvdx.link import messages
from hvdx.ops import NumpyOps
from hvdx.scaling.outline import asked, kept
from hvdx.scaling.ways import METHODS, read_way

METHODS = [name for name in METHODS if name not in ("local_sgd", "diloco")]
SHAPES = [(64, 48), (130, 33), (3, 40, 50), (2000,), (7,), (1, 1)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", [*METHODS, "powersgd=1", "topk=0.3", "dgc=0.2"])
def test_a_method_sends_what_it_sends(name, ranks):
    """The very messages, in the very rounds, of real ranks that train."""
    ops, compressor = NumpyOps(), read_way(name).compressor
    for shape in SHAPES:
        spec = Spec("gradient", shape, "float32", ranks)
        sent: list[list] = [[] for _ in range(ranks)]
        works = []
        for rank in range(ranks):
            values = np.random.default_rng(rank).standard_normal(shape).astype("float32")
            work = compressor.reduce(ops, values, compressor.init(ops, spec))
            works.append(through(work, see=sent[rank].append))
        in_step(works)
        rounds = [each for each in sent[0] if not isinstance(each, FACTS)]
        told = [m for n, each in enumerate(rounds) for m in messages(ops, each, n)]
        assert list(asked(compressor, Form(shape, "float32"), ranks)) == told, shape


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [*METHODS, "diloco"])
def test_a_method_keeps_what_it_keeps(name, ranks):
    ops, way = NumpyOps(), read_way(name)
    compressor = way.compressor
    if way.local:
        compressor = way.local.outer(lambda spec: np.zeros(spec.shape, spec.dtype))
    for shape in SHAPES:
        state = compressor.init(ops, Spec("gradient", shape, "float32", ranks))
        size = sum(leaf.tensor.size * width(str(leaf.tensor.dtype)) for leaf in leaves(state))
        assert kept(way.compressor, Form(shape, "float32"), ranks) == size, shape


def test_a_thousand_ranks():
    """Between so many, int8 rounds its pieces up to blocks, and topk no longer gathers."""
    form = Form((4096, 1024), "float32")
    first, second = asked(read_way("int8").compressor, form, 1024)
    assert (first.kind, second.kind) == ("alltoall", "allgather")
    assert first.payload == 1024 * second.payload == 4096 * 1024 * 257 // 256
    (only,) = asked(read_way("topk=0.01").compressor, form, 1024)
    assert only.kind == "allreduce float32" and only.payload == form.bytes
