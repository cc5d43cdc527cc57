"""What users give pipelines of any framework, checked and filled in: options, ranks, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.plan import SCHEDULES, Plan, check_mesh
from hvdx.pipeline.schedule import CHECKPOINTS

#: Running statistics of batch normalization move once per batch, or with each micro-batch; or a
#: micro-batch is normalized together with those that the replicas of its stage have meanwhile.
BATCHNORMS = ("deferred", "micro", "sync")
CHANNELS = "zmq", "horovod"


def check_options(
    micro_batches: Any,
    place: Any,
    clip_norm: Any = None,
    checkpoint: Any = "never",
    batchnorm: Any = "deferred",
    channel: Any = "zmq",
    channels: Sequence[str] = CHANNELS,
) -> None:
    """Refuse options that mean nothing for any framework.

    Raises:
        PlanError: one does; the message names it and what there is.
    """
    if micro_batches is not None and (not isinstance(micro_batches, int) or micro_batches < 1):
        raise PlanError(f"micro_batches={micro_batches!r}: give a whole number from 1")
    if place is not None and place != "auto" and (isinstance(place, str) or not len(place)):
        raise PlanError(
            f"place={place!r}: give a list of devices, such as ['cpu', 'cpu'], rows of ranks, or "
            "'auto'"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise PlanError(f"clip_norm={clip_norm!r}: give a number above 0, or None")
    if checkpoint is not None and checkpoint not in CHECKPOINTS:
        raise PlanError(f"checkpoint={checkpoint!r}: use one of {', '.join(CHECKPOINTS)}")
    if batchnorm not in BATCHNORMS:
        raise PlanError(f"batchnorm={batchnorm!r}: use one of {', '.join(BATCHNORMS)}")
    if channel not in channels:
        raise PlanError(f"channel={channel!r}: use one of {', '.join(channels)}")


class Told(NamedTuple):
    """Options that a plan may bring, or the planner choose; None: left to it."""

    micro_batches: int | None
    schedule: str | None
    checkpoint: str | None


def settled(told: Told, place: Any, stages: Any) -> Told:
    """Fill in what the user has left out: from a plan, or the defaults; nothing for the planner."""
    planned = isinstance(stages, Plan)
    if isinstance(place, str) and place == "auto" and not planned:
        return told
    kept = stages.checkpoint if planned else ""
    return Told(
        8 if told.micro_batches is None else told.micro_batches,
        told.schedule or "1f1b",
        told.checkpoint or kept or "never",
    )


def is_mesh(place: Any) -> bool:
    """Tell whether ``place`` has rows of ranks, not devices."""
    return isinstance(place, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in place)


def checked_mesh(told: Sequence[Any], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Return the rows that a user has given; none if each has the rank of its number alone.

    Raises:
        PlanError: they do not have each rank of the job once.
    """
    if not told:
        return ()
    for row in told:
        if not isinstance(row, (list, tuple)) or not all(type(rank) is int for rank in row):
            raise PlanError(f"place={told!r} has {row!r}, which is no list of ranks")
    check_mesh(told, ranks)
    mesh = tuple(map(tuple, told))
    return () if mesh == tuple((rank,) for rank in range(ranks)) else mesh


def placed(plan: Plan, mesh: tuple[tuple[int, ...], ...], ranks: int, what: str) -> Plan:
    """Return the plan that a user has given, on the ``mesh`` that was given with it.

    Args:
        plan: as given.
        mesh: rows of ranks; none: those of the plan.
        ranks: that there are; 0: as many as it takes.
        what: these are.

    Raises:
        PlanError: it is for other ranks.
    """
    plan = replace(plan, mesh=mesh) if mesh and not plan.mesh else plan
    if ranks and plan.ranks != ranks:
        raise PlanError(f"the plan is for {plan.ranks} {what}, but there are {ranks}")
    if mesh and plan.mesh != mesh:
        told, own = ([list(row) for row in each] for each in (mesh, plan.mesh))
        raise PlanError(f"place={told}, but the plan has {own}: give one of them")
    return plan


def devices_for(stages: Any, schedule: str) -> int:
    """Count the devices that stages take, which were given as a number, names or lengths."""
    count = 1 if stages is None else stages if isinstance(stages, int) else (
        len(stages) + isinstance(next(iter(stages), ""), str))  # fmt: skip
    return max(1, count // SCHEDULES.get(schedule, 1))


def rows_of(shapes: Sequence[Sequence[int]]) -> int:
    """Count the rows of a batch from its tensors' shapes; those of scalars do not matter.

    Raises:
        ValueError: they differ in that, or there is none.
    """
    counts = {shape[0] for shape in shapes if len(shape)}
    if len(counts) != 1 or counts == {0}:
        told = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"the batch has tensors of shapes {told or 'none'}: all need the same first dimension, "
            "of at least 1, along which micro-batches are cut"
        )
    return counts.pop()
