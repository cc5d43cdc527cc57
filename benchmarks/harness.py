"""What the benchmarks share: one job for all variants, interleaved; medians; table and JSON.

The frameworks are imported by the functions that need them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
    command = [sys.executable, "-m", "hvdx", "run", "-np", str(ranks), "--", sys.executable]
    return _rows_of([*command, script, *arguments])


def each_backend(script: str, short: bool) -> list[Row]:
    """Run ``script`` on one rank with each backend of Keras, on one thread."""
    rows = []
    for backend in ("tensorflow", "torch"):
        os.environ.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1")
        rows += launch(script, 1, ["--short"] * short)
    return rows


def alone(script: str, arguments: list[str], **variables: str) -> list[Row]:
    """Run ``script --worker FILE`` in one process that no launcher starts."""
    return _rows_of([sys.executable, script, *arguments], **variables)


def _rows_of(command: list[str], **variables: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        environ = {**os.environ, **variables}
        subprocess.run([*command, "--worker", str(result)], check=True, env=environ)
        return load(result)


def load(file: Path) -> list[Row]:
    """Read what a rank has left."""
    return [Row(**row) for row in json.loads(file.read_text())]


def leave(rows: list[Row], file: str) -> None:
    """Leave ``rows`` for the process that launched this rank."""
    Path(file).write_text(json.dumps([row._asdict() for row in rows]))


@contextlib.contextmanager
def torch_job() -> Iterator[None]:
    """Start hvdx and ``torch.distributed`` on every rank, on a thread each; end both."""
    import torch
    import torch.distributed

    import hvdx as hvd

    torch.set_num_threads(1)
    hvd.init(framework="torch")
    rendezvous = hvd.broadcast_object(tempfile.mktemp())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("HOROVOD_GLOO_IFACE", "lo"))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=hvd.rank(), world_size=hvd.size()
    )
    yield
    hvd.barrier()
    torch.distributed.destroy_process_group()
    if hvd.rank() == 0:
        Path(rendezvous).unlink(missing_ok=True)
    hvd.shutdown()


def slowest(step: Callable[[], object]) -> float:
    """Return milliseconds of a step that all ranks begin together, on the slowest of them."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    step()
    taken = torch.tensor((time.perf_counter() - start) * 1e3)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def one_thread(backend: str) -> None:
    """Have Keras' backend compute on one thread."""
    if backend == "torch":
        import torch

        torch.set_num_threads(1)
    else:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def verdict(rows: list[Row]) -> None:
    """Say which bars are met."""
    judged = [row for row in rows if row.baseline == "bar"]
    for row in judged:
        word = "met   " if row.ratio >= 1 else "MISSED"
        print(f"{word}  {row.case}: {row.metric}: {row.value:.4g} (bar {row.baseline_value:.4g})")
    print(f"{sum(row.ratio >= 1 for row in judged)} of {len(judged)} bars met")
