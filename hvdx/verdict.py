"""Judge from what the ranks report whether a collective can still finish, and say why not.

No threads, no clocks, no sockets: times are given, so that every case can be tested in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

LEFT_SECONDS = 3.0  # how long to wait for a rank that has left: Horovod itself mostly says so
SLOW = 10  # times the timeout: how long a collective that all ranks have called may take
_LINES = 16  # of a message, at most, about ranks


class Wait(NamedTuple):
    """A collective that has not finished, as one rank sees it."""

    operation: str
    name: str | None
    what: str  # dtype and shape
    seconds: float
    ranks: list[int] | None  # of the process set; None: all
    at: str  # file, line and source of the call; "" unless rank 0 is curious

    @property
    def key(self) -> tuple[Any, ...]:
        """What must agree between ranks that mean the same collective."""
        return self.name or self.operation, tuple(self.ranks or ())

    def __str__(self) -> str:
        called = f" {self.name!r}" if self.name else ""
        among = f" in the process set {self.ranks}" if self.ranks else ""
        return f"{self.operation}{called}{self.what and f' ({self.what})'}{among}"


class Report(NamedTuple):
    """What a rank says about itself, about once a second."""

    waits: list[Wait]
    at: str  # where its main thread is; "" unless rank 0 is curious
    last: str  # its last collective, "" before the first
    patience: float  # seconds for which it has asked the others to wait
    progress: str  # changes whenever the rank gets anywhere


def to_plain(report: Report) -> list[Any]:
    """Return lists, numbers and strings, for JSON."""
    return [[list(wait) for wait in report.waits], *report[1:]]


def from_plain(plain: Any) -> Report:
    """Return the report that :func:`to_plain` took apart; ValueError if it is none."""
    try:
        waits, at, last, patience, progress = plain
        rebuilt = [
            Wait(str(op), name and str(name), str(what), float(s), ranks and [*map(int, ranks)],
                 str(where))
            for op, name, what, s, ranks, where in waits
        ]  # fmt: skip
        return Report(rebuilt, str(at), str(last), float(patience), str(progress))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"no report: {error}") from None


class Picture:
    """All that is known about a job's ranks.

    Args:
        size: number of ranks.
        timeout: seconds after which a rank that waits for a missing one has waited too long.
        now: the time, in seconds.
    """

    def __init__(self, size: int, timeout: float, now: float) -> None:
        self._size = size
        self._timeout = timeout
        self._reports: dict[int, Report] = {}
        self._heard = dict.fromkeys(range(size), now)
        self._left: dict[int, tuple[str, float]] = {}
        self._calm = self._moved = now
        self._warned: set[tuple[Any, ...]] = set()

    def hear(self, rank: int, report: Report, now: float) -> None:
        """Take note of what ``rank`` reports."""
        before = self._reports.get(rank)
        joined = any(wait.operation == "join" for wait in report.waits)
        if before is None or (_moved(before, report) and not joined):
            self._moved = now
        if report.patience > 0:
            self._calm = now
        self._reports[rank] = report
        self._heard[rank] = now

    def lose(self, rank: int, reason: str, now: float, *, certain: bool = True) -> None:
        """Take note that ``rank`` has left the job; as far as one can tell, if not ``certain``."""
        self._left.setdefault(rank, (reason, now if certain else float("inf")))
        self._reports.pop(rank, None)

    def patience(self) -> float:
        """Return the longest time for which any rank has asked."""
        return max((report.patience for report in self._reports.values()), default=0.0)

    def curious(self, now: float) -> bool:
        """Tell whether to have the ranks say where they are: something waits unusually long."""
        limit = self._timeout / 4
        return any(
            seconds > (min(limit, LEFT_SECONDS / 4) if self._left else limit)
            for _, seconds in self._oldest(now)
        )

    def stalled(self, now: float) -> str | None:
        """Return what to tell all ranks if a collective has waited too long, else None."""
        for wait, seconds in self._oldest(now):
            if seconds <= min(LEFT_SECONDS, self._timeout):
                break
            missing = self._missing(wait, now)
            limit = self._timeout if missing else SLOW * self._timeout
            since = min((self._left[r][1] for r in missing if r in self._left), default=now)
            if now - since > LEFT_SECONDS:
                limit = min(limit, LEFT_SECONDS)
            if seconds > limit:
                return self._told(wait, seconds, missing, now)
        return None

    def slow(self, now: float) -> str | None:
        """Return a warning when half of the time is over, once for each collective."""
        slow = [wait for wait, seconds in self._oldest(now) if seconds > self._timeout / 2]
        for wait in slow:
            missing = self._missing(wait, now)
            if missing and wait.key not in self._warned:
                self._warned |= {w.key for report in self._reports.values() for w in report.waits}
                seconds = wait.seconds
                return (
                    f"{_spell(self._waiting(wait, now))} waits {seconds:.0f} s already for "
                    f"{wait}; missing: {_spell(missing)}. The job is stopped after "
                    f"{self._timeout:g} s (HVDX_TIMEOUT).\n" + self._lines(now)
                )
        return None

    def _oldest(self, now: float) -> list[tuple[Wait, float]]:
        """List what ranks wait for and for how long that counts, the longest first.

        Time within somebody's ``patience`` does not count; nor, for a rank that has joined,
        time in which the others got on.
        """
        since = {True: max(self._calm, self._moved), False: self._calm}
        waits = [
            (wait, min(wait.seconds, now - since[wait.operation == "join"]))
            for rank, report in self._reports.items()
            if not self._silent(rank, now)
            for wait in report.waits
        ]
        return sorted(waits, key=lambda entry: -entry[1])

    def silent(self, now: float) -> list[int]:
        """List the ranks that have not been heard of for a while."""
        return [rank for rank in range(self._size) if self._silent(rank, now)]

    def _silent(self, rank: int, now: float) -> bool:
        return now - self._heard[rank] > max(self._timeout / 2, 2.0)

    def _waiting(self, wait: Wait, now: float) -> list[int]:
        return [
            rank
            for rank, report in sorted(self._reports.items())
            if any(other.key == wait.key for other in report.waits) and not self._silent(rank, now)
        ]

    def _missing(self, wait: Wait, now: float) -> list[int]:
        """List the ranks of the set that have not called it. One that has joined takes part."""
        called = set(self._waiting(wait, now))
        for rank, report in self._reports.items():
            if any(other.operation == "join" for other in report.waits):
                called.add(rank)
        return [rank for rank in wait.ranks or range(self._size) if rank not in called]

    def _told(self, wait: Wait, seconds: float, missing: list[int], now: float) -> str:
        gone = [rank for rank in missing if rank in self._left]
        silent = [rank for rank in missing if self._silent(rank, now)]
        elsewhere = [
            rank
            for rank in missing
            if rank not in silent and rank in self._reports and self._reports[rank].waits
        ]
        here = _spell(self._waiting(wait, now))
        remedy = ""
        if gone:
            why = f"{_spell(gone)} {_have(gone)} left the job"
        elif silent:
            why = f"{_spell(silent)} {_have(silent)} not been heard of"
        elif elsewhere:
            why = f"{_spell(elsewhere)} {_are(elsewhere)} waiting for another collective"
            remedy = (
                "Every rank must call the same collectives, in the same order and under the same "
                "names; look for a call that only some ranks make, such as one under `if rank() "
                "== 0`, or for data that give ranks different numbers of batches (hvd.join())."
            )
        elif missing:
            why = f"{_spell(missing)} {_have(missing)} not called it"
            remedy = (
                f"If {_spell(missing)} only needs longer, say so: `with hvd.patience(seconds):` "
                "around the long part, or HVDX_TIMEOUT=<seconds> for the whole job (0: never stop)."
            )
        else:
            why = "all ranks have called it, but it does not finish: is the network down?"
            remedy = "If it is only slow, give it more time: HVDX_TIMEOUT=<seconds> (0: for ever)."
        head = f"{here} waited {seconds:.0f} s for {wait}, but {why}."
        return "\n".join(filter(None, [head, self._lines(now), remedy]))

    def _lines(self, now: float) -> str:
        """Say about every rank what it does; equal ranks share a line."""
        groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for rank in range(self._size):
            doing, seconds, where = self._state(rank, now)
            groups.setdefault((doing, where), []).append((rank, seconds))
        lines = []
        for (doing, where), members in groups.items():
            longest = max(seconds for _, seconds in members)
            lasting = f" for {longest:.0f} s" if longest else ""
            lines.append(f"  {_spell(rank for rank, _ in members)}: {doing}{lasting}{where}")
        if len(lines) > _LINES:
            lines[_LINES:] = [f"  and {len(lines) - _LINES} more"]
        return "\n".join(lines)

    def _state(self, rank: int, now: float) -> tuple[str, float, str]:
        """Return what a rank does, for how many seconds, and where."""
        if rank in self._left:
            return self._left[rank][0], 0.0, ""
        if self._silent(rank, now):
            why = "; its process is stopped, out of reach, or in code that keeps Python's lock"
            return "not heard of", now - self._heard[rank], why
        report = self._reports.get(rank)
        if report is None:
            return "starting", 0.0, ""
        if report.waits:
            wait = max(report.waits, key=lambda each: each.seconds)
            more = f" and {len(report.waits) - 1} more" if report.waits[1:] else ""
            at = f", called at {wait.at}" if wait.at else ""
            return f"waiting for {wait}{more}", max(wait.seconds, 1.0), at
        last = f" (its last: {report.last})" if report.last else ""
        return f"in no collective{last}", 0.0, f"; it is at {report.at or 'an unknown place'}"


def _moved(before: Report, now: Report) -> bool:
    """Tell whether a rank has got anywhere between two reports."""
    walked = bool(before.at and now.at) and before.at != now.at
    return walked or before.progress != now.progress


def _spell(ranks: Iterable[int]) -> str:
    """Name ranks: ``rank 3``, ``ranks 0, 2-5``."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    told = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {told}" if len(ordered) == 1 else f"ranks {told}"


def _are(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _have(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
