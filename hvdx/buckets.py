"""Which gradients travel together.

One allreduce per parameter pays Horovod's negotiation and the network's latency hundreds of
times a step; one for all would start only when the whole backward pass is over. Buckets of
some megabytes lie between: few operations, and the first leaves while backward goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from hvdx.errors import HvdxError

#: Over Gloo on two processes, 4 to 16 MB are within noise; HVDX_BUCKET_MB overrides.
DEFAULT_MEGABYTES = 16.0
Thing = TypeVar("Thing")


class Entry(NamedTuple):
    """One gradient: its parameter's name, number of elements, dtype (as NumPy's) and device."""

    name: str
    elements: int
    dtype: str
    device: str


_WIDTHS = {"128": 16, "64": 8, "32": 4, "16": 2, "8": 1}


def width(dtype: str) -> int:
    """Return the bytes of one element of ``dtype``, a NumPy-like name such as bfloat16."""
    digits = dtype[len(dtype.rstrip("0123456789")) :]
    return _WIDTHS.get(digits, 1)


def summed_width(dtype: str) -> int:
    """Return the bytes of an element as it travels to be added up: bfloat16 as float32."""
    return width("float32" if dtype == "bfloat16" else dtype)


def limit_bytes() -> int:
    """Return the size at which a bucket is full, from ``HVDX_BUCKET_MB`` where it is set."""
    told = os.environ.get("HVDX_BUCKET_MB")
    try:
        megabytes = float(told) if told else DEFAULT_MEGABYTES
    except ValueError:
        megabytes = -1.0
    if not 0 < megabytes < float("inf"):  # nan neither
        raise HvdxError(f"HVDX_BUCKET_MB={told!r} is no size: give megabytes, such as 16")
    return int(megabytes * 2**20)


def plan(
    entries: Sequence[Entry], limit: int, groups: Sequence[Sequence[int]] = ()
) -> list[list[int]]:
    """Group ``entries`` into buckets of one dtype and device each.

    Args:
        entries: in the order in which gradients are expected to become ready.
        limit: bytes; a bucket that would pass it is closed, so that only a single larger
            gradient, or a group, exceeds it.
        groups: indices into ``entries`` that travel together, however large they are; no index
            appears twice.

    Returns:
        Indices into ``entries``, by bucket: full ones in the order in which they fill up, then
        the rest, then the groups.
    """
    buckets: list[list[int]] = []
    open_: dict[tuple[str, str], tuple[list[int], int]] = {}
    grouped = {index for group in groups for index in group}
    for index, entry in enumerate(entries):
        if index in grouped:
            continue
        key = (entry.dtype, entry.device)
        weight = entry.elements * width(entry.dtype)
        members, held = open_.get(key, ([], 0))
        if members and held + weight > limit:
            buckets.append(members)
            members, held = [], 0
        members.append(index)
        open_[key] = (members, held + weight)
    buckets += [members for members, _ in open_.values()]
    for group in groups:
        by_kind: dict[tuple[str, str], list[int]] = {}
        for index in group:
            by_kind.setdefault((entries[index].dtype, entries[index].device), []).append(index)
        buckets += by_kind.values()
    return buckets


def evenly(count: int, parts: int) -> list[range]:
    """Cut ``range(count)`` into at most ``parts`` runs whose lengths differ by one at most."""
    parts = max(1, min(parts, count))
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def runs(
    things: Iterable[Thing],
    size: Callable[[Thing], int],
    limit: int,
    kind: Callable[[Thing], Hashable] = lambda thing: None,
) -> Iterator[list[Thing]]:
    """Split ``things`` into runs of one kind and at most ``limit`` bytes, one thing at least."""
    run: list[Thing] = []
    held = 0
    for thing in things:
        weight = size(thing)
        if run and (held + weight > limit or kind(thing) != kind(run[0])):
            yield run
            run, held = [], 0
        run.append(thing)
        held += weight
    if run:
        yield run
