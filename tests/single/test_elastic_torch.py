"""The elastic states of PyTorch, in one process."""

from __future__ import annotations

from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod")

import hvdx.torch as hvd  # noqa: E402
from hvdx import elastic  # noqa: E402
from hvdx.torch.elastic.state import (  # noqa: E402
    ModelStateHandler,
    get_handler_registry,
    set_handler_registry,
)


@pytest.fixture(autouse=True, scope="module")
def running():
    hvd.init()
    yield
    hvd.shutdown()  # other files test what comes before init()


def linear(value):
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values(model):
    return {value for p in model.parameters() for value in p.detach().flatten().tolist()}


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_models_optimizers_and_schedules_go_back_together():
    model = linear(1.0)
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), 0.1), model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = hvd.elastic.TorchState(model, optimizer, schedule=schedule, batch=20)
    state.sync()
    step(model, optimizer)
    schedule.step()
    state.batch = 21
    state.commit()
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    weight = model.weight.detach().clone()
    for _ in range(2):  # twice: loading must not hand out what is saved
        step(model, optimizer)
        schedule.step()
        state.batch = 22
        state.restore()
        torch.testing.assert_close(model.weight.detach(), weight)
        torch.testing.assert_close(optimizer.state[model.weight]["exp_avg"], moment)
        assert (schedule.last_epoch, state.batch) == (1, 21)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert state.schedule.optimizer is optimizer


def owed(optimizer):
    parameters = optimizer.compression_state()["parameters"]
    return torch.cat([own["residual"].flatten() for own in parameters.values()])


@pytest.mark.parametrize("conserve", [False, True])
def test_what_compression_holds_back_goes_back_with_the_rest(conserve):
    model = linear(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compression = hvd.Compression.onebit(min_elements=0)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=compression)
    state = hvd.elastic.TorchState(model, optimizer, conserve=conserve)

    def owe(value):  # one rank delivers all, and owes nothing by itself
        saved = optimizer.compression_state()
        for own in saved["parameters"].values():
            own["residual"].fill_(value)
        optimizer.load_compression_state(saved)

    step(model, optimizer)
    owe(3.0)
    state.commit()
    owe(5.0)
    state.restore()  # the script's own
    assert set(owed(optimizer).tolist()) == {3.0}
    owe(5.0)
    elastic._go_back(state)
    hvd.shutdown()
    hvd.init()
    assert set(owed(optimizer).tolist()) == {3.0}
    state.sync()
    step(model, optimizer)  # what was owed is met, and sent
    assert set(owed(optimizer).tolist()) == {0.0}


def test_several_models_and_a_replaced_one():
    state = hvd.elastic.TorchState(one=linear(1.0), two=linear(2.0))
    assert (state.model, state.optimizer) == (None, None)
    state.one.load_state_dict(linear(5.0).state_dict())
    state.two = linear(3.0)
    state.two.load_state_dict(linear(7.0).state_dict())
    state.restore()
    assert (values(state.one), values(state.two)) == ({1.0}, {3.0})


def test_handlers_of_ones_own():
    class Mine(ModelStateHandler):
        pass

    registry = get_handler_registry()
    try:
        set_handler_registry([(torch.nn.Linear, Mine), *registry])
        state = hvd.elastic.TorchState(linear(1.0))
        assert type(state._handlers["model"]) is Mine
    finally:
        set_handler_registry(registry)


def ranks(rank, size):
    names = {"rank": lambda: rank, "size": lambda: size}
    return mock.patch.multiple("hvdx.torch.elastic.sampler", **names)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_sampler_shares_out_what_is_left(shuffle):
    samples, seen = 36, []
    samplers = []
    for rank in range(3):
        with ranks(rank, 3):
            samplers.append(hvd.elastic.ElasticSampler(range(samples), shuffle=shuffle))
    loaders = [torch.utils.data.DataLoader(range(samples), 2, sampler=s) for s in samplers]
    for sampler, loader in zip(samplers, loaders, strict=True):
        assert len(sampler) == 12
        for index, batch in enumerate(loader):
            if index == 2:
                break
            seen += batch.tolist()
            sampler.record_batch(index, len(batch))
    assert [sampler.processed_num for sampler in samplers] == [12] * 3
    # One rank less; the sampler of rank 1 has just joined, and is told by rank 0.
    for rank in range(2):
        with ranks(rank, 2):
            sampler = hvd.elastic.ElasticSampler(range(samples), shuffle=shuffle)
            sampler.load_state_dict(samplers[0].state_dict())
            assert len(sampler.remaining_indices) == 24
            seen += sampler
    assert sorted(seen) == list(range(samples))


def test_the_sampler_in_a_state_without_sync():
    # Hosts have gone, and nothing else: Horovod skips sync(), and its sampler keeps old shares.
    with ranks(1, 2):
        sampler = hvd.elastic.ElasticSampler(range(8), shuffle=False)
        state = hvd.elastic.TorchState(sampler=sampler)
        sampler.record_batch(0, 2)
    with ranks(0, 1):
        state.on_reset()
        assert list(sampler) == [4, 5, 6, 7]


@pytest.mark.parametrize("record", [True, False])
def test_a_script_knows_the_last_batch_of_a_resumed_epoch(record):
    batches = hvd.DistributedBatchSampler(range(30), 2, shuffle=False)
    batches.load_state_dict({"epoch": 0, "processed_num": 20})
    for step, own in enumerate(batches):
        assert own == [20 + 2 * step, 21 + 2 * step]
        if record:
            batches.record_batch(step)
        assert len(batches) == 5
    for _ in batches:
        assert len(batches) == 15


def test_batches_go_on_where_ranks_are_only_taken_away():
    batches = hvd.DistributedBatchSampler(range(10), 2, shuffle=False)
    state = hvd.elastic.TorchState(linear(1.0), batches=batches)
    for step, _ in enumerate(batches):
        batches.record_batch(step)
        if step == 1:
            break
    state.save()
    state.on_reset()  # nobody synchronises
    assert list(batches) == [[4, 5], [6, 7], [8, 9]]


def test_the_sampler_repeats_some_where_shares_differ():
    with ranks(1, 2):
        sampler = hvd.elastic.ElasticSampler(range(5), shuffle=False)
        assert (sampler.num_samples, sampler.total_size) == (3, 6)
        assert list(sampler) == [1, 3, 0]
        for index in range(3):
            sampler.record_batch(index, 1)
        assert list(sampler) == [1, 3, 0]  # until it is told to look again
        sampler.reset()
        assert len(sampler) == 0
        sampler.set_epoch(1)
        assert len(sampler) == 3
