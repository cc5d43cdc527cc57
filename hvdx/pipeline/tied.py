"""Gradients of parameters that units of several rows of ranks use: each row needs them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdx.pipeline.channel import Key
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.plan import Plan
from hvdx.pipeline.post import PostChannel
from hvdx.pipeline.replicas import Row, Weight


def exchange_tied(
    channel: PostChannel,
    row: Row,
    plan: Plan,
    line: Graph,
    step: int,
    found: dict[Weight, Any],
    arrived: Callable[[Any, int, str], Any],
) -> None:
    """Give and get the gradients of parameters that several rows have.

    All ranks of a row have the same: each gives it to those of the others whose turn it is.

    Args:
        channel: to the ranks of other rows.
        row: of this rank.
        plan: that is followed.
        line: the units.
        step: number of this one.
        found: gradients of this row by unit and name; those of other rows are added.
        arrived: ``(gradient, unit, name)``: puts one that has come where this rank's is.
    """
    rows, place = plan.rows, row.place
    row_of = [
        plan.place[number]
        for number, (first, stop) in enumerate(plan.edges(line))
        for _ in range(first, stop)
    ]
    own = rows.index(row.ranks)
    shared = []
    for index, (name, units) in enumerate(sorted(line.tied().items())):
        owners: dict[int, list[int]] = {}
        for unit in units:
            owners.setdefault(row_of[unit], []).append(unit)
        if own in owners and len(owners) > 1:
            shared.append((name, owners, Key("T", step, index, 0)))
    for name, owners, key in shared:
        mine = [found.get((unit, name)) for unit in owners[own]]
        for other in set(owners) - {own}:
            for rank in rows[other][place :: len(rows[own])]:
                channel.send(rank, key, mine)
    for name, owners, key in shared:
        for other in set(owners) - {own}:
            theirs = channel.receive(rows[other][place % len(rows[other])], key)
            for unit, gradient in zip(owners[other], theirs, strict=True):
                if gradient is not None:
                    found[unit, name] = arrived(gradient, unit, name)
