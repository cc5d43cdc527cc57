"""Leave in good order when a scheduler takes machines away: SIGTERM, agree, save, exit.

A scheduler sends SIGTERM to some processes of a job or to all, at slightly different moments, and
SIGKILL a little later. Ranks that act on it each for themselves stop at different steps: the others
wait for them, and no checkpoint is whole. So the signal is only noted, and between steps the ranks
ask each other whether anybody has noted one.

To ask takes a collective, about as long as a small allreduce. So they ask not after each step, but
after so many that a second passes; rank 0 measures how many, and tells all in that collective.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from hvdx import watchdog, world
from hvdx.errors import HvdxError

STATUS = 128 + signal.SIGTERM
DEFAULT_SECONDS = 30.0  # as Kubernetes and Slurm give by default
_ASK_SECONDS = 1.0
_MOST_STEPS = 10_000


class Preemption:
    """Watches for SIGTERM, and ends all ranks of the job after the same step.

    Make one when training begins, in the main thread, on every rank; it stands until
    :meth:`close`, or the end of a ``with`` block. Until SIGTERM comes, a step costs less than a
    microsecond, and a second one small collective.

    ``hvdx run`` passes SIGTERM on to all ranks. ``HVDX_GRACE`` seconds later, 30 by default, it
    kills what still runs.

    Args:
        save: writes the checkpoint; called on every rank, between steps.

    Raises:
        HvdxError: made in another thread than the main one; ``HVDX_GRACE`` is no number.

    Example:
        >>> preemption = hvd.Preemption(lambda: save(model, optimizer))
        >>> for batch in batches:
        ...     train(batch)
        ...     preemption.check()
    """

    def __init__(self, save: Callable[[], Any] | None = None) -> None:
        self._save = save
        self._seconds = grace_seconds()
        self._noted = self._agreed = False
        self._left = 1  # calls of asked() until ranks ask each other
        self._between = 0  # the last time it was so many
        self._since = time.monotonic()
        if threading.current_thread() is not threading.main_thread():
            raise HvdxError("hvd.Preemption() must be made in the main thread, as Python demands")
        self._before = signal.signal(signal.SIGTERM, self._note)

    def asked(self) -> bool:
        """Tell whether any rank was sent SIGTERM; call it after each step, on every rank.

        The answer is the same on all ranks, and stays True.
        """
        if self._agreed:
            return True
        self._left -= 1
        if self._left <= 0:
            self._agree()
        return self._agreed

    def check(self) -> None:
        """Call it after each step, on every rank: once :meth:`asked`, save and leave.

        Raises:
            SystemExit: with status 143, once all ranks have saved.
        """
        if self.asked():
            self.leave()

    def leave(self) -> None:
        """Save, wait until all ranks have, and leave.

        Raises:
            SystemExit: with status 143.
        """
        with watchdog.patience(self._seconds):
            if self._save is not None:
                self._save()
            if _several():
                from hvdx.collectives import barrier

                barrier()  # the launcher ends the job when the first has left
        raise SystemExit(STATUS)

    def close(self) -> None:
        """Have SIGTERM end the process again, or whatever it did before."""
        with contextlib.suppress(ValueError):  # in another thread, at the end of the process
            signal.signal(signal.SIGTERM, self._before)

    def __enter__(self) -> Preemption:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def _agree(self) -> None:
        """Ask all ranks, and say when to ask again: in twice as many steps, or in a second."""
        now = time.monotonic()
        pace = self._between / max(now - self._since, 1e-6)
        wanted = int(min(max(1, pace * _ASK_SECONDS), 2 * self._between + 1, _MOST_STEPS))
        answers = _gathered(wanted << 1 | self._noted)
        noted = [rank for rank, answer in enumerate(answers) if answer & 1]
        self._agreed = bool(noted)
        self._left = self._between = answers[0] >> 1
        self._since = time.monotonic()
        if noted and (not world.is_initialized() or world.rank() == 0):
            told = ", ".join(map(str, noted))
            print(f"hvdx: SIGTERM came to rank {told}: the job leaves", file=sys.stderr, flush=True)


def _gathered(number: int) -> list[int]:
    """Return every rank's ``number``; a collective call."""
    if not _several():
        return [number]
    import numpy as np

    core = world.core()
    own = core.from_numpy(np.array([number], np.int32))
    # Always under the same name, which Horovod then knows already.
    everyone = core.allgather(own, name="hvdx.preemption", process_set=None)
    return [int(each) for each in core.to_numpy(everyone)]


def _several() -> bool:
    return world.is_initialized() and world.size() > 1


def grace_seconds() -> float:
    """Return ``HVDX_GRACE``: the seconds from SIGTERM to SIGKILL.

    Raises:
        HvdxError: it is no number of seconds.
    """
    return watchdog.seconds_of("HVDX_GRACE", DEFAULT_SECONDS, "30")
