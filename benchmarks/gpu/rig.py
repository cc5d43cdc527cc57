"""What the GPU benchmarks share: the device, how to time on it, and lines that name it."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what all of them take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--short", action="store_true", help="small and few: only shows it runs")
    parser.add_argument("--runs", type=int, default=0, help="default: 30; 3 with --short")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser


def described(device: str) -> str:
    """Say what figures were measured on, so that none passes for another's."""
    if torch.device(device).type != "cuda":
        return f"{device}, torch {torch.__version__}: these figures tell nothing about GPUs"
    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def seconds(call: Callable[[], Any], device: str, runs: int) -> float:
    """Return the median duration of ``call``, on the device's own clock where it has one."""
    for _ in range(2):
        call()
    if torch.device(device).type != "cuda":
        return statistics.median(_wall(call) for _ in range(runs))
    taken = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def _wall(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(device: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print a table in Markdown, and write it as JSON if asked to."""
    print(f"Measured on {described(device)}.\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v)
                                for v in row.values()) + " |")  # fmt: skip
    if path:
        path.write_text(json.dumps({"on": described(device), "rows": rows}, indent=2))
