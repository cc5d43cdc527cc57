"""Pipelines over ranks: what they learn is, bit for bit, what one process learns."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import zmq
from torch import nn
from torch.nn import functional as F

import hvdx as hvd
from hvdx.errors import HvdxError, MismatchError, PipelineError, PlanError
from hvdx.pipeline.channel import Failure, Key
from hvdx.pipeline.zmq_channel import ZmqChannel
from hvdx.torch import SyncBatchNorm


def load_models():
    """The models of the tests in one process."""
    path = Path(__file__).parents[2] / "single" / "test_pipeline_torch.py"
    spec = importlib.util.spec_from_file_location("pipeline_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_models()
STEPS = 8
two = pytest.mark.ranks(2)


def pipeline(model, x, **options):
    options = {"micro_batches": 4, "seed": 7, **options}
    return hvd.Pipeline(model, x, F.mse_loss, models.adam, **options)


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
def alone(kind, steps):
    """What one process learns, and its last loss."""
    return models.train(models.made(kind), models.batches(steps), place=["cpu"])


@pytest.mark.parametrize(
    ("schedule", "channel"),
    [
        pytest.param("gpipe", "zmq", marks=two),
        ("1f1b", "zmq"),
        ("interleaved", "zmq"),
        pytest.param("zb1p", "zmq", marks=two),
        ("zbv", "zmq"),
        # Where ranks must make their calls in one order, each schedule has its own.
        *(pytest.param(each, "horovod", marks=two)
          for each in ("gpipe", "1f1b", "interleaved", "zb1p")),
        ("zbv", "horovod"),
        pytest.param("1f1b", "gloo", marks=two),
        ("zbv", "gloo"),
    ],
)  # fmt: skip
def test_ranks_learn_what_one_process_learns(schedule, channel, shared):
    kind = models.Everything  # tied weights, skips, dropout, buffers; units for 8 stages
    steps = STEPS if channel == "zmq" else STEPS // 2
    data = models.batches(steps)
    expected, loss = alone(kind, steps)
    model = models.made(kind)
    if hvd.rank():  # the ranks begin with rank 0's weights
        torch.nn.init.ones_(next(model.parameters()))
    pipe = pipeline(model, data[0][0], schedule=schedule, channel=channel)
    losses = [pipe.step(x, y) for x, y in data]
    assert torch.equal(losses[-1], loss)
    models.assert_same(learnt(pipe, shared / "state"), expected)
    pipe.close()


@two
def test_dropout_uneven_batches_and_outputs_everywhere(shared):
    data = models.batches(rows=[12, 7, 3, 1])
    expected, loss = models.train(models.made(models.Dropped), data, place=["cpu"])
    pipe = pipeline(models.made(models.Dropped), data[0][0])
    for x, y in data:
        last = pipe.step(x, y)
    assert torch.equal(last, loss)
    models.assert_same(learnt(pipe, shared / "state"), expected)
    plain = models.made(models.Dropped).eval()
    plain.load_state_dict(expected)
    for x, _ in data:
        torch.testing.assert_close(pipe(x), plain(x))
    following = [pipe.step(x, y) for x, y in data]
    pipe.close()

    single = pipeline(models.made(models.Dropped), data[0][0], place=["cpu", "cpu"])
    single.load(shared / "state")  # from ranks to one process, and back
    for x, _ in data:
        single(x)
    assert [single.step(x, y) for x, y in data] == following
    single.close()
    again = pipeline(models.made(models.Dropped), data[0][0])
    again.load(shared / "state")
    for x, _ in data:
        again(x)
    assert [again.step(x, y) for x, y in data] == following
    again.close()


class Failing(nn.Module):
    def forward(self, x):
        if self.training and not torch.is_grad_enabled():
            return x  # the sample
        raise ArithmeticError("no such luck")


@pytest.mark.parametrize("channel", ["zmq", "horovod", "gloo"])
def test_an_error_reaches_all_ranks_and_leaves_nothing_behind(channel):
    threads, sockets = threading.active_count(), open_sockets()
    size = hvd.size()
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(size - 1)), Failing())
    x, y = models.batches(1)[0]
    pipe = pipeline(model, x, stages=[1] * size, channel=channel)
    hvd.barrier()
    start = time.monotonic()
    told = (
        f"rank {size - 1}, stage {size - 1}, unit '{size - 1}', forward of micro-batch 0 in step 0:"
        " ArithmeticError: no such luck"
    )
    with pytest.raises(PipelineError, match=told) as caught:
        pipe.step(x, y)
    assert time.monotonic() - start < 20  # of 0.05: and no deadline is as short
    assert "in forward" in str(caught.value)  # the traceback, on each rank
    with pytest.raises(PipelineError, match=r"of no more use, since .*no such luck"):
        pipe.step(x, y)
    pipe.close()
    hvd.barrier()
    until = time.monotonic() + 60  # Gloo closes what it has in a thread of its own
    while (threading.active_count(), open_sockets()) != (threads, sockets):
        assert time.monotonic() < until, (threading.enumerate(), threads, open_sockets(), sockets)
        time.sleep(0.01)


def open_sockets():
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return sum(link.startswith(("socket:", "anon_inode:[eventfd]")) for link in links)


@two
def test_different_batches_are_told():
    x, y = models.batches(1)[0]
    pipe = pipeline(models.sequential(), x)
    rows = 12 - hvd.rank()
    with pytest.raises(PipelineError, match=r"MismatchError: .*step 0 with 1[12] rows in 4 micro"):
        pipe.step(x[:rows], y[:rows])
    pipe.close()
    pipe = pipeline(models.sequential(), x)
    with pytest.raises(PipelineError, match=r"rank 1, step 0: ValueError: the batch has tensors"):
        pipe.step(x, y[: 12 - hvd.rank()])
    pipe.close()


@two
def test_different_pipelines_are_told():
    x = models.batches(1)[0][0]
    with pytest.raises(MismatchError, match=r"rank 0: 'micro_batches' = 4, rank 1: 'mic.* = 5"):
        pipeline(models.sequential(), x, micro_batches=4 + hvd.rank())
    with pytest.raises(MismatchError, match="rank 0: 'stages' = None, rank 1: 'stages' = 9"):
        pipeline(models.sequential(), x, stages=9 if hvd.rank() else None)
    with pytest.raises(PlanError, match="4 stages, but the model has 2 units: use at most 2"):
        pipeline(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), x, schedule="interleaved")
    message = "module 'inner'" if hvd.rank() else "rank 1 cannot make the pipeline: PlanError: mod"
    with pytest.raises(PlanError, match=message):
        pipeline((models.sequential, models.WithBranch)[hvd.rank()](), x)
    with pytest.raises(PlanError, match="3 stages on 2 ranks"):
        pipeline(models.sequential(), x, stages=3)
    with pytest.raises(MismatchError, match="rank 0: 'channel' = 'zmq', rank 1: 'channel' = 'horo"):
        pipeline(models.sequential(), x, channel=("zmq", "horovod")[hvd.rank()])
    with pytest.raises(MismatchError, match="rank 0: 'schedule' = 'auto', rank 1: 'schedule' = '1"):
        pipeline(models.sequential(), x, schedule=("auto", "1f1b")[hvd.rank()])
    rate = 0.1 + hvd.rank()
    for make, told in (
        (
            lambda params: torch.optim.Adam(params, rate),
            r"rank 0: Adam .*'lr': 0\.1.*, rank 1: Adam",
        ),
        (None if hvd.rank() else models.adam, "rank 0: Adam .*, rank 1: none"),
    ):
        with pytest.raises(MismatchError, match=f"disagree about the optimizer: {told}"):
            hvd.Pipeline(models.sequential(), x, F.mse_loss, make)
    with pytest.raises(PlanError, match="channel='nccl' needs a GPU of its own for each rank, but"):
        pipeline(models.sequential(), x, channel="nccl")


# --- the channel


def exchange(value):
    return hvd.allgather_object(value)


@pytest.fixture
def channel():
    made = ZmqChannel(range(hvd.size()), hvd.rank(), exchange)
    yield made
    made.close()


def ring(channel, *, tensors):
    """Send forward from rank to rank; return what has come."""
    rank, last = hvd.rank(), hvd.size() - 1
    found = tensors
    if rank:
        found = channel.get(Key("F", 0, rank, 0))
    if rank < last:
        channel.put(Key("F", 0, rank + 1, 0), found)
    return found


@two
def test_the_channel_carries_any_shape(channel):
    import numpy as np

    sent = [
        np.arange(5.0),
        None,
        np.zeros((0, 3), np.int8),
        np.full((300, 400), 7.0),
        np.array(2),
        np.arange(6).reshape(2, 3).T,
    ]
    found = ring(channel, tensors=sent)
    for one, other in zip(sent, found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))
    if hvd.rank() == hvd.size() - 1:
        found[3][0] = 1  # its memory is the receiver's own


def test_a_get_has_a_deadline():
    made = ZmqChannel(range(hvd.size()), hvd.rank(), exchange)
    made._seconds = 1  # to meet takes longer on a busy machine
    if hvd.rank() == 0:
        with pytest.raises(TimeoutError, match="stage 0 has waited 1 s for the gradients of"):
            made.get(Key("B", 3, 0, 1))
    hvd.barrier()
    made.close()


def test_a_failure_and_a_farewell_reach_everyone(channel):
    last = hvd.size() - 1
    hvd.barrier()
    if hvd.rank() == last:
        channel.fail(Failure(last, "ValueError: x", "stage 1"))
    with pytest.raises(PipelineError, match=f"rank {last}, stage 1: ValueError: x"):
        channel.receive(0 if hvd.rank() else 1, Key("X", 0, 0, 0))
    with pytest.raises(PipelineError):
        channel.put(Key("F", 0, 0, 0), [])


def test_who_leaves_is_named_after_what_he_sent(channel):
    last = hvd.size() - 1
    if hvd.rank() == last:
        channel.send(0, Key("X", 0, 0, 0), [])
        channel.close()
    if hvd.rank() == 0:
        time.sleep(0.2)
        assert channel.receive(last, Key("X", 0, 0, 0)) == []
        with pytest.raises(ConnectionError, match=f"rank {last} has closed its pipeline"):
            channel.receive(last, Key("X", 1, 0, 0))
    hvd.barrier()


@two
def test_another_secret_is_refused():
    def lying(value):
        everyone = exchange(value)
        if hvd.rank() == 1 and isinstance(everyone[0], tuple):  # secret and kernel
            everyone[0] = ("no secret", everyone[0][1])
        return everyone

    with pytest.raises(HvdxError, match="rank 1: it is refused by another: the secrets"):
        ZmqChannel(range(2), hvd.rank(), lying, seconds=2)


def far(value):
    """Exchange as ranks of two machines do."""
    return exchange((value[0], str(hvd.rank())) if isinstance(value, tuple) else value)


def plain(place):
    """Connect to a door of ZeroMQ's with a socket that knows nothing of it."""
    if place.startswith("tcp://"):
        address, port = place.removeprefix("tcp://").split(":")
        return socket.create_connection((address, int(port)))
    made = socket.socket(socket.AF_UNIX)
    made.connect("\0" + place.removeprefix("ipc://@"))
    return made


@two
def test_a_port_in_use_is_told_on_every_rank(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if hvd.rank() == 0:
            bind = lambda self, address: self.bind(f"{address}:{port}")  # noqa: E731
            monkeypatch.setattr(zmq.Socket, "bind_to_random_port", bind)
        with pytest.raises(
            HvdxError, match=r"rank 0: cannot listen on 127\.0\.0\.1: Address alread"
        ):
            ZmqChannel(range(2), hvd.rank(), far)
        hvd.barrier()


@two
@pytest.mark.parametrize("told", [exchange, far])
def test_strangers_do_not_get_in_while_ranks_meet(told):
    """Noise, silence and a wrong password come before the right rank does."""
    strangers = []

    def late(value):
        everyone = told(value)
        if isinstance(everyone[0], dict) and hvd.rank() == 1:  # the doors
            place = everyone[0][1]
            for noise in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096)):
                strangers.append(plain(place))
                strangers[-1].send(noise)
            context = zmq.Context()
            for password in (b"guessed", b""):
                stranger = context.socket(zmq.PAIR)
                stranger.linger = 0
                if password:
                    stranger.plain_username, stranger.plain_password = b"rank", password
                stranger.connect(place)
                stranger.send(b"malice", zmq.NOBLOCK)
                strangers.append(stranger)
            time.sleep(0.3)
        return everyone

    channel = ZmqChannel(range(2), hvd.rank(), late)
    ring(channel, tensors=[])
    hvd.barrier()
    for stranger in strangers:
        stranger.close()
    channel.close()


@two
@pytest.mark.parametrize(
    "frames",
    [
        [b"\x80\x04garbage"],
        [b"[]"],
        [b'{"a": 1}'],
        [b'[9, "F", 0, 1, 0, "", []]'],
        [b'[1, "F", 0, 1, 0, "", [["<f4", [2], null]]]'],
        [b'[1, "F", 0, 1, 0, "", [["<f4", [2], null]]]', b"1234567"],
        [b'[1, "F", 0, 1, 0, "", [["|O", [1], null]]]', b"12345678"],
        [b'[1, "F", 0, 1, 0, "", [["<f4"]]]', b"1234"],
        [b'[1, "F", 0, 1, 0, "", 5]', b""],
        [b'[1, "fail", 0, 0, 0, "", {"a": 1}]'],
        [b"[" * 100_000],
        [b" " * (2 << 20)],
    ],
    ids=lambda frames: str(frames[0][:40]),
)
def test_garbage_of_a_rank_is_told(channel, frames):
    if hvd.rank() == 0:
        channel._sockets[1].send_multipart(frames)
    else:
        with pytest.raises(OSError, match="rank 0 sent what is no message: "):
            channel.get(Key("F", 0, 1, 0))
    hvd.barrier()


@two
def test_ranks_make_the_plan_of_what_rank_0_measures(shared):
    data = models.batches(4)
    expected, loss = models.train(models.made(models.Residual), data, place=["cpu"])
    pipe = pipeline(models.made(models.Residual), data[0][0], schedule="auto")
    for x, y in data:
        last = pipe.step(x, y)
    assert torch.equal(last, loss)
    models.assert_same(learnt(pipe, shared / "state"), expected)
    told = hvd.allgather_object(pipe.plan.to_json())
    assert len(set(told)) == 1 and pipe.plan.step > 0
    pipe.close()
    with pytest.raises(PlanError, match="not enough memory for"):
        pipeline(models.made(models.Residual), data[0][0], memory=100)


def test_a_timeline_has_all_ranks(shared):
    x, y = models.batches(1)[0]
    pipe = pipeline(models.made(models.Residual), x)
    pipe.step(x, y)
    pipe.step(x, y)
    pipe.timeline(shared / "run.json", steps=1)
    events = json.loads((shared / "run.json").read_text())["traceEvents"]
    spans = {(e["tid"], e["name"]): e for e in events if e["ph"] == "X" and e["pid"] == 1}
    assert {rank for rank, _ in spans} == set(range(hvd.size()))
    for k in range(4):
        for rank in range(1, hvd.size()):
            before, after = spans[rank - 1, f"{rank - 1}F{k}"], spans[rank, f"{rank}F{k}"]
            assert after["ts"] >= before["ts"] + before["dur"]
    with pytest.raises(OSError, match=r"cannot be written to .*missing"):
        pipe.timeline(shared / "missing" / "run.html")
    pipe.step(x, y)  # a picture that failed does no harm
    pipe.close()


@two
def test_clipping_over_ranks(shared):
    data = models.batches(4)
    model = models.made(models.Residual)
    expected, _ = models.train(model, data, place=["cpu"], clip_norm=0.05)
    pipe = pipeline(model, data[0][0], clip_norm=0.05)
    for x, y in data:
        pipe.step(x, y)
    models.assert_same(learnt(pipe, shared / "state"), expected)
    assert len(set(hvd.allgather_object(pipe.gradient_norm))) == 1
    pipe.close()
    with pytest.raises(MismatchError, match="clip_norm"):
        pipeline(models.made(models.Residual), data[0][0], clip_norm=1.0 + hvd.rank())


@two
def test_running_statistics_over_ranks(shared):
    data = models.batches(3)
    expected, _ = models.train(models.made(models.Everything), data, place=["cpu"])
    pipe = pipeline(models.made(models.Everything), data[0][0], checkpoint="always")
    for x, y in data:
        pipe.step(x, y)
    models.assert_same(learnt(pipe, shared / "state"), expected)
    pipe.close()
    with pytest.raises(PlanError, match=r"'1' is a SyncBatchNorm, .*with batchnorm='sync' if"):
        stack = [nn.Linear(6, 6), SyncBatchNorm(6), *(nn.Linear(6, 6) for _ in range(3))]
        pipeline(nn.Sequential(*stack), data[0][0])


@two
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_over_ranks(dtype, shared):
    """It travels as it is; and where one stage's gradients overflow, all skip the step."""
    data, own, seen = models.fragile_batches(), models.scaler(), set()
    with torch.autocast("cpu", dtype):
        options = {"place": ["cpu"], "scaler": models.scaler()}
        expected, _ = models.train(models.made(models.fragile), data, **options)
        pipe = pipeline(models.made(models.fragile), data[0][0], scaler=own)
        pack = pipe._codec.pack
        pipe._codec.pack = lambda tensor: (seen.add(tensor.dtype), pack(tensor))[1]
        skipped = []
        for x, y in data:
            pipe.step(x, y)
            skipped.append(pipe.skipped)
    assert skipped == [False, False, True, False, False, False]
    assert dtype in set().union(*hvd.allgather_object(seen))
    models.assert_same(learnt(pipe, shared / "state"), expected)
    assert hvd.allgather_object(own.get_scale()) == [2048.0] * hvd.size()
    pipe.close()


@two
def test_what_only_one_rank_does_is_told():
    x, y = models.batches(1)[0]
    pipe = pipeline(models.sequential(), x)
    cast, told = torch.autocast("cpu", torch.bfloat16, enabled=hvd.rank() == 0), r"autocast of cpu"
    with cast, pytest.raises(PipelineError, match=rf"MismatchError: .*, {told} to torch.bfloat16"):
        pipe.step(x, y)
    pipe.close()
    model = models.sequential()
    pipe = pipeline(model, x)
    model[0].requires_grad_(hvd.rank() == 0)
    with pytest.raises(PipelineError, match=r"MismatchError: .*, 2 parameters frozen"):
        pipe.step(x, y)
    pipe.close()
    with pytest.raises(MismatchError, match=r"'the GradScaler' = .*'scale': 1.0"):
        pipeline(model, x, scaler=models.scaler(init_scale=1.0 + hvd.rank()))
