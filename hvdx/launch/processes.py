"""Start the ranks, pass on what they print, end all when one fails."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, NamedTuple, TextIO

from hvdx.launch.shell import GRACE_SECONDS

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: How a rank ends whose lifeline was cut, here and, by the shell's and ssh's codes, elsewhere.
_ENDED_BY_US = (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGKILL, 255)

_WRITING = threading.Lock()  # text streams mix and lose lines that threads write at once


class Start(NamedTuple):
    """How to start one rank: a shell that reads ``script`` and obeys its lifeline."""

    rank: int
    host: str
    shell: Sequence[str]  # ["sh", "-s"], or ssh with it
    script: str
    environ: Mapping[str, str] | None  # None: the launcher's own


class Failure(NamedTuple):
    """How a rank ended that did not end well."""

    rank: int
    host: str
    code: int  # exit code, or minus the signal

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.host}"
        number = -self.code if self.code < 0 else self.code - 128
        with contextlib.suppress(ValueError):
            name = signal.Signals(number).name
            if self.preempted:
                return f"{where} has left after SIGTERM"
            if self.code < 0:
                return f"{where} was killed by signal {number} ({name})"
            return f"{where} exited with code {self.code} (128 + {number}: {name})"
        known = {127: " (command not found)", 255: " (ssh's own, if the connection broke)"}
        return f"{where} exited with code {self.code}{known.get(self.code, '')}"

    @property
    def preempted(self) -> bool:
        """Whether it was sent SIGTERM and left in good order, as :class:`hvdx.Preemption` does."""
        return self.code == 128 + signal.SIGTERM

    @property
    def status(self) -> int:
        """The exit status that says the same to a shell."""
        return 128 - self.code if self.code < 0 else self.code


class Ended(NamedTuple):
    """How the job ended."""

    failures: list[Failure]  # those that failed by themselves, the first first
    finished: list[int]  # ranks that had ended well before
    signal: int | None  # what ended the launcher
    gave_up: bool = False  # an elastic launcher, which has said why


class Rank:
    """One rank's process and the threads that serve it."""

    def __init__(self, start: Start, events: SimpleQueue[tuple[str, int, int]]) -> None:
        self.start = start
        self.process = subprocess.Popen(
            start.shell,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=start.environ,
            start_new_session=True,
        )
        self._events = events
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._feeder.start()

    def _feed(self) -> None:
        """Send the script; in a thread, because a host that hangs must not hold up the others."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # ended already: its exit code says so
            self.process.stdin.write(self.start.script.encode(errors="surrogateescape"))
            self.process.stdin.flush()

    def watch(self) -> None:
        """Report the exit when it comes."""

        def wait() -> None:
            self._events.put(("exit", self.start.rank, self.process.wait()))

        threading.Thread(target=wait, daemon=True).start()

    def end(self, grace: float = GRACE_SECONDS) -> None:
        """Cut the lifeline: the watcher beside the rank ends its process group.

        Args:
            grace: seconds from SIGTERM to SIGKILL.
        """
        assert self.process.stdin is not None
        if self._feeder.is_alive():
            self.process.terminate()
            return
        with contextlib.suppress(OSError, ValueError):  # gone, or cut already
            self.process.stdin.write(b"%d" % (10 * grace))
            self.process.stdin.close()

    def kill(self) -> None:
        """End what still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Crew:
    """Ranks that run: passes on what they print, and tells how they end. A context manager.

    Args:
        folder: also write each rank's output to ``folder/rank.<rank>/stdout`` and ``stderr``.
        digits: of a rank's number in the folder's name.
        timestamps: put the time before each line's prefix.

    Attributes:
        events: ``("exit", rank, code)``, and ``("signal", -1, number)`` for the launcher.
    """

    def __init__(
        self, *, folder: str | None = None, digits: int = 1, timestamps: bool = False
    ) -> None:
        self.events: SimpleQueue[tuple[str, int, int]] = SimpleQueue()
        self._folder = folder
        self._digits = digits
        self._timestamps = timestamps
        self._outputs: list[threading.Thread] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Crew:
        self._open.enter_context(_signals_to(self.events))
        return self

    def __exit__(self, *error: object) -> None:
        until = time.monotonic() + GRACE_SECONDS
        for output in self._outputs:  # what a rank left running may hold a pipe, but not for ever
            output.join(max(0.0, until - time.monotonic()))
        self._open.close()

    def start(self, start: Start) -> Rank:
        """Start one rank."""
        rank = Rank(start, self.events)
        for name, source, console in (
            ("stdout", rank.process.stdout, sys.stdout),
            ("stderr", rank.process.stderr, sys.stderr),
        ):
            assert source is not None
            sinks = [console]
            if self._folder:
                path = Path(self._folder, f"rank.{start.rank:0{self._digits}}", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                sinks.append(self._open.enter_context(path.open("w")))
            prefix = f"[{start.rank}]<{name}>:"
            arguments = (source, sinks, prefix, self._timestamps, self.events)
            output = threading.Thread(target=_forward, args=arguments, daemon=True)
            output.start()
            self._outputs = [each for each in self._outputs if each.is_alive()] + [output]
        rank.watch()
        return rank


def run_ranks(
    starts: Sequence[Start],
    *,
    folder: str | None = None,
    timestamps: bool = False,
    grace: float = GRACE_SECONDS,
) -> Ended:
    """Run all ranks to their end; when one fails or a signal comes, end the others.

    Args:
        starts: one per rank.
        folder: also write each rank's output to ``folder/rank.<rank>/stdout`` and ``stderr``.
        timestamps: put the time before each line's prefix.
        grace: seconds that ranks have to leave in good order after SIGTERM came to the launcher,
            or to one of them; those that end for another reason have less.
    """
    alive: dict[int, Rank] = {}
    with Crew(folder=folder, digits=len(str(len(starts) - 1)), timestamps=timestamps) as crew:
        for start in starts:
            alive[start.rank] = crew.start(start)
        return _see_through(alive, crew.events, grace)


def _see_through(
    alive: dict[int, Rank], events: SimpleQueue[tuple[str, int, int]], grace: float
) -> Ended:
    """Wait until no rank is alive; at the first failure or signal, end them."""
    failures: list[Failure] = []
    finished: list[int] = []
    caught: int | None = None
    until: float | None = None  # when to kill what still runs
    while alive:
        patience = None if until is None else max(0.0, until - time.monotonic())
        try:
            kind, who, code = events.get(timeout=patience)
        except Empty:
            for rank in alive.values():
                rank.kill()
            until = time.monotonic() + GRACE_SECONDS
            continue
        if kind == "exit":
            ended = alive.pop(who)
            ended.end()  # also ends what the rank left running
            if code != 0 and not (until is not None and code in _ENDED_BY_US):
                failures.append(Failure(who, ended.start.host, code))
            elif until is None:
                finished.append(who)
        else:
            if caught is not None:  # asked twice: no grace
                for rank in alive.values():
                    rank.kill()
            caught = caught or code
        if (failures or caught) and until is None:
            told = caught == signal.SIGTERM or bool(failures and failures[0].preempted)
            seconds = grace if told else GRACE_SECONDS
            until = time.monotonic() + seconds + 2
            for rank in alive.values():
                rank.end(seconds)
    return Ended(failures, sorted(finished), caught)


def _forward(
    source: IO[bytes],
    sinks: list[TextIO],
    prefix: str,
    timestamps: bool,
    events: SimpleQueue[tuple[str, int, int]],
) -> None:
    """Copy lines to all sinks, each behind ``prefix``.

    A carriage return ends a line too: progress bars show as they move. Bytes that are not
    UTF-8 are replaced, never fatal: a rank must not stall on a full pipe.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pending = ""
    while True:
        chunk = os.read(source.fileno(), 1 << 16)
        pending += decoder.decode(chunk, final=not chunk)
        *lines, pending = re.split(r"(?<=[\r\n])", pending)
        if not chunk and pending:
            lines.append(pending)
        if lines:
            before = (time.asctime() if timestamps else "") + prefix
            text = "".join(before + line for line in lines)
            for sink in list(sinks):
                try:
                    with _WRITING:
                        sink.write(text)
                        sink.flush()
                except (OSError, ValueError):  # nobody reads any more: end as by SIGPIPE
                    sinks.remove(sink)
                    _abandon(sink)
                    events.put(("signal", -1, int(signal.SIGPIPE)))
        if not chunk:
            source.close()
            return


def _abandon(sink: TextIO) -> None:
    """Let what ``sink`` still holds go nowhere.

    Python flushes it at exit, and where that fails the exit status is 120, whatever was asked for.
    """
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sink.fileno())


@contextlib.contextmanager
def _signals_to(events: SimpleQueue[tuple[str, int, int]]) -> Iterator[None]:
    """Turn the signals that end a program into events, while the ranks run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SimpleQueue.put may be called from a signal handler; Queue.put may not.
    before = {s: signal.signal(s, lambda s, _: events.put(("signal", -1, s))) for s in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
