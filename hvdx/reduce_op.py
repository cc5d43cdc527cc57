"""Reduction operators, by Horovod's names and numbers."""

from __future__ import annotations

import enum


class ReduceOp(enum.IntEnum):
    """How tensors of different ranks combine; numbered as in Horovod's C++ core."""

    Average = 0
    Sum = 1
    Adasum = 2
    Min = 3
    Max = 4
    Product = 5

    @classmethod
    def of(cls, op: int | None, average: bool | None = None) -> ReduceOp:
        """Return the operator meant by ``op`` or by Horovod's older ``average``.

        Raises:
            ValueError: ``op`` is no operator, or both were given.
        """
        if op is None:
            return cls.Sum if average is False else cls.Average
        if average is not None:
            raise ValueError("give op= or average=, not both; average= is Horovod's older spelling")
        try:
            return cls(op)
        except ValueError:
            known = ", ".join(f"hvd.{known.name}" for known in cls)
            raise ValueError(f"unknown reduction op={op!r}; use one of {known}") from None


Average = ReduceOp.Average
Sum = ReduceOp.Sum
Adasum = ReduceOp.Adasum
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product
