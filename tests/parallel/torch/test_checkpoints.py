"""Checkpoints that several ranks save and restore together, with PyTorch."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hvdx as hvd
from hvdx.checkpoints.files import File
from hvdx.checkpoints.folder import Folder, Manifest
from hvdx.errors import CheckpointError
from hvdx.torch import DistributedSampler


@pytest.fixture
def shared(tmp_path):
    """A folder that all ranks know."""
    return Path(hvd.broadcast_object(str(tmp_path)))


class Training:
    """A model, its optimizer, and whatever else has a state."""

    def __init__(self, seed=0, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3, dtype=torch.float32)
        )
        plain = torch.optim.Adam(self.model.parameters(), 0.01)
        self.optimizer = hvd.DistributedOptimizer(plain, self.model, **options)
        self.rates = torch.optim.lr_scheduler.StepLR(plain, 2, 0.5)
        self.sampler = DistributedSampler(range(64), seed=1)
        self.told, self.losses, self.indices = {"steps": 0}, [], None

    @property
    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "rates": self.rates,
                "sampler": self.sampler, "told": self.told}  # fmt: skip

    def train(self, steps=3):
        """Take steps whose batches and dropout are each rank's own."""
        self.indices = self.indices or iter(self.sampler)
        for index in itertools.islice(self.indices, steps):
            self.optimizer.zero_grad()
            loss = F.mse_loss(self.model(torch.randn(6, 5)), torch.full((6, 3), index / 64))
            loss.backward()
            self.optimizer.step()
            self.rates.step()
            self.told["steps"] += 1
            self.losses.append(loss.item())


WAYS = {
    "plain": {},
    "topk": {"compression": hvd.Compression.topk(0.3, min_elements=1)},
    "servers": {"sync": "parameter_server"},
    "one server, int8": {
        "sync": "parameter_server", "servers": [0], "compression": hvd.Compression.int8,
    },
    "local": {"compression": hvd.Compression.diloco(2)},
}  # fmt: skip


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.ranks(2) if way in ("plain", "local") else ())
        for way in WAYS
    ],
)
def test_as_many_ranks_go_on_to_the_last_bit(way, shared):
    first, again = Training(**WAYS[way]), Training(seed=9, **WAYS[way])
    torch.manual_seed(100 + hvd.rank())
    first.train()
    checkpoints = hvd.Checkpoints(shared / "saved")
    checkpoints.save(3, **first.parts)
    first.train()
    again.train(1)  # what is restored counts
    checkpoints.wait()
    assert hvd.Checkpoints(shared / "saved").restore(**again.parts) == 3
    again.indices = None  # from where the sampler is now
    again.train()
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert again.told == first.told and again.losses[1:] == first.losses[3:]
    assert again.rates.state_dict() == first.rates.state_dict()
    assert again.sampler.state_dict() == first.sampler.state_dict()


def test_each_rank_writes_what_only_it_has(shared):
    training = Training(sync="parameter_server")
    training.train(1)
    with hvd.Checkpoints(shared / "saved", random=False) as checkpoints:
        checkpoints.save(1, **training.parts)
    place = Folder(shared / "saved").of(1)
    files = [File(place / each["name"]) for each in Manifest.read(place).files]
    assert len(files) == hvd.size()
    elements = [sum(each.nbytes // 4 for name, each in file.tensors.items() if "exp_avg" in name)
                for file in files]  # fmt: skip
    assert sum(elements) == 2 * sum(p.numel() for p in training.model.parameters())
    assert max(elements) - min(elements) <= 2 * len(elements)
    assert [any(n.startswith("model/") for n in file.tensors) for file in files] == [
        rank == 0 for rank in range(hvd.size())
    ]


@pytest.mark.ranks(2)
def test_a_disk_that_is_full_on_one_rank_is_told_on_all(shared):
    model, last = nn.Linear(300, 300), hvd.size() - 1
    checkpoints = hvd.Checkpoints(shared / "saved")
    checkpoints.save(1, model=model)
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hvd.rank() == last:  # the others' writing succeeds
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        checkpoints.save(2, model=model)
        with pytest.raises(
            CheckpointError, match=rf"step 2 cannot be saved to .*: rank {last}: .*File too large"
        ):
            checkpoints.save(3, model=model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    hvd.barrier()
    assert [each.name for each in (shared / "saved").iterdir()] == ["step-00000001"]
    assert len(list((shared / "saved" / "step-00000001").iterdir())) == hvd.size() + 1
    assert hvd.Checkpoints(shared / "saved").latest() == 1
    checkpoints.save(4, model=model)  # goes on once there is room
    assert checkpoints.latest() == 4


def test_what_is_damaged_is_passed_over_by_all(shared):
    first, again = Training(), Training(seed=9)
    with hvd.Checkpoints(shared / "saved") as checkpoints:
        for step in (1, 2):
            first.train(1)
            checkpoints.save(step, **first.parts)
    damaged = Folder(shared / "saved").of(2)
    name = Manifest.read(damaged).files[-1]["name"]  # the last rank's
    hvd.barrier()
    if hvd.rank() == 0:
        data = bytearray((damaged / name).read_bytes())
        data[len(data) // 2] ^= 1
        (damaged / name).write_bytes(data)
        with pytest.warns(UserWarning, match=rf"passed over: .*{name}: its checksum does not fit"):
            assert checkpoints.restore(**again.parts) == 1
    else:
        assert checkpoints.restore(**again.parts) == 1
    assert again.told == {"steps": 1}
    with pytest.raises(CheckpointError, match=rf"no checkpoint is whole: .*{name}"):
        checkpoints.restore(2, **again.parts)
    with pytest.raises(CheckpointError, match="there is no checkpoint of step 7"):
        checkpoints.restore(7, **again.parts)


@pytest.mark.ranks(2)
def test_what_does_not_fit_is_listed_on_every_rank_and_changes_nothing(shared):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    adam = torch.optim.Adam(model.parameters())
    checkpoints = hvd.Checkpoints(shared / "saved", asynchronous=False)
    checkpoints.save(1, model=model, optimizer=adam)
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))
    other[0].half()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as told:
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        checkpoints.restore(model=other, optimizer=optimizer, rates=other)
    for part in (
        "model: '2.weight' is not in the checkpoint",
        "'1.weight' is float32 (2, 5) in the checkpoint, but float32 (3, 5) here",
        "'0.bias' is float32 (5,) in the checkpoint, but float16 (5,) here",
        "optimizer: it is of Adam, but this is SGD",
        "it has 4 parameters, but this optimizer has 5",
        "it has no part 'rates'; there are model, optimizer",
    ):
        assert part in str(told.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    last = hvd.size() - 1
    with pytest.raises(CheckpointError, match=f"rank {last}: .*'1.weight' is float32"):
        checkpoints.restore(model=other if hvd.rank() == last else model)


@pytest.mark.ranks(2)
def test_ranks_that_save_different_things_are_told(shared):
    model, rank = nn.Linear(2, 2), hvd.rank()
    checkpoints = hvd.Checkpoints(shared / "saved")
    with pytest.raises(CheckpointError, match=r"different steps .*rank 0: 0, \['model', 'random'"):
        checkpoints.save(rank, model=model)
    with pytest.raises(CheckpointError, match=r"rank 1: other= is a set: give models"):
        checkpoints.save(1, model=model, other={} if rank != 1 else {1})
    with pytest.raises(CheckpointError, match=r"rank 0: told/f is a builtin_.*: checkpoints hold"):
        checkpoints.save(1, model=model, told=_Told())
    assert checkpoints.latest() is None and not (shared / "saved").exists()


class _Told:
    """Has a state that no file can hold."""

    def state_dict(self):
        return {"f": print}

    def load_state_dict(self, state):
        raise NotImplementedError


def test_stages_save_their_shares_which_fit_any_stages_and_the_plain_model(shared):
    def pipeline(seed, **options):
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 6, dtype=torch.float64) for _ in range(5)]
        model = nn.Sequential(*layers).to(torch.float64)
        pipe = hvd.Pipeline(
            model, x, F.mse_loss, lambda ps: torch.optim.Adam(ps, 0.01), micro_batches=2, **options
        )
        return model, pipe

    x = torch.ones(4, 6, dtype=torch.float64)
    _, pipe = pipeline(0)
    losses = [pipe.step(x, x) for _ in range(2)]
    checkpoints = hvd.Checkpoints(shared / "saved", random=False)
    checkpoints.save(pipe.steps, stages=pipe)
    losses = [pipe.step(x, x) for _ in range(2)]
    pipe.close()
    assert checkpoints.latest() == 2
    place = Folder(shared / "saved").of(2)
    manifest = Manifest.read(place)
    held = [{n for n in each["tensors"] if "/model/" in n} for each in manifest.files]
    assert all(held) and sum(map(len, held)) == len(set().union(*held)) == 10
    assert manifest.about["stages"]["plan"]
    for options in ({"place": ["cpu", "cpu"]}, {}):
        _, other = pipeline(9, **options)
        assert checkpoints.restore(stages=other) == other.steps == 2
        assert [other.step(x, x) for _ in range(2)] == losses
        other.close()
    model, other = pipeline(9)
    other.close()
    assert checkpoints.restore(stages=model) == 2
    torch.testing.assert_close(F.mse_loss(model(x), x), losses[0])
