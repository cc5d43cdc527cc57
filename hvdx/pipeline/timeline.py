"""Pictures of a step: as text, as one HTML file, as a trace for Chrome or Perfetto.

A lane is what all ranks did, or are predicted to do: their spans, by rank. Lanes stand one above
the other on one scale, so that a prediction can be compared with what came of it.
"""

from __future__ import annotations

import html
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.schedule import Action, Schedule, Span, needs
from hvdx.pipeline.simulator import Times, simulate

Lane = Sequence[Sequence[Span]]


class Gap(NamedTuple):
    """Time in which a rank does nothing.

    Attributes:
        rank: whose.
        start: in seconds.
        end: in seconds.
        cause: ``"fill"`` before its first action, ``"drain"`` after its last; between them
            ``"wait"`` for another rank's action to end, then ``"hop"`` for its result to come;
            ``"own"`` where nothing is waited for, such as the engine's own time if measured.
        until: what it waits for.
    """

    rank: int
    start: float
    end: float
    cause: str
    until: Action | None = None


def gaps(lane: Lane, schedule: Schedule) -> list[Gap]:
    """Return all time that is no span, from the lane's first start to its last end.

    Args:
        lane: spans by rank.
        schedule: of which they are.
    """
    ends = {span.action.gives: span.end for row in lane for span in row}
    begin, end = _extent([lane])
    found = []
    for rank, row in enumerate(lane):
        at = begin
        for number, span in enumerate(row):
            for gap in _before(rank, at, span, ends, schedule):
                found.append(gap if number else gap._replace(cause="fill"))
            at = max(at, span.end)
        found.append(Gap(rank, at, end, "drain"))
    return [gap for gap in found if gap.end > gap.start]


def _before(
    rank: int, at: float, span: Span, ends: Mapping[Action, float], schedule: Schedule
) -> Iterator[Gap]:
    remote = [need for need in needs(span.action, schedule.stages)
              if schedule.owner(need.stage, need.micro_batch) != rank and need in ends]  # fmt: skip
    last = max(remote, key=ends.__getitem__, default=None)
    ready = at if last is None else min(max(at, ends[last]), span.start)
    yield Gap(rank, at, ready, "wait", last)
    yield Gap(rank, ready, span.start, "hop" if last else "own", last)


def _extent(lanes: Sequence[Lane]) -> tuple[float, float]:
    spans = [span for lane in lanes for row in lane for span in row]
    return (
        min((span.start for span in spans), default=0.0),
        max((span.end for span in spans), default=0.0),
    )


def text(schedule: Schedule, times: Times | None = None, columns: int = 100) -> str:
    """Draw a schedule as rows of ranks: an action, ``-`` while it lasts, ``.`` for waiting.

    Args:
        schedule: a valid one.
        times: of stages and hops; None: F, I and W take one slot each, B two.
        columns: slots at most; with more, the shortest actions do not show.
    """
    seen = simulate(schedule, times or Times.equal(schedule.stages))
    several = schedule.stages > schedule.ranks
    shortest = min((s.end - s.start for row in seen.spans for s in row if s.end > s.start),
                   default=1.0)  # fmt: skip
    slot = max(shortest, seen.step / columns)
    lines = []
    for rank, row in enumerate(seen.spans):
        cells = ["."] * round(seen.step / slot)
        for action, start, end in row:
            first, last = round(start / slot), round(end / slot)
            label = str(action) if several else f"{action.kind}{action.micro_batch}"
            cells[first:last] = [label, *"-" * (last - first - 1)][: last - first]
        lines.append([f"rank {rank}", *cells])
    width = max(len(cell) for line in lines for cell in line[1:])
    head = len(f"rank {schedule.ranks - 1}")
    return "\n".join(
        f"{line[0]:<{head}}  {' '.join(f'{cell:<{width}}' for cell in line[1:])}".rstrip()
        for line in lines
    )


def aligned(lane: Lane, schedule: Schedule) -> list[list[Span]]:
    """Set the ranks' clocks so that no message arrives before it was sent.

    Ranks of one machine share a clock, those of others need not. What they send each other bounds
    how far their clocks are apart, from both sides; where these bounds allow no difference, the
    middle between them is taken.

    Args:
        lane: spans by rank, each by its own clock.
        schedule: of which they are.
    """
    ends = {span.action.gives: span.end for row in lane for span in row}
    bounds: dict[tuple[int, int], float] = {}  # (from, to): how long the quickest message took
    for rank, row in enumerate(lane):
        for span in row:
            for need in needs(span.action, schedule.stages):
                sender = schedule.owner(need.stage, need.micro_batch)
                if sender != rank and need in ends:
                    way = sender, rank
                    bounds[way] = min(bounds.get(way, float("inf")), span.start - ends[need])
    ahead = {0: 0.0}  # by rank, its clock less rank 0's
    waiting = [0]
    while waiting:
        near = waiting.pop()
        for far in range(len(lane)):
            if far not in ahead and (near, far) in bounds and (far, near) in bounds:
                out, back = bounds[near, far], bounds[far, near]
                apart = 0.0 if out >= 0 and back >= 0 else (out - back) / 2
                ahead[far] = ahead[near] + apart
                waiting.append(far)
    return [
        [Span(action, start - ahead.get(rank, 0.0), end - ahead.get(rank, 0.0))
         for action, start, end in row]
        for rank, row in enumerate(lane)
    ]  # fmt: skip


def typical(lanes: Sequence[Lane], stages: int) -> Times:
    """Return the medians of what measured steps took by stage; hops count nothing."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for lane in lanes:
        for row in lane:
            for action, start, end in row:
                seconds.setdefault((action.kind, action.stage), []).append(end - start)

    def all_of(kind: str) -> list[float]:
        return [statistics.median(seconds.get((kind, stage), [0.0])) for stage in range(stages)]

    both, inputs, weights = map(all_of, "BIW")
    back = tuple(map(sum, zip(both, inputs, strict=True)))
    return Times(tuple(all_of("F")), back, tuple(weights), (0.0,) * (stages - 1))


def write(
    path: str | os.PathLike[str], schedule: Schedule, times: Times | None, steps: Mapping[int, Lane]
) -> None:
    """Draw steps that were measured, under what is predicted for them.

    Args:
        path: ``.json``: a trace for Chrome or Perfetto; ``.png``: a picture, which needs
            matplotlib; else HTML.
        schedule: of the steps.
        times: that the plan was made with; None: those of the steps, and hops that take none.
        steps: number -> spans by rank.

    Raises:
        OSError: the file cannot be written.
    """
    name = "predicted" if times else "with these times and no hops"
    times = times or typical(list(steps.values()), schedule.stages)
    lanes: dict[str, Lane] = {name: simulate(schedule, times).spans}
    lanes |= {f"step {number}": aligned(lane, schedule) for number, lane in steps.items()}
    draw(path, schedule, lanes)


def draw(path: str | os.PathLike[str], schedule: Schedule, lanes: Mapping[str, Lane]) -> None:
    """Write lanes to a file, of the kind that its name ends with; see :func:`write`."""
    file = Path(path)
    if file.suffix == ".png":
        _png(file, schedule, lanes)
    elif file.suffix == ".json":
        file.write_text(chrome(lanes))
    else:
        file.write_text(page(schedule, lanes))


def _png(file: Path, schedule: Schedule, lanes: Mapping[str, Lane]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError(
            f"{file}: pictures as PNG need matplotlib: pip install matplotlib, or write .html"
        ) from None
    ranks = [len(lane) for lane in lanes.values()]
    figure = Figure((14, 0.35 * sum(ranks) + 0.7 * len(ranks)), layout="constrained")
    rows = figure.subplots(len(lanes), 1, sharex=True, squeeze=False, height_ratios=ranks)
    for axes, (name, lane) in zip(rows[:, 0], lanes.items(), strict=True):
        begin, _ = _extent([lane])
        boxes = [(rank, span.start, span.end, span.action.kind, str(span.action))
                 for rank, row in enumerate(lane) for span in row]  # fmt: skip
        boxes += [(gap.rank, gap.start, gap.end, gap.cause, "") for gap in gaps(lane, schedule)]
        for rank, start, end, key, label in boxes:
            left, width = 1e3 * (start - begin), 1e3 * (end - start)
            axes.broken_barh(
                [(left, width)], (rank - 0.45, 0.9), fc=_COLORS[key], ec="white", lw=0.3
            )
            axes.text(left, rank, label, fontsize=6, va="center", clip_on=True)
        axes.set(title=f"{name}: {_summary(lane, schedule)}", yticks=range(len(lane)))
        axes.set_yticklabels([f"rank {rank}" for rank in range(len(lane))])
        axes.invert_yaxis()
    rows[-1, 0].set_xlabel("ms")
    figure.savefig(file, dpi=120)


_COLORS = {
    "F": "#4c8bd9", "B": "#e0854b", "I": "#e0854b", "W": "#7cb36b",
    "fill": "#f0f0f0", "drain": "#f0f0f0", "wait": "#f3c9c9", "hop": "#d9c9f3",
    "own": "#d0d0d0",
}  # fmt: skip
_WORDS = {
    "F": "forward", "B": "backward", "I": "gradient of inputs", "W": "gradient of weights",
    "fill": "before the first", "drain": "after the last", "wait": "waits for another rank",
    "hop": "waits for its message", "own": "between two actions",
}  # fmt: skip
_WIDTH, _HEIGHT, _LEFT = 1400, 22, 150


def page(schedule: Schedule, lanes: Mapping[str, Lane], title: str = "hvdx pipeline") -> str:
    """Return a self-contained HTML page with a picture (SVG) of all lanes; hover for details."""
    longest = max((end - begin for begin, end in map(_extent_of, lanes.values())), default=0.0)
    scale = (_WIDTH - _LEFT) / (longest or 1.0)
    body, top = [], 0
    for name, lane in lanes.items():
        body.append(f'<text x="0" y="{top + 15}" font-weight="bold">{html.escape(name)}: '
                    f"{html.escape(_summary(lane, schedule))}</text>")  # fmt: skip
        top += _HEIGHT
        body += _shapes(lane, schedule, scale, top)
        top += _HEIGHT * len(lane) + 10
    legend = "".join(
        f'<span style="background:{_COLORS[key]};padding:2px 8px;margin-right:6px">'
        f"{_WORDS[key]}</span>"
        for key in _COLORS
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<body style="font:13px sans-serif"><h1 style="font-size:16px">{html.escape(title)}</h1>'
        f'<p>{legend}</p><svg width="{_WIDTH}" height="{top}" font-size="12">'
        f"{''.join(body)}</svg></body></html>\n"
    )


def _extent_of(lane: Lane) -> tuple[float, float]:
    return _extent([lane])


def _summary(lane: Lane, schedule: Schedule) -> str:
    begin, end = _extent([lane])
    idle: dict[str, float] = {}
    for gap in gaps(lane, schedule):
        idle[gap.cause] = idle.get(gap.cause, 0.0) + gap.end - gap.start
    whole = (end - begin) * len(lane) or 1.0
    told = ", ".join(f"{cause} {share / whole:.1%}" for cause, share in sorted(idle.items()))
    return f"{schedule.name}, step {1e3 * (end - begin):.3f} ms" + (
        f", idle: {told}" if told else ""
    )


def _shapes(lane: Lane, schedule: Schedule, scale: float, top: int) -> Iterator[str]:
    begin, _ = _extent([lane])

    def box(rank: int, start: float, end: float, key: str, told: str, label: str = "") -> str:
        x, y, width = _LEFT + (start - begin) * scale, top + rank * _HEIGHT, (end - start) * scale
        shape = (
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_HEIGHT - 3}" '
            f'fill="{_COLORS[key]}"><title>{told}, {1e3 * (end - start):.3f} ms</title></rect>'
        )
        if label and width > 8 * len(label):
            shape += f'<text x="{x + 2:.2f}" y="{y + 14}" pointer-events="none">{label}</text>'
        return shape

    for rank, row in enumerate(lane):
        yield f'<text x="0" y="{top + rank * _HEIGHT + 14}">rank {rank}</text>'
        for action, start, end in row:
            told = (
                f"stage {action.stage}, {_WORDS[action.kind]} of micro-batch {action.micro_batch}"
            )
            yield box(rank, start, end, action.kind, told, str(action))
    for gap in gaps(lane, schedule):
        told = _WORDS[gap.cause] + (f" ({gap.until})" if gap.until else "")
        yield box(gap.rank, gap.start, gap.end, gap.cause, told)


def chrome(lanes: Mapping[str, Lane]) -> str:
    """Return the lanes as JSON that chrome://tracing and Perfetto show: a process per lane."""
    events: list[dict[str, object]] = []
    for number, (name, lane) in enumerate(lanes.items()):
        begin, _ = _extent([lane])
        events.append({"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}})
        for rank, row in enumerate(lane):
            told = {"name": f"rank {rank}"}
            events.append(
                {"ph": "M", "pid": number, "tid": rank, "name": "thread_name", "args": told}
            )
            events += [
                {
                    "ph": "X", "pid": number, "tid": rank, "cat": action.kind, "name": str(action),
                    "ts": 1e6 * (start - begin), "dur": 1e6 * (end - start),
                }
                for action, start, end in row
            ]  # fmt: skip
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
