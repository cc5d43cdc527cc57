"""Where a thread of Python is, as the user's own code knows it.

For messages about jobs that stand still: the innermost line that is neither Python's, nor hvdx's,
nor an installed package's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections import deque
from itertools import accumulate, repeat
from types import FrameType
from typing import NamedTuple


class Place(NamedTuple):
    """Where a thread is: one line of its stack."""

    file: str
    line: int
    function: str


def whereabouts(thread: int | None) -> str:
    """Tell where a thread is, the main thread by default.

    For moments of need, not for every second: the thread runs on meanwhile. faulthandler, which
    seems made for this, takes no lock: a thread that C++ code makes or ends while it looks
    crashes it (Python 3.11, SIGSEGV).
    """
    frame = sys._current_frames().get(thread or threading.main_thread().ident or 0)
    return _told(_stack(frame) if frame else [])


def _stack(frame: FrameType) -> list[Place]:
    """List where ``frame`` and its callers are, the innermost first."""
    frames: deque[FrameType | None] = deque()
    with contextlib.suppress(AttributeError):  # None, behind the outermost, has no f_back
        # In C from end to end, so that the thread does not run on the way.
        frames.extend(accumulate(repeat("f_back"), getattr, initial=frame))
    return [
        Place(each.f_code.co_filename, each.f_lineno or 0, each.f_code.co_name)
        for each in frames
        if each is not None
    ]


@functools.cache
def _is_library(file: str) -> bool:
    """Tell whether ``file`` is Python's, hvdx's or another installed package's."""
    import sysconfig

    import hvdx

    inner = sys.modules.get("hvdx.integrations")
    folders = [os.path.dirname(module.__file__ or "") for module in (hvdx, inner) if module]
    folders += [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    packages = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
    return file.startswith(tuple(folder + os.sep for folder in folders)) or any(
        package in file for package in packages
    )


def _is_users(place: Place) -> bool:
    if place.file.startswith("<"):  # made at run time: by libraries, or given to python -c
        return place.file in ("<string>", "<stdin>") and place.function == "<module>"
    return not _is_library(place.file)


def _told(stack: list[Place]) -> str:
    """Name the innermost line of the user's own code: ``train.py:31 in main: loss.backward()``."""
    import linecache

    if not stack:
        return ""
    file, line, function = next(filter(_is_users, stack), stack[0])
    source = linecache.getline(file, line).strip()[:120]
    told = f"{file[-120:]}:{line} in {function}"
    return f"{told}: {source}" if source else told
