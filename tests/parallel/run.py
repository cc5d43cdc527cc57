"""Run the parallel tests: each folder here, on each number of ranks, in one `hvdx run` each.

    python tests/parallel/run.py 2 4
    python tests/parallel/run.py 2 --group torch -- -k allreduce

Ranks wait for each other half of the time. So where numbers differ, as many launches run at a time
as have the ranks of the largest: with 2 and 4, two of 2 ranks.

All ranks run the same tests in the same order. Rank 0's output is shown as it comes, or at the end
where launches run side by side; that of the others when something fails. A rank that fails ends at
once and `hvdx run` ends the others; each then prints where it stood (see conftest.py), so a hang
shows who waits for whom.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
GROUPS = {  # name: folder, environment
    "torch": ("torch", {}),
    "tensorflow": ("tensorflow", {}),
    "keras on tensorflow": ("keras", {"KERAS_BACKEND": "tensorflow"}),
    "keras on torch": ("keras", {"KERAS_BACKEND": "torch"}),
    "both": ("both", {}),
}
PREFIX = re.compile(r"\[(\d+)\]<std(?:out|err)>:")


class Result(NamedTuple):
    name: str
    passed: int
    failed: int
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", type=int, nargs="*", default=[2, 4], help="numbers of ranks")
    parser.add_argument("--group", help="only the groups whose name begins so")
    parser.add_argument("--tests", type=Path, default=HERE, help="folder with the groups")
    parser.add_argument("--limit", type=float, default=1800, help="seconds per launch")
    parser.add_argument("--test-limit", type=float, default=180, help="seconds per test")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:cut])
    extra = [f"--timeout={options.test_limit}", *sys.argv[cut + 1 :]]  # the rest is pytest's

    groups = [
        (name, options.tests / folder, environ)
        for name, (folder, environ) in GROUPS.items()
        if name.startswith(options.group or "") and any((options.tests / folder).glob("test_*.py"))
    ]
    results = []
    for size in options.sizes:
        at_a_time = max(1, max(options.sizes) // size)

        def started(
            group: tuple[str, Path, dict[str, str]], size: int = size, alone: bool = at_a_time == 1
        ) -> Result:
            name, path, environ = group
            return launch(f"{name}, {size} ranks", path, size, environ, extra, options, alone)

        with ThreadPoolExecutor(at_a_time) as pool:
            results += pool.map(started, groups)
    print()
    for name, passed, failed, seconds in results:
        print(f"{name}: {passed} passed, {failed} failed ({seconds:.0f} s)")
    print(f"{sum(r.passed for r in results)} passed, {sum(r.failed for r in results)} failed")
    return int(not results or any(result.failed for result in results))


def launch(
    name: str,
    path: Path,
    size: int,
    environ: dict[str, str],
    extra: list[str],
    options: argparse.Namespace,
    alone: bool,
) -> Result:
    """Run one group on ``size`` ranks; what it says is shown at its end unless it is alone."""
    print(f"\n--- {name}", flush=True)
    said: list[str] = [] if alone else [f"\n--- What {name} said:\n"]
    pytest = ["-m", "pytest", "-x", "--capture=sys", "--timeout-method=thread"]
    pytest += ["-p", "no:cacheprovider", "--color=no", *extra]
    hvdx_run = [sys.executable, "-m", "hvdx", "run"]
    job = subprocess.Popen(
        [*hvdx_run, "-np", str(size), "--", sys.executable, *pytest, str(path)],
        env={
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
            "HVDX_TIMEOUT": "120",  # a rank may be slow on a busy machine
            **os.environ,
            **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    start = time.monotonic()
    overdue = threading.Timer(options.limit, job.send_signal, [signal.SIGTERM])
    overdue.start()
    others: list[str] = []
    summary = ""
    assert job.stdout is not None
    for line in job.stdout:
        rank = PREFIX.match(line)
        if rank and rank[1] == "0":
            text = line[rank.end() :]
            summary = text if re.match(r"=+ .*\d+ (passed|failed|error)", text) else summary
            if alone:
                print(text, end="", flush=True)
            else:
                said.append(text)
        else:
            others.append(line)
    status = job.wait()
    overdue.cancel()
    seconds = time.monotonic() - start
    if status:
        late = f" after {options.limit:.0f} s" if seconds >= options.limit else ""
        said += [*others, f"--- {name}: FAILED, exit status {status}{late}\n"]
    print("".join(said), end="", flush=True)
    counted = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", summary)}
    failed = counted.get("failed", 0) + counted.get("error", 0)
    return Result(name, counted.get("passed", 0), max(failed, int(status != 0)), seconds)


if __name__ == "__main__":
    sys.exit(main())
