"""What the units of a Keras model cost, measured on one micro-batch: for plans by time.

Stages compute unit by unit, each compiled alone and under a tape of its own; so does this, and the
units' times add up to a stage's. TensorFlow finds both halves of a backward at once, with the
inputs' gradients; so all of it counts for them, unless only weights have any. The loss is not
measured, nor what is kept for backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import tensorflow as tf

from hvdx.integrations.keras3_graph import Graph, Unit, size
from hvdx.integrations.keras3_stages import compiled
from hvdx.pipeline import ir


def profiled(
    graph: Graph,
    sample: Any,
    micro_batches: int,
    runs: int = 5,
    of: Callable[[Iterable[float]], float] = min,
) -> ir.Graph:
    """Return ``graph.line`` with times and bytes per micro-batch; variables stay as they are.

    Args:
        graph: of the model.
        sample: a batch.
        micro_batches: that a batch is cut into.
        runs: after one to compile.
        of: takes one of each time's runs. The lowest, since what else the machine does only adds;
            where other ranks compute as they will in training, the median.
    """
    states = [v for v in graph.model.variables if not v.trainable]
    before = [tf.identity(each.value) for each in states]
    try:
        rounds = [_round(graph, sample, micro_batches) for _ in range(runs + 1)]
    finally:
        for each, value in zip(states, before, strict=True):
            each.assign(value)
    values = rounds[0][0]
    least = [tuple(map(of, zip(*each, strict=True)))
             for each in zip(*(times for _, times in rounds[1:]), strict=True)]  # fmt: skip
    line = graph.line
    units = [
        replace(
            unit,
            makes={name: size(values[name]) for name in unit.makes},
            forward=forward,
            inputs=backward,
        )
        for unit, (forward, backward) in zip(line.units, least, strict=True)
    ]
    inputs = {name: size(values[name]) for name in line.inputs}
    return replace(line, units=tuple(units), inputs=inputs)


def _round(
    graph: Graph, sample: Any, micro_batches: int
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Compute the model once; return all values, and by unit seconds of forward and backward."""
    values: dict[str, Any] = {}
    for name, tensor in graph.tensors(sample).items():
        values[name] = tensor[: -(-len(tensor) // micro_batches)] if tensor.shape.rank else tensor
    return values, [_unit(unit, graph, values) for unit in graph.units]


def _unit(unit: Unit, graph: Graph, values: dict[str, Any]) -> tuple[float, float]:
    given = {name: values[name] for name in unit.reads}
    wanted = [x for name, x in given.items() if name in graph.smooth]
    wanted += [v.value for v in unit.params.values()]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(wanted)
        start = time.perf_counter()
        made = compiled(unit, True)(given)[0]
        _wait(made.values())
        forward = time.perf_counter() - start
    values.update(made)
    results = [x for name, x in made.items() if name in graph.smooth]
    if not results or not wanted:
        return forward, 0.0
    start = time.perf_counter()
    _wait(tape.gradient(results, wanted))
    return forward, time.perf_counter() - start


def _wait(tensors: Iterable[Any]) -> None:
    """Wait until GPUs have computed them."""
    for each in tensors:
        if each is not None and "GPU" in each.device:
            tf.test.experimental.sync_devices()
            return
