"""Run training scripts, one after the other, on this rank; report on each (test_migration.py).

    hvdx run -np 2 -- python run_scripts.py folder -- script.py [arguments] [-- script.py ...]

Ranks draw different weights, so that they end alike only if the script broadcasts and averages.
Rank 0 prints a line of JSON per script: its losses, and the ranks' parameter hashes.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import hvdx


def main() -> None:
    (folder,), *runs = parts(sys.argv[1:])
    for script, *arguments in runs:
        name = Path(script).stem
        seed(name, int(os.environ["HOROVOD_RANK"]))
        Path(folder, name).mkdir(exist_ok=True)
        os.chdir(Path(folder, name))  # for what it writes
        sys.argv = [script, *arguments]
        done = runpy.run_path(script, run_name="__main__")
        hashes = hvdx.allgather_object(hvdx.parameter_hash(done["model"]))
        told = {"script": name, "losses": done["losses"], "hashes": hashes}
        if hvdx.rank() == 0:
            print(f"report {json.dumps(told)}", flush=True)


def parts(words: list[str]) -> list[list[str]]:
    """Cut ``words`` at each ``--``."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            found.append([])
        else:
            found[-1].append(word)
    return found


def seed(name: str, rank: int) -> None:
    """Seed the framework that a script uses, to be told by its name."""
    if name.startswith("torch"):
        import torch

        torch.manual_seed(rank)
    else:
        import keras

        keras.utils.set_random_seed(rank)


if __name__ == "__main__":
    main()
