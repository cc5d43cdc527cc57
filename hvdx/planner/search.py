"""All candidates that a job has, and the quickest of those that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.partition import size_text
from hvdx.pipeline.plan import SCHEDULES
from hvdx.planner.costs import Candidate, Prediction, described, leanest, overfull, predict, priced
from hvdx.planner.facts import Job, Profile

Mesh = tuple[tuple[int, ...], ...]

_SEVERAL = 8  # ranks up to which rows need not be equal
_PIECES = 1, 2, 4, 8, 16  # micro-batches for each replica of the longest row
_MEASURED = 5  # numbers of micro-batches; between them costs follow lines
_MOST_PIECES = 4  # for each rank: more only make matrix products small
_CLOSE = 1.1  # times the quickest step that was measured: who is predicted to take less may win


class Wanted(NamedTuple):
    """What a user leaves to the planner, and what not.

    Attributes:
        micro_batches: None: any number.
        schedules: to choose from.
        checkpoints: to choose from.
        compressions: to choose from, by name.
    """

    micro_batches: int | None = None
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    checkpoints: tuple[str, ...] = ("never",)
    compressions: tuple[str, ...] = ("none",)

    @classmethod
    def told(
        cls, micro_batches: int | None, schedule: str | None, checkpoint: str | None, limited: bool
    ) -> Wanted:
        """Leave open what is None, or ``"auto"``; computing again only saves memory.

        Raises:
            PlanError: there is no such schedule.
        """
        auto = schedule in (None, "auto")
        if not auto and schedule not in SCHEDULES:
            names = ", ".join((*SCHEDULES, "auto"))
            raise PlanError(f"schedule={schedule!r}: use one of {names}; no text")
        several = ("never", "always") if limited else ("never",)
        return cls(
            micro_batches,
            tuple(SCHEDULES) if auto else (str(schedule),),
            several if checkpoint is None else (checkpoint,),
        )


def meshes(ranks: int) -> list[Mesh]:
    """Return the ways to set up ``ranks`` ranks in rows: from one row to one rank in each.

    Replicas are neighbours, since they send each other most. Rows that cannot be equal are as
    equal as they can be, the longer ones first or last.
    """
    found: list[Mesh] = []
    for count in range(1, ranks + 1):
        short, more = divmod(ranks, count)
        if more and ranks > _SEVERAL:
            continue
        lengths = [short + 1] * more + [short] * (count - more)
        found += [_rows(each) for each in dict.fromkeys((tuple(lengths), tuple(lengths[::-1])))]
    return found


def _rows(lengths: Sequence[int]) -> Mesh:
    numbers = itertools.count()
    return tuple(tuple(itertools.islice(numbers, length)) for length in lengths)


def counts(mesh: Mesh, rows: int) -> list[int]:
    """Return numbers of micro-batches that replicas can share out evenly.

    Micro-batches have two rows at least, of which batch normalization can take a variance, unless
    the batch is too small for that.
    """
    even = math.lcm(*map(len, mesh))
    most = min(_MOST_PIECES * sum(map(len, mesh)), rows // 2)
    return [even * pieces for pieces in _PIECES if even * pieces <= most] or [even] * (even <= rows)


ANY = Wanted()


def candidates(ranks: int, rows: int, wanted: Wanted = ANY) -> Iterator[Candidate]:
    """Yield all candidates for a batch of ``rows`` rows.

    A mesh of one row has no use for schedules, one without replicas none for compression; and
    fewer micro-batches than stages leave ranks without work.
    """
    for mesh in meshes(ranks):
        staged, shared = len(mesh) > 1, any(len(row) > 1 for row in mesh)
        schedules = wanted.schedules if staged else _simplest(wanted.schedules)
        told = [wanted.micro_batches] if wanted.micro_batches else counts(mesh, rows)
        numbers = [each for each in told if not staged or each >= len(mesh)] or told[-1:]
        compressions = wanted.compressions if shared else ("none",)
        if "none" not in wanted.compressions:  # the user's word: also for rows of one rank
            compressions = wanted.compressions
        for count, schedule, checkpoint, compression in itertools.product(
            numbers, schedules, wanted.checkpoints, compressions
        ):
            yield Candidate(mesh, count, schedule, checkpoint, compression)


def _simplest(schedules: Sequence[str]) -> Sequence[str]:
    """Return the schedule to take where there is but one stage."""
    return ("1f1b",) if "1f1b" in schedules else schedules[:1]


def to_measure(found: Iterable[Candidate], rows: int) -> list[int]:
    """Return the numbers of micro-batches to measure, the most first: five will do."""
    pieces = {-(-rows // each.micro_batches): each.micro_batches for each in found}
    numbers = [pieces[size] for size in sorted(pieces)]
    if len(numbers) <= _MEASURED:
        return numbers
    return [numbers[round(k * (len(numbers) - 1) / (_MEASURED - 1))] for k in range(_MEASURED)]


def ranked(found: Iterable[Candidate], profile: Profile, job: Job) -> list[Prediction]:
    """Return what can be done, the quickest first; of equals the first candidate.

    Raises:
        PlanError: nothing can; where memory is short, the message says how much would do.
    """
    every, made, problems = list(found), [], []
    for candidate in every:
        try:
            made.append(predict(candidate, profile, job))
        except PlanError as error:
            problems.append(error)
    if made:
        return sorted(made, key=lambda each: each.step)
    if job.memory:
        raise PlanError(_shortage(every, profile, job))
    raise problems[0] if problems else PlanError("there is no candidate: give a larger batch")


def corrected(found: Iterable[Prediction], profile: Profile, job: Job) -> list[Prediction]:
    """Predict the same plans again, as ``job`` has come to be known, the quickest first."""
    again = [
        priced(each.candidate, each.plan, profile.at(each.candidate.micro_batches), profile, job)
        for each in found
    ]
    return sorted(again, key=lambda each: each.step)


def _shortage(every: Iterable[Candidate], profile: Profile, job: Job) -> str:
    """Say which candidate needs least, and what it needs."""
    lean = []
    for candidate in every:
        try:
            lean.append(leanest(candidate, profile, job))
        except PlanError:
            continue  # more stages than units, say
    if not lean:
        return "no plan can be made, whatever the memory: the model has too few units"
    best = min(lean, key=lambda each: overfull(each.plan.memory, job))
    have = {size_text(each) for each in job.memory}
    need = max(best.plan.memory)
    told = size_text(need) if len(have) == 1 else "by rank " + ", ".join(
        size_text(each) for each in best.plan.memory)  # fmt: skip
    return (
        f"no plan fits into memory={', '.join(sorted(have))} a rank. The smallest that does fit "
        f"is {told}, for {described(best.candidate)}: give that, or use more ranks, or smaller "
        "batches"
    )


def best_of(found: Sequence[Prediction]) -> list[Prediction]:
    """Return the quickest of each mesh, the quickest first."""
    best: dict[Mesh, Prediction] = {}
    for each in found:
        best.setdefault(each.candidate.mesh, each)
    return list(best.values())


def to_try(found: Sequence[Prediction], measured: Mapping[Candidate, float]) -> list[Prediction]:
    """Return what to try next, if anything: what may be quicker than the quickest so far.

    The quickest that was not tried, and the quickest on a mesh, or with a number of micro-batches,
    that was not tried there: errors of likes are alike, so that others teach more.

    Args:
        found: all predictions, the quickest first.
        measured: seconds of a step, of those that were tried.
    """
    enough = _CLOSE * min(measured.values(), default=math.inf)
    fresh = [each for each in found if each.candidate not in measured and each.step < enough]
    known = {each[:2] for each in measured} | {each.candidate[:2] for each in fresh[:1]}
    return [*fresh[:1], *[each for each in fresh if each.candidate[:2] not in known][:1]]
