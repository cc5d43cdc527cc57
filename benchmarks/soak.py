"""Does anything grow? 20,000 steps of small models: memory, file descriptors and threads.

    python benchmarks/soak.py                     # all cases, about an hour on two cores
    python benchmarks/soak.py --short             # 2,000 steps each, with wider bounds
    python benchmarks/soak.py --case torch --steps 5000

Each case is a job of two ranks. What a rank holds is read at 100 moments; compared are the
medians of the first and of the last tenth after a warm-up, in which allocators and caches fill.
Exit status 1: memory has grown by more than 2 %, or there are more descriptors or threads.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CASES = {
    "torch": "PyTorch, PowerSGD",
    "keras": "Keras on TensorFlow, one bit",
    "keras-torch": "Keras on PyTorch, one bit",
    "pipeline": "PyTorch, two stages",
    "pipeline-keras": "Keras on TensorFlow, two stages",
}
SAMPLES = 100
WARM = 0.2  # of the steps
RANKS = 2


class Sample(NamedTuple):
    """What a process holds at a moment."""

    step: int
    memory: float  # resident, in MB
    descriptors: int
    threads: int


# -- a rank


def watched(step: Callable[[], object], steps: int) -> Iterator[Sample]:
    """Take steps; yield what the process holds, now and then."""
    import psutil

    process = psutil.Process()
    every = max(1, steps // SAMPLES)
    for number in range(1, steps + 1):
        step()
        if number % every == 0:
            gc.collect()  # when Python does is no leak's fault
            memory = process.memory_info().rss / 2**20
            yield Sample(number, memory, process.num_fds(), process.num_threads())


def torch_step() -> Callable[[], object]:
    """Return a step of training with compression under PyTorch."""
    import torch

    import hvdx.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    compression = hvd.Compression.powersgd(2, min_elements=0)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=compression)
    x = torch.randn(16, 32)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(x) - x.sin()).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def torch_model() -> Any:
    """Return a small PyTorch model."""
    from torch import nn

    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                         nn.Linear(64, 32))  # fmt: skip


def keras_model() -> Any:
    """Return a small Keras model."""
    import keras

    sizes = [(64, "tanh"), (64, "tanh"), (32, None)]
    layers = [keras.layers.Dense(size, activation=name) for size, name in sizes]
    return keras.Sequential([keras.Input((32,)), *layers])


def keras_step() -> Callable[[], object]:
    """Return a step of training with compression under Keras."""
    import keras
    import numpy as np

    import hvdx.keras as hvd

    hvd.init()
    keras.utils.set_random_seed(0)
    model = keras_model()
    compression = hvd.Compression.onebit(min_elements=0)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(hvd.DistributedOptimizer(optimizer, compression=compression), "mse")
    x = np.random.default_rng(0).normal(size=(16, 32)).astype("float32")
    return lambda: model.train_on_batch(x, np.sin(x))


def pipeline_step() -> Callable[[], object]:
    """Return a step of a pipeline under PyTorch."""
    import torch

    import hvdx as hvd

    hvd.init(framework="torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    loss = torch.nn.functional.mse_loss
    pipe = hvd.Pipeline(
        torch_model(), x, loss, lambda params: torch.optim.Adam(params, 1e-3), micro_batches=4
    )
    return lambda: pipe.step(x, x.sin())


def pipeline_keras_step() -> Callable[[], object]:
    """Return a step of a pipeline under Keras."""
    import keras
    import numpy as np

    import hvdx as hvd

    hvd.init()
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(16, 32)).astype("float32")
    optimizer = keras.optimizers.Adam(1e-3)
    pipe = hvd.Pipeline(keras_model(), x, loss="mse", optimizer=optimizer, micro_batches=4)
    return lambda: pipe.step(x, np.sin(x))


STEPS: dict[str, Callable[[], Callable[[], object]]] = {
    "torch": torch_step,
    "keras": keras_step,
    "keras-torch": keras_step,
    "pipeline": pipeline_step,
    "pipeline-keras": pipeline_keras_step,
}


def rank_main(case: str, steps: int) -> None:
    """Train as one rank, and print what it holds."""
    for sample in watched(STEPS[case](), steps):
        print(json.dumps(sample) + "\n", end="", flush=True)


# -- the driver


def run(case: str, steps: int) -> list[list[Sample]]:
    """Run one case; return every rank's samples.

    Raises:
        RuntimeError: the job has failed; the message has what it said.
    """
    command = [sys.executable, "-m", "hvdx", "run", "-np", str(RANKS), "--", sys.executable]
    backend = "torch" if case == "keras-torch" else "tensorflow"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environ["KERAS_BACKEND"] = backend
    job = subprocess.run(
        [*command, __file__, "--rank", case, str(steps)],
        capture_output=True,
        text=True,
        env=environ,
    )
    if job.returncode:
        raise RuntimeError(f"{case} ended with {job.returncode}:\n{job.stderr[-4000:]}")
    lines = job.stdout.splitlines()
    return [
        [Sample(*json.loads(line.partition(":")[2])) for line in lines if line.startswith(f"[{r}]")]
        for r in range(RANKS)
    ]


def judge(case: str, told: list[list[Sample]], growth: float) -> bool:
    """Print what the ranks of a case hold at first and at last; return whether that is the same.

    Args:
        case: its name.
        told: by rank.
        growth: how much more memory there may be, as a part of what there is at first.
    """
    good = True
    for rank, samples in enumerate(told):
        warm = [sample for sample in samples if sample.step > WARM * samples[-1].step]
        tenth = max(1, len(warm) // 10)
        ends = warm[:tenth], warm[-tenth:]
        memory, descriptors, threads = (
            [statistics.median(sample[field] for sample in end) for end in ends]
            for field in (1, 2, 3)
        )
        grown = memory[1] / memory[0] - 1
        fine = grown <= growth and descriptors[1] <= descriptors[0] and threads[1] <= threads[0]
        good &= fine
        print(
            f"{CASES[case]:33} rank {rank}  {samples[-1].step:6} steps  "
            f"{memory[0]:7.1f} -> {memory[1]:7.1f} MB ({grown:+6.2%})  "
            f"descriptors {descriptors[0]:.0f} -> {descriptors[1]:.0f}  "
            f"threads {threads[0]:.0f} -> {threads[1]:.0f}  {'ok' if fine else 'GROWS'}",
            flush=True,
        )
    return good


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--growth", type=float, default=0.02, help="of memory, that is no leak")
    parser.add_argument("--short", action="store_true", help="2,000 steps, 5 %% growth")
    options = parser.parse_args()
    if options.short:
        options.steps, options.growth = 2000, 0.05
    good = [
        judge(case, run(case, options.steps), options.growth)
        for case in options.case or list(CASES)
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank_main(sys.argv[-2], int(sys.argv[-1]))
        sys.exit(0)
    sys.exit(main())
