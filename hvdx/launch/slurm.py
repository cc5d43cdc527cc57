"""Slurm's two shorthands: node lists and tasks per node."""

from __future__ import annotations

import re

from hvdx.errors import LaunchError

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MAX_NODES = 1 << 16


def expand_nodes(text: str, variable: str = "SLURM_JOB_NODELIST") -> list[str]:
    """Return the names in a node list.

    Raises:
        LaunchError: the list has another form; the message names ``variable``.

    Example:
        >>> expand_nodes("gpu[01-03,07],login")
        ['gpu01', 'gpu02', 'gpu03', 'gpu07', 'login']
    """
    # Commas inside brackets do not separate entries.
    entries = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not entries or ",".join(entries) != text:
        raise _odd(variable, text)
    nodes = [name for entry in entries for name in _expand(entry, variable, text)]
    return nodes


def _expand(entry: str, variable: str, text: str) -> list[str]:
    """Return the names of one entry, as in ``rack[1-2]n[01-08]``."""
    before, bracket, rest = entry.partition("[")
    if not bracket:
        return [entry]
    inside, _, after = rest.partition("]")
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part)
        if not match:
            raise _odd(variable, text)
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + _MAX_NODES:
            raise _odd(variable, text)
        # "01-12" counts with leading zeros, "1-12" without.
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    tails = _expand(after, variable, text)
    return [before + number + tail for number in numbers for tail in tails]


def expand_counts(text: str, variable: str = "SLURM_TASKS_PER_NODE") -> list[int]:
    """Return the tasks of each node.

    Raises:
        LaunchError: the text has another form; the message names ``variable``.

    Example:
        >>> expand_counts("2(x3),1")
        [2, 2, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if not match or int(match[2] or 1) > _MAX_NODES:
            raise _odd(variable, text)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _odd(variable: str, text: str) -> LaunchError:
    return LaunchError(f"{variable}={text!r} is not as Slurm writes it: start the job with srun")
