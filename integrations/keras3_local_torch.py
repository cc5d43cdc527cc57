"""Local SGD and DiLoCo on Keras' torch backend."""

from __future__ import annotations

from typing import Any

import torch

from hvdx.integrations.keras3_local import Rounds
from hvdx.integrations.keras3_torch import TorchAverager


class TorchRounds(Rounds, TorchAverager):
    """Takes outer steps eagerly; torch.compile leaves them out of its graphs."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def before_step(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """See :meth:`Rounds.before_step`."""
        return super().before_step(optimizer, grads, variables)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def after_step(self, optimizer: Any) -> None:
        """See :meth:`Rounds.after_step`."""
        super().after_step(optimizer)

    def snapshot(self, variable: Any) -> Any:
        """See :meth:`Rounds.snapshot`."""
        return variable.value.detach().clone()

    def counter(self, value: int) -> list[int]:
        """See :meth:`Rounds.counter`."""
        return [value]

    def count(self, counter: list[int]) -> int:
        """See :meth:`Rounds.count`."""
        return counter[0]

    def set_count(self, counter: list[int], value: int) -> None:
        """See :meth:`Rounds.set_count`."""
        counter[0] = value
