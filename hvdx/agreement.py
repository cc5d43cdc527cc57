"""Ranks compare notes before they communicate, so that a difference is an error, not a hang."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from hvdx import world
from hvdx.errors import MismatchError
from hvdx.frameworks import Adapter

_named: collections.Counter[tuple[str, int]] = collections.Counter()


def _forget() -> None:
    """Count from the start when the job does: ranks that joined late have counted nothing."""
    if not world.running():
        _named.clear()


world.on_change(_forget)


def next_name(subject: str, process_set: Any = None) -> str:
    """Return a name for a collective that ranks call in the same order: ``hvdx.<subject>.<n>``.

    Counted for each process set: ranks outside a set do not take part in its calls.
    """
    key = (subject, process_set.process_set_id if process_set is not None else 0)
    _named[key] += 1
    return f"hvdx.{subject}.{_named[key]}"


def counts() -> dict[tuple[str, int], int]:
    """Return how many names of each subject and process set have been given."""
    return dict(_named)


def count_from(everyone: Iterable[dict[tuple[str, int], int]]) -> None:
    """Go on from the highest of all ranks' :func:`counts`, so that they name alike again."""
    for own in everyone:
        for key, count in own.items():
            _named[key] = max(_named[key], count)


def digest(entries: dict[str, str]) -> str:
    """Return a short hash of ``entries``, equal where keys, values and order are."""
    return hashlib.sha256(json.dumps(list(entries.items())).encode()).hexdigest()[:16]


def check_same(
    adapter: Adapter, subject: str, entries: dict[str, str], name: str, process_set: Any = None
) -> None:
    """Raise on every rank unless all hold the same ``entries``; a collective call.

    Args:
        adapter: the core to ask through.
        subject: what is compared, for the message: ``"parameters of the model"``.
        entries: name -> description; the order counts.
        name: of the collective, equal on all ranks.
        process_set: the ranks that compare.

    Raises:
        MismatchError: naming the first entry that differs and what each rank has.
    """
    digests = adapter.allgather_object(digest(entries), name, process_set)
    if len(set(digests)) == 1:
        return
    everyone = adapter.allgather_object(list(entries.items()), f"{name}/detail", process_set)
    raise MismatchError(f"ranks disagree about the {subject}: {first_difference(everyone)}")


def first_difference(everyone: list[list[tuple[str, str]]]) -> str:
    """Tell the first place at which the ranks' lists differ, and what each rank has there."""
    longest = max(map(len, everyone))
    for position in range(longest):
        told = [tuple(own[position]) if position < len(own) else None for own in everyone]
        if len(set(told)) > 1:
            each = ", ".join(
                f"rank {rank}: " + (f"{entry[0]!r} {entry[1]}" if entry else "nothing")
                for rank, entry in enumerate(told)
            )
            counts = ", ".join(str(len(own)) for own in everyone)
            return f"entry {position} is {each} (entries per rank: {counts})"
    return "nothing differs"
