"""Two stages of two replicas each against data parallelism, on four hosts with slow links.

    python benchmarks/hybrid.py --json hybrid.json
    python benchmarks/hybrid.py --framework keras

A model of many parameters and few activations: a stack of square dense layers, and few rows. Data
parallel, each of N hosts sends 2 (N-1)/N of all gradients in a step: of four, one and a half times
the model. In two stages of two replicas it sends its own half of the gradients once, and the
activations at the cut. One job trains all variants from the same start on the same batch, in turns:
Horovod, torch's DDP and hvdx data parallel, hvdx as a hybrid, both with gradients as 8-bit integers
too, and four stages, which send no gradient at all.

Times are those of the slowest rank, bytes those of the host that sends most, with all headers and
Horovod's own talk. What does not compress must learn the same, or the benchmark fails.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import rig

HOSTS, LAYERS, ROWS, MICRO_BATCHES = 4, 8, 32, 4
LEARNING_RATE = 0.1
MESH = [[0, 1], [2, 3]]  # replicas are neighbours: where hosts have several ranks they share one
INT8 = 1 + 1 / 256  # bytes of a number, and of its share of a block's scale
ALIKE = 1e-4  # share of the loss by which rounding may differ


class Variant(NamedTuple):
    """A way to train.

    Attributes:
        name: of the rows.
        mesh: of the pipeline; empty: data parallel.
        library: ``hvdx``, or another that trains data parallel.
        int8: whether gradients are compressed.
    """

    name: str
    mesh: list[list[int]]
    library: str = "hvdx"
    int8: bool = False

    def sent(self, width: int) -> float:
        """Return the bytes that the formula lets the busiest host send in a step."""
        gradients = LAYERS * width * (width + 1) * (INT8 if self.int8 else 4)
        stages = len(self.mesh) or 1
        replicas = HOSTS // stages
        cuts = min(stages - 1, 2)  # a stage in the middle sends activations and gradients of them
        ring = 2 * (replicas - 1) / replicas
        return ring * gradients / stages + cuts * ROWS / replicas * width * 4


OURS, THEIRS = "hybrid 2x2", "data parallel"
VARIANTS = [
    Variant(OURS, MESH),
    Variant(THEIRS, []),
    Variant("Horovod", [], "horovod"),
    Variant("DDP", [], "ddp"),
    Variant("hybrid 2x2, int8", MESH, int8=True),
    Variant("data parallel, int8", [], int8=True),
    Variant("stages 1x4", [[rank] for rank in range(HOSTS)]),
]


# --- the steps; each returns the loss of the rows that it has seen


def batch(width: int, rank: int | None) -> tuple[Any, Any]:
    """Return the batch, or a rank's share of it."""
    import numpy as np

    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, width)).astype("float32")
    y = np.roll(np.abs(x), 1, axis=1)
    share = slice(None) if rank is None else slice(rank, None, HOSTS)
    return x[share], y[share]


def torch_step(variant: Variant, width: int) -> Callable[[], float]:
    """Return a step of PyTorch."""
    import torch

    import hvdx as hvd

    torch.manual_seed(0)
    layers: list[Any] = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(width, width), torch.nn.ReLU()]
        torch.nn.init.kaiming_uniform_(layers[-2].weight, nonlinearity="relu")
    model: Any = torch.nn.Sequential(*layers[:-1])
    loss = torch.nn.functional.mse_loss
    compression = hvd.Compression.int8 if variant.int8 else None

    def make(params: Any) -> Any:
        return torch.optim.SGD(params, LEARNING_RATE, momentum=0.5)

    own = None if variant.mesh else hvd.rank()
    x, y = map(torch.from_numpy, batch(width, own))
    if variant.mesh:
        pipe = hvd.Pipeline(
            model, x, loss, make, place=variant.mesh, micro_batches=MICRO_BATCHES,
            compression=compression,
        )  # fmt: skip
        return lambda: float(pipe.step(x, y))
    optimizer = make(model.parameters())
    if variant.library == "horovod":
        import horovod.torch as horovod

        optimizer = horovod.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters()
        )
    elif variant.library == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        optimizer = hvd.DistributedOptimizer(optimizer, model, compression=compression)

    def step() -> float:
        optimizer.zero_grad()
        found = loss(model(x), y)
        found.backward()
        optimizer.step()
        return float(found.detach())

    return step


def keras_step(variant: Variant, width: int) -> Callable[[], float]:
    """Return a step of Keras."""
    import keras

    import hvdx as hvd

    keras.utils.set_random_seed(0)
    kinds = ["relu"] * (LAYERS - 1) + [None]
    layers = [keras.layers.Dense(width, kind, kernel_initializer="he_uniform") for kind in kinds]
    model = keras.Sequential([keras.Input((width,)), *layers])
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=0.5)
    compression = hvd.Compression.int8 if variant.int8 else None
    x, y = batch(width, None if variant.mesh else hvd.rank())
    if variant.mesh:
        pipe = hvd.Pipeline(
            model, x, "mse", optimizer, place=variant.mesh, micro_batches=MICRO_BATCHES,
            compression=compression,
        )  # fmt: skip
        return lambda: float(pipe.step(x, y))
    import hvdx.keras as face

    model.compile(face.DistributedOptimizer(optimizer, compression=compression), "mse")

    def step() -> float:
        model.reset_metrics()  # train_on_batch returns the mean since then
        return float(model.train_on_batch(x, y))

    return step


STEPS = {"torch": torch_step, "keras": keras_step}


# --- measuring


def sent() -> int:
    """Return the bytes that this host has sent over its link."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


class Runner:
    """Takes steps of a variant; keeps what each has sent, and its loss."""

    def __init__(self, step: Callable[[], float]) -> None:
        self.step, self.sent = step, list[float]()
        self.losses = [step(), step()]  # warm

    def __call__(self) -> float:
        """Return the milliseconds of a step."""
        import hvdx as hvd

        hvd.barrier()
        before, start = sent(), time.perf_counter()
        self.losses.append(self.step())
        seconds = time.perf_counter() - start
        hvd.barrier()  # what others still expect from this host is its step's
        self.sent.append(sent() - before)
        return seconds * 1e3


def of_all(own: list[float], pick: Callable[..., float]) -> list[float]:
    """Pick, element by element, from what all ranks have."""
    import hvdx as hvd

    return [pick(each) for each in zip(*hvd.allgather_object(own), strict=True)]


def work(file: str, framework: str, rate: float, width: int, runs: int) -> None:
    """Measure on one rank; rank 0 leaves the rows."""
    import hvdx as hvd

    with JOBS[framework]():
        runners = {}
        for variant in VARIANTS:
            if framework == "torch" or variant.library == "hvdx":
                runners[variant.name] = Runner(STEPS[framework](variant, width))
                if hvd.rank() == 0:
                    print(f"{variant.name} is warm", flush=True)
        samples = harness.interleave(runners, runs)
        samples = {name: of_all(taken, max) for name, taken in samples.items()}
        bytes_sent = {name: of_all(runner.sent, max) for name, runner in runners.items()}
        losses = {name: of_all(runner.losses, statistics.fmean) for name, runner in runners.items()}
        compare_losses(losses)
        if hvd.rank() == 0:
            case = f"{HOSTS} hosts, {rate:g} Mbit/s, {framework}"
            harness.leave(rows(case, width, samples, bytes_sent, losses), file)


@contextlib.contextmanager
def keras_job() -> Iterator[None]:
    """Start hvdx on every rank; end it."""
    import keras

    import hvdx as hvd

    hvd.init(framework="torch" if keras.backend.backend() == "torch" else "tensorflow")
    yield
    hvd.barrier()
    hvd.shutdown()


JOBS = {"torch": harness.torch_job, "keras": keras_job}


def compare_losses(losses: dict[str, list[float]]) -> None:
    """Stop if something has learnt nothing, or without compression anything else."""
    for name, theirs in losses.items():
        if not theirs[-1] < 0.95 * theirs[0]:
            raise SystemExit(f"{name} learns nothing: its losses are {theirs}")
        pairs = zip(theirs, losses[THEIRS], strict=True)
        off = max(abs(one / other - 1) for one, other in pairs)
        if off > ALIKE and "int8" not in name:
            raise SystemExit(f"losses of {name} differ by {off:.1e}: {theirs}, {losses[THEIRS]}")


def rows(
    case: str,
    width: int,
    samples: dict[str, list[float]],
    bytes_sent: dict[str, list[float]],
    losses: dict[str, list[float]],
) -> list[harness.Row]:
    """Return times, bytes against the formula, and what has been learnt."""
    made: list[harness.Row] = []
    pairs = [(OURS, name) for name in samples if name != OURS]
    for name, other in [*pairs, (f"{OURS}, int8", f"{THEIRS}, int8")]:
        pair = {name: samples[name], other: samples[other]}
        made += harness.compare(case, f"{name}, step ms", pair, ours=name)
    for variant in VARIANTS:
        if variant.name in samples:
            own, right = bytes_sent[variant.name], variant.sent(width) / 1e6
            value, wide = statistics.median(own) / 1e6, harness.spread(own)
            told = value, "formula", right, right / value, len(own), wide
            made.append(harness.Row(case, f"{variant.name}, MB sent a step", *told))
    for name, own in losses.items():
        right = losses[THEIRS][-1]
        made.append(harness.Row(case, f"{name}, loss after {len(own)} steps", own[-1], THEIRS,
                                right, right / own[-1], 1, 0.0))  # fmt: skip
    return made


def measure(framework: str, rate: float, width: int, runs: int) -> list[harness.Row]:
    """Run all variants on the rig."""
    with tempfile.TemporaryDirectory() as folder, rig.network(HOSTS, rate) as made:
        result = Path(folder) / "rows.json"
        told = ["--framework", framework, "--rate", str(rate), "--width", str(width)]
        command = [sys.executable, __file__, "--worker", str(result), *told, "--runs", str(runs)]
        if rig.run(made, command, {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}):
            raise SystemExit("a rank failed")
        return harness.load(result)


def main() -> int:
    """Print the table, and whether the hybrid is quicker."""
    parser = harness.options(__doc__)
    parser.add_argument("--framework", choices=STEPS, default="torch")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s of each link")
    parser.add_argument("--width", type=int, help="of the layers; 1024 by default")
    parser.add_argument("--runs", type=int, help="turns of each variant")
    told = parser.parse_args()
    width = told.width or (128 if told.short else 1024)
    runs = told.runs or (2 if told.short else 9)
    if told.worker:
        work(told.worker, told.framework, told.rate, width, runs)
        return 0
    if (reason := rig.missing()) is not None:
        print(f"no rig here: {reason}", file=sys.stderr)
        return 0 if told.short else 2
    found = measure(told.framework, told.rate, width, runs)
    harness.report(found, told.json)
    for row in found if not told.short else ():  # so small a model needs latency, not bandwidth
        if row.metric == f"{OURS}, step ms" and row.baseline in (THEIRS, "Horovod", "DDP"):
            word = "met   " if row.ratio > 1 else "MISSED"
            print(f"{word}  {OURS} is {row.ratio:.2f} times as quick as {row.baseline}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
