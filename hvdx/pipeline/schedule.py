"""Schedules as data: which rank does what, in which order.

A schedule is a list of actions per rank. The engine runs it, :mod:`hvdx.pipeline.simulator` times
it, and :func:`validate` says whether it can run at all; none of them knows how it was made:

    gpipe        all forwards, then all backwards          Huang et al., NeurIPS 2019
    1f1b         forward and backward in turns             Narayanan et al., SOSP 2019
    interleaved  the same with several stages per rank     Narayanan et al., SC 2021
    zb1p         weights' gradients fill the gaps          Qi et al., ICLR 2024
    zbv          and first and last stage share a rank     (:mod:`hvdx.pipeline.greedy`)
    text         what the user writes

Where a rank has replicas, :func:`dealt` deals its micro-batches round them.

Two of them for 2 ranks and 3 micro-batches, F forward and B backward, in slots of time:

    gpipe  rank 0   F0 F1 F2 .  B0 B1 B2       1f1b   rank 0   F0 F1 .  B0 F2 B1 .  B2
           rank 1   .  F0 F1 F2 B0 B1 B2              rank 1   .  F0 B0 F1 B1 F2 B2 .
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hvdx.errors import PlanError


class Action(NamedTuple):
    """One piece of work: a stage's forward or (part of its) backward of one micro-batch.

    Kinds: ``F`` forward; ``B`` the whole backward; or in two parts ``I``, the gradient of the
    stage's inputs, and ``W``, that of its weights. Written ``0F3``: stage 0, micro-batch 3.
    """

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @property
    def gives(self) -> Action:
        """Return what others wait for: an ``I`` gives its neighbour what a ``B`` would."""
        return Action("B", self.stage, self.micro_batch) if self.kind == "I" else self


class Span(NamedTuple):
    """When an action ran, or is predicted to run, in seconds."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """One step's work of every rank.

    Attributes:
        rows: by rank, what it does, in order.
        place: by stage, the rank that has it, or the row of ``mesh``.
        micro_batches: how many a step has.
        name: of the method, such as ``"1f1b"``; ``"text"`` for the user's own.
        mesh: rows of ranks that are replicas of each other; empty: no rank has a replica.
    """

    rows: tuple[tuple[Action, ...], ...]
    place: tuple[int, ...]
    micro_batches: int
    name: str = "text"
    mesh: tuple[tuple[int, ...], ...] = ()

    @property
    def stages(self) -> int:
        """Count the stages."""
        return len(self.place)

    @property
    def ranks(self) -> int:
        """Count the ranks."""
        return len(self.rows)

    def owner(self, stage: int, micro_batch: int) -> int:
        """Return the rank that computes ``micro_batch`` in ``stage``."""
        row = self.place[stage]
        return self.mesh[row][micro_batch % len(self.mesh[row])] if self.mesh else row

    @property
    def trains(self) -> bool:
        """Tell training from inference, which has no backward."""
        return any(action.kind != "F" for row in self.rows for action in row)

    @property
    def splits(self) -> bool:
        """Tell whether backward comes in two parts."""
        return any(action.kind == "W" for row in self.rows for action in row)

    def __str__(self) -> str:
        """Return the text form, which :func:`parse` reads."""
        return "\n".join(",".join(map(str, row)) for row in self.rows)


def needs(action: Action, stages: int) -> list[Action]:
    """List what must be done before ``action``, in terms of :attr:`Action.gives`."""
    kind, stage, micro_batch = action
    if kind == "F":
        return [Action("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [Action("B", stage, micro_batch)]
    own = [Action("F", stage, micro_batch)]
    return own if stage == stages - 1 else [*own, Action("B", stage + 1, micro_batch)]


def walk(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Yield each action with its rank, in an order in which all of them can run.

    Raises:
        PlanError: the ranks wait for each other; the message says who for what.
    """
    done: set[Action] = set()
    position = [0] * schedule.ranks
    moving = True
    while moving:
        moving = False
        for rank, row in enumerate(schedule.rows):
            while position[rank] < len(row):
                action = row[position[rank]]
                if not done.issuperset(needs(action, schedule.stages)):
                    break
                yield rank, action
                done.add(action.gives)
                position[rank] += 1
                moving = True
    stuck = [
        _stuck(rank, row[at], done, schedule)
        for rank, (row, at) in enumerate(zip(schedule.rows, position, strict=True))
        if at < len(row)
    ]
    if stuck:
        raise PlanError(f"the schedule deadlocks: {'; '.join(stuck)}")


def _stuck(rank: int, action: Action, done: set[Action], schedule: Schedule) -> str:
    missing = next(each for each in needs(action, schedule.stages) if each not in done)
    owner = schedule.owner(missing.stage, missing.micro_batch)
    where = "later in its own row" if owner == rank else f"on rank {owner}"
    return f"rank {rank} stops at {action}, which needs {missing} {where}"


def peak_live(schedule: Schedule) -> list[int]:
    """Return per stage how many micro-batches a rank keeps of it at most, from F to B or W.

    This depends on the order alone, not on times.
    """
    alone = [[float(stage == each) for each in range(schedule.stages)]
             for stage in range(schedule.stages)]  # fmt: skip
    return [int(max(peak_kept(schedule, kept))) for kept in alone]


def peak_live_of_ranks(schedule: Schedule) -> list[int]:
    """Return per rank how many micro-batches its stages keep at most, all together."""
    return [int(peak) for peak in peak_kept(schedule, [1] * schedule.stages)]


def peak_kept(schedule: Schedule, kept: Sequence[float]) -> list[float]:
    """Return per rank what it keeps at most, where a micro-batch of stage s keeps ``kept[s]``."""
    peaks = []
    for row in schedule.rows:
        held = peak = 0.0
        for action in row:
            held += kept[action.stage] * {"F": 1, "I": 0}.get(action.kind, -1)
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


CHECKPOINTS = "never", "except_last", "always"


def recomputed(schedule: Schedule, checkpoint: str) -> list[frozenset[int]]:
    """Return by stage the micro-batches that keep their inputs alone (Chen et al., 2016).

    Args:
        schedule: that is run.
        checkpoint: ``"always"``: all but those whose backward follows their forward at once,
            which would gain nothing; ``"except_last"``: nor a rank's last micro-batch, save in
            the last stage: that computes nothing twice, and must take them in order; ``"never"``.
    """
    found: list[set[int]] = [set() for _ in schedule.place]
    if checkpoint == "never":
        return [frozenset() for _ in found]
    for row in schedule.rows:
        last = {action.stage: action.micro_batch for action in row if action.kind == "F"}
        for action, following in itertools.pairwise(row):
            whole = checkpoint == "except_last" and action.micro_batch == last[action.stage]
            if whole and action.stage < schedule.stages - 1:
                continue
            if action.kind == "F" and following[1:] != action[1:]:
                found[action.stage].add(action.micro_batch)
    return [frozenset(each) for each in found]


def validate(schedule: Schedule) -> None:
    """Check that ``schedule`` is complete, keeps micro-batches in order and cannot deadlock.

    Order matters for the result: gradients are summed as they come, and only the same order
    gives the same bits under every schedule.

    Raises:
        PlanError: it is not so; the message names rank and action.
    """
    _check_actions(schedule)
    _check_order(schedule)
    for _ in walk(schedule):
        pass


def _check_actions(schedule: Schedule) -> None:
    seen: set[Action] = set()
    for rank, row in enumerate(schedule.rows):
        for action in row:
            if action.kind not in ("F", "B", "I", "W"):
                raise PlanError(f"rank {rank}: {action} is no F, B, I or W")
            if not 0 <= action.stage < schedule.stages:
                raise PlanError(f"rank {rank}: {action}, but there are {schedule.stages} stages")
            if not 0 <= action.micro_batch < schedule.micro_batches:
                count = schedule.micro_batches
                raise PlanError(f"rank {rank}: {action}, but there are {count} micro-batches")
            owner = schedule.owner(action.stage, action.micro_batch)
            if owner != rank:
                raise PlanError(
                    f"rank {rank}: {action}, but stage {action.stage} is on rank {owner}"
                )
            if action in seen:
                raise PlanError(f"rank {rank}: {action} comes twice")
            seen.add(action)
    _check_complete(schedule, seen)


def _check_complete(schedule: Schedule, seen: set[Action]) -> None:
    trains = schedule.trains
    for stage in range(schedule.stages):
        for micro_batch in range(schedule.micro_batches):
            kinds = "".join(k for k in "FBIW" if Action(k, stage, micro_batch) in seen)
            if kinds not in (("FB", "FIW") if trains else ("F",)):
                raise PlanError(
                    f"rank {schedule.owner(stage, micro_batch)}: micro-batch {micro_batch} has "
                    f"{'+'.join(kinds) or 'nothing'} in stage {stage}; it needs "
                    + ("F and B, or F, I and W" if trains else "F")
                )


def _check_order(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.rows):
        last: dict[tuple[str, int], Action] = {}
        for action in row:
            for way in {"F": "F", "B": "IW", "I": "I", "W": "W"}[action.kind]:
                before = last.get((way, action.stage))
                if before is not None and before.micro_batch > action.micro_batch:
                    raise PlanError(
                        f"rank {rank}: {action} comes after {before}; each stage must take "
                        "micro-batches in ascending order, or sums would differ in their bits"
                    )
                last[way, action.stage] = action


_ACTION = re.compile(r"\s*(\d+)([FBIW])(\d+)\s*", re.ASCII)


def parse(text: str) -> Schedule:
    """Read a schedule: one line per rank, such as ``0F0,0F1,0B0,0B1``.

    The stages that a line names are its rank's.

    Raises:
        PlanError: it is none, or :func:`validate` finds fault with it.
    """
    rows = []
    for rank, line in enumerate(text.strip().splitlines()):
        matches = [(_ACTION.fullmatch(word), word) for word in line.split(",")]
        for match, word in matches:
            if match is None:
                raise PlanError(f"line {rank + 1}: {word.strip()!r} is no action such as 0F3")
        rows.append(tuple(Action(m[2], int(m[1]), int(m[3])) for m, _ in matches if m))
    if not rows:
        raise PlanError("an empty schedule: write one line per rank, such as 0F0,0B0")
    schedule = Schedule(
        tuple(rows), _places(rows), 1 + max(action.micro_batch for row in rows for action in row)
    )
    validate(schedule)
    return schedule


def _places(rows: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    owner: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            if owner.setdefault(action.stage, rank) != rank:
                raise PlanError(
                    f"line {rank + 1}: {action}, but stage {action.stage} has actions on line "
                    f"{owner[action.stage] + 1} too; a stage is on one rank"
                )
    for stage in range(max(owner)):
        if stage not in owner:
            raise PlanError(f"no line has actions of stage {stage}, but there is {max(owner)}")
    return tuple(owner[stage] for stage in range(len(owner)))


def looped(ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """Place stage s on rank s mod ``ranks``."""
    return tuple(range(ranks)) * chunks


def vee(ranks: int) -> tuple[int, ...]:
    """Place two stages per rank, down the ranks and back: the first and the last on rank 0."""
    return (*range(ranks), *reversed(range(ranks)))


def dealt(order: Schedule, mesh: Sequence[Sequence[int]], micro_batches: int) -> Schedule:
    """Deal micro-batches round replicas: number k goes to replica k mod r of a row of r.

    What ``order`` does with one micro-batch is done with a group of as many as all rows can share
    out evenly, so that what can run still can: with equal rows each chain of replicas runs
    ``order`` by itself. Here for ``mesh=[[0, 1], [2]]``, groups of two, and 1f1b:

        rank 0   F0 F2 B0 F4 B2 B4
        rank 1   F1 F3 B1 F5 B3 B5
        rank 2   F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5

    Args:
        order: of ``groups(mesh, micro_batches)`` micro-batches on as many ranks as there are rows.
        mesh: rows of ranks, which are 0 to n - 1, each once.
        micro_batches: to deal.
    """
    size, last = math.lcm(*map(len, mesh)), order.stages - 1
    rows: list[tuple[Action, ...]] = [()] * sum(map(len, mesh))
    for row, ranks in zip(order.rows, mesh, strict=True):
        for replica, rank in enumerate(ranks):
            rows[rank] = tuple(
                Action(action.kind, action.stage, k)
                for block in _blocks(row, last)
                for k in range(block[0].micro_batch * size + replica,
                               min((block[0].micro_batch + 1) * size, micro_batches), len(ranks))
                for action in block
            )  # fmt: skip
    return Schedule(tuple(rows), order.place, micro_batches, order.name, tuple(map(tuple, mesh)))


def _blocks(row: Sequence[Action], last: int) -> Iterator[list[Action]]:
    """Yield what is done to a micro-batch at one go: in the last stage, which waits for none."""
    for _, block in itertools.groupby(enumerate(row), lambda each: (
        each[1][1:] if each[1].stage == last else each[0])):  # fmt: skip
        yield [action for _, action in block]


def groups(mesh: Sequence[Sequence[int]], micro_batches: int) -> int:
    """Return into how many groups :func:`dealt` puts so many micro-batches."""
    return -(-micro_batches // math.lcm(*map(len, mesh)))


def forward_only(place: Sequence[int], micro_batches: int) -> Schedule:
    """Inference: each rank's stages, micro-batch by micro-batch."""
    _positive(ranks=len(place), micro_batches=micro_batches)
    rows = [
        tuple(
            Action("F", stage, k)
            for k in range(micro_batches)
            for stage, owner in enumerate(place)
            if owner == rank
        )
        for rank in range(max(place) + 1)
    ]
    return Schedule(tuple(rows), tuple(place), micro_batches, "forward")


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards; every micro-batch is live at once.

    Bubble (p-1)/(m+p-1) for p ranks, m micro-batches and equal stages.
    """
    _positive(ranks=ranks, micro_batches=micro_batches)
    rows = [
        tuple(Action(kind, rank, k) for kind in "FB" for k in range(micro_batches))
        for rank in range(ranks)
    ]
    return Schedule(tuple(rows), looped(ranks), micro_batches, "gpipe")


def one_f_one_b(ranks: int, micro_batches: int, *, slack: bool = False) -> Schedule:
    """Fill the pipeline, take forward and backward in turns, drain it.

    gpipe's bubble, with at most p-r micro-batches live on rank r. With ``slack`` 2(p-r)-1 are;
    then a hop that takes time c costs 2(p-1)c per step instead of about 2mc.
    """
    _positive(ranks=ranks, micro_batches=micro_batches)
    rows = []
    for rank in range(ranks):
        fill = min(micro_batches, (2 if slack else 1) * (ranks - 1 - rank))
        row = [Action("F", rank, k) for k in range(fill)]
        for k in range(micro_batches):
            if fill + k < micro_batches:
                row.append(Action("F", rank, fill + k))
            row.append(Action("B", rank, k))
        rows.append(tuple(row))
    name = "1f1b-slack" if slack else "1f1b"
    return Schedule(tuple(rows), looped(ranks), micro_batches, name)


def interleaved(
    ranks: int, micro_batches: int, chunks: int = 2, *, split: bool = False
) -> Schedule:
    """Give each rank several thin stages, and take micro-batches in rounds.

    Bubble (p-1)/(vm+p-1) for p ranks and v chunks; with ``split`` (p-1)/(3vm+p-1) if F, I and W
    take the same time, since W fills the gaps. This where rounds are full, which is where m is
    divisible by m // p; other numbers idle as the next that is.
    """
    _positive(ranks=ranks, micro_batches=micro_batches, chunks=chunks)
    full = micro_batches
    while full % max(1, full // ranks):
        full += 1
    rows = tuple(
        # What is left of an order that can run can run.
        tuple(a for a in _interleaved_row(rank, ranks, full, chunks, split)
              if a.micro_batch < micro_batches)
        for rank in range(ranks)
    )  # fmt: skip
    name = "interleaved-zb" if split else "interleaved"
    return Schedule(rows, looped(ranks, chunks), micro_batches, name)


def _interleaved_row(
    rank: int, ranks: int, micro_batches: int, chunks: int, split: bool
) -> tuple[Action, ...]:
    size = micro_batches // max(1, micro_batches // ranks)  # of a round
    total = micro_batches * chunks

    def action(kind: str, k: int) -> Action:
        chunk = k // size % chunks
        if kind != "F":
            chunk = chunks - 1 - chunk
        return Action(kind, chunk * ranks + rank, k // (size * chunks) * size + k % size)

    fill = min(total, (chunks - 1) * size + (1 if split else 2) * (ranks - 1 - rank))
    row = [action("F", k) for k in range(fill)]
    for k in range(total):
        if fill + k < total:
            row.append(action("F", fill + k))
        row.append(action("I" if split else "B", k))
        if split and k >= rank:
            row.append(action("W", k - rank))
    if split:
        row += [action("W", k) for k in range(max(0, total - rank), total)]
    return tuple(row)


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """1f1b with the backward split, so that W fills gaps: bubble (p-1)/(3m+p-1) if F = I = W.

    At most p micro-batches are live on a rank. Gains nothing where I takes longer than W.
    """
    made = interleaved(ranks, micro_batches, 1, split=True)
    return Schedule(made.rows, made.place, micro_batches, "zb1p")


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise PlanError(f"{name}={number}: give at least 1")
