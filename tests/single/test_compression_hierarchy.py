"""Raw within hosts, compressed between them: between ranks that live in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdx.comm import Among, in_step, operations, sent_share, through, together
from hvdx.compression import (
    Compression,
    CompressionError,
    Compressor,
    Spec,
    after,
    as_compressor,
    error_feedback,
    hierarchy,
)
from hvdx.compression.hierarchy import Hosts, among_hosts
from hvdx.compression.portable import portable, restored, shared_alike
from hvdx.compression.state import leaves
from hvdx.ops import NumpyOps

OPS = NumpyOps()
HIERARCHY = Compression.hierarchical(Compression.int8)
SHAPES = {"weight": (48, 96), "odd": (7, 11, 3), "bias": (5,)}
METHODS = {
    "none": Compression.none,
    "fp16": Compression.fp16,
    "bf16": Compression.bf16,
    "int8 at random": Compression.int8(rounding="stochastic"),
    "int4": Compression.int4(),
    "onebit": Compression.onebit(min_elements=0),
    "onebit by matrix": Compression.onebit(scales="matrix"),
    "topk": Compression.topk(0.02, min_elements=0),
    "dgc": Compression.dgc(0.02, min_elements=0),
    "randomk": Compression.randomk(0.05, min_elements=0),
    "powersgd": Compression.powersgd(4, min_elements=0),
    "after": after(1, Compression.onebit()),
    "by layer": Compression.by_layer({"odd": Compression.topk(0.1)}, default=Compression.int4),
}
every = pytest.mark.parametrize("method", METHODS)


class Job:
    """Hosts of ranks that reduce several parameters, each rank side by side as engines do."""

    def __init__(self, inner: Compressor, hosts: int, local: int) -> None:
        self.ranks, self.local, self.done = hosts * local, local, 0
        self.compressors = [
            among_hosts(inner, Hosts(self.ranks, local, place)) for place in range(self.ranks)
        ]
        self.states = self.first()
        self.sent = 0.0  # bytes a step, of the first host to others

    def first(self) -> list[dict[str, Any]]:
        specs = [Spec(name, shape, "float32", self.ranks) for name, shape in SHAPES.items()]
        return [{s.name: each.of(s).init(OPS, s) for s in specs} for each in self.compressors]

    def step(self, grads: list[dict[str, Any]]) -> dict[str, Any]:
        self.sent = 0.0
        works = []
        for rank, own in enumerate(grads):
            each = [
                self.compressors[rank]
                .of(Spec(name, grad.shape, "float32", self.ranks))
                .at(self.done)
                .reduce(OPS, grad, self.states[rank][name])
                for name, grad in own.items()
            ]
            work = together(each, OPS)
            works.append(through(work, see=self._count) if rank < self.local else work)
        results = in_step(works)
        self.states = [
            {name: one.state for name, one in zip(SHAPES, own, strict=True)} for own in results
        ]
        self.done += 1
        for own in results[1:]:  # the same on all ranks, to the last bit
            for one, other in zip(own, results[0], strict=True):
                assert one.mean.tobytes() == other.mean.tobytes()
        return {name: one.mean for name, one in zip(SHAPES, results[0], strict=True)}

    def _count(self, request: Any) -> None:
        for each in getattr(request, "requests", [request]):
            inside = isinstance(each, Among) and each.ranks[1] - each.ranks[0] < self.local
            for one in operations(each) if not inside else ():
                assert isinstance(each, Among) or self.local in (1, self.ranks)
                share = sent_share(type(one).__name__.lower(), self.ranks // self.local)
                self.sent += share * np.asarray(one.tensor).nbytes

    def owed(self, name: str) -> Any:
        """Return what is owed to the mean, by the definition."""
        total = np.zeros(SHAPES[name])
        for rank in range(0, self.ranks, self.local):
            for _, tensor, kind in leaves(self.states[rank][name]):
                whole = np.zeros(SHAPES[name])
                if kind.startswith("owed"):
                    whole = tensor / (self.ranks // self.local)
                elif kind.startswith("piece"):
                    host = rank // self.local
                    flat = np.zeros((self.ranks // self.local, tensor.size))
                    flat[host] = tensor
                    whole = flat.reshape(-1)[: whole.size].reshape(whole.shape)
                total += whole
        return total

    def saved(self) -> list[dict[str, dict[str, Any]]]:
        works = [together([portable(OPS, s) for s in own.values()], OPS) for own in self.states]
        return [dict(zip(SHAPES, own, strict=True)) for own in in_step(works)]

    def load(self, saved: dict[str, dict[str, Any]]) -> None:
        self.states = [
            {name: restored(like, saved[name]) for name, like in own.items()}
            for own in self.first()
        ]


def gradients(ranks: int, steps: int) -> list[list[dict[str, Any]]]:
    """Return gradients (step, rank, name), of whole numbers, so that their sums are exact."""
    random = np.random.default_rng(0)
    return [
        [
            {n: random.integers(-64, 64, s).astype(np.float32) for n, s in SHAPES.items()}
            for _ in range(ranks)
        ]
        for _ in range(steps)
    ]


def of_hosts(grads: list[dict[str, Any]], local: int) -> list[dict[str, Any]]:
    """Return the means of each host."""
    hosts = [grads[start : start + local] for start in range(0, len(grads), local)]
    return [{n: np.mean([g[n] for g in own], 0, dtype="f4") for n in SHAPES} for own in hosts]


@every
@pytest.mark.parametrize(("hosts", "local"), [(2, 2), (3, 2)])
def test_it_is_what_one_rank_a_host_makes_of_its_mean(method, hosts, local):
    """To the last bit, over steps, with as many bytes between hosts; states too."""
    job, flat = Job(METHODS[method], hosts, local), Job(METHODS[method], hosts, 1)
    for grads in gradients(hosts * local, 3):
        means, told = job.step(grads), flat.step(of_hosts(grads, local))
        assert {n: m.tobytes() for n, m in means.items()} == {
            n: m.tobytes() for n, m in told.items()
        }
        padding = 4 * local * hosts * 2 * len(SHAPES)  # at most, in two phases
        assert flat.sent <= job.sent <= flat.sent + padding
    for rank in range(hosts * local):
        for name in SHAPES:
            own, one = (leaves(x[name]) for x in (job.states[rank], flat.states[rank // local]))
            assert [leaf.tensor.tobytes() for leaf in own] == [x.tensor.tobytes() for x in one]


@every
def test_what_is_owed_goes_to_other_hosts_and_ranks(method):
    job = Job(METHODS[method], 3, 2)
    for grads in gradients(6, 3):
        job.step(grads)
    owed, saved = {name: job.owed(name) for name in SHAPES}, job.saved()
    for hosts, local in ((2, 2), (4, 1), (1, 3)):
        other = Job(METHODS[method], hosts, local)
        other.load(saved[0])
        for name in SHAPES:
            near = np.linalg.norm(other.owed(name) - owed[name])
            assert near <= 1e-6 * np.linalg.norm(owed[name])
        other.step(gradients(hosts * local, 1)[0])


@pytest.mark.parametrize("method", ["int4", "onebit", "topk", "randomk", "powersgd"])
@pytest.mark.parametrize("hosts", [2, 3])
def test_nothing_is_lost(method, hosts):
    """What was applied and what is owed are the sum of the true means."""
    job = Job(METHODS[method], hosts, 2)
    true, applied = np.zeros(SHAPES["weight"]), np.zeros(SHAPES["weight"])
    for grads in gradients(2 * hosts, 8):
        true += np.mean([own["weight"] for own in grads], 0)
        applied += job.step(grads)["weight"]
    assert np.any(job.owed("weight"))
    error = np.linalg.norm(applied + job.owed("weight") - true)
    assert error <= 1e-5 * np.linalg.norm(true)


def test_in_one_host_all_is_sent_that_is_owed():
    job = Job(METHODS["powersgd"], 2, 2)
    grads = gradients(4, 2)
    job.step(grads[0])
    owed, saved = job.owed("weight"), job.saved()
    alone = Job(METHODS["powersgd"], 1, 4)
    alone.load(saved[0])
    mean = alone.step(grads[1])["weight"]
    true = np.mean([own["weight"] for own in grads[1]], 0)
    np.testing.assert_allclose(mean, true + owed, atol=1e-4)
    assert not np.any(alone.owed("weight"))


def test_states_of_other_hosts_are_told_from_ones_own():
    """As many ranks, in hosts of other sizes: each has its state, but its mates have others."""
    one, other = Job(METHODS["int4"], 2, 3), Job(METHODS["int4"], 3, 2)
    held = leaves(one.states[0]["weight"])
    assert [leaf.kind for leaf in held] == ["owed*3"]
    assert shared_alike(one.states[1]["weight"], held)
    assert not shared_alike(other.states[0]["weight"], held)


@pytest.mark.parametrize(
    ("sizes", "numbers", "told"),
    [
        ([3, 3, 3, 1], [0, 1, 2, 0], "rank 2: 3, rank 3: 1"),
        ([3, 3, 3, 3], [None] * 4, "4 ranks are no hosts of 3"),
        ([2, 2, 2, 2], [0, 0, 1, 1], "the one in place 1 of 4 is number 0 of 2 in its host"),
    ],
)
def test_hosts_that_cannot_be(sizes, numbers, told):
    with pytest.raises(CompressionError, match=told):
        hierarchy._check(sizes, numbers)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Compression.hierarchical(Compression.auto()), "preparations of its own"),
        (lambda: Compression.hierarchical("int8"), "unknown compression='int8'"),
        (lambda: Compression.hierarchical(Compression.int8, 0), "local_size=0"),
        (lambda: Compression.hierarchical(HIERARCHY), "preparations of its own"),
        (lambda: error_feedback(HIERARCHY), r"hierarchical\(error_feedback"),
        (lambda: Compression.by_layer({"*": HIERARCHY}), "goes around the whole"),
        (lambda: HIERARCHY.init(OPS, None), "a single operation cannot"),
        (lambda: as_compressor(Compression.hierarchical), "call it, with the method"),
    ],
)
def test_what_it_refuses(make, told):
    with pytest.raises(CompressionError, match=told):
        make()
