"""A rank of a real job in which one fault happens; test_faults.py has the table of faults.

    hvdx run -np 2 -- python faulty.py FOLDER

FOLDER holds `fault.json`: {"framework", "job", "point", "rank", "act"}. The rank trains until it
comes to ``point``, notes the time, and runs ``act`` there. Each rank also notes what ended it.
Times are those of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal  # noqa: F401  # acts use it
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import hvdx as hvd

FOLDER = Path(sys.argv[1])
TOLD = json.loads((FOLDER / "fault.json").read_text())
RANK = int(os.environ.get("HOROVOD_RANK", os.environ.get("RANK", "0")))
WARM, WHEN = 3, 6  # steps until frameworks have loaded all, and until the fault
#: What ranks may do differently; acts at the point "options" change it.
options: dict[str, Any] = {
    "steps": TOLD["steps"],
    "width": 8,
    "loss": np.ones(3, "float32"),
    "names": ["loss", "accuracy"],
    "compression": hvd.Compression.none,
    "process_sets": None,
    "pipeline": {},
    "checkpoints": None,
}
warming = contextlib.ExitStack()
steps_done = 0


def at(point: str, **more: Any) -> None:
    """Run the act if it is for this point and rank."""
    if TOLD["point"] != point or TOLD["rank"] not in (RANK, None):
        return
    if point in ("data", "forward", "hook", "step") and steps_done != WHEN:
        return
    note("fault", "")
    exec(TOLD["act"], {**globals(), **more})


def note(name: str, text: str) -> None:
    """Write a note to be read by the test, in one piece."""
    part = FOLDER / f"{name}.part{RANK}"
    part.write_text(f"{time.monotonic()} {text}")
    part.rename(FOLDER / name)


def step_done() -> None:
    """Do what a script does after a step: average metrics."""
    global steps_done
    steps_done += 1
    if steps_done == WARM:
        hvd.barrier()
        warming.close()
    at("step")
    for name in options["names"]:
        if options["loss"] is not None:
            hvd.allreduce(options["loss"], name=name)
    time.sleep(0.01)


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the data of a training that seems endless."""
    for number in range(options["steps"]):
        if number >= WHEN:
            while steps_done < WHEN and not step_failed.is_set():  # read ahead, by Keras
                time.sleep(0.001)
        at("data")
        x = np.random.default_rng(number).normal(size=(4, 8)).astype("float32")
        yield x, x[:, :1]


step_failed = threading.Event()


# --- jobs by framework: data parallel, and a pipeline of two stages


def torch_model() -> Any:
    import torch

    class Probe(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            at("forward")
            return x

    torch.manual_seed(0)
    width = options["width"]
    return torch.nn.Sequential(
        torch.nn.Linear(8, width), Probe(), torch.nn.Tanh(), torch.nn.Linear(width, 1)
    )


def torch_parallel() -> None:
    import torch

    model = torch_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=options["compression"])
    hvd.broadcast_parameters(model)
    model[0].weight.register_hook(lambda grad: at("hook"))
    for x, y in batches():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(torch.tensor(x)), torch.tensor(y))
        loss.backward()
        optimizer.step()
        step_done()


def torch_pipeline() -> None:
    import torch

    model, x = torch_model(), torch.ones(4, 8)
    at("making")
    pipe = hvd.Pipeline(
        model,
        x,
        torch.nn.functional.mse_loss,
        lambda params: torch.optim.SGD(params, 0.01),
        leaves=[type(model[1])],
        **{"stages": [1, 3], "micro_batches": 2, **options["pipeline"]},
    )
    for x, y in batches():
        pipe.step(torch.tensor(x), torch.tensor(y))
        step_done()
        if options["checkpoints"]:
            pipe.save(Path(options["checkpoints"], "model.pt"))


def keras_model() -> Any:
    import keras
    import tensorflow as tf

    class Probe(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            with tf.control_dependencies([tf.py_function(lambda: at("forward"), [], [])]):
                return tf.identity(x)

    keras.utils.set_random_seed(0)
    width = options["width"]
    layers = [keras.layers.Dense(width), Probe(), keras.layers.Activation("tanh")]
    return keras.Sequential([keras.Input((8,)), *layers, keras.layers.Dense(1)])


def keras_parallel() -> None:
    import keras

    class AfterStep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            try:
                step_done()
            except BaseException:
                step_failed.set()
                raise

    model = keras_model()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.01), compression=options["compression"]
    )
    model.compile(optimizer, "mse")
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), AfterStep()]
    epoch: dict[str, Any] = {"verbose": 0}
    if options["checkpoints"]:
        epoch |= {"epochs": 1000, "steps_per_epoch": 4}
        callbacks.append(hvd.callbacks.CheckpointCallback(options["checkpoints"]))
    model.fit(batches(), callbacks=callbacks, **epoch)


def keras_pipeline() -> None:
    import keras

    model = keras_model()
    at("making")
    pipe = hvd.Pipeline(
        model,
        np.ones((4, 8), "float32"),
        "mse",
        keras.optimizers.SGD(0.01),
        **{"stages": [1, 3], "micro_batches": 2, **options["pipeline"]},
    )
    for x, y in batches():
        pipe.step(x, y)
        step_done()


JOBS: dict[tuple[str, str], Callable[[], None]] = {
    ("torch", "parallel"): torch_parallel,
    ("torch", "pipeline"): torch_pipeline,
    ("keras", "parallel"): keras_parallel,
    ("keras", "pipeline"): keras_pipeline,
}


# --- what acts need


def exhaust_memory() -> None:
    """Allocate beyond what the system gives this process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    kept = []
    while True:
        kept.append(np.ones(1 << 20))


def keep_the_lock(seconds: int) -> None:
    """Sleep in C without letting go of Python's lock."""
    ctypes.PyDLL(None).sleep(seconds)


def main() -> None:
    at("options")
    at("start")
    sets = options["process_sets"]
    framework = "torch" if TOLD["framework"] == "torch" else "tensorflow"
    __import__("torch" if framework == "torch" else "keras")
    at("before init")
    hvd.init(framework=framework, process_sets=sets and [hvd.ProcessSet(each) for each in sets])
    warming.enter_context(hvd.patience(300))
    JOBS[TOLD["framework"], TOLD["job"]]()
    at("end")


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        note(f"rank{RANK}", f"{type(error).__name__}: {error}")
        raise
    note(f"rank{RANK}", "fine")
