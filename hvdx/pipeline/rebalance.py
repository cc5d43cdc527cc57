"""How readily units move to other stages while a model trains: options, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvdx.errors import PlanError


@dataclass(frozen=True)
class Rebalance:
    """When a pipeline moves units to other stages by itself.

    Attributes:
        every: steps between two looks at the times, of which the medians count.
        gain: share of a step that must be saved.
        checks: looks in a row that must find so much. After layers were frozen or freed one look
            is enough, since the cause is known.
        horizon: steps within which a move must save more time than it takes.

    Raises:
        PlanError: one of them is out of its range.

    Example:
        >>> pipe = hvd.Pipeline(model, x, loss, make, rebalance=hvd.Rebalance(gain=0.05))
    """

    every: int = 10
    gain: float = 0.1
    checks: int = 2
    horizon: int = 1000

    def __post_init__(self) -> None:
        for name in ("every", "checks", "horizon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"Rebalance({name}={value!r}): give a whole number from 1")
        if not isinstance(self.gain, (int, float)) or not 0 < self.gain < 1:
            raise PlanError(f"Rebalance(gain={self.gain!r}): give a share between 0 and 1")


def rebalance_of(told: Any) -> Rebalance | None:
    """Read the option ``rebalance`` of a pipeline.

    Raises:
        PlanError: it is none.
    """
    if told is None or isinstance(told, Rebalance):
        return told
    if isinstance(told, str) and told == "auto":
        return Rebalance()
    raise PlanError(f"rebalance={told!r}: use 'auto', hvd.Rebalance(...) or None")
