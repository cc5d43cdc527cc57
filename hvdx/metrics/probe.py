"""What one process can tell of itself: counters that only grow, and what it occupies now."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from hvdx import world


class Counts(NamedTuple):
    """Seconds, and bytes, since anything."""

    seconds: float = 0.0
    cpu: float = 0.0  # seconds of all cores
    waited: float = 0.0  # seconds, for other ranks
    sent: float = 0.0  # bytes
    busy: float = 0.0  # seconds in which stages computed
    scheduled: float = 0.0  # seconds of the schedules that they belong to

    def since(self, before: Counts) -> Counts:
        """Return what has grown; a counter that went back began anew, with another object."""
        pairs = zip(self, before, strict=True)
        return Counts(*(now - then if now >= then else now for now, then in pairs))

    def plus(self, more: Counts) -> Counts:
        """Add what has grown."""
        return Counts(*map(sum, zip(self, more, strict=True)))


class Probe:
    """Reads the counters of this process, and of what trains in it.

    Args:
        source: an optimizer that averages, a pipeline, a list of such, or None.

    Attributes:
        shares_batches: ranks train on the same batches, as those of a pipeline do.

    Raises:
        TypeError: a source is neither.
    """

    def __init__(self, source: Any = None) -> None:
        import psutil

        self._process = psutil.Process()
        given = source if isinstance(source, (list, tuple)) else [source]
        self._sources = [each for each in given if each is not None]
        for each in self._sources:
            if not hasattr(each, "communication_seconds"):
                raise TypeError(
                    f"source={type(each).__qualname__} tells nothing of communication: give what "
                    "hvd.DistributedOptimizer or hvd.Pipeline has returned"
                )
        self._pipelines = [each for each in self._sources if hasattr(each, "schedule_seconds")]
        self.shares_batches = bool(self._pipelines)

    def counts(self) -> Counts:
        """Read all counters."""
        times = self._process.cpu_times()
        cores = [world.core(name) for name in world.running()] if world.is_initialized() else []
        return Counts(
            time.perf_counter(),
            times.user + times.system,
            sum(float(each.communication_seconds) for each in self._sources),
            sum(each.bytes_sent for each in [*cores, *self._pipelines]),
            sum(each.busy_seconds for each in self._pipelines),
            sum(each.schedule_seconds for each in self._pipelines),
        )

    def measures(self, grown: Counts, steps: int) -> dict[str, float]:
        """Return what :class:`hvdx.metrics.Metrics` records of this rank, by name."""
        seconds = max(grown.seconds, 1e-9)
        found = {}
        if self._sources:
            found["communication"] = grown.waited / seconds
            found["megabytes_per_step"] = grown.sent / max(1, steps) / 1e6
        if self._pipelines:
            if grown.scheduled:
                found["bubble"] = max(0.0, 1.0 - grown.busy / grown.scheduled)
            found["busy"] = grown.busy / seconds
        memory = self._process.memory_info().rss
        return {
            **found,
            "cpu": grown.cpu / seconds,
            "memory_mb": memory / 1e6,
            "peak_memory_mb": max(memory, peak_bytes()) / 1e6,
            **_devices(world.running()),
        }


def peak_bytes() -> int:
    """Return the most memory that this process has had; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _devices(frameworks: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in frameworks:
        found.update(world.core(name).device_use())
    return found
