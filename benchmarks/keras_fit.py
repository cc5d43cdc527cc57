"""Step time of Keras' ``fit`` with hvdx's optimizer on one rank, against the same ``fit`` without.

    python benchmarks/keras_fit.py --json keras_fit.json

One rank sends nothing, so that this is what wrapping costs. One job per backend, of one thread;
both variants take a few steps at a time in changing order. The bar: a ratio of at least 0.97.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import harness

BATCH = 32


def mlp(depth: int, width: int, inputs: int) -> Any:
    """Return a stack of dense layers with one output."""
    import keras

    hidden = [keras.layers.Dense(width, activation="relu") for _ in range(depth)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, keras.layers.Dense(1)])


CASES: dict[str, Callable[[], Any]] = {
    "fit, many small layers (122 tensors)": lambda: mlp(60, 64, 64),
    "fit, large layers (5 M parameters)": lambda: mlp(3, 1024, 3072),
}


def variants(make: Callable[[], Any]) -> dict[str, Any]:
    """Return the compiled models, equal at the start."""
    import keras

    import hvdx.keras as hvd

    made = {}
    for name in ("hvdx", "keras alone"):
        keras.utils.set_random_seed(0)
        optimizer = keras.optimizers.Adam(1e-4)
        made[name] = make()
        made[name].compile(
            hvd.DistributedOptimizer(optimizer) if name == "hvdx" else optimizer, "mse"
        )
    return made


def stepper(model: Any, x: Any, y: Any) -> float:
    """Return the milliseconds of a step, over an epoch of ``x``."""
    start = time.perf_counter()
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    return (time.perf_counter() - start) / (len(x) // BATCH) * 1e3


def work(file: str, short: bool) -> None:
    """Measure on the only rank."""
    import keras
    import numpy as np

    import hvdx.keras as hvd

    backend = keras.backend.backend()
    harness.one_thread(backend)
    hvd.init()
    rows: list[harness.Row] = []
    runs, steps = (3, 5) if short else (20, 30)
    for case, make in CASES.items():
        models = variants(make)
        random = np.random.default_rng(0)
        width = models["hvdx"].input_shape[1]
        x, y = (random.normal(size=(steps * BATCH, n)).astype("float32") for n in (width, 1))
        for model in models.values():
            stepper(model, x, y)  # warm up: graphs are made
        samples = harness.interleave(
            {name: functools.partial(stepper, model, x, y) for name, model in models.items()}, runs
        )
        rows += harness.compare(f"{case}, {backend}", "step ms", samples)
    harness.leave(rows, file)


def measure(short: bool) -> list[harness.Row]:
    """Launch a rank per backend and return all rows."""
    return harness.each_backend(__file__, short)


def main() -> None:
    """Print the table."""
    told = harness.options(__doc__).parse_args()
    if told.worker:
        work(told.worker, told.short)
    else:
        harness.report(measure(told.short), told.json)


if __name__ == "__main__":
    sys.exit(main())
