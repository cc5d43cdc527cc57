"""What compression costs in accuracy: every method against none, from equal starts.

    python benchmarks/quality.py --json quality.json            # handwritten digits
    python benchmarks/quality.py --text --json quality.json     # bytes of English text

One job of real ranks per framework trains all methods, one after the other, seed after seed. A
seed fixes the data, their order and the first weights, so that methods are compared in pairs.

- Digits: the net of ``examples/digits_*.py``; accuracy on the test set, and by how many points it
  may fall.
- Text: a transformer of 1.3 M parameters that reads the help texts that Python ships, byte by
  byte, with Adam or with SGD and momentum; loss on what it has not seen, and by how many percent it
  may rise.

The last method is the control that must fail: without error feedback signs are not enough for SGD.
Under Adam they may be (docs/compression.md).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness

from hvdx.compression import Compression, after

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONTROL = "onebit:feedback=False,min_elements=0"
PEER = "ddp-powersgd"  # --methods: PyTorch's own, on text
LAST = 5  # epochs whose accuracies are averaged: one image is 0.28 points


class Bar(NamedTuple):
    """What a method may cost; None where nobody has said."""

    points: float | None  # of accuracy on digits
    percent: float | None  # of loss on text


BARS = {
    "fp16": Bar(0.2, 0.3),
    "bf16": Bar(0.2, 0.3),
    "int8": Bar(0.2, 0.3),
    "int4": Bar(0.5, 1.0),
    "onebit": Bar(0.7, 1.0),
    "topk": Bar(0.5, None),
    "dgc": Bar(1.0, 2.0),
    "randomk": Bar(1.0, None),
    "powersgd": Bar(0.3, 1.0),
    "diloco": Bar(None, 2.0),
}
#: What the control must cost at least, to show that feedback is needed and that bars can be missed.
CONTROL_BAR = Bar(2.0, 2.0)
DIGITS = ["fp16", "bf16", "int8", "int4", "onebit", "topk", "dgc:warmup_steps=200", "randomk",
          "powersgd", CONTROL]  # fmt: skip
TEXT = ["fp16", "bf16", "int8", "int8:feedback=True", "int4", "onebit", "onebit:scales='matrix'",
        "topk", "powersgd", "diloco", CONTROL]  # fmt: skip
#: dgc brings its own momentum, which Adam has already.
MOMENTUM_ONLY = ["dgc:warmup_steps=100"]


class Sample(NamedTuple):
    """How one training ended."""

    case: str
    method: str
    seed: int
    value: float  # accuracy in percent, or loss


class Row(NamedTuple):
    """One method against none."""

    case: str
    method: str
    value: float  # mean over the seeds
    none: float  # likewise, without compression
    cost: float  # points of accuracy lost, or percent of loss gained; mean over pairs
    error: float  # standard error of that; NaN of a single pair
    bar: float | None
    met: bool | None


# -- on the ranks


def digits(framework: str, method: str, seed: int, told: argparse.Namespace) -> float:
    """Return the accuracy on the test set, in percent: the mean of the last epochs."""
    sweep = importlib.import_module(f"compression_sweep_{framework}")
    options = argparse.Namespace(seed=seed, epochs=told.epochs, batch_size=32, lr=0.05)
    return 100 * statistics.fmean(sweep.train(method, options).accuracies[-LAST:])


WIDTH, DEPTH, LENGTH, BATCH = 160, 4, 64, 8
RATES = {"adam": 1e-3, "sgd": 0.02}  # at 0.02 Keras diverges without compression: --rate 0.01


def windows(rank: int, steps: int, seed: int) -> tuple[Any, Any]:
    """Return bytes to train on, (steps * BATCH, LENGTH + 1), and to test on, alike on all ranks."""
    import gpt_shared as gpt
    import numpy as np

    train, test = gpt.english()
    starts = np.random.default_rng([seed, rank]).integers(len(train) - LENGTH, size=steps * BATCH)
    rest = len(test) // (LENGTH + 1) * (LENGTH + 1)
    return gpt.windows(train, starts, LENGTH), test[:rest].reshape(-1, LENGTH + 1)


def text_torch(method: Any, seed: int, told: argparse.Namespace) -> float:
    """Return the mean loss of PyTorch's transformer on the test windows."""
    import torch
    from optimizer import Transformer

    import hvdx as hvd

    torch.manual_seed(seed)
    model: Any = Transformer(256, WIDTH, DEPTH)
    if told.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(model.parameters(), told.rate, momentum(method))
    else:
        optimizer = torch.optim.Adam(model.parameters(), told.rate)
    if method == PEER:
        model = with_hook(model)
    else:
        optimizer = hvd.DistributedOptimizer(optimizer, model, compression=method)
    factor = (lambda step: 1 - step / told.steps) if told.decay else (lambda step: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    train, test = map(torch.from_numpy, windows(hvd.rank(), told.steps, seed))
    for batch in train.split(BATCH):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        schedule.step()
    finish(optimizer)
    model.eval()
    with torch.no_grad():
        losses = [model(part).item() * len(part) for part in test.split(64)]
    return sum(losses) / len(test)


def finish(optimizer: Any) -> None:
    """Bring replicas together that were trained apart."""
    if hasattr(optimizer, "flush"):
        optimizer.flush()


def momentum(method: Any) -> float:
    """Return the momentum that the optimizer is to have."""
    return 0.0 if getattr(method, "owns_momentum", False) else 0.9


def with_hook(model: Any) -> Any:
    """Return ``model`` in PyTorch's own data parallelism, with its hook for PowerSGD, rank 4."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    # One bucket, as in benchmarks/compression.py.
    model = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=64)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return model


def text_keras(method: Any, seed: int, told: argparse.Namespace) -> float:
    """Return the mean loss of the same transformer in Keras on the test windows."""
    import keras
    from keras import layers

    import hvdx as hvd

    keras.utils.set_random_seed(seed)
    tokens = keras.Input((LENGTH,), dtype="int64")
    x = layers.Embedding(256, WIDTH)(tokens)
    for _ in range(DEPTH):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, WIDTH // 4)(y, y, use_causal_mask=True)
        y = layers.Dense(4 * WIDTH, activation="relu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(y)
    model = keras.Model(tokens, layers.Dense(256)(x))
    rate = told.rate
    if told.decay:
        rate = keras.optimizers.schedules.PolynomialDecay(told.rate, told.steps, 0.0)
    if told.optimizer == "sgd":
        optimizer: Any = keras.optimizers.SGD(rate, momentum(method))
    else:
        optimizer = keras.optimizers.Adam(rate)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=method)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train, test = windows(hvd.rank(), told.steps, seed)
    model.fit(train[:, :-1], train[:, 1:], batch_size=BATCH, shuffle=False, verbose=0)
    finish(optimizer)
    return float(model.evaluate(test[:, :-1], test[:, 1:], batch_size=64, verbose=0))


def text(framework: str, method: str, seed: int, told: argparse.Namespace) -> float:
    """Return the loss on text, in nats per byte."""
    compressor: Any = method
    if method == "diloco":  # no compressor, but a way of training
        compressor = Compression.diloco
    elif method != PEER:
        compressor = importlib.import_module("compression_sweep").method(method)
        if told.warm_up and method != "none":
            compressor = after(told.warm_up, compressor)
    train: dict[str, Callable[..., float]] = {"torch": text_torch, "keras": text_keras}
    return train[framework](compressor, seed, told)


def work(told: argparse.Namespace) -> None:
    """Train everything on one rank."""
    sys.path.insert(0, str(EXAMPLES))
    (framework,) = told.frameworks
    if framework == "torch":
        with harness.torch_job():
            train_all(framework, told)
        return
    importlib.import_module("digits_keras")  # chooses the backend
    import hvdx as hvd

    hvd.init()
    train_all(framework, told)


def train_all(framework: str, told: argparse.Namespace) -> None:
    """Train method by method; rank 0 leaves the samples."""
    import hvdx as hvd

    case, train = f"{'text' if told.text else 'digits'}, {framework}", text if told.text else digits
    samples = []
    for seed in range(told.seeds):
        for method in ["none", *told.methods]:
            value = train(framework, method, seed, told)
            samples.append(Sample(case, method, seed, value))
            if hvd.rank() == 0:
                print(f"{case}, seed {seed}, {method}: {value:.4f}", flush=True)
    if hvd.rank() == 0:
        Path(told.worker).write_text(json.dumps(samples))


# -- on the machine that launches


def launch(framework: str, ranks: int, given: list[str]) -> list[Sample]:
    """Run the job of one framework."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "samples.json"
        command = [sys.executable, "-m", "hvdx", "run", "-np", str(ranks), "--", sys.executable]
        more = ["--frameworks", framework, "--worker", str(result)]  # the last ones count
        subprocess.run([*command, __file__, *given, *more], check=True)
        return [Sample(*each) for each in json.loads(result.read_text())]


def compare(samples: list[Sample]) -> list[Row]:
    """Compare every method with none, pair by pair."""
    values = {(s.case, s.method, s.seed): s.value for s in samples}
    rows = []
    for case, method in dict.fromkeys((s.case, s.method) for s in samples if s.method != "none"):
        pairs = [
            (value, values[case, "none", seed])
            for (own, name, seed), value in values.items()
            if (own, name) == (case, method)
        ]
        in_points = case.startswith("digits")
        costs = [none - own if in_points else (own / none - 1) * 100 for own, none in pairs]
        cost = statistics.fmean(costs)
        bar = bar_of(method)[0 if in_points else 1]
        met = None if bar is None else cost >= bar if method == CONTROL else cost <= bar
        error = statistics.stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.nan
        own, none = (statistics.fmean(side) for side in zip(*pairs, strict=True))
        rows.append(Row(case, method, own, none, cost, error, bar, met))
    return rows


def bar_of(method: str) -> Bar:
    """Return what ``method`` may cost."""
    return CONTROL_BAR if method == CONTROL else BARS.get(method.partition(":")[0], Bar(None, None))


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "method", "value", "none", "cost", "± error", "bar", "")
    for row in rows:
        limit = "" if row.bar is None else f"{'≥' if row.method == CONTROL else '≤'} {row.bar}"
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        if row.bar is not None and abs(row.cost - row.bar) < row.error:
            verdict += ", within error"
        numbers = (f"{x:.3f}" for x in (row.value, row.none, row.cost, row.error))
        table.add_row(row.case, row.method, *numbers, limit, verdict)
    Console(width=120).print(table)


def main() -> None:
    """Launch the jobs and print their table."""
    parser = harness.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--text", action="store_true", help="text in place of digits")
    parser.add_argument("--frameworks", nargs="+", default=["torch", "keras"])
    parser.add_argument("--methods", nargs="+", help="as the sweeps of examples/ take them")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seeds", type=int, help="how many; 5 on digits, 1 on text")
    parser.add_argument("--epochs", type=int, default=30, help="of digits")
    parser.add_argument("--steps", type=int, default=300, help="on text")
    parser.add_argument("--optimizer", choices=RATES, default="adam", help="on text")
    parser.add_argument("--rate", type=float, help="of learning, on text; else 0.001, by sgd 0.02")
    parser.add_argument("--decay", action="store_true", help="to a rate of 0 at the end, on text")
    parser.add_argument("--warm-up", type=int, default=0, help="steps without compression, of text")
    told = parser.parse_args()
    on_text = TEXT + (MOMENTUM_ONLY if told.optimizer == "sgd" else [])
    told.methods = told.methods or (on_text if told.text else DIGITS)
    told.rate = told.rate or RATES[told.optimizer]
    told.seeds = told.seeds or (1 if told.text else 5)
    if told.short:  # does it work at all?
        told.seeds, told.epochs, told.steps, told.ranks = 1, 2, 5, 2
        told.methods = told.methods[:2]
    if told.worker:
        work(told)
        return
    samples = [s for f in told.frameworks for s in launch(f, told.ranks, sys.argv[1:])]
    rows = compare(samples)
    show(rows)
    if told.json:
        content = {
            "machine": harness.machine(),
            "ranks": told.ranks,
            "rows": [row._asdict() for row in rows],
            "samples": [sample._asdict() for sample in samples],
        }
        Path(told.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
