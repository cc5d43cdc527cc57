"""What a training says about itself: progress, speed, time lost to communication, the end."""

from __future__ import annotations

import time
from typing import Any

from hvdx import world
from hvdx.errors import MismatchError
from hvdx.replicas import allgather_object, parameter_hash


class TrainingReport:
    """Print a line per epoch on rank 0, and at the end compare the replicas.

    The communication share is the part of the training's wall-clock time in which this rank
    waited for gradients to be averaged; what overlaps with computing costs nothing and does
    not count.

    Args:
        optimizer: what :func:`hvdx.DistributedOptimizer` returned; its
            ``communication_seconds`` are read.
        epochs: how many are planned, for the ``3/10`` in the line; 0 leaves it out.

    Example:
        >>> report = hvd.TrainingReport(optimizer, epochs=10)
        >>> report.batch(samples=64, loss=loss)  # after every step
        >>> report.epoch()  # after every epoch; pause() before and resume() after validation
        >>> report.final(accuracy, model)
    """

    def __init__(self, optimizer: Any, epochs: int = 0) -> None:
        self._optimizer = optimizer
        self._epochs = epochs
        self._done = 0
        self._begin()

    def _begin(self) -> None:
        self._samples = 0
        self._loss: Any = 0.0
        self._batches = 0
        self._waited = float(self._optimizer.communication_seconds)
        self._start = time.perf_counter()
        self._elapsed = 0.0
        self._running = True

    def pause(self) -> None:
        """Stop the clock, for what is no training: validation, or writing a checkpoint."""
        if self._running:
            self._elapsed += time.perf_counter() - self._start
            self._running = False

    def resume(self) -> None:
        """Let the clock go on, if it was stopped."""
        if not self._running:
            self._start = time.perf_counter()
            self._running = True

    def batch(self, samples: int, loss: Any = None) -> None:
        """Count one step of ``samples`` on this rank; ``loss`` is a number or a tensor."""
        self._samples += samples
        self._batches += 1
        if loss is not None:
            self._loss = self._loss + (loss.detach() if hasattr(loss, "detach") else loss)

    def epoch(self, **metrics: float) -> None:
        """Print the epoch's line on rank 0: mean loss, ``metrics``, speed of all ranks."""
        self.pause()
        elapsed = self._elapsed
        waited = float(self._optimizer.communication_seconds) - self._waited
        self._done += 1
        if world.rank() == 0:
            told = {"loss": float(self._loss) / max(self._batches, 1), **metrics}
            self.line(self._samples * world.size() / elapsed, waited / elapsed, told)
        self._begin()

    def line(self, samples_per_second: float, share: float, metrics: dict[str, float]) -> None:
        """Print one epoch's line."""
        count = f"{self._done}/{self._epochs}" if self._epochs else str(self._done)
        told = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        print(
            f"epoch {count}{told}  {samples_per_second:,.0f} samples/s on {world.size()} ranks"
            f"  communication {share:.1%}",
            flush=True,
        )

    def final(self, accuracy: float, model: Any) -> None:
        """Print accuracy and every rank's parameter hash on rank 0; a collective call.

        Raises:
            MismatchError: replicas have drifted apart (raised on every rank).
        """
        hashes = allgather_object(parameter_hash(model))
        each = " ".join(f"rank{rank}={value}" for rank, value in enumerate(hashes))
        equal = len(set(hashes)) == 1
        if world.rank() == 0:
            told = "equal" if equal else "DIFFERENT"
            print(f"accuracy {accuracy:.4f}  parameters {each} ({told})", flush=True)
        if not equal:
            raise MismatchError(
                f"replicas have drifted apart: {each}; did every rank call broadcast_parameters "
                "and train through DistributedOptimizer?"
            )
