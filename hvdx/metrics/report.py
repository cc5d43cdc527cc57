"""``hvdx report``: tables and pictures of what :class:`hvdx.Metrics` has written."""

from __future__ import annotations

import html
import io
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hvdx.errors import HvdxError
from hvdx.metrics.log import read

Line: TypeAlias = dict[str, Any]
Points: TypeAlias = list[tuple[float, float]]


class Run(NamedTuple):
    """One training: its lines, whose ``seconds`` go on over interruptions."""

    name: str
    header: Line
    lines: list[Line]

    def of(self, kind: str) -> list[Line]:
        """Return the lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def unit(self) -> str:
        """What samples are."""
        return str(self.header.get("unit", "samples"))


def runs(path: str | os.PathLike[str], name: str) -> list[Run]:
    """Read a file; a run that was resumed continues the one before it.

    What that had learnt after the step from which the new one starts is left out, but not the time
    it took.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is none of metrics.
    """
    found: list[Run] = []
    spent = 0.0
    for line in read(path):
        if line["kind"] == "header":
            start = line.get("start", 0)
            if found and start:
                last = found[-1]
                spent = max((each["seconds"] for each in last.lines), default=0.0)
                kept = [each for each in last.lines if each["step"] <= start]
                found[-1] = last._replace(lines=kept)
            else:
                spent = 0.0
                found.append(Run(name, line, []))
        else:
            found[-1].lines.append({**line, "seconds": line["seconds"] + spent})
    if len(found) > 1:
        found = [run._replace(name=f"{name} ({i})") for i, run in enumerate(found, 1)]
    return found


def load(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read files; runs are called after them, with folders where names alone are alike.

    Raises:
        HvdxError: one of them cannot be read, or has nothing to draw.
    """
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        names = [os.fspath(path) for path in paths]
    try:
        found = [run for path, name in zip(paths, names, strict=True) for run in runs(path, name)]
    except (OSError, ValueError) as error:
        raise HvdxError(str(error)) from None
    if not any(run.lines for run in found):
        raise HvdxError("there is nothing to draw yet: no interval has ended")
    return found


# --- tables


def rows(found: Sequence[Run]) -> list[dict[str, str]]:
    """Return what a table says of each run, by column; all have the same ones."""
    every = [dict(_cells(run)) for run in found]
    columns = dict.fromkeys(name for cells in every for name in cells)
    return [{name: cells.get(name, "-") for name in columns} for cells in every]


def _cells(run: Run) -> Iterator[tuple[str, str]]:
    intervals = run.of("interval")
    steady = intervals[1:] if len(intervals) > 2 else intervals  # the first one warms up
    yield "run", run.name
    yield "ranks", str(run.header["ranks"])
    yield "steps", str(max((line["step"] for line in run.lines), default=0))
    yield "time", _duration(max((line["seconds"] for line in run.lines), default=0.0))
    if steady:
        speed = statistics.median(line.get("samples_per_second", 0.0) for line in steady)
        yield f"{run.unit}/s", f"{speed:,.0f}"
    for name in ("communication", "bubble"):
        told = [line[name]["mean"] for line in steady if name in line]
        if told:
            yield name, f"{statistics.fmean(told):.1%}"
    told = [line["megabytes_per_step"]["mean"] for line in steady if "megabytes_per_step" in line]
    if told:
        yield "MB/step", f"{statistics.fmean(told):.3g}"
    told = [line["peak_memory_mb"]["max"] for line in intervals if "peak_memory_mb" in line]
    if told:
        yield "peak MB", f"{max(told):,.0f}"
    last: dict[str, Any] = {}
    for line in run.lines:
        last.update(line.get("values", {}))
    for name, value in last.items():
        yield name, "not finite" if value is None else f"{value:.4g}"
    for line in run.of("target"):
        yield "target", f"{line.get('target', 'reached')}: {_duration(line['seconds'])}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def table(found: Sequence[Run]) -> str:
    """Return the table as text."""
    cells = rows(found)
    lines = [list(cells[0]), *(list(each.values()) for each in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{'<' if not i else '>'}{widths[i]}}" for i, text in enumerate(line))
        for line in lines
    )


# --- pictures


class Panel(NamedTuple):
    """One of the pictures: ``draw(axes, run, colour)`` adds a run to it."""

    title: str
    x: str
    y: str
    draw: Callable[[Any, Run, str], bool]
    ranged: bool = False  # from 0, since sizes are to be compared


def panels(found: Sequence[Run]) -> list[Panel]:
    """Return those for which there is something to draw: values first, two by two."""
    units = {run.unit for run in found}
    unit = units.pop() if len(units) == 1 else "samples"
    names = dict.fromkeys(
        name.removeprefix("val_")
        for run in found
        for line in run.lines
        for name in line.get("values", {})
    )
    made = []
    for name in names:
        for x, label in (("step", "steps"), ("seconds", "seconds of training")):
            made.append(Panel(f"{name} by {label}", label, name, _values(name, x)))
    steps = "steps"
    return [
        *made,
        Panel(f"{unit} per second, all ranks", steps, f"{unit}/s", _speed, True),
        Panel("time lost", steps, "% of time", _shares, True),
        Panel("sent by a rank for a step", steps, "MB", _measure("megabytes_per_step"), True),
        Panel("memory of a rank", steps, "MB", _measure("memory_mb"), True),
        Panel("cores that a rank keeps busy", steps, "cores", _measure("cpu"), True),
        Panel("GPU memory of a rank", steps, "MB", _measure("gpu_memory_mb"), True),
    ]


def _values(name: str, x: str) -> Callable[[Any, Run, str], bool]:
    """Draw a value of the training, and that of evaluations with dots and dashes."""

    def draw(axes: Any, run: Run, colour: str) -> bool:
        drawn = False
        for line_name, style in ((name, "-"), (f"val_{name}", ".--")):
            for kind in ("interval", "evaluation"):
                points = [
                    (line[x], line["values"][line_name])
                    for line in run.of(kind)
                    if line["values"].get(line_name) is not None
                ]
                if points:
                    own = ".--" if kind == "evaluation" else style
                    _plot(axes, points, own, colour)
                    drawn = True
        return drawn

    return draw


def _speed(axes: Any, run: Run, colour: str) -> bool:
    told = [line for line in run.of("interval") if "samples_per_second" in line]
    _plot(axes, [(line["step"], line["samples_per_second"]) for line in told], "-", colour)
    return bool(told)


def _shares(axes: Any, run: Run, colour: str) -> bool:
    drawn = False
    for name, style in (("communication", "-"), ("bubble", ":")):
        told = [line for line in run.of("interval") if name in line]
        _plot(axes, [(line["step"], 100 * line[name]["mean"]) for line in told], style, colour)
        _band(axes, told, name, colour, 100)
        drawn = drawn or bool(told)
    return drawn


def _measure(name: str) -> Callable[[Any, Run, str], bool]:
    def draw(axes: Any, run: Run, colour: str) -> bool:
        told = [line for line in run.of("interval") if name in line]
        _plot(axes, [(line["step"], line[name]["mean"]) for line in told], "-", colour)
        _band(axes, told, name, colour, 1)
        return bool(told)

    return draw


def _plot(axes: Any, points: Points, style: str, colour: str) -> None:
    if not points:
        return
    if len(points) == 1 and not style.startswith("."):
        style = f".{style}"  # a line would not show
    axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.4, markersize=7)


def _band(axes: Any, told: Sequence[Line], name: str, colour: str, factor: float) -> None:
    """Shade what lies between the least and the greatest of the ranks."""
    low, high = ([factor * line[name][how] for line in told] for how in ("min", "max"))
    axes.fill_between([line["step"] for line in told], low, high, color=colour, alpha=0.15, lw=0)


def figure(found: Sequence[Run]) -> Any:
    """Draw all panels.

    Raises:
        HvdxError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen
        from matplotlib.lines import Line2D
    except ImportError:
        raise HvdxError("pictures need matplotlib: pip install 'hvdx[metrics]'") from None
    colours = [colormaps["tab10"](i % 10) for i in range(len(found))]
    wanted = [panel for panel in panels(found) if _has(panel, found)]
    lines = -(-len(wanted) // 2)
    picture = Figure(figsize=(11, 2.6 * lines + 0.6), layout="constrained")
    for index, panel in enumerate(wanted):
        axes = picture.add_subplot(lines, 2, index + 1)
        for run, colour in zip(found, colours, strict=True):
            panel.draw(axes, run, colour)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x, fontsize=9)
        axes.set_ylabel(panel.y, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if panel.ranged:
            axes.set_ylim(0, 1.12 * axes.dataLim.ymax or None)
    handles = [
        Line2D([], [], color=c, label=run.name) for run, c in zip(found, colours, strict=True)
    ]
    lines_of = {line["kind"] for run in found for line in run.lines}
    if "evaluation" in lines_of:
        handles.append(Line2D([], [], color="0.3", linestyle="--", marker=".", label="evaluation"))
    for name, style in (("communication", "-"), ("bubble", ":")):
        if any(name in line for run in found for line in run.lines):
            handles.append(
                Line2D([], [], color="0.3", linestyle=style, label=f"{name} (time lost)")
            )
    picture.legend(
        handles=handles, loc="outside upper center", ncols=min(5, len(handles)), fontsize=9
    )
    return picture


class _Nowhere:
    """Axes that take all and show nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _has(panel: Panel, found: Sequence[Run]) -> bool:
    return any([panel.draw(_Nowhere(), run, "k") for run in found])


def write(path: str | os.PathLike[str], found: Sequence[Run]) -> None:
    """Draw runs into a ``.png`` (or what else matplotlib knows), or a page of HTML with a table.

    Raises:
        HvdxError: matplotlib is missing, or the file cannot be written.
    """
    drawn = figure(found)
    try:
        if Path(path).suffix.lower() not in (".html", ".htm"):
            drawn.savefig(path, dpi=120)
            return
        into = io.StringIO()
        drawn.savefig(into, format="svg")
        Path(path).write_text(_page(found, into.getvalue()), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HvdxError(f"cannot draw into {os.fspath(path)!r}: {error}") from None


def _page(found: Sequence[Run], drawn: str) -> str:
    cells = rows(found)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in cells[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in each.values()) + "</tr>\n"
        for each in cells
    )
    about = "".join(
        f"<p><b>{html.escape(run.name)}</b>: {html.escape(_about(run.header))}</p>\n"
        for run in found
    )
    return _PAGE.format(head=head, body=body, about=about, drawn=drawn[drawn.index("<svg") :])


def _about(header: Line) -> str:
    """Say what a run was, in words."""
    hosts = ", ".join(f"{name}: {count}" for name, count in header.get("hosts", {}).items())
    versions = ", ".join(f"{name} {text}" for name, text in header.get("versions", {}).items())
    options = ", ".join(f"{name}={value}" for name, value in (header.get("options") or {}).items())
    parts = [header.get("began"), f"{header['ranks']} ranks", hosts, versions, options]
    return "; ".join(str(part) for part in parts if part)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>hvdx report</title>
<style>
body {{ font-family: sans-serif; max-width: 70em; margin: 2em auto; color: #222 }}
table {{ border-collapse: collapse; margin-bottom: 1em }}
th, td {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
p {{ font-size: 85%; color: #555 }}
svg {{ width: 100%; height: auto }}
</style></head><body>
<table><tr>{head}</tr>
{body}</table>
{drawn}
{about}</body></html>
"""
