"""Keras' ``LossScaleOptimizer`` where several ranks have parts of the model."""

from __future__ import annotations

from typing import Any


class LossScale:
    """Moves the loss scale by what all ranks have found, where the optimizer knows one rank's.

    Float16 loses small gradients, so the loss is multiplied by as much as they bear: half as much
    after a step with one that is not finite, twice as much after ``dynamic_growth_steps`` without
    (Micikevicius et al.: Mixed precision training. ICLR 2018. arXiv:1710.03740).

    Args:
        optimizer: a built ``LossScaleOptimizer``; its variables hold the state.

    Attributes:
        inner: the optimizer that it wraps.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self.inner = optimizer, optimizer.inner_optimizer

    def value(self) -> float:
        """Return what the loss of this step is multiplied by."""
        return float(self._optimizer.dynamic_scale)

    def settings(self) -> str:
        """Describe what must be equal on all ranks."""
        own = self._optimizer
        return f"{own.initial_scale}, doubled after {own.dynamic_growth_steps} steps"

    def update(self, overflowed: bool) -> None:
        """Go on after a step, which was skipped if gradients overflowed."""
        own = self._optimizer
        steps = 0 if overflowed else int(own.step_counter) + 1
        if overflowed or steps == own.dynamic_growth_steps:
            own.dynamic_scale.assign(self.value() * (0.5 if overflowed else 2.0))
            steps = 0
        own.step_counter.assign(steps)
