"""Meshes of stages and replicas: they learn what the plain model learns."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hvdx as hvd
from hvdx.compression import CompressionError
from hvdx.errors import MismatchError, PipelineError, PlanError
from hvdx.pipeline.channel import Key


def load_models():
    """The models of the tests in one process."""
    path = Path(__file__).parents[2] / "single" / "test_pipeline_torch.py"
    spec = importlib.util.spec_from_file_location("pipeline_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_models()
four, two = pytest.mark.ranks(4), pytest.mark.ranks(2)
UNEQUAL = [[3, 1, 0], [2]]  # rank 0, which writes checkpoints, is no row's first
MESHES = [
    pytest.param([[0, 2], [1, 3]], marks=four),
    pytest.param(UNEQUAL, marks=four),
    pytest.param([[0, 1, 2, 3]], marks=four),
    pytest.param([[3], [1], [0], [2]], marks=four),
    pytest.param([[1, 0]], marks=two),
]
MIXED = [MESHES[0], MESHES[1], MESHES[-1]]


def pipeline(model, x, **options):
    options = {"micro_batches": 4, "seed": 7, **options}
    return hvd.Pipeline(model, x, F.mse_loss, models.adam, **options)


def train(model, data, **options):
    """Train a pipeline; return it and its losses."""
    pipe = pipeline(model, data[0][0], **options)
    return pipe, [pipe.step(x, y) for x, y in data]


def learnt(pipe, path):
    """Rank 0's whole model, gathered by a checkpoint."""
    pipe.save(path)
    hvd.barrier()
    return hvd.load_state(path)["model"]


@pytest.fixture
def shared(tmp_path):
    """A folder that all ranks know."""
    return Path(hvd.broadcast_object(str(tmp_path)))


@functools.cache
def alone(kind, micro_batches=4, rows=(12,) * 6, clip_norm=None):
    """What one process learns, and its losses."""
    data = models.batches(rows=list(rows))
    options = {"micro_batches": micro_batches, "clip_norm": clip_norm}
    pipe, losses = train(models.made(kind), data, place=["cpu"], **options)
    pipe.close()
    return models.weights(pipe._graph.model), losses


@pytest.mark.parametrize("place", MIXED)
def test_it_learns_what_the_plain_model_learns_in_float64(place, shared):
    """A tied weight in the first and the last stage, clipped gradients, skips."""
    data = [(x.double(), y.double()) for x, y in models.batches(8)]
    model = models.made(models.Residual).double()
    expected, loss = models.train_plain(model, data, clip_norm=0.5)
    if hvd.rank():  # the ranks begin with rank 0's weights
        nn.init.ones_(next(model.parameters()))
    pipe, losses = train(model, data, place=place, clip_norm=0.5)
    models.assert_near(learnt(pipe, shared / "state"), expected, 1e-10, 1e-10)
    torch.testing.assert_close(losses[-1], loss, rtol=1e-10, atol=1e-10)
    assert len(set(hvd.allgather_object((losses[-1].item(), pipe.gradient_norm)))) == 1
    own = {name: p for each in pipe._params.values() for name, p in each.items()}
    for name, value in _of_first(pipe, own).items():
        assert torch.equal(own[name], value)  # replicas have the same bits
    models.assert_near(
        {"y": pipe(data[0][0])}, {"y": _plain(model, expected)(data[0][0])}, 1e-9, 1e-9
    )
    pipe.close()


def _of_first(pipe, own):
    """The parameters of the first rank of the own row."""
    everyone = hvd.allgather_object({name: p.detach() for name, p in own.items()})
    return everyone[pipe._row.ranks[0]]


def _plain(model, weights):
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *(pytest.param(models.Residual, *each.values, marks=each.marks) for each in MESHES),
        *(pytest.param(models.Dropped, *each.values, marks=each.marks) for each in MIXED[1:]),
    ],
)
def test_the_order_of_sums_decides_about_bits(kind, place, shared):
    """Each replica has one micro-batch, so sums go by micro-batch, as without replicas."""
    count = next((len(row) for row in place if len(row) > 1), 4)
    expected, losses = alone(kind, count)
    pipe, found = train(models.made(kind), models.batches(6), place=place, micro_batches=count)
    assert found == losses
    models.assert_same(learnt(pipe, shared / "state"), expected)
    pipe.close()


@four
def test_schedules_and_places_of_equal_rows_change_no_bit(shared):
    data = models.batches(3)
    pipe, losses = train(models.made(models.Residual), data, place=[[0, 1], [2, 3]])
    expected = learnt(pipe, shared / "state")
    pipe.close()
    place = [[3, 1], [0, 2]]
    for schedule in ("gpipe", "zb1p", "interleaved", "zbv"):
        pipe, found = train(models.made(models.Residual), data, place=place, schedule=schedule)
        assert found == losses, schedule
        models.assert_same(learnt(pipe, shared / schedule), expected)
        pipe.close()


@pytest.mark.parametrize("place", [pytest.param(UNEQUAL, marks=four),
                                   pytest.param([[1, 0]], marks=two)])  # fmt: skip
def test_batches_of_fewer_rows_than_replicas_and_checkpoints_of_any_mesh(place, shared):
    rows = (12, 7, 2, 1)
    data = models.batches(rows=list(rows))
    expected, losses = alone(models.Dropped, 4, rows)
    pipe, found = train(models.made(models.Dropped), data, place=place, checkpoint="always")
    torch.testing.assert_close(found, losses)
    models.assert_near(learnt(pipe, shared / "state"), expected)
    following = [pipe.step(x, y) for x, y in data]
    pipe.close()
    for other in (None, ["cpu"], [list(range(hvd.size()))]):
        again = pipeline(models.made(models.Dropped), data[0][0], place=other)
        again.load(shared / "state")
        torch.testing.assert_close([again.step(x, y) for x, y in data], following)
        again.close()


COMPRESSIONS = {
    "powersgd": hvd.Compression.powersgd(rank=1, min_elements=1),
    "topk": hvd.Compression.topk(0.5, min_elements=1),
    "by_layer": hvd.Compression.by_layer({"*.bias": hvd.Compression.none}, hvd.Compression.int4),
}


@pytest.mark.parametrize("name", ["powersgd", "topk", pytest.param("by_layer", marks=two)])
def test_gradients_of_replicas_are_compressed(name, shared):
    place = [[0, 1]] if hvd.size() == 2 else UNEQUAL
    data, options = models.batches(4), {"place": place, "compression": COMPRESSIONS[name]}
    _, losses = alone(models.Residual, 4, (12,) * 4)
    pipe, found = train(models.made(models.Residual), data, **options)
    assert len(set(hvd.allgather_object(found[-1].item()))) == 1
    assert found != losses
    torch.testing.assert_close(found, losses, rtol=0.1, atol=0.1)
    own = {name: p for each in pipe._params.values() for name, p in each.items()}
    assert all(torch.equal(own[name], value) for name, value in _of_first(pipe, own).items())
    pipe.save(shared / "state")
    kept, steps = pipe._sums.saved(99), pipe._sums.steps
    hvd.barrier()
    assert steps == 4 and any(hvd.allgather_object(bool(kept))) == COMPRESSIONS[name].stateful
    pipe.close()
    pipe = pipeline(models.made(models.Residual), data[0][0], **options)
    pipe.load(shared / "state")
    again = pipe._sums.saved(99)
    assert pipe._sums.steps == 4
    torch.testing.assert_close(again, kept)
    pipe.step(*data[0])
    pipe.close()


@two
def test_wrong_compressions_are_told(shared):
    x, y = models.batches(1)[0]
    place = [list(range(hvd.size()))]
    model = models.sequential()

    def sgd(params):
        return torch.optim.SGD(params, 0.1, momentum=0.9)

    with pytest.raises(CompressionError, match="applies momentum itself, and SGD would do so once"):
        hvd.Pipeline(model, x, F.mse_loss, sgd, place=place, compression=hvd.Compression.dgc)
    with pytest.raises(CompressionError, match="is a way of training"):
        pipeline(model, x, place=place, compression=hvd.Compression.local_sgd)
    pipe = pipeline(model, x, place=place, compression=hvd.Compression.int4)
    pipe.step(x, y)
    pipe.save(shared / "state")
    pipe.close()
    other = pipeline(model, x, place=place, compression=hvd.Compression.onebit)
    with pytest.raises(PipelineError, match=r"has the state of compression=int4.*: give it the"):
        other.load(shared / "state")
    other.close()


@two
def test_wrong_meshes_are_told_on_every_rank():
    x, _ = models.batches(1)[0]
    last = hvd.size() - 1
    everyone = list(range(hvd.size()))
    for place, told in (
        ([everyone, []], "row 1 has no rank"),
        ([everyone, [last + 1]], rf"row 1 has rank {last + 1}, but the job has ranks 0 to {last}"),
        ([everyone, [0]], "rank 0 is in rows 0 and 1"),
        ([everyone[:-1]], rf"has {last} of {last + 1} ranks: add rank {last}"),
        ([everyone, 0], r"has 0, which is no list of ranks"),
    ):
        with pytest.raises(PlanError, match=told):
            pipeline(models.sequential(), x, place=place)
    with pytest.raises(MismatchError, match="'mesh'"):
        place = [everyone] if hvd.rank() else [everyone[::-1]]
        pipeline(models.sequential(), x, place=place)


def normed():
    """Norms in a unit of their own and within one, of several kinds; no bias that they undo."""
    enter = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    plain = nn.BatchNorm1d(8, momentum=None, affine=False), nn.Linear(8, 8, bias=False)
    return nn.Sequential(
        enter, *plain, nn.Tanh(), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 6)
    ).double()


def by_turns(model, data, micro_batches, replicas):
    """Train in one process, a turn at a time; running statistics move once, by the whole batch."""
    optimizer = models.adam(model.parameters())
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d)]
    seen = {each: [] for each in norms}
    for each in norms:
        each.register_forward_pre_hook(lambda norm, given: seen[norm].append(given[0].detach()))
    for step, (x, y) in enumerate(data):
        before = {name: each.clone() for name, each in model.named_buffers()}
        sizes = [
            len(part) for part in torch.arange(len(x)).tensor_split(min(len(x), micro_batches))
        ]
        turns = [sum(sizes[k : k + replicas]) for k in range(0, len(sizes), replicas)]
        optimizer.zero_grad()
        for one, other in zip(x.split(turns), y.split(turns), strict=True):
            (F.mse_loss(model(one), other) * len(one) / len(x)).backward()
        optimizer.step()
        for name, each in model.named_buffers():
            each.copy_(before[name])
        for norm in norms:
            given = torch.cat(seen[norm])
            seen[norm].clear()
            if norm.track_running_stats:
                share = norm.momentum or 1 / (step + 1)
                norm.num_batches_tracked += 1
                norm.running_mean.lerp_(given.mean(0), share)
                norm.running_var.lerp_(given.var(0), share)
    return models.weights(model)


ROWS = (11, 10, 2)


@pytest.mark.parametrize(
    ("place", "count", "options"),
    [
        pytest.param(
            [[0, 2], [1, 3]], 2, {"checkpoint": "always", "channel": "horovod"}, marks=four
        ),
        pytest.param([[3, 1], [0, 2]], 5, {"schedule": "zb1p"}, marks=four),
        pytest.param(UNEQUAL, 5, {"stages": ["5"], "checkpoint": "always"}, marks=four),
        pytest.param([[1, 0]], 2, {"schedule": "zb1p", "channel": "gloo"}, marks=two),
        pytest.param([[1, 0]], 5, {"checkpoint": "always"}, marks=two),
    ],
)
def test_replicas_normalize_together(place, count, options, shared):
    """Also where a last turn is incomplete, or where a replica has no micro-batch."""
    data = [(x.double() + 5, y.double()) for x, y in models.batches(rows=list(ROWS))]
    expected = by_turns(models.made(normed), data, count, len(place[0]))
    options = {"place": place, "micro_batches": count, "batchnorm": "sync", **options}
    pipe, _ = train(models.made(normed), data, **options)
    models.assert_near(learnt(pipe, shared / "state"), expected, 1e-10, 1e-10)
    stages = {number for number, _, _ in pipe._own_stages()}
    own = {name: each for name, each in pipe._graph.model.state_dict().items()
           if pipe._stage_of()[pipe._graph.owner(name)] in stages}  # fmt: skip
    for name, value in _of_first(pipe, own).items():
        assert torch.equal(own[name], value), name
    pipe.close()


class Breaks(nn.Module):
    """Fails on the rank that is told so."""

    rank = None

    def forward(self, x):
        if self.training and hvd.rank() == self.rank:
            raise RuntimeError("out of order")
        return x


def test_a_replica_that_fails_is_told_to_those_who_wait_in_a_norm():
    x, y = models.batches(1)[0]
    breaks = Breaks()
    stack = [nn.Linear(6, 6), breaks, nn.BatchNorm1d(6), nn.Linear(6, 6)]
    place = [list(range(hvd.size()))]
    pipe = pipeline(nn.Sequential(*stack), x, place=place, batchnorm="sync", leaves=[Breaks])
    pipe.step(x, y)
    breaks.rank = hvd.size() - 1
    told = rf"rank {breaks.rank}, stage 0, unit '1', forward .*out of order"
    with pytest.raises(PipelineError, match=told):
        pipe.step(x, y)
    pipe.close()


def test_sums_over_a_row_go_in_its_order():
    """Large ones in two rounds; rounding shows the order."""
    place = [list(range(hvd.size()))[::-1]]
    pipe = pipeline(models.sequential(), torch.ones(4, 6), place=place)
    for size in (5, 10_001):
        everyone = [torch.rand(size, generator=torch.Generator().manual_seed(rank)) * 10.0**rank
                    for rank in range(hvd.size())]  # fmt: skip
        small, large = pipe._row.sum([torch.ones(3), everyone[hvd.rank()]], Key("x", size, 0, 0))
        expected = functools.reduce(torch.add, [everyone[rank] for rank in place[0]])
        assert torch.equal(large, expected) and small.tolist() == [hvd.size()] * 3
    pipe.close()


@four
def test_a_plan_of_what_was_measured_and_its_timeline(shared):
    data = models.batches(3)
    pipe, losses = train(models.made(models.Residual), data, place=UNEQUAL, schedule="auto")
    assert pipe.plan.mesh == tuple(map(tuple, UNEQUAL)) and pipe.plan.step > 0
    assert len(pipe.plan.memory) == 4
    told = pipe.plan.to_json()
    pipe.timeline(shared / "run.html")
    pipe.close()
    plan = type(pipe.plan).from_json(told)
    again, found = train(models.made(models.Residual), data, stages=plan)
    assert found == losses
    again.close()
    with pytest.raises(PlanError, match="but the plan has"):
        pipeline(models.made(models.Residual), data[0][0], stages=plan, place=[[0, 1], [2, 3]])
