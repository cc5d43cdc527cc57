"""What real steps teach about predicted ones.

Units are measured alone, so that their sum lacks what the engine, the loss, cold caches and the
machine's other ranks cost. A few steps of a few plans show it: how long each stage's actions
took, and the whole step. The factors and the remainders that explain them best, in the sense of
least squares of relative errors, correct all other predictions. They are held near 1 and 0, so that
two noisy steps cannot lead far astray.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hvdx.planner.clock import clock
from hvdx.planner.costs import Prediction, tasks_of
from hvdx.planner.facts import Job, Profile, Trim

_NOISE = 0.03  # of a measured action
_FACTOR = 0.3  # by which factors may differ from 1 before that counts as much as noise does
_REMAINDER = 0.1  # share of a typical action that remainders may be


class Trial(NamedTuple):
    """What a few steps of a plan took.

    Attributes:
        prediction: under no trim.
        seconds: of a step, the median.
        actions: (kind, stage) -> median seconds.
    """

    prediction: Prediction
    seconds: float
    actions: Mapping[tuple[str, int], float]


class _Point(NamedTuple):
    """A kind of action of a stage: what it took, and what the trim can make of it."""

    measured: float
    forward: float  # predicted seconds of it, without the loss
    backward: float
    loss: float  # rows whose loss it computes
    back_loss: float


def trimmed(trials: Sequence[Trial], profile: Profile, job: Job) -> Trim:
    """Return what explains the trials best."""
    plain = job._replace(trim=Trim())
    points = [point for trial in trials for point in _points(trial, profile, plain)]
    found = _fitted(points) if points else Trim()
    late = [trial.seconds - _step(trial, profile, job._replace(trim=found)) for trial in trials]
    return found._replace(step=max(0.0, statistics.median(late))) if late else found


def _step(trial: Trial, profile: Profile, job: Job) -> float:
    rows = tasks_of(trial.prediction, profile, job)
    return max(taken[-1].end for taken in clock(rows, job.lanes, job.hosts))


def _points(trial: Trial, profile: Profile, job: Job) -> list[_Point]:
    """Return what can be learnt of each stage's forward and whole backward.

    Ranks that share cores are slowed down by each other, as predicted: that is taken out.
    """
    candidate, plan, times = trial.prediction[:3]
    order = plan.order(times)
    rows = tasks_of(trial.prediction, profile, job)
    ran = clock(rows, job.lanes, job.hosts)
    slowed: dict[tuple[str, int], list[float]] = {}
    for actions, tasks, taken in zip(order.rows, rows, ran, strict=True):
        places = [place for place, task in enumerate(tasks) if task.action is not None]
        for action, place in zip(actions, places, strict=True):
            if tasks[place].seconds:
                span = taken[place].end - taken[place].start
                slowed.setdefault(action[:2], []).append(span / tasks[place].seconds)
    size, points = -(-profile.rows // candidate.micro_batches), []
    for (kind, stage), seconds in trial.actions.items():
        factor = statistics.median(slowed.get((kind, stage), [1.0]))
        loss = float(size) if stage == order.stages - 1 else 0.0
        if kind == "F":
            points.append(_Point(seconds / factor, times.forward[stage], 0.0, loss, 0.0))
        elif kind == "B":
            back = times.inputs[stage] + times.weights[stage]
            points.append(_Point(seconds / factor, 0.0, back, 0.0, loss))
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
