"""Pipelines of PyTorch models in one process: several stages learn what the plain model learns."""

from __future__ import annotations

import copy
import functools
import threading

import pytest

torch = pytest.importorskip("torch")
import numpy as np  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PipelineError, PlanError  # noqa: E402
from hvdx.integrations.pytorch_channel import TorchCodec  # noqa: E402
from hvdx.integrations.pytorch_graph import traced  # noqa: E402
from hvdx.pipeline.plan import Plan  # noqa: E402

ROWS = 12


def adam(params):
    return torch.optim.Adam(params, 1e-2)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def train(model, batches, loss=F.mse_loss, **options):
    """Return weights and last loss after training a copy of ``model`` in a pipeline."""
    model = copy.deepcopy(model)
    options = {"micro_batches": 4, "seed": 7, **options}
    pipe = hvd.Pipeline(model, batches[0][0], loss, adam, **options)
    try:
        for x, y in batches:
            last = pipe.step(x, y)
    finally:
        pipe.close()
    return weights(model), last


def train_plain(model, batches, loss=F.mse_loss, clip_norm=None):
    model = copy.deepcopy(model)
    optimizer = adam(model.parameters())
    for x, y in batches:
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        optimizer.zero_grad()
        last = loss(model(*args, **kwargs), y)
        last.backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return weights(model), last.detach()


def assert_near(one, other, rtol=1e-5, atol=4e-5):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol)


class Residual(nn.Module):
    """A skip over everything, one of three consumers, an in-place call, a tied weight."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.first = nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.norm = nn.LayerNorm(8)
        self.leave = nn.Linear(6, 8, bias=False)
        self.leave.weight = nn.Parameter(self.enter.weight.detach().clone())
        self.enter.weight = self.leave.weight

    def forward(self, x):
        size = x.shape[0]
        h = torch.tanh(self.enter(x))
        g = self.relu(self.first(h))
        g = self.second(g) + h
        g = self.norm(g * self.scale + h).transpose(0, 1).transpose(0, 1)
        return (g + h).view(size, -1) @ self.leave.weight


class TwoByTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.both, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, left, right, mask=None):
        a = self.left(left)
        if mask is not None:
            a = a * mask
        h = torch.relu(self.both(a + self.right(right)))
        one, other = h.chunk(2, dim=1)
        return {"mean": self.last(h), "parts": (one * left[:, :4], other)}


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        for layer in self.layers:
            x = self.drop(F.dropout(torch.tanh(layer(x)), 0.2, self.training))
        return x


def sequential():
    torch.manual_seed(1)
    layers = [
        nn.Linear(6, 9),
        nn.Tanh(),
        nn.Linear(9, 9),
        nn.ReLU(),
        nn.Linear(9, 9),
        nn.Linear(9, 6),
    ]
    return nn.Sequential(*layers)  # fmt: skip


def made(kind):
    torch.manual_seed(1)
    return kind()


def batches(steps=20, rows=ROWS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    rows = [rows] * steps if isinstance(rows, int) else rows
    return [(torch.randn(n, 6, generator=generator), torch.randn(n, 6, generator=generator))
            for n in rows]  # fmt: skip


#: On 1 to 4 ranks; with two stages per rank the models have units for 3.
SCHEDULES = [(name, stages) for name in ("gpipe", "1f1b", "zb1p") for stages in (1, 2, 3, 4)]
SCHEDULES += [(name, stages) for name in ("interleaved", "zbv") for stages in (2, 4, 6)]


@pytest.mark.parametrize("kind", [sequential, Residual])
def test_no_schedule_or_cut_changes_a_bit(kind):
    model, data = made(kind), batches()
    one, loss = train(model, data)
    for schedule, stages in SCHEDULES:
        other, last = train(model, data, schedule=schedule, stages=stages)
        assert_same(one, other)
        assert torch.equal(loss, last)
    plain, last = train_plain(model, data)
    assert_near(one, plain)
    torch.testing.assert_close(loss, last)


@pytest.mark.parametrize("kind", [sequential, Residual])
def test_it_learns_what_the_plain_model_learns_in_float64(kind):
    data = [(x.double(), y.double()) for x, y in batches()]
    model = made(kind).double()
    assert_near(train(model, data, stages=3)[0], train_plain(model, data)[0], 1e-10, 1e-10)


def test_every_cut_of_a_model_with_skips():
    model, data = made(Residual), batches(3)
    names = [unit.name for unit in traced(model, data[0][0]).units]
    whole = train(model, data)[0]
    for name in names[1:]:
        assert_same(whole, train(model, data, stages=[name])[0])
    assert_same(whole, train(model, data, stages=[1] * len(names))[0])


def test_several_inputs_and_outputs():
    model = made(TwoByTwo)
    x = {"left": torch.randn(ROWS, 6), "right": torch.randn(ROWS, 4)}

    def loss(out, y):
        return F.mse_loss(out["mean"], y) + out["parts"][0].mean() + (out["parts"][1] ** 2).mean()

    data = [(x, torch.randn(ROWS, 2)) for _ in range(4)]
    one = train(model, data, loss)[0]
    assert_same(one, train(model, data, loss, stages=3)[0])
    assert_same(one, train(model, [(tuple(x.values()), y) for _, y in data], loss, stages=2)[0])
    assert_near(one, train_plain(model, data, loss)[0])
    pipe = hvd.Pipeline(model, x, stages=3)
    out = pipe(x)
    torch.testing.assert_close(out["parts"], model(**x)["parts"])
    with pytest.raises(TypeError, match=r"'left', 'right'.*, given are .*'left', 'right', 'mask'"):
        pipe({**x, "mask": torch.ones(1)})
    with pytest.raises(TypeError, match="missing a required argument: 'right'"):
        pipe(x["left"])
    pipe.close()


def test_dropout_is_the_same_in_any_partition():
    model, data = made(Dropped), batches(4)
    before = torch.get_rng_state()
    one = train(model, data)[0]
    assert torch.equal(before, torch.get_rng_state())  # others' random numbers stay what they were
    for stages, schedule in ((2, "1f1b"), (4, "gpipe"), (4, "zbv"), (3, "zb1p")):
        assert_same(one, train(model, data, stages=stages, schedule=schedule)[0])
    other = train(model, data, seed=8)[0]
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])
    pipe = hvd.Pipeline(model, data[0][0], stages=2)
    torch.testing.assert_close(pipe(data[0][0]), model.eval()(data[0][0]))  # none in inference
    pipe.close()


def test_uneven_and_small_batches():
    model, data = made(sequential), batches(rows=[12, 7, 5, 3, 1])
    one = train(model, data)[0]
    for schedule, stages in (("1f1b", 3), ("interleaved", 4), ("zbv", 4)):
        assert_same(one, train(model, data, schedule=schedule, stages=stages)[0])
    assert_near(one, train_plain(model, data)[0])


def test_gradients_are_clipped_by_their_norm_over_all_stages():
    """The residual model's tied weight counts once."""
    model, data = made(Residual), batches(5)
    one, loss = train(model, data, clip_norm=0.05)
    for schedule, stages in (("1f1b", 3), ("zbv", 4)):
        other, last = train(model, data, schedule=schedule, stages=stages, clip_norm=0.05)
        assert_same(one, other)
        assert torch.equal(loss, last)
    assert_near(one, train_plain(model, data, clip_norm=0.05)[0])
    assert not torch.equal(one["first.weight"], train(model, data)[0]["first.weight"])
    assert_same(train(model, data)[0], train(model, data, clip_norm=1e9)[0])
    pipe = hvd.Pipeline(copy.deepcopy(model), data[0][0], F.mse_loss, adam, stages=2, clip_norm=1e9)
    pipe.step(*data[0])
    pipe.close()
    F.mse_loss(model(data[0][0]), data[0][1]).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert pipe.gradient_norm == pytest.approx(norm.item(), rel=1e-5)


class Everything(nn.Module):
    """Dropout, BatchNorm, a buffer that forward reads and writes, and the residual net."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.norm = Residual(), nn.Dropout(0.2), nn.BatchNorm1d(6)
        self.power = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(torch.tanh(self.power(self.norm(self.drop(self.body(x))))))


@pytest.mark.parametrize("checkpoint", ["always", "except_last"])
def test_computing_again_changes_no_bit(checkpoint):
    model, data = made(Everything), batches(4)
    one, loss = train(model, data)
    for schedule, stages in (("gpipe", 3), ("1f1b", 4), ("zb1p", 2), ("zbv", 4)):
        options = {"schedule": schedule, "stages": stages, "checkpoint": checkpoint}
        other, last = train(model, data, **options)
        assert_same(one, other)
        assert torch.equal(loss, last)


def test_computing_again_keeps_less():
    """Counted by what autograd saves and has not let go of, over all micro-batches of gpipe."""
    layers = [each for _ in range(6) for each in (nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 6))]
    model, (x, y) = nn.Sequential(*layers), batches(1, rows=64)[0]

    def peak(checkpoint):
        alive, most = 0, 0

        class Saved:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor.detach()
                self.size = 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
                alive += self.size
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.size

        options = {"schedule": "gpipe", "micro_batches": 8, "stages": 2, "checkpoint": checkpoint}
        pipe = hvd.Pipeline(copy.deepcopy(model), x, F.mse_loss, adam, **options)
        stage = pipe._stages[0]
        compute = stage._compute

        def watched(*args, **kwargs):  # hooks belong to threads
            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
                return compute(*args, **kwargs)

        stage._compute = watched
        pipe.step(x, y)
        pipe.close()
        return most

    never, last, always = map(peak, ("never", "except_last", "always"))
    assert always == never / 8
    assert last == never / 4


def test_a_stage_that_writes_into_its_inputs_cannot_compute_them_again():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 6))
    x, y = batches(1)[0]
    pipe = hvd.Pipeline(model, x, F.mse_loss, adam, stages=2, checkpoint="always")
    with pytest.raises(PipelineError, match=r"writes into its inputs, .* checkpoint='never'"):
        pipe.step(x, y)
    pipe.close()


def test_frozen_layers():
    model = made(Residual)
    for name in ("first.weight", "first.bias", "leave.weight", "enter.bias"):
        model.get_parameter(name).requires_grad_(False)
    one = train(model, batches(3))[0]
    assert torch.equal(one["first.weight"], model.first.weight)
    assert_same(one, train(model, batches(3), stages=4, schedule="zb1p")[0])
    assert_near(one, train_plain(model, batches(3))[0])


def test_layers_frozen_and_freed_while_training():
    """As the plain model, whose optimizer leaves out what has no gradient."""
    model, data = made(sequential), batches(6)

    def switch(model, step):
        for parameter in model[0].parameters() if step in (1, 3) else ():
            parameter.requires_grad_(step == 3)
        for parameter in model[2].parameters() if step in (2, 5) else ():
            parameter.requires_grad_(step == 5)

    def learnt(**options):
        own = copy.deepcopy(model)
        pipe = hvd.Pipeline(own, data[0][0], F.mse_loss, adam, micro_batches=4, **options)
        for step, (x, y) in enumerate(data):
            switch(own, step)
            before = own[0].weight.clone()
            pipe.step(x, y)
            assert torch.equal(before, own[0].weight) == (step in (1, 2))
        pipe.close()
        return weights(own)

    one = learnt()
    for stages, schedule, checkpoint in (
        (2, "zb1p", "always"),
        (4, "1f1b", "never"),
        (3, "gpipe", "always"),
    ):
        assert_same(one, learnt(stages=stages, schedule=schedule, checkpoint=checkpoint))
    plain, optimizer = copy.deepcopy(model), None
    optimizer = adam(plain.parameters())
    for step, (x, y) in enumerate(data):
        switch(plain, step)
        optimizer.zero_grad()
        F.mse_loss(plain(x), y).backward()
        optimizer.step()
    assert_near(one, weights(plain))


def test_below_frozen_layers_nothing_is_kept_or_computed_again():
    model, (x, y) = made(sequential), batches(1)[0]
    model[0].requires_grad_(False)
    pipe = hvd.Pipeline(
        model, x, F.mse_loss, adam, stages=["2"], checkpoint="always", schedule="gpipe"
    )
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    pipe.step(x, y)
    pipe.close()
    assert calls == [False] * 8


def test_tied_weights_are_stepped_once_and_saved_under_both_names():
    out = train(made(Residual), batches(2), stages=4)[0]
    assert torch.equal(out["enter.weight"], out["leave.weight"])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_whole_batches(momentum):
    torch.manual_seed(1)
    norms = nn.BatchNorm1d(6, momentum=momentum), nn.BatchNorm1d(6)
    model = nn.Sequential(norms[0], nn.Linear(6, 6), norms[1], nn.Linear(6, 6))
    data = batches(rows=[12, 11, 9])
    data = [(x + 100, y) for x, y in data]
    one, plain = train(model, data)[0], train_plain(model, data)[0]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(one[f"0.{name}"], plain[f"0.{name}"])
    for stages, schedule, checkpoint in ((2, "zb1p", "always"), (4, "gpipe", "except_last")):
        options = {"stages": stages, "schedule": schedule, "checkpoint": checkpoint}
        assert_same(one, train(model, data, **options)[0])
        micro = train(model, data, batchnorm="micro", **options)[0]
        assert micro["0.num_batches_tracked"] == 12
        assert_same(micro, train(model, data, batchnorm="micro")[0])
    assert_same(one, train(model, data, batchnorm="sync")[0])  # here no stage has replicas
    assert_near(train(model, data, micro_batches=1)[0], plain)
    norms[0].eval().requires_grad_(False)  # pipelines leave it so
    after = train(model, data)[0]
    assert_same(weights(norms[0]), {n[2:]: w for n, w in after.items() if n.startswith("0.")})


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.norm(x) + self.norm(3 * x))


def test_a_norm_that_is_called_twice_moves_twice():
    model, data = made(Twice), batches(3)
    one, plain = train(model, data, stages=2)[0], train_plain(model, data)[0]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(one[f"norm.{name}"], plain[f"norm.{name}"])
    with pytest.raises(PlanError, match=r"'norm.running_mean', which .* in stages 0 and 1: cut so"):
        train(model, data, stages=["norm#2"])


class Heads(nn.Module):
    """A value in float32, from the norm, that three products read, and a weight used twice."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.leave = nn.Linear(8, 6)

    def forward(self, x):
        h = self.norm(self.enter(x))
        return self.leave(self.k(self.q(h) * self.k(h)) + self.v(h))


class Fragile(nn.Module):
    """Its own gradient is not a number where a batch has one above 100; no other's is."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + 0.0 * torch.sqrt(self.p + (x.abs().max() < 100).float())


def fragile():
    return nn.Sequential(Fragile(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def fragile_batches():
    data = batches(6)
    data[2][0][0, 0] = 101.0
    return data


def scaler(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 2, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_depends_on_no_cut_and_no_thread(dtype):
    model, data = made(Heads), batches(3)
    cast = functools.partial(torch.autocast, "cpu", dtype)

    def learnt(**options):
        options["scaler"] = scaler(init_scale=2.0**20) if dtype == torch.float16 else None
        with cast():
            return train(model, data, **options)[0]

    one = learnt()
    for stages, schedule, checkpoint in (
        (2, "1f1b", "always"),
        (4, "zb1p", "never"),
        (7, "gpipe", "always"),
    ):
        assert_same(one, learnt(stages=stages, schedule=schedule, checkpoint=checkpoint))
    plain, optimizer, scales = (
        copy.deepcopy(model),
        None,
        scaler(init_scale=2.0**20, enabled=dtype == torch.float16),
    )
    optimizer = adam(plain.parameters())
    for x, y in data:
        optimizer.zero_grad()
        with cast():
            loss = F.mse_loss(plain(x), y)
        scales.scale(loss).backward()
        scales.step(optimizer)
        scales.update()
    assert_near(one, weights(plain), 5e-2, 5e-3)
    assert not torch.equal(one["q.weight"], train(model, data)[0]["q.weight"])


def test_steps_with_gradients_that_are_not_finite_are_skipped_by_all_stages(tmp_path):
    data, plain = fragile_batches(), made(fragile)
    optimizer, own, scales = adam(plain.parameters()), scaler(), []
    for x, y in data:
        optimizer.zero_grad()
        own.scale(F.mse_loss(plain(x), y)).backward()
        own.unscale_(optimizer)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        own.step(optimizer)
        own.update()
        scales.append(own.get_scale())
    for stages in (1, 3):
        model, own = made(fragile), scaler()
        pipe = hvd.Pipeline(model, data[0][0], F.mse_loss, adam, stages=stages, scaler=own,
                            clip_norm=0.1, micro_batches=4)  # fmt: skip
        found = []
        for x, y in data:
            before = weights(model)
            pipe.step(x, y)
            found.append(own.get_scale())
            assert pipe.skipped == all(torch.equal(before[n], w) for n, w in weights(model).items())
        pipe.save(tmp_path / "state")
        pipe.close()
        assert found == scales == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0, 2048.0]
        assert_near(weights(model), weights(plain))
    own = scaler()
    pipe = hvd.Pipeline(made(fragile), data[0][0], F.mse_loss, adam, stages=2, scaler=own)
    pipe.load(tmp_path / "state")
    pipe.step(*data[0])
    assert own.get_scale() == 4096.0  # the second step in a row
    pipe.close()
    half, (x, y) = made(sequential).half(), (each.half() for each in data[0])
    pipe = hvd.Pipeline(half, x, F.mse_loss, adam, stages=2, scaler=scaler())
    with pytest.raises(ValueError, match=r"under torch.autocast, but some here are in float16"):
        pipe.step(x, y)
    pipe.close()


def test_checkpoints_move_between_any_numbers_of_stages(tmp_path):
    data = batches(6)

    def pipeline(stages):
        return hvd.Pipeline(made(Dropped), data[0][0], F.mse_loss, adam, stages=stages, seed=stages)

    first = pipeline(4)
    for x, y in data[:3]:
        first.step(x, y)
    first.save(tmp_path / "state")
    expected = [first.step(x, y) for x, y in data[3:]]
    first.close()
    for stages in (1, 2):
        other = pipeline(stages)
        other.load(tmp_path / "state")
        assert [other.step(x, y) for x, y in data[3:]] == expected
        other.close()
    plain = made(Dropped)
    plain.load_state_dict(hvd.load_state(tmp_path / "state")["model"])
    save_file(plain.state_dict(), tmp_path / "plain")
    other = pipeline(2)
    other.load(tmp_path / "plain")
    with pytest.raises(OSError, match=r"cannot be loaded from .*missing"):
        other.load(tmp_path / "missing")
    other.close()


def test_a_plan_is_a_file(tmp_path):
    model, data = made(sequential), batches(2)
    pipe = hvd.Pipeline(model, data[0][0], stages=["2", "4"], schedule="gpipe", micro_batches=3)
    pipe.plan.save(tmp_path / "plan.json")
    pipe.close()
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.cuts, plan.schedule, plan.micro_batches) == (("2", "4"), "gpipe", 3)
    assert_same(train(model, data, micro_batches=3)[0], train(model, data, stages=plan)[0])


def test_an_error_names_stage_unit_and_micro_batch():
    class Failing(nn.Module):
        def forward(self, x):
            if not self.training or x.shape[0] == ROWS:
                return x
            raise ArithmeticError("no such luck")

    model = nn.Sequential(nn.Linear(6, 6), Failing(), nn.Linear(6, 6))
    x, y = batches(1)[0]
    pipe = hvd.Pipeline(model, x, F.mse_loss, adam, stages=[1, 1, 1])
    told = r"rank 1, stage 1, unit '1', forward of micro-batch 0 in step 0: ArithmeticError: no"
    with pytest.raises(PipelineError, match=told):
        pipe.step(x, y)
    pipe.close()
    with pytest.raises(PipelineError, match="of no more use, since it has been closed"):
        pipe.step(x, y)
    assert not [t for t in threading.enumerate() if t.name.startswith("hvdx-pipeline")]


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class WithBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.inner, self.two = nn.Linear(6, 6), Branching(), nn.Linear(6, 6)

    def forward(self, x):
        return self.two(self.inner(self.one(x)))


def test_an_untraceable_module_is_named_and_can_be_kept_whole():
    x, y = batches(1)[0]
    with pytest.raises(PlanError, match=r"'inner' \(Branching\) cannot .* leaves=\[Branching\]"):
        hvd.Pipeline(WithBranch(), x)
    with pytest.raises(PlanError, match=r"^Branching.forward cannot be traced"):
        hvd.Pipeline(Branching(), x)
    for leaves in ([Branching], ["inner"]):
        pipe = hvd.Pipeline(WithBranch(), x, F.mse_loss, adam, stages=3, leaves=leaves)
        assert pipe.units == ["one", "inner", "two"]
        pipe.step(x, y)
        pipe.close()


class Odd(nn.Module):
    """Hands on what is no tensor."""

    def forward(self, x):
        return np.zeros(1) if x is None else {"of": x, "by": np.ones(1)}


class WithOdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.odd, self.take = nn.Linear(6, 6), Odd(), Take()
        self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.three(self.two(self.take(self.odd(self.one(x)))))


class Take(nn.Module):
    def forward(self, odd):
        return odd["of"] * float(odd["by"][0])


def test_what_is_no_tensor_crosses_no_cut():
    x, y = batches(1)[0]
    options = {"loss": F.mse_loss, "optimizer": adam, "leaves": [Odd, Take]}
    told = r"^no stage can begin at 'take': it must be in that of 'odd', or 'odd' would cross the c"
    with pytest.raises(PlanError, match=told + ".*a ndarray, which cannot travel"):
        hvd.Pipeline(WithOdd(), x, stages=["take"], **options)
    pipe = hvd.Pipeline(WithOdd(), x, stages=4, **options)  # as many as there can be
    assert pipe.plan.cuts == ("odd", "two", "three")
    pipe.step(x, y)
    pipe.close()


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
@pytest.mark.parametrize("stages", [[1, 3], [2, 2]])
def test_a_stage_that_no_gradient_reaches_is_told(schedule, stages):
    model = nn.Sequential(nn.Linear(6, 6), Detach(), nn.Linear(6, 6), nn.Tanh())
    x, y = batches(1)[0]
    options = {"stages": stages, "schedule": schedule}
    pipe = hvd.Pipeline(model, x, F.mse_loss, adam, **options)
    told = "rank 0, stage 0, .* no gradient reaches the trainable weights .* such as '0.weight'"
    with pytest.raises(PipelineError, match=told):
        pipe.step(x, y)
    pipe.close()
    model[0].requires_grad_(False)  # the remedy
    pipe = hvd.Pipeline(model, x, F.mse_loss, adam, **options)
    pipe.step(x, y)
    pipe.close()


def wrong(**options):
    x = batches(1)[0][0]
    return hvd.Pipeline(**{"model": sequential(), "sample": x, **options})


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"stages": 9}, PlanError, "9 stages, but the model has 6 units"),
        ({"stages": ["7"]}, PlanError, "no unit is named '7'"),
        ({"stages": 3, "schedule": "zbv"}, PlanError, "3 stages"),
        ({"schedule": "fast"}, PlanError, "schedule='fast': use one of"),
        ({"micro_batches": 0}, PlanError, "micro_batches=0"),
        ({"checkpoint": "some"}, PlanError, "checkpoint='some': use one of never, exc"),
        ({"batchnorm": "none"}, PlanError, "batchnorm='none': use one of deferred, micro, sync"),
        ({"clip_norm": -1}, PlanError, "clip_norm=-1: give a number above 0"),
        ({"place": ["cpu", "cuda:99"]}, PlanError, "place has 'cuda:99', which cannot be used"),
        ({"place": "cpu"}, PlanError, "place='cpu': give a list"),
        ({"channel": "tcp"}, PlanError, "channel='tcp': use one of zmq, horovod, nccl, gloo"),
        ({"model": Residual(), "stages": ["relu"]}, PlanError,
         "no stage can begin at 'relu': unit 'first', which it is part of, is kept whole, since"),
        ({"model": Residual(), "stages": ["tanh"]}, PlanError, "'tanh': it goes with unit 'enter'"),
        ({"model": nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6))),
          "stages": ["1.1"]}, PlanError, "begin at '1.1': it is inside '1', which is one unit"),
        ({"optimizer": adam([nn.Parameter(torch.ones(1))])}, TypeError, "Adam; give a function"),
        ({"scaler": 1024.0}, TypeError, "scaler is a float; give a torch.amp.GradScaler"),
        ({"model": 3}, TypeError, "int is no model"),
        ({"sample": torch.ones(2, 5)}, PlanError, "unit '0' fails on the sample: RuntimeError"),
    ],
)  # fmt: skip
def test_wrong_options(options, kind, told):
    with pytest.raises(kind, match=told):
        wrong(**options)


@pytest.mark.parametrize(
    ("loss", "y", "kind", "told"),
    [
        (F.mse_loss, torch.ones(11, 6), ValueError, r"shapes \(12, 6\), \(11, 6\): all need"),
        (lambda out, y: out - y, torch.ones(12, 6), PipelineError, "returns .*, no scalar tensor"),
        (lambda out, y: out.detach().mean(), torch.ones(12, 6), PipelineError, "depends on no par"),
        (None, torch.ones(12, 6), PlanError, "needs the loss="),
    ],
)
def test_wrong_steps(loss, y, kind, told):
    pipe = wrong(loss=loss, optimizer=adam, stages=2)
    with pytest.raises(kind, match=told):
        pipe.step(batches(1)[0][0], y)
    pipe.close()


@pytest.mark.parametrize("place", [["cpu"], ["cpu", "cpu"]])
def test_place_says_how_many_stages(place):
    pipe = wrong(place=place, loss=F.mse_loss, optimizer=adam)
    assert len(pipe.plan.place) == len(place)
    pipe.step(*batches(1)[0])
    pipe.close()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.arange(3.0).expand(4, 3),
        torch.ones(()).expand(2, 3),
        torch.arange(20.0).reshape(4, 5)[:, :2],
        torch.arange(6).to(torch.bfloat16),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.empty(0, 4),
    ],
)
def test_tensors_travel_with_their_strides(tensor):
    codec = TorchCodec()
    packed = codec.pack(tensor)
    assert len(packed.data) <= tensor.numel() * tensor.element_size()
    back = codec.unpack(packed._replace(data=bytearray(packed.data)))
    assert back.stride() == tensor.stride()
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"dtype": "nn"},
        {"shape": [3]},
        {"shape": [-2]},
        {"shape": [True, 2]},
        {"layout": [1, 2]},
        {"layout": [-1]},
        {"layout": [1 << 60]},
        {"data": bytearray(7)},
    ],
    ids=str,
)
def test_descriptions_that_lie_make_no_tensor(change):
    packed = TorchCodec().pack(torch.ones(2))
    with pytest.raises(ValueError):
        TorchCodec().unpack(packed._replace(data=bytearray(packed.data))._replace(**change))


def test_numbers_and_structures_travel():
    from hvdx.integrations.pytorch_graph import flat, unflat

    value = {"a": (torch.ones(2), 3, 2.5), "b": [torch.Size([2, 3]), True, None, torch.float32]}
    spec, kinds, tensors = flat(value)
    assert len(tensors) == 5
    back = unflat(spec, kinds, iter(tensors))
    assert str(back) == str(value)
    with pytest.raises(TypeError, match="a ndarray, which cannot travel"):
        flat(np.ones(2))
