"""Run every benchmark in its short form: `make bench`. Run one by itself for real numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELPERS = {"run.py", "harness.py", "rig.py", "keras_fit.py"}  # optimizer.py runs keras_fit.py


def main() -> int:
    """Return how many benchmarks failed."""
    failed = 0
    for script in sorted(HERE.glob("*.py")):
        if script.name not in HELPERS:
            print(f"--- {script.name} --short", flush=True)
            failed += subprocess.run([sys.executable, str(script), "--short"]).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
