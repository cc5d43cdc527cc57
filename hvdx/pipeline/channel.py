r"""How tensors travel from stage to stage: put and get by key, never "the next".

Since each message has a key, ranks need not agree on an order of messages, and none is lost or
taken for another when they run ahead of each other.

    stage 0   F0 [1]              [4] B0       [1] put(Key("F", step, 1, 0), activations)
                 \               /             [2] get(Key("F", step, 1, 0))
    stage 1      [2] F0    B0 [3]              [3] put(Key("B", step, 0, 0), gradients)
                                               [4] get(Key("B", step, 0, 0))
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from hvdx.errors import PipelineError

#: The live set at a cut, in its fixed order. A gradient may be None: nothing depends on that
#: value, or its dtype has no gradient.
Tensors = Sequence[Any]


class Key(NamedTuple):
    """What a message is.

    Attributes:
        kind: ``"F"``, activations on their way forward, or ``"B"``, gradients on their way back
            (of an ``I`` as of a ``B``).
        step: number of the training step.
        stage: that receives.
        micro_batch: number within the step.
    """

    kind: str
    step: int
    stage: int
    micro_batch: int

    @property
    def sender(self) -> int:
        """Return the stage that puts it."""
        return self.stage - 1 if self.kind == "F" else self.stage + 1


class Failure(NamedTuple):
    """Why a step failed, as plain data that travels as JSON (``_asdict()``).

    Attributes:
        rank: that failed.
        error: type and message.
        where: ``"stage 1, unit 'block3', forward of micro-batch 2 in step 7"``.
        row: its schedule around the failed action, which is in brackets.
        traceback: on that rank.
    """

    rank: int
    error: str
    where: str = ""
    row: str = ""
    traceback: str = ""

    def exception(self) -> PipelineError:
        """Make the error that every rank raises."""
        lines = [", ".join(filter(None, (f"rank {self.rank}", self.where))) + f": {self.error}"]
        if self.row:
            lines.append(f"Schedule of rank {self.rank}: {self.row}")
        if self.traceback:
            lines.append(f"Traceback on rank {self.rank}:\n{self.traceback.rstrip()}")
        error = PipelineError("\n".join(lines))
        error.failure = self
        return error


class Channel(Protocol):
    """Carries tensors between the ranks of one pipeline.

    Made with the rank of each stage, or the ranks that are its replicas, so that a key says where
    a message goes and whence it comes (see :func:`holder`). The engine asks it only for what
    crosses ranks. One thread uses it, unless it says otherwise.

    Once a rank has failed, the channel is of no more use: every call but ``close`` raises.

    Attributes:
        seconds_waited: for messages that had not come when they were asked for, if it counts them.
    """

    seconds_waited: float

    def put(self, key: Key, tensors: Tensors) -> None:
        """Send, and return at once: a put never waits for its get.

        The schedule bounds what is on its way. Tensors are not modified before the step ends.

        Raises:
            PipelineError: a rank has failed.
        """

    def get(self, key: Key) -> Tensors:
        """Return what was put under ``key``; each key once.

        Raises:
            PipelineError: a rank has failed; known to all ranks already.
            TimeoutError: it has not come before the deadline.
            OSError: the sender is gone. These the engine makes a failure and passes to ``fail``.
        """

    def fail(self, failure: Failure) -> None:
        """Tell every other rank that this one has failed: their gets and puts raise.

        The first failure stands; later ones are dropped. Never waits, never raises.
        """

    def close(self) -> None:
        """Give back sockets and threads; may be called twice."""


def rows_of_ranks(place: Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Return by stage its ranks: one, or the replicas round which micro-batches are dealt."""
    return tuple((each,) if isinstance(each, int) else tuple(each) for each in place)


def holder(rows: Sequence[Sequence[int]], stage: int, micro_batch: int) -> int:
    """Return the rank that computes ``micro_batch`` in ``stage``; ``rows``: ranks by stage."""
    return rows[stage][micro_batch % len(rows[stage])]


class LocalChannel:
    """Between threads of one process: all ranks share one object.

    Args:
        seconds: deadline of a get; None: wait for ever.
    """

    seconds_waited = 0.0  # threads share it, and their stages have no replicas to wait for

    def __init__(self, seconds: float | None = 30.0) -> None:
        self._seconds = seconds or None
        self._lock = threading.Lock()
        self._arrived: dict[Key, Tensors] = {}
        self._waiting: dict[Key, threading.Event] = {}
        self._failure: Failure | None = None

    def put(self, key: Key, tensors: Tensors) -> None:
        """See :meth:`Channel.put`."""
        with self._lock:
            self._check()
            if key in self._arrived:
                raise ValueError(f"{key} was put twice")
            self._arrived[key] = tensors
            if key in self._waiting:
                self._waiting[key].set()

    def get(self, key: Key) -> Tensors:
        """See :meth:`Channel.get`."""
        with self._lock:
            self._check()
            if key in self._arrived:
                return self._arrived.pop(key)
            event = self._waiting[key] = threading.Event()
        event.wait(self._seconds)
        with self._lock:
            del self._waiting[key]
            self._check()
            if key in self._arrived:
                return self._arrived.pop(key)
        raise TimeoutError(late(key, self._seconds))

    def fail(self, failure: Failure) -> None:
        """See :meth:`Channel.fail`."""
        with self._lock:
            self._failure = self._failure or failure
            for event in self._waiting.values():
                event.set()

    def close(self) -> None:
        """Forget what nobody has fetched."""
        with self._lock:
            self._arrived.clear()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure.exception()


def late(key: Key, seconds: float | None) -> str:
    """Say that a message did not come in time."""
    what = "activations" if key.kind == "F" else "gradients"
    return (
        f"stage {key.stage} has waited {seconds:g} s for the {what} of micro-batch "
        f"{key.micro_batch} in step {key.step} from stage {key.sender}: it hangs or takes longer "
        "than HVDX_TIMEOUT"
    )
