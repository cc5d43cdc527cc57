"""When tasks end that wait for each other, on ranks that may have to share cores.

Where each rank computes for itself, a task ends its own time after the last of what it needs has
arrived. Where ranks of a host are more than its cores can serve, those at work share them in equal
parts, and the others, who wait, take nothing: so a pipeline of four ranks on two cores gets more
of them while it fills than four replicas ever do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.schedule import Action

INFINITY = float("inf")
_NOTHING = 1e-12  # seconds: what rounding leaves of a task


class Need(NamedTuple):
    """The end of a rank's task, by its place in the row, and how long the news travels."""

    rank: int
    place: int
    seconds: float = 0.0


class Task(NamedTuple):
    """What a rank does after all that comes before in its row, once it has what it needs.

    Attributes:
        seconds: at full speed.
        needs: all of them.
        action: of the schedule; None: coding, waiting, updating.
    """

    seconds: float
    needs: tuple[Need, ...] = ()
    action: Action | None = None


class Taken(NamedTuple):
    """When a task ran."""

    start: float
    end: float


def clock(
    rows: Sequence[Sequence[Task]], lanes: float = INFINITY, hosts: Sequence[int] = ()
) -> list[list[Taken]]:
    """Return by rank when each of its tasks runs.

    Args:
        rows: by rank, its tasks in order.
        lanes: how many ranks of a host compute at full speed at the same time.
        hosts: by rank, its host; empty: all are on one.

    Raises:
        PlanError: they wait for each other.
    """
    hosts = hosts or [0] * len(rows)
    crowded = max(map(list(hosts).count, set(hosts)), default=0) > lanes
    return _shared(rows, lanes, hosts) if crowded else _free(rows)


def _free(rows: Sequence[Sequence[Task]]) -> list[list[Taken]]:
    """Run ranks that share nothing, each as far as it can, until all are done."""
    ran: list[list[Taken]] = [[] for _ in rows]
    waiting = set(range(len(rows)))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            row, own = rows[rank], ran[rank]
            while len(own) < len(row):
                start = _arrival(row[len(own)], ran)
                if start == INFINITY:
                    break
                start = max(start, own[-1].end if own else 0.0)
                own.append(Taken(start, start + row[len(own)].seconds))
                moved = True
            if len(own) == len(row):
                waiting.discard(rank)
        if waiting and not moved:
            raise PlanError(f"ranks {sorted(waiting)} wait for each other")
    return ran


def _arrival(task: Task, ran: Sequence[Sequence[Taken]]) -> float:
    """Return when a rank has all that ``task`` needs; infinity: nobody knows yet."""
    latest = 0.0
    for rank, place, seconds in task.needs:
        if place >= len(ran[rank]):
            return INFINITY
        latest = max(latest, ran[rank][place].end + seconds)
    return latest


def _shared(
    rows: Sequence[Sequence[Task]], lanes: float, hosts: Sequence[int]
) -> list[list[Taken]]:
    """Run ranks that share lanes: from event to event, at speeds that hold in between."""
    ran: list[list[Taken]] = [[] for _ in rows]
    left: dict[int, float] = {}  # rank at work -> seconds at full speed
    begun = [0.0] * len(rows)
    now = 0.0
    while True:
        arrivals = _begin(rows, ran, left, begun, now)
        if not left and not arrivals:
            break
        crowd = {host: sum(hosts[rank] == host for rank in left) for host in set(hosts)}
        speed = {rank: min(1.0, lanes / crowd[hosts[rank]]) for rank in left}
        pause = min([*(left[rank] / speed[rank] for rank in left),
                     *(each - now for each in arrivals)])  # fmt: skip
        now += pause
        for rank in list(left):
            left[rank] -= pause * speed[rank]
            if left[rank] <= _NOTHING:
                del left[rank]
                ran[rank].append(Taken(begun[rank], now))
    stuck = [rank for rank, row in enumerate(rows) if len(ran[rank]) < len(row)]
    if stuck:
        raise PlanError(f"ranks {stuck} wait for each other")
    return ran


def _begin(
    rows: Sequence[Sequence[Task]],
    ran: list[list[Taken]],
    left: dict[int, float],
    begun: list[float],
    now: float,
) -> list[float]:
    """Begin what can; tasks that take no time end at once. Return when more can."""
    moved = True
    while moved:
        moved, arrivals = False, []
        for rank, row in enumerate(rows):
            if rank in left or len(ran[rank]) == len(row):
                continue
            task = row[len(ran[rank])]
            arrival = _arrival(task, ran)
            if arrival > now:
                arrivals += [arrival] if arrival < INFINITY else []
            elif task.seconds > _NOTHING:
                left[rank], begun[rank] = task.seconds, now
            else:
                ran[rank].append(Taken(now, now))
                moved = True
    return arrivals
