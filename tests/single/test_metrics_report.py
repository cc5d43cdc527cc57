"""``hvdx report``: what its table and its pictures are made of."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from hvdx.cli import main
from hvdx.metrics.report import load, panels, rows


def spread(value):
    return {"rank0": value, "min": value, "mean": value, "max": 2 * value}


def interval(step, **more):
    told = {"kind": "interval", "step": step, "seconds": step / 10, "steps": 10}
    told |= {"samples_per_second": 100.0 * step, "values": {"loss": 1 / step}}
    return {**told, "peak_memory_mb": spread(400), "memory_mb": spread(300), **more}


def write(path, *lines, **header):
    told = [{"kind": "header", "format": 1, "ranks": 2, **header}, *lines]
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in told)
    return path


def evaluation(step, **values):
    return {"kind": "evaluation", "step": step, "seconds": step / 10, "values": values}


def test_a_table_has_what_counts(tmp_path):
    target = {"kind": "target", "step": 20, "seconds": 2.0, "target": "accuracy >= 0.5"}
    share = {"communication": spread(0.25), "megabytes_per_step": spread(1.5)}
    whole = write(
        tmp_path / "whole.jsonl",
        interval(10, communication=spread(0.9)),  # which warms up
        *(interval(step, **share) for step in (20, 30)),
        evaluation(30, accuracy=0.5),
        target,
        unit="tokens",
    )
    other = write(tmp_path / "other.jsonl", interval(10, values={"loss": None}), unit="tokens")
    first, second = rows(load([whole, other]))
    assert (first["run"], first["ranks"], first["steps"]) == ("whole", "2", "30")
    assert (first["time"], first["tokens/s"], first["communication"]) == ("3.0 s", "2,500", "25.0%")
    assert (first["MB/step"], first["peak MB"], first["accuracy"]) == ("1.5", "800", "0.5")
    assert first["target"] == "accuracy >= 0.5: 2.0 s"
    assert list(first) == list(second) and second["accuracy"] == "-"
    assert second["loss"] == "not finite"


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path):
    path = write(tmp_path / "run.jsonl", interval(10), interval(20), interval(30))
    with open(path, "a") as file:
        file.write('{"kind": "inter')  # killed
        file.write("\n")
    write(path, interval(30), interval(40), start=20)
    write(path, interval(10))
    first, second = load([path])
    assert [line["step"] for line in first.lines] == [10, 20, 30, 40]
    assert [line["seconds"] for line in first.lines] == [1.0, 2.0, 6.0, 7.0]
    assert (first.name, second.name, len(second.lines)) == ("run (1)", "run (2)", 1)


def test_evaluations_stand_beside_what_they_evaluate(tmp_path):
    path = write(tmp_path / "run.jsonl", interval(10), evaluation(10, val_loss=1.0, accuracy=0.5))
    titles = [panel.title for panel in panels(load([path]))]
    assert titles[:4] == [
        "loss by steps",
        "loss by seconds of training",
        "accuracy by steps",
        "accuracy by seconds of training",
    ]


@pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("html", b"<!DOCTYPE html>")])
def test_pictures(tmp_path, ending, begin):
    pytest.importorskip("matplotlib")
    bubble = {"communication": spread(0.2), "bubble": spread(0.1)}
    one = write(tmp_path / "one.jsonl", *(interval(step, **bubble) for step in (10, 20, 30)))
    two = write(tmp_path / "<two>.jsonl", interval(10), evaluation(10, val_loss=0.3))
    out = tmp_path / f"out.{ending}"
    done = CliRunner().invoke(main, ["report", str(one), str(two), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert f"drawn: {out}" in done.output and "bubble" in done.output.splitlines()[0]
    data = out.read_bytes()
    assert data.startswith(begin)
    if ending == "html":
        assert b"&lt;two&gt;" in data and b"<two>" not in data and b"</svg>" in data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1: no object whose kind is"),
        ('{"kind": "header", "format": 1, "ranks": 2}\n', "nothing to draw yet"),
        (None, "No such file"),
    ],
)
def test_files_of_no_use_are_named(tmp_path, text, message):
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    done = CliRunner().invoke(main, ["report", str(path)])
    assert done.exit_code == 1 and message in done.output


def test_a_picture_that_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "run.jsonl", interval(10))
    done = CliRunner().invoke(main, ["report", str(path), "-o", str(tmp_path / "no" / "x.png")])
    assert done.exit_code == 1 and "cannot draw into" in done.output
