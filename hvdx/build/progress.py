"""What the user sees while a build runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

EVERY = 30.0  # seconds between two plain lines
PERCENT = re.compile(r"\[\s*(\d{1,3})%\]")  # as make prints it


class Progress:
    """Shows the stages of one command, and the compiler's own count during the build.

    Args:
        verbose: print every line of the build instead.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self._percent = 0
        self._started = self._said = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if sys.stdout.isatty() and not verbose:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[n]}"),
            )
            self._bar = Bar(*columns, TimeElapsedColumn())

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print ``text``, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def stage(self, text: str) -> None:
        """Begin a stage."""
        self._percent, self._said = 0, time.monotonic()
        if not self._bar:
            self.say(text)
        elif self._task is None:
            self._task = self._bar.add_task(text, total=None, n="")
        else:
            self._bar.update(self._task, description=text, total=None, n="")

    def line(self, line: str) -> None:
        """Take in a line that the build printed."""
        if self._verbose:
            self.say(line)
            return
        if found := PERCENT.search(line):
            # Two targets count side by side, so the number may step back; the bar should not.
            self._percent = max(self._percent, int(found.group(1)))
            if self._bar and self._task is not None:
                self._bar.update(
                    self._task, total=100, completed=self._percent, n=f"{self._percent}%"
                )
        now = time.monotonic()
        if not self._bar and now - self._said >= EVERY:
            self._said = now
            self.say(f"  {self._percent}% after {now - self._started:.0f} s")
