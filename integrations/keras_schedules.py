"""Callbacks that set the learning rate while training: Horovod's schedule and warm-up."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import keras

from hvdx import world
from hvdx.integrations.keras_sync import RankCallback


class LearningRateScheduleCallback(RankCallback):
    """Set the learning rate to ``initial_lr * multiplier(epoch)`` between two epochs.

    Each epoch's end adds the learning rate to the logs, as ``lr``.

    Momentum correction: Keras' momentum buffers hold past steps times the learning rate of
    their time, so that a new rate scales them by new / old, once. Horovod scales the coefficient
    for one batch instead; that is the same step, but graphs hold the coefficient as a constant.

    Args:
        initial_lr: the learning rate at the start of training.
        multiplier: a function of the epoch, or a number, whose powers are then taken: it acts
            anew in each epoch from ``start_epoch``.
        start_epoch: the first epoch to adjust, from 0.
        end_epoch: the first epoch to leave alone again; none by default.
        staircase: adjust at the start of each epoch, which the multiplier gets as an integer;
            else before each batch, where it gets fractions: epoch + batch / steps_per_epoch.
            With ``steps_per_execution`` Keras has one rate for all its steps, that of the first.
        momentum_correction: for optimizers with momentum: see above.
        steps_per_epoch: batches per epoch, for fractions; what Keras says by default.

    Raises:
        ValueError: ``initial_lr`` or ``multiplier`` is of no use; when training begins: the
            optimizer has a schedule of its own, or the steps of an epoch are unknown.

    Example:
        >>> decay = lambda epoch: 0.1 ** (epoch // 30)
        >>> hvd.callbacks.LearningRateScheduleCallback(0.1 * hvd.size(), decay, start_epoch=5)
    """

    initial_lr: float
    start_epoch: int
    end_epoch: int | None
    current_epoch: int
    staircase: bool
    momentum_correction: bool
    steps_per_epoch: int | None

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[Any], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(initial_lr, numbers.Real):
            raise ValueError(f"initial_lr={initial_lr!r}: give the learning rate as a number")
        if not callable(multiplier) and not isinstance(multiplier, numbers.Real):
            raise ValueError(f"multiplier={multiplier!r}: give a number or a function of the epoch")
        self.initial_lr = initial_lr
        self.multiplier: Callable[[Any], Any] = (
            multiplier
            if callable(multiplier)
            else lambda epoch: multiplier ** (epoch - start_epoch)
        )
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Check that the learning rate can be set, and find out how long an epoch is."""
        rate = self.model.optimizer.learning_rate
        if not isinstance(rate, keras.Variable):
            raise ValueError(
                f"{type(self).__name__}: the learning rate of {self.model.optimizer.name!r} is "
                "set by a schedule or function of its own; make the optimizer with a number, or "
                "leave this callback out"
            )
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = (self.params or {}).get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    f"{type(self).__name__}: Keras does not know how many batches an epoch of "
                    "this data has; give steps_per_epoch="
                )

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Note the epoch."""
        self.current_epoch = epoch

    def on_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Set the learning rate, if it is time."""
        begun = self.current_epoch >= self.start_epoch
        if not begun or (self.end_epoch is not None and self.current_epoch >= self.end_epoch):
            return
        if not self.staircase:
            assert self.steps_per_epoch is not None
            self._adjust(self.multiplier(self.current_epoch + batch / self.steps_per_epoch))
        elif batch == 0:
            self._adjust(self.multiplier(self.current_epoch))

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Do nothing: Keras waits only for callbacks that have this method before it goes on."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the learning rate."""
        if logs is not None:
            logs["lr"] = self._rate()

    def _rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _adjust(self, multiplier: Any) -> None:
        optimizer = self.model.optimizer
        old = self._rate()
        optimizer.learning_rate = float(self.initial_lr * multiplier)
        ratio = self._rate() / old if old else 1.0
        if self.momentum_correction and ratio != 1.0:
            inner = getattr(optimizer, "inner_optimizer", optimizer)
            for buffer in _velocities(inner):
                buffer.assign(buffer * ratio)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raise the learning rate from ``initial_lr / size`` to ``initial_lr``, batch by batch.

    As Goyal et al. do for large batches (arXiv:1706.02677).

    Args:
        initial_lr: the learning rate to reach, that of the whole job.
        warmup_epochs: how many epochs it takes.
        momentum_correction: see :class:`LearningRateScheduleCallback`.
        steps_per_epoch: batches per epoch; what Keras says by default.
        verbose: 1 prints a line on rank 0 when it is done.

    Example:
        >>> hvd.callbacks.LearningRateWarmupCallback(0.1 * hvd.size(), warmup_epochs=5)
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            initial_lr,
            self._warm,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.warmup_epochs = warmup_epochs
        self.verbose = verbose

    def _warm(self, epoch: float) -> float:
        assert self.steps_per_epoch is not None
        done = (epoch + 1 / self.steps_per_epoch) / self.warmup_epochs  # 1 in the last batch
        return (1 + done * (world.size() - 1)) / world.size()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reach the goal with the last epoch of the warm-up, however many steps ran at once."""
        if epoch == self.warmup_epochs - 1:
            self._adjust(1.0)
            if self.verbose and world.rank() == 0:
                print(f"\nEpoch {epoch + 1}: learning rate warmed up to {self._rate():g}")
        super().on_epoch_end(epoch, logs)


def _velocities(optimizer: Any) -> list[Any]:
    """Return the momentum buffers of ``SGD`` and ``RMSprop``, whose steps hold learning rates."""
    if not getattr(optimizer, "momentum", 0):
        return []
    buffers = getattr(optimizer, "momentums", None) or getattr(optimizer, "_momentums", None)
    return [buffer for buffer in buffers or () if buffer is not None]
