"""The engine: run one rank's actions over its stages and a channel.

All cleverness lies in the schedule, which is a static list; all mathematics in the stages.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

from hvdx.errors import PipelineError
from hvdx.pipeline.channel import Channel, Failure, Key, LocalChannel, Tensors
from hvdx.pipeline.schedule import Action, Schedule, Span


class Stage(Protocol):
    """An interval of a model's units, as the engine sees it: one per stage and framework.

    The stage keeps what a backward needs, by micro-batch, and accumulates weight gradients: in
    ascending order of micro-batches, as validated schedules have it. The first stage reads its
    inputs from the batch it was given for this step, the last one computes the loss, weighted
    by the micro-batch's share of the batch.

    Attributes:
        unit: name of the unit it computes now, for messages. The engine sets it to None before
            each action; a stage need not set it.
    """

    unit: str | None

    def forward(self, micro_batch: int, inputs: Tensors | None) -> Tensors:
        """Compute the live set at the cut after this stage from the one before it.

        Values that only pass through are in both. ``inputs`` is None for the first stage, and
        what the last one returns is ignored. A schedule without any backward means inference:
        nothing need be kept but the last stage's outputs.
        """

    def backward(self, micro_batch: int, gradients: Tensors | None) -> Tensors:
        """Accumulate the weights' gradients; return those of the inputs, in their order.

        ``gradients`` belong to what ``forward`` returned, None for the last stage. What the
        first stage returns is ignored. What the micro-batch kept is set free.
        """

    def input_gradient(self, micro_batch: int, gradients: Tensors | None) -> Tensors:
        """Return the inputs' gradients, as ``backward`` does; the weights' come later."""

    def weight_gradient(self, micro_batch: int) -> None:
        """Accumulate what ``input_gradient`` left, and set free what the micro-batch kept."""


def unreached(weight: str) -> str:
    """Say that no gradient comes to a stage, whose weights could not learn."""
    return (
        f"no gradient reaches the trainable weights of this stage, such as {weight!r}: something "
        "between them and the loss is detached, made of integers or not differentiable. Mend that, "
        "or freeze these weights"
    )


def run(
    schedule: Schedule,
    rank: int,
    stages: Mapping[int, Stage],
    channel: Channel,
    step: int = 0,
    ended: Callable[[int], None] | None = None,
) -> list[Span]:
    """Run ``rank``'s row of ``schedule`` once.

    Args:
        schedule: a validated one, equal on all ranks.
        rank: row of the schedule.
        stages: those that this rank has, by number.
        channel: to the other ranks.
        step: number of this step, which no other step on this channel has.
        ended: called with the number of each stage that has done all its work here, at once.

    Returns:
        When each action ran, by ``time.perf_counter``, from its inputs' arrival on; without what
        stages have waited for their replicas meanwhile.

    Raises:
        PipelineError: an action failed, here or elsewhere. Every rank raises it that is not done
            with its row; the others learn of it at their next use of the channel.
    """
    loop = _Loop(schedule, rank, stages, channel, step)
    row = schedule.rows[rank]
    spans: list[Span] = []
    number, last = 0, {action.stage: number for number, action in enumerate(row)}
    try:
        for number, action in enumerate(row):
            spans.append(loop.perform(action))
            if ended is not None and last[action.stage] == number:
                ended(action.stage)
    except PipelineError:
        raise
    except BaseException as error:
        failure = _failure(error, rank, row, number, stages, step)
        channel.fail(failure)
        if not isinstance(error, Exception):  # KeyboardInterrupt stays what it is
            raise
        raise failure.exception() from error
    return spans


class _Loop:
    """One step on one rank; what passes between two of its own stages skips the channel."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, Stage],
        channel: Channel,
        step: int,
    ) -> None:
        self._order, self._rank, self._stages = schedule, rank, stages
        self._channel, self._step = channel, step
        self._kept: dict[Key, Tensors] = {}

    def perform(self, action: Action) -> Span:
        """Fetch the inputs, compute, send the results."""
        kind, number, micro_batch = action
        stage = self._stages[number]
        stage.unit = None
        if kind == "W":
            return self._timed(action, lambda: stage.weight_gradient(micro_batch))[1]
        way = action.gives.kind
        work = getattr(stage, _METHODS[kind])
        given = self._fetch(Key(way, self._step, number, micro_batch))
        result, span = self._timed(action, lambda: work(micro_batch, given))
        onward = number + 1 if way == "F" else number - 1
        self._send(Key(way, self._step, onward, micro_batch), result)
        return span

    def _timed(self, action: Action, work: Callable[[], Any]) -> tuple[Any, Span]:
        """Return what ``work`` returns, and when it ran."""
        before, start = self._channel.seconds_waited, time.perf_counter()
        result = work()
        end = time.perf_counter()
        return result, Span(action, start + self._channel.seconds_waited - before, end)

    def _fetch(self, key: Key) -> Tensors | None:
        if not 0 <= key.sender < self._order.stages:
            return None
        if self._order.owner(key.sender, key.micro_batch) == self._rank:
            return self._kept.pop(key)
        return self._channel.get(key)

    def _send(self, key: Key, tensors: Tensors) -> None:
        if not 0 <= key.stage < self._order.stages:
            return
        if self._order.owner(key.stage, key.micro_batch) == self._rank:
            self._kept[key] = tensors
        else:
            self._channel.put(key, tensors)


_METHODS = {"F": "forward", "B": "backward", "I": "input_gradient"}
_WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def _failure(
    error: BaseException,
    rank: int,
    row: Sequence[Action],
    place: int,
    stages: Mapping[int, Stage],
    step: int,
) -> Failure:
    """Describe an error in ``row[place]``."""
    action = row[place]
    unit = getattr(stages.get(action.stage), "unit", None)
    shown = [str(each) for each in row]
    shown[place] = f"[{action}]"
    first, stop = max(0, place - 8), place + 9  # of long rows only the surroundings
    shown = [*["..."] * (first > 0), *shown[first:stop], *["..."] * (stop < len(row))]
    return Failure(
        rank=rank,
        error=f"{type(error).__name__}: {error}",
        where=f"stage {action.stage}, "
        + (f"unit {unit!r}, " if unit else "")
        + f"{_WORDS[action.kind]} of micro-batch {action.micro_batch} in step {step}",
        row=" ".join(shown),
        traceback="".join(traceback.format_exception(error)),
    )


class LocalRanks:
    """All ranks of a schedule in this process, one thread each.

    Threads, since one thread would compute the stages one after the other; they live as long as
    this object, because frameworks keep thread pools and settings per thread.

    Args:
        stages: all, by number.
        ranks: how many threads.
        seconds: deadline of a wait for another thread; None: for ever.
    """

    def __init__(
        self, stages: Mapping[int, Stage], ranks: int, seconds: float | None = 30.0
    ) -> None:
        self._stages, self._seconds = stages, seconds
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"hvdx-pipeline-{rank}")
            for rank in range(ranks)
        ]

    def run(self, schedule: Schedule, step: int = 0) -> list[list[Span]]:
        """Run a step on all threads; return their spans.

        Raises:
            PipelineError: an action failed; by then all threads are idle again.
        """
        channel = LocalChannel(self._seconds)
        work = [
            thread.submit(run, schedule, rank, self._stages, channel, step)
            for rank, thread in enumerate(self._threads)
        ]
        try:
            wait(work)
        except BaseException as error:  # Ctrl-C comes to this thread alone
            channel.fail(Failure(0, f"interrupted by {type(error).__name__}"))
            wait(work)
            raise
        errors = [each.exception() for each in work]
        failed = [error for error in errors if error is not None]
        if failed:  # rather the one whose cause is at hand
            raise next((error for error in failed if error.__cause__), failed[0])
        return [each.result() for each in work]

    def close(self) -> None:
        """End the threads; may be called twice."""
        for thread in self._threads:
            thread.shutdown()

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
