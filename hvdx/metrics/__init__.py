"""``hvd.Metrics``: what a training is like while it goes on, as lines, JSON and TensorBoard."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hvdx import world
from hvdx.agreement import first_difference, next_name
from hvdx.errors import MismatchError
from hvdx.metrics.log import Log, header
from hvdx.metrics.probe import Counts, Probe
from hvdx.ops import ops_for

_SECONDS = 10.0  # between two lines, unless the user counts them in steps
_GROWTH = 10  # times as many steps at most than in the interval before


class Target(NamedTuple):
    """What training is to reach: ``accuracy >= 0.95``, or ``val_loss <= 0.1``."""

    name: str
    sign: str
    value: float

    @classmethod
    def of(cls, text: str) -> Target:
        """Read a target.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=)\s*(\S+)\s*", text)
        try:
            return cls(found[1], found[2], float(found[3]))  # type: ignore[index]
        except (TypeError, ValueError):
            raise ValueError(
                f"target={text!r}: write 'accuracy >= 0.95' or 'val_loss <= 0.1'"
            ) from None

    def reached(self, values: Mapping[str, float | None]) -> bool:
        """Tell whether ``values`` are good enough; without the one asked for they are not."""
        value = values.get(self.name)
        if value is None:
            return False
        return value >= self.value if self.sign == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.value:g}"


class Metrics:
    """Record speed, learning, communication, utilisation, bytes and memory of a training.

    The first rank prints a line per interval, and writes it to a file and to TensorBoard, if asked
    to. Ranks count for themselves, without looking at a device; when an interval ends they gather
    what they have counted, a few hundred bytes, and that is all they send. It ends after as many
    steps as they have agreed on: **every rank must make the same number of steps**, and what it
    calls here it must call in the same place as the others.

    =================== ==========================================================================
    samples_per_second  of all ranks together
    communication       share of time in which a rank waits for others: for averages of gradients,
                        beyond what overlaps with backward; in a pipeline for any message
    megabytes_per_step  that a rank sends for gradients, and between stages: payloads, without
                        headers; collectives by the formulas of rings, see docs/metrics.md
    bubble              share of a pipeline's schedule in which a rank computes nothing
    busy                share of time in which a pipeline's rank computes stages
    cpu                 cores that the process keeps busy
    memory_mb           resident; ``peak_memory_mb``: the most so far; with a GPU also ``gpu`` (its
                        utilisation), ``gpu_memory_mb`` and ``peak_gpu_memory_mb``
    =================== ==========================================================================

    Args:
        path: of the file of JSON lines; those of an earlier run stay in it, before the new ones.
            ``hvdx report`` draws it. None: no file.
        source: what trains: what ``hvd.DistributedOptimizer`` or ``hvd.Pipeline`` has returned, or
            a list of such. Without it nothing is known of communication.
        every: steps in an interval. None: as many as take about ten seconds.
        target: ``"accuracy >= 0.95"``, of a value given to :meth:`step` or :meth:`evaluated`: the
            time until then is recorded.
        tensorboard: folder for TensorBoard, which takes the package tensorboardX.
        options: of the training, for the file: whatever JSON has words for.
        unit: what samples are: ``"tokens"``.
        start: steps made before, if training is resumed.
        process_set: the ranks that train together, if not all do. Others do not call this.
        quiet: print nothing.

    Attributes:
        steps: made so far.
        reached: seconds of training until the target was reached; None before.

    Raises:
        OSError: a file cannot be written.
        MismatchError: ranks give different arguments.
        ValueError: an argument is of no use. All of these on every rank.

    Example:
        >>> metrics = hvd.Metrics("run.jsonl", optimizer, target="accuracy >= 0.97")
        >>> for x, y in batches:
        ...     loss = train(x, y)
        ...     metrics.step(len(x), loss=loss)
        >>> metrics.close()
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        source: Any = None,
        *,
        every: int | None = None,
        target: str | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
        unit: str = "samples",
        start: int = 0,
        process_set: Any = None,
        quiet: bool = False,
    ) -> None:
        self._set, self._unit, self.steps = process_set, unit, start
        self._core = world.core() if world.is_initialized() else None
        self._first = self._place() == 0
        self._log: Log | None = None
        self.reached: float | None = None
        problem = ""
        try:
            self._probe = Probe(source)
            self._target = Target.of(target) if target is not None else None
            if every is not None and (not isinstance(every, int) or every < 1):
                raise ValueError(f"every={every!r}: give a number of steps, from 1, or None")
            if self._first:
                self._log = Log(path, tensorboard, unit, quiet)
        except (OSError, ValueError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        asked = [("every", f"= {every}"), ("target", f"= {target!r}"), ("start", f"= {start}")]
        self._open(problem, asked, {"every": every, "target": target, "options": options or {}})
        self._every, self._due = every, every or 1
        self._sums: dict[str, _Mean] = {}
        self._samples, self._fresh = 0, 0  # of this interval, and its steps
        self._grown, self._seconds = Counts(), 0.0
        self._began, self._last = time.perf_counter(), self._probe.counts()
        self._running = True

    # --- what users call

    def step(self, samples: int, **values: Any) -> None:
        """Count a step; now and then, when an interval is over, ranks meet.

        Args:
            samples: of this rank; of a pipeline: of the whole batch.
            **values: numbers, or tensors of one element, whose means are recorded: ``loss=loss``.
                Tensors are not read before the interval ends, so that nothing waits for a GPU.
        """
        self._samples += samples
        for name, value in values.items():
            mean = self._sums.get(name)
            if mean is None:
                mean = self._sums[name] = _Mean(name)
            mean.add(value)
        self._advance(1)

    def evaluated(self, **values: Any) -> None:
        """Record the means over the ranks of what an evaluation has found; all ranks call it."""
        own = {name: _Mean(name, value).pair() for name, value in values.items()}
        with self.paused():
            means = _means(self._gather(own))
            if self._log is not None:
                self._log.write("evaluation", self._told(values=means))
            self._aim(means)

    def pause(self) -> None:
        """Let what follows, such as an evaluation, count in no speed and no share."""
        if self._running:
            self._count()
            self._running = False

    def resume(self) -> None:
        """Go on to count, after :meth:`pause`."""
        if not self._running:
            self._last, self._running = self._probe.counts(), True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Surround what is no training; may stand inside of another."""
        running = self._running
        self.pause()
        try:
            yield
        finally:
            if running:
                self.resume()

    def close(self) -> None:
        """Record what is left of an interval, and close the files; all ranks call it."""
        if self._fresh:
            self._end_interval()
        self._close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        """Close; after an error without the other ranks, which may not have one."""
        if kind is None:
            self.close()
        else:
            self._close()

    # --- the rest

    def _advance(self, steps: int) -> None:
        self._fresh += steps
        self.steps += steps
        if self._fresh >= self._due:
            self._end_interval()

    def _counted(self) -> tuple[int, dict[str, tuple[float, float]]]:
        """Return the samples of the interval, and by name the sums and numbers of values."""
        return self._samples, {name: mean.pair() for name, mean in self._sums.items()}

    def _close(self) -> None:
        self._fresh = 0
        if self._log is not None:
            self._log.close()

    def _place(self) -> int:
        if self._core is None:
            return 0
        if self._set is not None and not self._set.included():
            raise ValueError(f"rank {world.rank()} is not part of {self._set}, and records nothing")
        return self._core.place(world.own_set(self._core.framework, self._set))

    def _gather(self, own: Any) -> list[Any]:
        """Return what every rank has; a collective call."""
        if self._core is None:
            return [own]
        own_set = world.own_set(self._core.framework, self._set)
        return self._core.allgather_object(own, next_name("metrics", own_set), own_set)

    def _open(self, problem: str, asked: list[Any], about: dict[str, Any]) -> None:
        """Have all ranks go on, or none; write the header."""
        everyone = self._gather((problem, asked, _host()))
        problems = {told: rank for rank, (told, *_) in reversed([*enumerate(everyone)]) if told}
        if problems:
            self._close()
            told, rank = next(iter(sorted(problems.items(), key=lambda each: each[1])))
            kind, _, text = told.partition(": ")
            raise _KINDS.get(kind, OSError)(f"metrics, rank {rank}: {text}")
        if any(other != asked for _, other, _ in everyone):
            self._close()
            lists = [other for _, other, _ in everyone]
            raise MismatchError(f"ranks disagree about their metrics: {first_difference(lists)}")
        if self._log is not None:
            hosts = [host for *_, host in everyone]
            self._log.write("header", header(hosts, unit=self._unit, start=self.steps, **about))

    def _count(self) -> None:
        """Add what has grown since the last look."""
        now = self._probe.counts()
        self._grown, self._last = self._grown.plus(now.since(self._last)), now

    def _end_interval(self) -> None:
        """Meet the other ranks, and tell what has been since the last time."""
        if self._running:
            self._count()
        grown, steps = self._grown, self._fresh
        self._seconds += grown.seconds
        samples, values = self._counted()
        measures = self._probe.measures(grown, steps)
        own = {"samples": samples, "seconds": grown.seconds, "values": values}
        everyone = self._gather({**own, "measures": measures})
        self._samples, self._fresh, self._grown, self._sums = 0, 0, Counts(), {}
        seconds = max(each["seconds"] for each in everyone)
        if not self._probe.shares_batches:
            samples = sum(each["samples"] for each in everyone)
        means = _means([each["values"] for each in everyone])
        if self._log is not None:
            told = self._told(
                steps=steps,
                samples=samples,
                samples_per_second=samples / max(seconds, 1e-9),
                values=means,
                **_spread([each["measures"] for each in everyone]),
            )
            self._log.write("interval", told)
        if self._every is None:  # all compute the same from the same numbers
            wanted = round(_SECONDS * steps / max(seconds, 1e-9))
            self._due = max(1, min(wanted, _GROWTH * steps))
        self._aim(means)

    def _told(self, **more: Any) -> dict[str, Any]:
        seconds = self._seconds + self._grown.seconds
        wall = time.perf_counter() - self._began
        return {"step": self.steps, "seconds": seconds, "wall": wall, **more}

    def _aim(self, means: Mapping[str, float | None]) -> None:
        """See whether the target is reached, for the first time."""
        if self._target is None or self.reached is not None or not self._target.reached(means):
            return
        told = self._told(target=str(self._target))
        self.reached = told["seconds"]
        if self._log is not None:
            self._log.write("target", told)


_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}


class _Mean:
    """Adds up the values of one name; tensors stay where they are until they are asked for."""

    def __init__(self, name: str, value: Any = None) -> None:
        self._name, self._sum, self._count = name, 0.0, 0
        self._tensors: Any = None
        if value is not None:
            self.add(value)

    def add(self, value: Any) -> None:
        """Count a number, or a tensor of one element."""
        self._count += 1
        if isinstance(value, (int, float)):
            self._sum += value
            return
        value = getattr(value, "value", value) if hasattr(value, "trainable") else value
        if math.prod(getattr(value, "shape", ())) != 1:
            raise ValueError(
                f"metrics: {self._name}= has shape {tuple(value.shape)}; give one number, such as "
                "the mean"
            )
        value = value.detach() if hasattr(value, "detach") else value
        ops = ops_for(type(value))
        if ops.dtype(value) in ("float16", "bfloat16"):
            value = ops.cast(value, "float32")
        # Never the tensor itself, which its owner may write to.
        self._tensors = value + 0 if self._tensors is None else self._tensors + value

    def pair(self) -> tuple[float, int]:
        """Return the sum and the number of values."""
        if self._tensors is not None:
            ops = ops_for(type(self._tensors))
            self._sum, self._tensors = self._sum + float(ops.reshape(self._tensors, ())), None
        return self._sum, self._count


def _means(everyone: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float | None]:
    """Return the mean of each name over the ranks that have it; None if it is not finite."""
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(name for own in everyone for name in own):
        pairs = [own[name] for own in everyone if name in own]
        mean = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        means[name] = mean if math.isfinite(mean) else None
    return means


def _spread(everyone: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the first rank's measures, and the least, mean and greatest of all ranks'."""
    found = {}
    for name in dict.fromkeys(name for own in everyone for name in own):
        all_of = [own[name] for own in everyone if name in own]
        mean = sum(all_of) / len(all_of)
        own = {"rank0": everyone[0][name]} if name in everyone[0] else {}
        found[name] = {**own, "min": min(all_of), "mean": mean, "max": max(all_of)}
    return found


def _host() -> str:
    from socket import gethostname

    return gethostname()
