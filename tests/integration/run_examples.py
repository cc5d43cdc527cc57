"""Run examples, one after the other, on this rank: starting processes takes longest.

    hvdx run -np 2 -- python run_examples.py '[["digits_torch.py", "--epochs", "1"], ...]'

Horovod starts with the first; those that declare process sets must be that. Rank 0 prints the name
of each before what it says.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def main() -> None:
    sys.path.insert(0, str(EXAMPLES))
    examples = json.loads(sys.argv.pop())
    if any(script.endswith("_keras.py") for script, *_ in examples):
        import tensorflow as tf

        # One of them does so, which is too late once another has computed.
        tf.config.threading.set_intra_op_parallelism_threads(1)
    for script, *arguments in examples:
        if os.environ.get("HOROVOD_RANK") == "0":
            print(f"--- {script} {' '.join(arguments)}", flush=True)
        sys.argv = [str(EXAMPLES / script), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        if "keras" in sys.modules:  # layers are called as in a process of their own
            sys.modules["keras"].backend.clear_session(free_memory=False)


if __name__ == "__main__":
    main()
