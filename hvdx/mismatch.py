"""Turn Horovod's bare "Mismatched ..." into an error that says what every rank has."""

from __future__ import annotations

from typing import Any

from hvdx.agreement import next_name
from hvdx.errors import MismatchError
from hvdx.frameworks import Adapter


def is_mismatch(error: BaseException) -> bool:
    """Tell whether Horovod refused an operation because ranks submitted different things."""
    return "Mismatched" in str(error)


def explain(
    adapter: Adapter,
    operation: str,
    name: str | None,
    tensors: list[Any],
    process_set: Any,
    reason: str = "",
) -> MismatchError:
    """Gather what each rank submitted; every rank of the set is here for the same reason.

    Horovod answers a mismatch on all ranks of the set, so that this exchange always has
    company; it is counted by set, since ranks outside have not met this one. ``reason`` is what
    Horovod said: it knows the options, but no rank.
    """
    told = f"{operation} of " + ", ".join(
        f"{adapter.dtype_name(tensor)} {tuple(tensor.shape)}{_device(tensor)}" for tensor in tensors
    )
    everyone = adapter.allgather_object(told, next_name("mismatch", process_set), process_set)
    ranks = process_set.ranks if process_set is not None else range(len(everyone))
    each = "; ".join(f"rank {rank}: {told}" for rank, told in zip(ranks, everyone, strict=True))
    called = f"tensor {name!r}" if name else "an unnamed tensor"
    return MismatchError(
        f"ranks submitted different operations for {called}: {each}. Give the same operation, "
        "shape, dtype and options on every rank; without names, calls pair up by their order"
        + (f" (Horovod: {reason})" if reason else "")
    )


def _device(tensor: Any) -> str:
    device = str(getattr(tensor, "device", "cpu"))
    return "" if "cpu" in device.lower() else f" on {device}"
