"""What real steps teach about predicted ones.

Units are measured alone, so that their sum lacks what the engine, the loss, cold caches and the
machine's other ranks cost. A few steps of a few plans show it, in two ways:

    actions    how long each stage's forward and backward took: factors, and what is added to each
    steps      how long all of it took: how fast ranks that share cores are together, what sums of
               gradients and a step's beginning and end cost, and the pace of all

First actions are explained, by least squares of relative errors, then, from there, steps, by those
of their logarithms. Both are held near what is known before, so that two noisy steps cannot lead
far astray.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hvdx.planner.clock import clock
from hvdx.planner.costs import Prediction, tasks_of
from hvdx.planner.facts import Job, Profile, Trim

if TYPE_CHECKING:
    import numpy as np

_NOISE = 0.03  # of a measured action
_FACTOR = 0.3  # by which factors may differ from 1 before that counts as much as noise does
_REMAINDER = 0.1  # share of a typical action that remainders may be
_TURNS = 4  # of explaining actions, since how far ranks slow each other down depends on it
_AGAIN = 2  # of all, since it depends on what steps show, too

_STEP_NOISE = 0.05
#: Knobs that steps turn, and how far, before that counts as much as noise does. The first three are
#: logarithms of factors; the others are shares of a typical action and step.
_SURE = {"pace": 0.2, "lanes": 0.4, "sums": 0.5, "action": 0.1, "step": 0.05}
_NUDGE = {"pace": 0.02, "lanes": -0.02, "sums": 0.02, "action": 0.02, "step": 0.01}
_MOST = 1.5  # that a knob is turned
_ROUNDS = 4  # of linearizing
_ENOUGH = 0.98  # of the sum of squares: less is not worth another round


class Trial(NamedTuple):
    """What a few steps of a plan took.

    Attributes:
        prediction: for which the plan was made.
        steps: seconds of each.
        actions: (kind, stage) -> median seconds.
    """

    prediction: Prediction
    steps: Sequence[float]
    actions: Mapping[tuple[str, int], float]

    @property
    def seconds(self) -> float:
        """Return those of a step, the median."""
        return statistics.median(self.steps)


class _Point(NamedTuple):
    """A kind of action of a stage: what it took, and what the trim can make of it."""

    measured: float
    forward: float  # predicted seconds of it, without the loss
    backward: float
    loss: float  # rows whose loss it computes
    back_loss: float


def calibrated(trials: Sequence[Trial], profile: Profile, job: Job) -> Job:
    """Return the job with the trim and the lanes that explain the trials best."""
    if not trials:
        return job
    found = job._replace(lanes=min(job.lanes, _crowd(job)), trim=Trim())
    for _ in range(_AGAIN):
        for _ in range(_TURNS):
            points = [point for trial in trials for point in _points(trial, profile, found)]
            if points:
                told = found.trim
                found = found._replace(
                    trim=_fitted(points)._replace(sums=told.sums, step=told.step)
                )
        found = _stepped(trials, profile, found)
    return found


def _crowd(job: Job) -> int:
    """Return how many ranks the fullest host has; as many lanes are enough."""
    hosts = job.hosts or (0,) * job.ranks
    return max(map(hosts.count, hosts))


def _stepped(trials: Sequence[Trial], profile: Profile, job: Job) -> Job:
    """Turn the knobs until predicted steps are closest to measured ones, by Gauss and Newton."""
    import numpy as np

    action = statistics.median(seconds for trial in trials for seconds in trial.actions.values())
    step = statistics.median(trial.seconds for trial in trials)
    sure, nudge = (np.array(list(each.values())) for each in (_SURE, _NUDGE))

    def turned(knobs: Any) -> Job:
        trim, crowd = job.trim, _crowd(job)
        pace, lanes, sums = (math.exp(each) for each in knobs[:3])
        more, most = map(float, knobs[3:])
        return job._replace(
            lanes=min(job.lanes * lanes, crowd),
            trim=Trim(
                trim.forward * pace, trim.backward * pace, max(0.0, trim.action + more * action),
                trim.loss * pace, trim.back_loss * pace, trim.sums * sums,
                max(0.0, trim.step + most * step),
            ),
        )  # fmt: skip

    def errors(knobs: Any) -> np.ndarray:
        """Return what noise would have to be, and knobs, in units of what is to be expected."""
        own = turned(knobs)
        ratios = [_step(trial, profile, own) / trial.seconds for trial in trials]
        return np.concatenate([np.log(ratios) / _STEP_NOISE, knobs / sure])

    knobs = np.zeros(len(_SURE))
    now = errors(knobs)
    for _ in range(_ROUNDS):
        slopes = [(errors(knobs + each) - now) / each.sum() for each in np.diag(nudge)]
        way = np.linalg.lstsq(np.array(slopes).T, -now, rcond=None)[0]
        tries = [np.clip(knobs + part * way, -_MOST, _MOST) for part in (1.0, 0.3)]
        then, better = min(((errors(each), each) for each in tries), key=lambda x: x[0] @ x[0])
        if then @ then > _ENOUGH * (now @ now):
            break
        knobs, now = better, then
    return turned(knobs)


def _step(trial: Trial, profile: Profile, job: Job) -> float:
    rows = tasks_of(trial.prediction, profile, job)
    return max(taken[-1].end for taken in clock(rows, job.lanes, job.hosts))


def _points(trial: Trial, profile: Profile, job: Job) -> list[_Point]:
    """Return what can be learnt of each stage's forward and whole backward.

    Ranks that share cores slow each other down, as ``job`` predicts: that is taken out.
    """
    candidate, plan, times = trial.prediction[:3]
    order = plan.order(times)
    plain = tasks_of(trial.prediction, profile, job._replace(trim=Trim()))
    rows = tasks_of(trial.prediction, profile, job)
    ran = clock(rows, job.lanes, job.hosts)
    slowed: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for actions, known, tasks, taken in zip(order.rows, plain, rows, ran, strict=True):
        places = [place for place, task in enumerate(tasks) if task.action is not None]
        for action, place in zip(actions, places, strict=True):
            span = taken[place].end - taken[place].start
            alone = known[place].seconds, tasks[place].seconds
            slowed.setdefault(action[:2], []).append((*alone, span))
    size, points = -(-profile.rows // candidate.micro_batches), []
    for (kind, stage), seconds in trial.actions.items():
        several = slowed[kind, stage]
        own = statistics.median(each[0] for each in several)
        factor = (
            statistics.median(span / alone for _, alone, span in several if alone)
            if any(each[1] for each in several)
            else 1.0
        )
        measured = seconds / factor
        loss = float(size) if stage == order.stages - 1 else 0.0
        if kind == "F":
            points.append(_Point(measured, own, 0.0, loss, 0.0))
        elif kind == "B":
            points.append(_Point(measured, 0.0, own, 0.0, loss))
    return points


def _fitted(points: Sequence[_Point]) -> Trim:
    """Solve for the factors, what each action takes more, and the loss; none is negative."""
    import numpy as np

    typical = statistics.median(point.measured for point in points)
    rows = max(max(point.loss, point.back_loss) for point in points) or 1.0
    prior = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    sure = np.array([_FACTOR, _FACTOR, _REMAINDER * typical, typical / rows, typical / rows])
    left = [[p.forward, p.backward, 1.0, p.loss, p.back_loss] for p in points]
    weights = np.array([1.0 / (_NOISE * max(p.measured, 1e-9)) for p in points])
    matrix = np.vstack([np.array(left) * weights[:, None], np.diag(1.0 / sure)])
    wanted = np.concatenate([[p.measured for p in points] * weights, prior / sure])
    free = list(range(5))
    while True:
        found = np.zeros(5)
        found[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
        negative = [place for place in free if found[place] < 0.0]
        if not negative:
            break
        free = [place for place in free if place not in negative]
    forward, backward, action, loss, back_loss = map(float, found)
    return Trim(forward, backward, action, loss, back_loss)
