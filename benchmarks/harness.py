"""What the benchmarks share: one job for all variants, interleaved; medians; table and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One comparison; ``ratio`` above 1 means that hvdx is better."""

    case: str
    metric: str
    value: float
    baseline: str
    baseline_value: float
    ratio: float
    runs: int
    spread: float  # interquartile range of ``value`` over its median


def interleave(
    variants: dict[str, Callable[[], float]], runs: int, seed: int = 0
) -> dict[str, list[float]]:
    """Measure every variant ``runs`` times, in a new order each time, equal on all ranks."""
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            samples[name].append(variants[name]())
    return samples


def compare(
    case: str, metric: str, samples: dict[str, list[float]], ours: str = "hvdx"
) -> list[Row]:
    """Compare the median of ``ours`` with every other variant's; lower is better."""
    value = statistics.median(samples[ours])
    rows = []
    for name, theirs in samples.items():
        if name != ours:
            # Neighbours in time share the machine's mood: the ratio is the median of theirs.
            ratio = statistics.median(t / o for t, o in zip(theirs, samples[ours], strict=True))
            rows.append(
                Row(case, metric, value, name, statistics.median(theirs), ratio,
                    len(theirs), spread(samples[ours]))
            )  # fmt: skip
    return rows


def within(bar: float, value: float) -> float:
    """Return how far ``value`` stays below ``bar``, at most 1000 times.

    A cost too small to measure may come out as nothing, or below it.
    """
    return bar / max(value, bar / 1000)


def spread(samples: list[float]) -> float:
    """Return the interquartile range over the median."""
    if len(samples) < 4:
        return (max(samples) - min(samples)) / statistics.median(samples)
    quarters = statistics.quantiles(samples, n=4)
    return (quarters[2] - quarters[0]) / statistics.median(samples)


def machine() -> dict[str, Any]:
    """Describe where this was measured."""
    about: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            about["processor"] = line.partition(":")[2].strip()
            break
    from importlib.metadata import PackageNotFoundError, version

    for package in ("hvdx", "horovod", "torch", "tensorflow-cpu", "keras"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    return about


def report(rows: list[Row], file: str | None) -> None:
    """Print the rows as a table; write them and the machine to ``file`` as JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*Row._fields)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    Console(width=140).print(table)
    if file:
        content = {"machine": machine(), "rows": [row._asdict() for row in rows]}
        Path(file).write_text(json.dumps(content, indent=1) + "\n")


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--short", action="store_true", help="few runs: does it work at all?")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    return parser


def launch(script: str, ranks: int, arguments: list[str]) -> list[Row]:
    """Run ``script --worker FILE`` on ``ranks`` processes; rank 0 leaves its rows in FILE."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "hvdx", "run", "-np", str(ranks), "--", sys.executable]
        subprocess.run([*command, script, *arguments, "--worker", str(result)], check=True)
        return load(result)


def load(file: Path) -> list[Row]:
    """Read what a rank has left."""
    return [Row(**row) for row in json.loads(file.read_text())]


def leave(rows: list[Row], file: str) -> None:
    """Leave ``rows`` for the process that launched this rank."""
    Path(file).write_text(json.dumps([row._asdict() for row in rows]))
