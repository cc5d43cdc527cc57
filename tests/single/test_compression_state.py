"""What methods keep: saved, restored, and moved between numbers of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdx.comm import in_step, through, together
from hvdx.compression import Compression, CompressionError, Compressor, Spec, after
from hvdx.compression.portable import carried, moved, portable, restored, shares
from hvdx.compression.state import leaves
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps

OPS = NumpyOps()
SHAPES = {"weight": (48, 96), "odd": (7, 11, 3), "bias": (48,)}
METHODS = {
    "none": Compression.none,
    "fp16": Compression.fp16,
    "bf16": Compression.bf16,
    "int8": Compression.int8(),
    "int8 with feedback": Compression.int8(feedback=True),
    "int4": Compression.int4(),
    "onebit": Compression.onebit(min_elements=0),
    "onebit by matrix": Compression.onebit(scales="matrix"),
    "topk": Compression.topk(0.02),
    "dgc": Compression.dgc(0.02, min_elements=0),
    "randomk": Compression.randomk(0.05),
    "powersgd": Compression.powersgd(4, min_elements=0),
    "after": after(1, Compression.onebit()),
}
every = pytest.mark.parametrize("method", METHODS)


class Job:
    """Ranks in this process that reduce the gradients of several parameters."""

    def __init__(self, compressor: Compressor, ranks: int) -> None:
        self.compressor, self.ranks, self.done = compressor, ranks, 0
        self.states = [self.first() for _ in range(ranks)]

    def first(self) -> dict[str, Any]:
        specs = [Spec(name, shape, "float32", self.ranks) for name, shape in SHAPES.items()]
        return {spec.name: self.compressor.of(spec).init(OPS, spec) for spec in specs}

    def run(self, steps: int) -> list[list[bytes]]:
        """Return the bytes of the means of each step, from gradients that depend on the step."""
        told = []
        for step in range(self.done, self.done + steps):
            compressor = self.compressor.at(step)
            random = np.random.default_rng(step)
            works = []
            for states in self.states:
                grads = [random.normal(size=s).astype(np.float32) for s in SHAPES.values()]
                works.append(
                    together(
                        [
                            compressor.reduce(OPS, grad, states[name])
                            for name, grad in zip(SHAPES, grads, strict=True)
                        ],
                        OPS,
                    )
                )
            results = in_step(works)
            self.states = [
                {name: one.state for name, one in zip(SHAPES, own, strict=True)} for own in results
            ]
            told.append([one.mean.tobytes() for one in results[0]])
        self.done += steps
        return told

    def owed(self) -> dict[str, Any]:
        """Return what training is owed, by the definition: means, and owners' pieces."""
        result = {}
        for name, shape in SHAPES.items():
            ranks = [leaves(own[name]) for own in self.states]
            parts = [
                np.mean([leaf.tensor for leaf in same], 0, dtype=np.float64)
                for same in zip(*ranks, strict=True)
                if same[0].kind in ("owed", "averaged")
            ]
            total = np.stack(parts) if parts else np.zeros((1, *shape))
            for same in zip(*ranks, strict=True):
                if same[0].kind == "piece":
                    whole = np.concatenate([leaf.tensor for leaf in same])
                    total[0] += whole[: total[0].size].reshape(shape)
            result[name] = total
        return result

    def saved(self) -> list[dict[str, dict[str, Any]]]:
        """Return the portable state of every parameter, as each rank has it."""
        works = [together([portable(OPS, s) for s in own.values()], OPS) for own in self.states]
        return [dict(zip(SHAPES, own, strict=True)) for own in in_step(works)]

    def load(self, saved: list[dict[str, dict[str, Any]]]) -> None:
        self.states = [
            {name: restored(like, own[name]) for name, like in self.first().items()}
            for own in saved
        ]


@every
def test_another_number_of_ranks_is_owed_the_same(method):
    """Gate: 4, 2, 3, 4 ranks, and 1; training goes on in between."""
    job = Job(METHODS[method], 4)
    job.run(3)
    owes = any(np.any(each) for each in job.owed().values())
    assert owes == (method not in ("none", "fp16", "bf16", "int8"))
    for ranks in (2, 3, 4, 1, 3):
        owed, saved = job.owed(), job.saved()
        for name, tensors in saved[0].items():
            for other in saved[1:]:
                assert {p: t.tobytes() for p, t in other[name].items()} == {
                    p: t.tobytes() for p, t in tensors.items()
                }
        job = Job(METHODS[method], ranks)
        job.load([saved[0]] * ranks)
        job.done = 3
        for name, tensor in job.owed().items():
            assert np.linalg.norm(tensor - owed[name]) <= 1e-6 * np.linalg.norm(owed[name]), name
        job.run(2)


@every
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_ranks_go_on_to_the_last_bit(method, ranks):
    job = Job(METHODS[method], ranks)
    job.run(3)
    saved = [
        {
            name: {leaf.path: leaf.tensor.copy() for leaf in leaves(state)}
            for name, state in s.items()
        }
        for s in job.states
    ]
    again = Job(METHODS[method], ranks)
    again.load(saved)
    again.done = job.done
    assert again.run(20) == job.run(20)


@every
def test_ranks_that_are_left_bring_what_they_owe(method):
    """Elastic training: of 4 ranks, 1 is lost; 3 go on with 2 new ones, which have nothing."""
    job, new = Job(METHODS[method], 4), Job(METHODS[method], 5)
    job.run(3)
    left = {0: 1, 2: 0, 3: 3}  # place now: rank then
    given = {place: _shares(job.states[rank], rank, 4) for place, rank in left.items()}
    works = []
    for place in range(5):
        likes = new.states[place]
        held = given.get(place, {name: {} for name in SHAPES})
        works.append(together([carried(OPS, likes[n], held[n], place == 0) for n in SHAPES], OPS))
    new.states = [dict(zip(SHAPES, own, strict=True)) for own in in_step(works)]
    for name, owed in new.owed().items():
        expected = job.owed()[name] - _owed_by(job, 2, name)
        assert np.linalg.norm(owed - expected) <= 1e-6 * np.linalg.norm(expected), name
    for state in new.states:  # new ranks learn what is equal on all
        for name, own in state.items():
            for new_leaf, old in zip(leaves(own), leaves(job.states[0][name]), strict=True):
                if old.kind == "same":
                    np.testing.assert_array_equal(new_leaf.tensor, old.tensor)


def _shares(states: dict[str, Any], rank: int, ranks: int) -> dict[str, dict[str, Any]]:
    return {name: shares(OPS, leaves(state), rank, ranks) for name, state in states.items()}


def _owed_by(job: Job, rank: int, name: str) -> Any:
    kinds = [leaf for leaf in leaves(job.states[rank][name]) if leaf.kind in ("owed", "averaged")]
    part = _shares(job.states[rank], rank, 4)[name]
    return np.stack([part[leaf.path] for leaf in kinds]) if kinds else 0.0


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("feedback", [True, False])
def test_padding_adds_nothing_to_a_mean(ranks, feedback):
    """Ranks' pieces are padded to whole blocks, and 1-bit codes decode padding to ±scale: that
    counted in the scale of the mean, and where errors are kept, they grew a thousandfold a step.
    """
    compressor, shape = Compression.onebit(feedback, min_elements=0), (11, 100)
    states = [compressor.init(OPS, Spec("w", shape, "float32", ranks)) for _ in range(ranks)]
    signs = np.where(np.arange(1100) % 3, 1, -1).astype(np.float32)  # which need no rounding
    grad = signs.reshape(shape)
    for _ in range(3):
        results = in_step([compressor.reduce(OPS, grad, state) for state in states])
        states = [result.state for result in results]
        np.testing.assert_array_equal(results[0].mean, grad)


def test_one_ranks_state_for_all_is_not_what_is_owed():
    """The negative control: a checkpoint that rank 0 alone has written, for all."""
    job = Job(METHODS["onebit"], 3)
    job.run(3)
    owed, mine = job.owed()["weight"], job.states[0]
    job.states = [mine] * 3
    assert np.linalg.norm(job.owed()["weight"] - owed) > 0.1 * np.linalg.norm(owed)


def test_a_portable_state_is_one_tensor_of_the_parameters_shape():
    job = Job(METHODS["onebit"], 4)
    job.run(1)
    shapes = {name: {p: t.shape for p, t in own.items()} for name, own in job.saved()[0].items()}
    assert shapes == {"weight": {"residual": (48, 96)}, "odd": {"residual": (7, 11, 3)}, "bias": {}}


@pytest.mark.parametrize("make", [TorchOps, TensorFlowOps])
def test_in_every_framework(make):
    """The verbs that NumPy hides: states of torch and TensorFlow tensors."""
    tensor = {
        TorchOps: lambda: pytest.importorskip("torch").tensor,
        TensorFlowOps: lambda: pytest.importorskip("tensorflow").constant,
    }[make]()
    job = Job(METHODS["onebit"], 3)
    job.run(2)
    ops = make()
    spec = Spec("weight", SHAPES["weight"], "float32", 3)
    works = []
    for own in job.states:
        like = METHODS["onebit"].init(ops, spec)
        state = restored(like, {leaf.path: tensor(leaf.tensor) for leaf in leaves(own["weight"])})
        works.append(through(portable(ops, state), make=tensor))
    result = np.asarray(in_step(works)[0]["residual"])
    np.testing.assert_array_equal(result, job.saved()[0]["weight"]["residual"])


@pytest.mark.parametrize(
    ("method", "tensors", "told"),
    [
        ("onebit", {"residual": (48, 95)}, "residual has shape (48, 95) .* but (48, 96) here"),
        ("onebit", {"residual": (48, 96), "inner.lost": (8,)}, "inner.lost has shape (8,)"),
        ("onebit", {}, "holds nothing, but .* inner.lost (2048,), residual (48, 96)"),
        ("topk", {"momentum": (48, 96), "owed": (48, 96)}, "holds momentum .* keeps residual"),
        ("powersgd", {"residual": (48, 96)}, "inner (4, 96)"),
        ("int8", {"residual": (48, 96)}, "keeps nothing"),
    ],
)
def test_a_state_of_another_form_is_refused(method, tensors, told):
    like = METHODS[method].init(OPS, Spec("weight", (48, 96), "float32", 3))
    with pytest.raises(CompressionError) as error:
        restored(like, {path: np.zeros(shape, "f4") for path, shape in tensors.items()})
    for part in told.split(" .* "):
        assert part in str(error.value)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_state_of_another_form_takes_what_is_owed(ranks):
    """Without a word between ranks: owners of pieces owe them themselves then."""
    job = Job(Compression.onebit(), ranks)
    job.run(3)
    spec, ops = Spec("weight", SHAPES["weight"], "float32", ranks), NumpyOps()
    like = Compression.topk(0.01, min_elements=0).init(ops, spec)
    told = [moved(ops, like, leaves(own["weight"]), (r, ranks)) for r, own in enumerate(job.states)]
    assert [lost for _, lost in told] == [[]] * ranks
    owed = np.mean([state.residual for state, _ in told], 0)
    np.testing.assert_allclose(owed, job.owed()["weight"][0], atol=1e-6)
    assert np.abs(owed).max() > 0.1
    nowhere = Compression.powersgd(4).init(ops, spec)._replace(residual=np.zeros((2, 3), "f4"))
    assert moved(ops, nowhere, leaves(job.states[0]["weight"]), (0, ranks))[1] == ["residual"]
