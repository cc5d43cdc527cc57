"""What hvdx adds to a call of Horovod, and what importing it costs.

    python benchmarks/overhead.py --json overhead.json

Calls run in one process, alternating in blocks, with a short Horovod cycle so that waiting
for it does not drown the difference; `import hvdx` is timed inside fresh interpreters.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import harness


def per_call(call: object, tensor: object, calls: int) -> float:
    """Return microseconds per call of ``call(tensor)``."""
    start = time.perf_counter()
    for _ in range(calls):
        call(tensor)  # type: ignore[operator]
    return (time.perf_counter() - start) / calls * 1e6


def calls(short: bool) -> list[harness.Row]:
    """Compare ``hvdx.allreduce`` with ``horovod.torch.allreduce``."""
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.05")
    import horovod.torch as horovod
    import torch

    import hvdx as hvd

    hvd.init(framework="torch")
    tensor = torch.ones(16)
    block, runs = (50, 10) if short else (100, 150)
    samples = harness.interleave(
        {
            "hvdx": lambda: per_call(hvd.allreduce, tensor, block),
            "horovod": lambda: per_call(horovod.allreduce, tensor, block),
        },
        runs,
    )
    added = [ours - theirs for ours, theirs in zip(*samples.values(), strict=True)]
    rows = harness.compare("allreduce of 16 floats, 1 rank", "us per call", samples)
    return [
        *rows,
        harness.Row(
            "allreduce of 16 floats, 1 rank", "us added per call (bar: 5)",
            statistics.median(added), "bar", 5.0, harness.within(5.0, statistics.median(added)),
            runs, harness.spread(samples["hvdx"]),
        ),
    ]  # fmt: skip


def watch(short: bool) -> list[harness.Row]:
    """Time what the watchdog costs: per collective, and per second on rank 0 of 8.

    Both bars together are 1 % of a step, where that takes 1 ms or more and has ten collectives.
    """
    import hvdx as hvd
    from hvdx import verdict, watchdog

    def marked(calls: int = 1000) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            with watchdog.waiting("allreduce", "name"):
                pass
        return (time.perf_counter() - start) / calls * 1e6

    preemption = hvd.Preemption()

    def asked(calls: int = 1000) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            preemption.asked()
        return (time.perf_counter() - start) / calls * 1e6

    own = watchdog.Watch(0, 8, 30.0, {}, lambda: None)
    wait = verdict.Wait("allreduce", "name", "float32 (3,)", 0.1, None, "train.py:7 in main")
    theirs = verdict.to_plain(verdict.Report([wait], "train.py:7 in main", "", 0.0, ""))

    def second() -> float:
        start = time.thread_time()
        now = time.monotonic()
        own._report(now)
        for rank in range(1, 8):
            own._take(rank, {"report": theirs}, now)
        own._judge(now)
        return (time.thread_time() - start) * 100

    runs = 30 if short else 300
    rows = []
    for case, metric, call, bar in (
        ("watchdog, 8 ranks", "us added per collective (bar: 1)", marked, 1.0),
        ("watchdog, 8 ranks", "% of a core (bar: 1)", second, 1.0),
        ("Preemption.asked(), 1 rank", "us per step (bar: 1)", asked, 1.0),
    ):
        samples = [call() for _ in range(runs)]
        value = statistics.median(samples)
        rows.append(
            harness.Row(case, metric, value, "bar", bar, harness.within(bar, value),
                        runs, harness.spread(samples))
        )  # fmt: skip
    preemption.close()
    return rows


def imports(short: bool) -> list[harness.Row]:
    """Time ``import hvdx`` in fresh interpreters."""
    probe = (
        "import time; start = time.perf_counter(); import hvdx; print(time.perf_counter() - start)"
    )
    runs = 3 if short else 15
    seconds = [
        float(subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True).stdout)
        for _ in range(runs)
    ]
    value = statistics.median(seconds)
    return [
        harness.Row("import hvdx", "seconds (bar: 0.1)", value, "bar", 0.1,
                    harness.within(0.1, value), runs, harness.spread(seconds))
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    told = harness.options(__doc__).parse_args()
    harness.report([*imports(told.short), *calls(told.short), *watch(told.short)], told.json)


if __name__ == "__main__":
    main()
