"""What the two compression sweeps share: options, bytes, the table and the picture."""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import hvdx as hvd
from hvdx import link
from hvdx.comm import in_step, through
from hvdx.compression import CompressionError, Compressor, Spec, as_compressor
from hvdx.ops import NumpyOps

METHODS = ["none", "fp16", "int8", "int4", "onebit", "topk", "powersgd"]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class Curve(NamedTuple):
    """How training went with one method; a value per epoch."""

    method: str
    megabytes: list[float]  # sent by a rank, in mean, since training began
    seconds: list[float]  # since the end of the first epoch
    losses: list[float]  # on the test set
    accuracies: list[float]  # likewise


def options(description: str | None, framework: str) -> argparse.ArgumentParser:
    """Return the parser of a sweep's command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        metavar="METHOD",
        help="names in hvd.Compression, with options if you like: topk:density=0.05",
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", default=f"compression_sweep_{framework}.png", metavar="FILE")
    return parser


def method(text: str) -> Compressor:
    """Return the compressor that a word such as ``int8`` or ``topk:density=0.05`` means.

    Raises:
        CompressionError: there is none of that name, or it takes no such options.
    """
    name, _, told = text.partition(":")
    found = getattr(hvd.Compression, name, name)
    if told:
        pairs = (option.partition("=") for option in told.split(","))
        chosen = {key: ast.literal_eval(value) for key, _, value in pairs}
        try:
            found = found(**chosen)
        except TypeError as error:
            raise CompressionError(f"method {text!r}: {error}") from None
    return as_compressor(found)


def megabytes(compressor: Compressor, shapes: Shapes, ranks: int, steps: int) -> float:
    """Return what a rank sends in ``steps``, in mean: payloads, by ring, without any headers.

    Counted, not computed: compressors run between ranks that live in this process.
    """
    fixed = tuple(shapes.items())
    return sum(_bytes(compressor.at(step), fixed, ranks) for step in range(steps)) / 1e6


@functools.cache
def _bytes(
    compressor: Compressor, shapes: tuple[tuple[str, tuple[int, ...]], ...], ranks: int
) -> float:
    sent, ops = 0.0, NumpyOps()

    def count(request: Any) -> None:
        nonlocal sent
        sent += link.sent(ops, request, ranks)

    for name, shape in shapes:
        spec = Spec(name, shape, "float32", ranks)
        own = compressor.of(spec)
        grad, state = np.zeros(shape, np.float32), own.init(ops, spec)
        in_step([through(own.reduce(ops, grad, state), see=count) for _ in range(ranks)])
    return sent / ranks


def show(curves: list[Curve], title: str, file: str) -> None:
    """Print a table of ``curves`` and draw them into ``file``, on rank 0."""
    if hvd.rank() != 0:
        return
    most = curves[0].megabytes[-1]
    print(f"\n{'method':28}{'MB sent':>9}{'less by':>9}{'seconds':>9}{'loss':>8}{'accuracy':>10}")
    for curve in curves:
        sent = curve.megabytes[-1]
        less = f"{most / sent:.1f}x" if sent else "-"
        print(
            f"{curve.method:28}{sent:9.2f}{less:>9}{curve.seconds[-1]:9.2f}"
            f"{curve.losses[-1]:8.4f}{curve.accuracies[-1]:10.4f}"
        )
    draw(curves, title, file)
    print(f"drawn: {file}", flush=True)


def draw(curves: list[Curve], title: str, file: str) -> None:
    """Draw the loss against bytes, and against time."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title)
    sent, timed = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        sent.plot(curve.megabytes, curve.losses, ".-", label=curve.method)
        timed.plot(curve.seconds, curve.losses, ".-", label=curve.method)
    sent.set(xscale="log", yscale="log", xlabel="MB sent by a rank", ylabel="test loss")
    timed.set(xlabel="seconds after the first epoch")
    figure.legend(*timed.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(file, dpi=120)
