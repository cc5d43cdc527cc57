"""Channels between the ranks of a job, opened with the help of Horovod's collectives.

All ranks of the job call these functions, in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from hvdx import watchdog, world
from hvdx.agreement import next_name
from hvdx.frameworks import Adapter
from hvdx.pipeline.horovod_channel import HorovodChannel
from hvdx.pipeline.post import Codec
from hvdx.pipeline.zmq_channel import ZmqChannel, own_address

Channel = TypeVar("Channel", bound=ZmqChannel)


def over_horovod(
    core: Adapter, codec: Codec, rank: int, place: Sequence[int | Sequence[int]]
) -> HorovodChannel:
    """Open a channel between the ranks of ``place`` that needs nothing but Horovod."""
    return HorovodChannel(
        place,
        rank,
        world.size(),
        functools.partial(_alltoall, core, next_name("pipeline")),
        codec,
        seconds=watchdog.timeout_seconds(),
    )


def over_zmq(
    kind: type[Channel],
    core: Adapter,
    codec: Codec,
    rank: int,
    place: Sequence[int | Sequence[int]],
    **options: Any,
) -> Channel:
    """Open a :class:`ZmqChannel`, or what builds on one and takes ``options``."""
    return kind(
        place,
        rank,
        lambda each: core.allgather_object(each, next_name("pipeline"), None),
        codec,
        address=own_address(one_machine=core.horovod.local_size() == core.horovod.size()),
        seconds=watchdog.timeout_seconds(),
        **options,
    )


def _alltoall(
    core: Adapter, name: str, rows: np.ndarray, counts: list[int]
) -> tuple[np.ndarray, list[int]]:
    """Exchange rows through Horovod; see :class:`HorovodChannel`."""
    sent = core.from_numpy(rows)
    found, received = core.alltoall(sent, splits=counts, name=name, process_set=None)
    return core.to_numpy(found), core.to_numpy(received).tolist()
