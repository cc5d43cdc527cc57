"""What a step of a Keras pipeline costs beside computing, and what ``pipe.fit`` learns.

    python benchmarks/pipeline_keras.py --json pipeline_keras.json

One job per backend, of one process and one thread; pipelines of one and of two stages take steps in
changing order. Layers are so small that a step takes the time of its calls: divided by units and
micro-batches, that is what a unit costs, forward, backward and optimizer's part together. The bar:
700 us. On digits the same model learns by ``pipe.fit`` and by Keras' ``fit``, from three starts.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import harness

UNITS, MICRO_BATCHES, BAR = 24, 4, 700.0


def small(stages: int) -> Any:
    """Return a function that gives microseconds per unit and micro-batch, over some steps."""
    import keras
    import numpy as np

    import hvdx as hvd

    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(8, activation="tanh") for _ in range(UNITS)]
    x = np.random.default_rng(0).normal(size=(4 * MICRO_BATCHES, 8)).astype("float32")
    pipe = hvd.Pipeline(
        keras.Sequential([keras.Input((8,)), *dense]), x, "mse", keras.optimizers.SGD(1e-3),
        micro_batches=MICRO_BATCHES, place=["cpu"] * stages,
    )  # fmt: skip

    def measure(steps: int = 5) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            pipe.step(x, x)
        return (time.perf_counter() - start) / (steps * UNITS * MICRO_BATCHES) * 1e6

    measure()  # functions are traced
    return measure


def overhead(backend: str, runs: int) -> list[harness.Row]:
    """Measure what units cost."""
    names = {1: f"{UNITS} units, 1 stage, {backend}", 2: f"{UNITS} units, 2 stages, {backend}"}
    samples = harness.interleave({name: small(stages) for stages, name in names.items()}, runs)
    metric = f"us per unit and micro-batch (bar: {BAR:.0f})"
    rows = []
    for name, taken in samples.items():
        value = statistics.median(taken)
        told = "bar", BAR, harness.within(BAR, value), runs, harness.spread(taken)
        rows.append(harness.Row(name, metric, value, *told))
    return rows


def digits(backend: str, seeds: int) -> list[harness.Row]:
    """Compare the accuracy that ``pipe.fit`` and Keras' ``fit`` reach."""
    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    import hvdx as hvd

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1400], order[1400:]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    reached: dict[str, list[float]] = {"hvdx": [], "keras alone": []}
    for seed in range(seeds):
        for name, accuracies in reached.items():
            keras.utils.set_random_seed(seed)
            hidden = [keras.layers.Dense(64, activation="relu") for _ in range(2)]
            model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
            adam, options = keras.optimizers.Adam(3e-3), {"batch_size": 64, "verbose": 0}
            if name == "hvdx":
                pipe = hvd.Pipeline(
                    model, x[:64], loss, adam, micro_batches=4, place=["cpu"] * 2, seed=seed
                )
                pipe.fit(x[train], y[train], epochs=10, **options)
                found = pipe.predict(x[test], **options)
                pipe.close()
            else:
                model.compile(adam, loss)
                model.fit(x[train], y[train], epochs=10, **options)
                found = model.predict(x[test], **options)
            accuracies.append(float(np.mean(found.argmax(1) == y[test])))
    ours, theirs = (statistics.median(each) for each in reached.values())
    told = "keras alone", theirs, ours / theirs, seeds, harness.spread(reached["hvdx"])
    return [harness.Row(f"digits, 10 epochs, {backend}", "accuracy", ours, *told)]


def work(file: str, short: bool) -> None:
    """Measure on the only rank."""
    import keras

    backend = keras.backend.backend()
    harness.one_thread(backend)
    rows = overhead(backend, 3 if short else 15) + digits(backend, 1 if short else 3)
    harness.leave(rows, file)


def main() -> None:
    """Print the table."""
    told = harness.options(__doc__).parse_args()
    if told.worker:
        work(told.worker, told.short)
    else:
        harness.report(harness.each_backend(__file__, told.short), told.json)


if __name__ == "__main__":
    sys.exit(main())
