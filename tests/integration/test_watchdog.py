"""No job waits for ever: every rank ends, soon, and says who waits for what.

The jobs run side by side: most of a job's time is start-up and waiting.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, environment, run

pytest.importorskip("horovod")
TIMEOUT = 5  # seconds; and TensorFlow's first step takes some of them
SLACK = 60  # after the timeout, on a busy machine

#: What a rank does comes from the table below; it notes what it got, and when.
RANK = """
import multiprocessing, os, time
{imports}
import hvdx as hvd

hvd.init(framework={framework!r})
rank = hvd.rank()
note = open(os.path.join({folder!r}, f"rank{{rank}}"), "w")
with hvd.patience(120):  # frameworks load more on first use
{setup}
    hvd.barrier()
start = time.monotonic()
try:
{act}
except BaseException as error:
    note.write(f"{{time.monotonic() - start:.1f}} {{type(error).__name__}}: {{error}}")
    note.flush()
    raise
note.write("fine")
"""

TORCH = "import torch"
TENSORFLOW = "import tensorflow as tf"
KERAS = "import numpy, keras"
NET = """
torch.manual_seed(0)
net = torch.nn.Linear(3, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net)
def step():
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
step()
"""
FIT = """
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()), "mse")
def fit(batches):
    data = numpy.ones((2 * batches, 3), "float32")
    model.fit(data, data[:, :1], batch_size=2, verbose=0)
fit(2)
"""


class Case(NamedTuple):
    imports: str
    setup: str
    act: str
    told: list[tuple[str, ...]]  # by rank: what its error, or else stderr, holds
    backend: str = ""


CASES = {
    "one rank skips a collective": Case(
        TORCH, "x = torch.ones(3)",
        "if rank == 0: hvd.allreduce(x, name='loss')\n"
        "hvd.allreduce(x, name='metric')",
        [("StallError: rank ", "is waiting for another collective", "rank 0: waiting for "
          "allreduce 'loss' (float32 (3,))", "rank 1: waiting for allreduce 'metric'",
          "called at", "train.py:", "hvd.allreduce(x, name='loss')")] * 2,
    ),
    "different names": Case(
        TORCH, "x = torch.ones(3)",
        "hvd.allreduce(x, name=f'of rank {rank}')",
        [("StallError: rank ", "rank 0: waiting for allreduce 'of rank 0'", "rank 1: waiting "
          "for allreduce 'of rank 1'")] * 2,
    ),
    "a rank sleeps for ever": Case(
        TORCH, NET,
        "if rank == 1: time.sleep(1000)\n"
        "step()",
        [("StallError: rank 0 waited ", "for allreduce 'hvdx.gradients.1", "but rank 1 has not "
          "called it", "time.sleep(1000)", "hvd.patience(seconds)"), ()],
    ),
    "an endless loop, and nobody to end it": Case(
        TORCH, "x = torch.ones(3)",
        "if rank == 1:\n"
        "    while True: pass\n"
        "try: hvd.allreduce(x, name='loss')\n"
        "except hvd.StallError: time.sleep(1000)",
        [(), ("KeyboardInterrupt", "rank 1 is interrupted at", "while True: pass")],
    ),
    "unequal numbers of backward": Case(
        TORCH, NET,
        "for _ in range(3 + rank): step()\n"
        "hvd.barrier()",
        [("StallError: rank ", "is waiting for another collective", "rank 0: waiting for barrier",
          "rank 1: waiting for allreduce 'hvdx.gradients.1")] * 2,
    ),
    "an exception on one rank": Case(
        TORCH, "x = torch.ones(3)",
        "if rank == 1: raise KeyError('no such sample')\n"
        "hvd.allreduce(x, name='loss')",
        [("StallError: rank 0 waits for allreduce 'loss' (float32 (3,))", "which can never finish: "
          "rank 1 has left the job after KeyError: 'no such sample'"), ("KeyError",)],
    ),
    "TensorFlow, one rank skips a collective": Case(
        TENSORFLOW, "x = tf.ones(3)",
        "if rank == 0: hvd.allreduce(x, name='the/weights')\n"
        "hvd.allreduce(x, name='loss')",
        [("StallError: rank ", "is waiting for another collective", "rank 0: waiting for "
          "allreduce 'the/weights' (float32 (3,))", "rank 1: waiting for allreduce 'loss'")] * 2,
    ),
    "Keras on TensorFlow, a batch less": Case(
        KERAS, FIT,
        "fit(5 - rank)\n"
        "hvd.allreduce(numpy.float32(1), name='score')",
        [("is waiting for another collective", "rank 0: waiting for allreduce "
          "'hvdx.keras.1.0.0/mean'", "rank 1: waiting for allreduce 'score'", "model.fit("),
         ("StallError", "'hvdx.keras.1.0.0/mean'", "hvd.allreduce(numpy.float32(1)")],
        "tensorflow",
    ),
    "Keras on torch, a batch less": Case(
        KERAS, FIT,
        "fit(5 - rank)\n",
        [("StallError: rank 0 waits for", "hvdx.keras.1.0.0", "which can never finish: rank 1 has "
          "left the job: its script has ended"), ()],
        "torch",
    ),
    "nothing wrong": Case(
        TORCH, NET + "x = torch.ones(3)",
        # slow, but in time; slower, and announced; uneven data; ranks that end one by one
        "if rank == 1: time.sleep(1.5)\n"
        "step()\n"
        "if rank == 0:\n"
        "    with hvd.patience(60): time.sleep(6)\n"
        "step()\n"
        "for _ in range(20 if rank else 1):\n"
        "    time.sleep(0.3)\n"
        "    step()\n"
        "hvd.join()\n"
        "step()\n"
        "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(0.1,))\n"
        "worker.start(); worker.join()\n"
        "time.sleep(2 * rank)",
        [("fine",)] * 2,
    ),
}  # fmt: skip


class Done(NamedTuple):
    status: int
    notes: list[str]
    stderr: str


def framework(case: Case) -> str:
    return case.backend or ("torch" if case.imports == TORCH else "tensorflow")


def done(folder: Path, case: Case) -> Done:
    """Run a case on two ranks; its launch is stopped where it takes too long."""
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(
        RANK.format(
            folder=str(folder),
            framework=framework(case),
            imports=case.imports,
            setup=textwrap.indent(case.setup, "    "),
            act=textwrap.indent(case.act, "    "),
        )
    )
    environ = environment(HVDX_TIMEOUT=str(TIMEOUT), KERAS_BACKEND=framework(case))
    job = run(*HVDX_RUN, "-np", "2", "--", sys.executable, str(script), env=environ)
    notes = [(folder / f"rank{rank}").read_text() for rank in range(2)]
    return Done(job.returncode, notes, job.stderr)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Start the cases, a few at a time."""
    root = tmp_path_factory.mktemp("jobs")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield {
            name: pool.submit(done, root / str(number), case)
            for number, (name, case) in enumerate(CASES.items())
            if importlib.util.find_spec(framework(case))
        }


@pytest.mark.parametrize("name", CASES)
def test_the_job_ends_and_says_why(name, jobs):
    case = CASES[name]
    if name not in jobs:
        pytest.skip("its framework is not installed")
    ended = jobs[name].result()
    for rank, (note, told) in enumerate(zip(ended.notes, case.told, strict=True)):
        lines = ended.stderr.splitlines()
        own = note + "\n".join(line for line in lines if line.startswith(f"[{rank}]"))
        missing = [text for text in told if text not in own]
        assert not missing, f"rank {rank}:\n{note}\n{ended.stderr}"
        if note not in ("fine", ""):  # ended from outside
            assert float(note.split(" ")[0]) < TIMEOUT + SLACK
    if name == "nothing wrong":
        assert ended.status == 0
        if "already" not in ended.stderr:  # said when half of the time is over: a busy machine
            assert "hvdx" not in ended.stderr, ended.stderr
    else:
        assert ended.status != 0
