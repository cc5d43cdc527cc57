"""What the two searches share: options, who tries what, the table and the best."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hvdx as hvd

PATIENCE = 3600.0  # seconds for which groups that have done their trials wait for the others


class Trial(NamedTuple):
    """What came of one learning rate."""

    rate: float
    group: int
    seconds: float
    loss: float  # on the test set
    accuracy: float  # likewise


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a search's command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[0.3, 0.1, 0.03, 0.01], metavar="RATE")
    add("--groups", type=groups, default=hvd.Groups(2), metavar="GROUPS",
        help="how many trials at a time; or the ranks of each: 0,1/2,3")  # fmt: skip
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=32, help="per process")
    add("--seed", type=int, default=0)
    add("--metrics", type=Path, metavar="FOLDER", help="for a file per trial: hvdx report draws")
    return parser


def groups(text: str) -> hvd.Groups:
    """Read ``2``, or ``0,1/2,3``."""
    try:
        if text.isdigit():
            return hvd.Groups(int(text))
        return hvd.Groups([[int(rank) for rank in part.split(",")] for part in text.split("/")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def recorder(rate: float, optimizer: Any, told: argparse.Namespace) -> hvd.Metrics:
    """Return what records a trial; its group calls this."""
    path = told.metrics and told.metrics / f"rate_{rate:g}.jsonl"
    every = {"every": 10, "quiet": True, "options": {"rate": rate}}
    return hvd.Metrics(path, optimizer, process_set=told.groups.mine, **every)


def search(
    train: Callable[[float, argparse.Namespace], tuple[float, float]], told: argparse.Namespace
) -> None:
    """Have each group try every so many rates, one after the other; tell the best on rank 0.

    Args:
        train: tries a rate with the ranks of this group; returns loss and accuracy.
        told: the options.
    """
    own: list[Trial] = []
    with hvd.patience(PATIENCE):
        for number, rate in enumerate(told.rates):
            if number % len(told.groups) == told.groups.index:
                start = time.perf_counter()
                loss, accuracy = train(rate, told)
                own.append(
                    Trial(rate, told.groups.index, time.perf_counter() - start, loss, accuracy)
                )
    everyone = hvd.allgather_object(own if told.groups.leads else [])
    if hvd.rank() == 0:
        show([trial for each in everyone for trial in each], told.groups.every)


def show(trials: list[Trial], ranks: list[tuple[int, ...]]) -> None:
    """Print a table, the best first."""
    print(f"\n{'rate':>8}{'loss':>9}{'accuracy':>10}{'seconds':>9}  ranks")
    trials.sort(key=lambda trial: (-trial.accuracy, trial.loss))
    for rate, group, seconds, loss, accuracy in trials:
        print(f"{rate:8g}{loss:9.4f}{accuracy:10.4f}{seconds:9.1f}  {ranks[group]}")
    print(f"best: {trials[0].rate:g}", flush=True)
