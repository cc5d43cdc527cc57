"""Pictures of schedules: as text, with every idle moment explained, and as files."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as xml
from textwrap import dedent

import pytest

from hvdx.errors import PlanError
from hvdx.pipeline.greedy import zbv
from hvdx.pipeline.schedule import Action, Span, gpipe, interleaved, needs, one_f_one_b, zb1p
from hvdx.pipeline.simulator import Times, simulate
from hvdx.pipeline.timeline import aligned, chrome, draw, gaps, page, text, typical, write


def test_text():
    assert text(one_f_one_b(2, 3), Times.equal(2, weights=0.0)) == dedent("""\
        rank 0  F0 F1 .  B0 F2 B1 .  B2
        rank 1  .  F0 B0 F1 B1 F2 B2 .""")
    assert text(gpipe(2, 2)) == dedent("""\
        rank 0  F0 F1 .  .  .  B0 -  B1 -
        rank 1  .  F0 F1 B0 -  B1 -  .  .""")


def test_text_of_several_stages_per_rank():
    assert text(zbv(1, 2)) == "rank 0  0F0 1F0 1I0 0I0 0F1 1F1 1I1 0I1 1W0 0W0 1W1 0W1"


def test_a_long_schedule_is_drawn_coarser():
    drawn = text(gpipe(2, 500), columns=60).splitlines()
    assert all(len(line) <= 60 * 5 + 8 for line in drawn)


@pytest.mark.parametrize("schedule", [gpipe(3, 5), one_f_one_b(4, 6), interleaved(2, 4),
                                      zb1p(3, 6), zbv(2, 3)])  # fmt: skip
def test_gaps_are_the_bubble(schedule):
    seen = simulate(schedule, Times.equal(schedule.stages, 1.0, 1.3, 0.7, 0.25))
    idle = gaps(seen.spans, schedule)
    assert sum(gap.end - gap.start for gap in idle) == pytest.approx(
        seen.bubble * seen.step * schedule.ranks
    )
    hops = [gap for gap in idle if gap.cause == "hop"]
    assert hops and all(gap.end - gap.start < 0.25 + 1e-9 for gap in hops)
    assert not [gap for gap in idle if gap.cause == "own"], "a simulated rank waits for others only"
    for gap in idle:
        spans = [span for span in seen.spans[gap.rank] if span.start < gap.end - 1e-9]
        assert all(span.end <= gap.start + 1e-9 for span in spans)


def test_why_a_rank_waits():
    schedule = one_f_one_b(2, 1)
    idle = gaps(simulate(schedule, Times.equal(2, hop=0.5)).spans, schedule)
    back = Action("B", 1, 0)
    assert [tuple(gap) for gap in idle if gap.rank == 0] == [
        (0, 1.0, 4.5, "wait", back), (0, 4.5, 5.0, "hop", back),
    ]  # fmt: skip
    assert [gap.cause for gap in idle if gap.rank == 1] == ["fill", "fill", "drain"]


def test_time_of_the_engine_in_a_measured_lane():
    f, b = Action("F", 0, 0), Action("B", 0, 0)
    lane = [[Span(f, 10.0, 11.0), Span(b, 11.5, 12.0)]]
    assert [tuple(gap)[:4] for gap in gaps(lane, gpipe(1, 1))] == [(0, 11.0, 11.5, "own")]


def test_page():
    schedule = one_f_one_b(3, 4)
    lanes = {
        name: simulate(schedule, Times.equal(3, 0.01, hop=hop)).spans
        for name, hop in [("predicted", 0.0), ("measured <here>", 0.002)]
    }
    made = page(schedule, lanes, title="a & b")
    assert "http" not in made, "it needs nothing from elsewhere"
    svg = xml.fromstring(made[made.index("<svg") : made.index("</svg>") + 6])
    boxes = svg.findall("rect")
    assert len([box for box in boxes if "micro-batch" in box.find("title").text]) == 2 * 24
    assert len(boxes) == 48 + sum(len(gaps(lane, schedule)) for lane in lanes.values())
    ends = [float(box.get("x")) + float(box.get("width")) for box in boxes]
    assert max(ends) == pytest.approx(float(svg.get("width")), abs=0.1)
    assert "measured &lt;here&gt;: 1f1b, step" in made and "<title>a &amp; b</title>" in made


def test_chrome_trace():
    schedule = gpipe(2, 2)
    lane = [[Span(a, s + 5, e + 5) for a, s, e in row]
            for row in simulate(schedule, Times.equal(2)).spans]  # fmt: skip
    events = json.loads(chrome({"measured": lane}))["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [
        "measured", "rank 0", "rank 1",
    ]  # fmt: skip
    first = next(event for event in events if event["ph"] == "X")
    assert (first["name"], first["ts"], first["dur"]) == ("0F0", 0.0, 1e6)
    assert len([event for event in events if event["ph"] == "X"]) == 8


def test_pictures_of_nothing():
    schedule = gpipe(1, 1)
    assert "step 0.000 ms" in page(schedule, {"measured": [[]]})
    assert gaps([[]], schedule) == []


def shifted(lane, clocks):
    return [
        [Span(action, start + clock, end + clock) for action, start, end in row]
        for row, clock in zip(lane, clocks, strict=True)
    ]


@pytest.mark.parametrize("schedule", [one_f_one_b(4, 6), zbv(3, 4), gpipe(1, 2)])
def test_clocks_of_several_machines_are_set_by_what_ranks_send(schedule):
    lane = simulate(schedule, Times.equal(schedule.stages, hop=0.25)).spans
    clocks = [0.0, 1e3, -50.0, 7.0][: schedule.ranks]
    seen = aligned(shifted(lane, clocks), schedule)
    ends = {span.action.gives: span.end for row in seen for span in row}
    assert all(gap.end - gap.start < 100 for gap in gaps(seen, schedule))
    for rank, row in enumerate(seen):
        assert [span.action for span in row] == list(schedule.rows[rank])
        for span in row:
            for need in needs(span.action, schedule.stages):
                assert span.start >= ends[need] - 1e-9
    assert aligned(lane, schedule) == [list(row) for row in lane]  # one clock is left alone


def test_a_prediction_of_measured_times():
    times = Times((1.0, 2.0), (1.5, 0.5), (0.25, 0.75), (0.0,))
    for schedule in (one_f_one_b(2, 3), zb1p(2, 3)):
        lane = simulate(schedule, times).spans
        late = shifted(lane, [5.0, 5.0])
        found = typical([lane, late, lane], 2)
        for row in schedule.rows:
            for action in row:
                assert found.of(action) == pytest.approx(times.of(action))


def test_files(tmp_path):
    schedule, times = one_f_one_b(2, 2), Times.equal(2)
    lane = simulate(schedule, times).spans
    write(tmp_path / "run.html", schedule, times, {7: lane})
    drawn = (tmp_path / "run.html").read_text()
    assert drawn.index(">predicted: 1f1b, step") < drawn.index(">step 7: 1f1b, step")
    assert "http" not in drawn.replace("http-equiv", "")  # nothing is fetched
    write(tmp_path / "run.json", schedule, None, {7: lane, 8: lane})
    names = [event["args"]["name"] for event in json.loads((tmp_path / "run.json").read_text())[
        "traceEvents"] if event["name"] == "process_name"]  # fmt: skip
    assert names == ["with these times and no hops", "step 7", "step 8"]


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    schedule = zbv(2, 2)
    draw(tmp_path / "plan.png", schedule, {"plan": simulate(schedule, Times.equal(4)).spans})
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlanError, match="need matplotlib: pip install matplotlib, or write"):
        draw(tmp_path / "plan.png", gpipe(1, 1), {})
