"""Metrics of one process: what is counted, written and read; files that cannot be."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import hvdx as hvd
from hvdx.metrics import Target
from hvdx.metrics.log import read
from hvdx.metrics.probe import Counts


class Training:
    """What a source tells, at our will."""

    communication_seconds = 0.0


class Staged(Training):
    busy_seconds = schedule_seconds = 0.0
    bytes_sent = 0


def recorded(path, kind="interval"):
    return [told for told in read(path) if told["kind"] == kind]


def test_an_interval_has_what_was_counted_in_it(tmp_path, capsys):
    path, source = tmp_path / "new folder" / "run.jsonl", Staged()
    with hvd.Metrics(path, source, every=2, unit="tokens", options={"lr": 0.1}) as metrics:
        for loss in (3.0, 1.0, 5.0):
            time.sleep(0.02)
            source.communication_seconds += 0.005
            source.schedule_seconds += 0.01
            source.busy_seconds += 0.0075
            source.bytes_sent += 2_000_000
            metrics.step(32, loss=loss)
    header, first, last = read(path)
    assert (header["ranks"], header["options"], header["unit"]) == (1, {"lr": 0.1}, "tokens")
    assert (first["step"], first["steps"], first["samples"]) == (2, 2, 64)
    assert (last["step"], last["steps"], last["samples"]) == (3, 1, 32)
    assert [told["values"]["loss"] for told in (first, last)] == [2.0, 5.0]
    assert first["samples_per_second"] == pytest.approx(64 / first["seconds"])
    assert first["communication"]["mean"] == pytest.approx(0.01 / first["seconds"])
    assert first["busy"]["mean"] == pytest.approx(0.015 / first["seconds"])
    assert first["bubble"]["rank0"] == pytest.approx(0.25)
    assert first["megabytes_per_step"]["max"] == 2.0
    assert 10 < first["memory_mb"]["min"] <= first["peak_memory_mb"]["min"]
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("step 2  loss 2.0000  ") and " tokens/s on 1 rank  comm" in line
    assert "bubble 25.0%  sent 2 MB/step" in line


def test_pauses_and_evaluations_count_in_no_speed(tmp_path):
    path, source = tmp_path / "run.jsonl", Training()
    metrics = hvd.Metrics(path, source, every=1, target="accuracy >= 0.5", quiet=True)
    with metrics.paused(), metrics.paused():
        time.sleep(0.2)
        source.communication_seconds += 0.2
    metrics.evaluated(accuracy=0.4, loss=1)
    assert metrics.reached is None
    metrics.evaluated(accuracy=np.float32(0.5))
    metrics.evaluated(accuracy=0.9)
    metrics.step(1)
    metrics.close()
    (interval,) = recorded(path)
    assert interval["communication"]["mean"] == 0.0 and interval["wall"] > 0.2
    assert interval["seconds"] < interval["wall"] - 0.19
    found = recorded(path, "evaluation")
    assert [told["values"]["accuracy"] for told in found] == [0.4, 0.5, 0.9]
    (target,) = recorded(path, "target")
    assert target["target"] == "accuracy >= 0.5"
    assert metrics.reached == target["seconds"] <= interval["seconds"]


def test_intervals_grow_to_ten_seconds(tmp_path):
    path = tmp_path / "run.jsonl"
    metrics = hvd.Metrics(path, quiet=True)
    for _ in range(200):  # of microseconds each
        metrics.step(1)
    assert [told["step"] for told in recorded(path)] == [1, 11, 111]
    metrics.close()
    metrics.close()
    assert recorded(path)[-1]["step"] == 200


def test_values_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "run.jsonl"
    metrics = hvd.Metrics(path, every=1)
    metrics.step(1, loss=float("nan"))
    assert recorded(path)[0]["values"] == {"loss": None}
    metrics.close()


def test_tensors_are_added_up_where_they_are(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "run.jsonl"
    metrics = hvd.Metrics(path, every=3)
    buffer = torch.ones((), dtype=torch.float16, requires_grad=True)
    for value in (60000.0, 60000.0, 0.0):  # their sum is no float16
        with torch.no_grad():
            buffer.fill_(value)
        metrics.step(1, loss=buffer, right=torch.tensor([3]))
    assert recorded(path)[0]["values"] == {"loss": pytest.approx(40000, rel=1e-3), "right": 3.0}
    with pytest.raises(ValueError, match=r"loss= has shape \(2,\); give one number"):
        metrics.step(1, loss=torch.ones(2))


def test_counters_that_begin_anew_do_not_run_backwards():
    before = Counts(10.0, 5.0, 3.0, 1000.0)
    assert Counts(12.0, 6.0, 1.0, 10.0).since(before)[:4] == (2.0, 1.0, 1.0, 10.0)


@pytest.mark.parametrize("text", ["accuracy", "accuracy > 1", "loss <= low", "0.9", ">= 1"])
def test_targets_that_are_none(text):
    with pytest.raises(ValueError, match=r"write 'accuracy >= 0.95' or 'val_loss <= 0.1'"):
        Target.of(text)
    with pytest.raises(ValueError, match="metrics, rank 0: target="):
        hvd.Metrics(target=text)


def test_targets():
    target = Target.of(" val_loss<=1e-1 ")
    assert str(target) == "val_loss <= 0.1"
    found = [target.reached(v) for v in ({"val_loss": 0.1}, {"val_loss": 0.2}, {"loss": 0}, {})]
    assert found == [True, False, False, False]
    assert not target.reached({"val_loss": None})


@pytest.mark.parametrize("every", [0, 1.5, "10"])
def test_steps_in_an_interval_must_be_some(every):
    with pytest.raises(ValueError, match=f"metrics, rank 0: every={every!r}: give a number"):
        hvd.Metrics(every=every)


def test_sources_must_tell_something():
    with pytest.raises(TypeError, match="source=dict tells nothing of communication"):
        hvd.Metrics(source={})


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import hvdx\n")
    with pytest.raises(ValueError, match=r"train.py' is no file of metrics: give another path"):
        hvd.Metrics(path)
    assert path.read_text() == "import hvdx\n"


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"metrics cannot be written to .*Is a directory"):
        hvd.Metrics(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_ends_the_file_and_not_the_training(tmp_path):
    metrics = hvd.Metrics(tmp_path / "run.jsonl", every=1, quiet=True)
    metrics._log._file.close()
    metrics._log._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.warns(UserWarning, match="no more metrics are written: .*No space left"):
        metrics.step(1)
    metrics.step(1)
    metrics.close()
    assert metrics.steps == 2


def test_runs_follow_each_other_even_after_a_crash(tmp_path):
    path = tmp_path / "run.jsonl"
    for start in (0, 2):
        metrics = hvd.Metrics(path, every=1, start=start, quiet=True)
        metrics.step(1, loss=1.0)
        metrics.close()
        with open(path, "a") as file:
            file.write('{"kind": "interval", "st')
    told = read(path)
    assert [each["kind"] for each in told] == ["header", "interval"] * 2
    assert [each.get("start", each.get("step")) for each in told] == [0, 1, 2, 3]


HEADER = json.dumps({"kind": "header", "format": 1, "ranks": 1})
STEP = json.dumps({"kind": "interval", "step": 1, "seconds": 1.0, "values": {}})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "does not begin with the header of a run"),
        ([STEP], "does not begin with the header of a run"),
        ([HEADER, "{", STEP], "line 2: no JSON"),
        ([HEADER, STEP, "[]"], "line 3: no object whose kind is one of header, interval"),
        ([HEADER, '{"kind": "interval", "seconds": 1}'], "line 2: a interval without step"),
        (['{"kind": "header", "format": 9}'], "line 1: format 9, but this hvdx reads 1"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        read(path)


def scalars(folder):
    """Read TensorBoard's files: records of a length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    data, found = file.read_bytes(), {}
    while data:
        (size,) = struct.unpack_from("<Q", data)
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        found |= {(each.tag, event.step): each.simple_value for each in event.summary.value}
    return found


def test_tensorboard_gets_what_the_file_gets(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = hvd.Metrics(None, Training(), every=2, tensorboard=tmp_path, quiet=True)
    for loss in (0.5, 1.0, 1.0, float("inf")):
        metrics.step(8, loss=loss)
    metrics.evaluated(accuracy=0.75)
    metrics.close()
    found = scalars(tmp_path)
    assert found["train/loss", 2] == 0.75 and ("train/loss", 4) not in found
    assert found["evaluation/accuracy", 4] == 0.75
    assert found["job/samples_per_second", 4] > 0 and found["job/communication", 4] == 0


def test_without_tensorboardx_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(OSError, match=r"needs the package tensorboardX: pip install"):
        hvd.Metrics(tensorboard=tmp_path)


def test_metrics_load_no_framework():
    code = (
        "import sys, hvdx; hvdx.Metrics().step(1); print({'torch', 'tensorflow'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "set()" in done.stdout, done.stderr
