"""Move what compressors keep to another number of ranks without losing what is owed.

Each rank keeps what it has not delivered, and may keep what rounding its piece of the mean has
lost. What training is still owed is the mean over ranks of the first plus all pieces of the
second: one tensor of the parameter's shape. If every rank of a job of any size starts from that
tensor, with no losses of its own, the same is owed. What else differs between ranks (DGC's
momentum) becomes its mean; the rest is equal on all ranks already and is kept.

Saving every rank's state and restoring it at the same number of ranks is exact to the last bit;
this is exact but for the rounding of a sum, and a job of N ranks saves one tensor, not N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvdx.comm import Allreduce, Rank, Ranks, Work
from hvdx.compression.base import CompressionError
from hvdx.compression.state import leaves, rebuilt
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp


def portable(ops: Ops, state: Any) -> Work[dict[str, Any]]:
    """Turn one parameter's state on each rank into one that any number of ranks can start from.

    A collective: all ranks run it; :func:`hvdx.comm.together` does so for all parameters at once.

    Returns:
        Tensors by path, as of :func:`hvdx.compression.state.leaves`, equal on all ranks; pieces
        are part of what is owed. To be given to :func:`restored`.
    """
    rank, ranks = (yield Rank()), (yield Ranks())
    tensors = shares(ops, state, rank, ranks)
    for path, _, kind in leaves(state):
        if kind in ("owed", "averaged"):
            tensors[path] = yield Allreduce(tensors[path], op=ReduceOp.Sum)
    return tensors


def shares(ops: Ops, state: Any, rank: int, ranks: int) -> dict[str, Any]:
    """Return by path what rank ``rank`` of ``ranks`` has in the sums that :func:`portable` makes.

    And, unchanged, what is equal on all ranks.
    """
    tensors: dict[str, Any] = {}
    owed = ""
    for path, tensor, kind in leaves(state):
        if kind == "piece":  # of what is owed, which every state has before them
            around = [rank * tensor.shape[0], (ranks - 1 - rank) * tensor.shape[0]]
            before, after = (ops.zeros((size,), "float32") for size in around)
            shape = tuple(tensors[owed].shape)
            whole = ops.concat([before, tensor, after])[: math.prod(shape)]
            tensors[owed] = tensors[owed] + ops.reshape(whole, shape)
        else:
            owed = path if kind == "owed" else owed
            tensors[path] = tensor if kind == "same" else ops.scale(tensor, 1.0 / ranks)
    return tensors


def restored(like: Any, tensors: Mapping[str, Any]) -> Any:
    """Return a state of the form of ``like``, made of tensors by path.

    Args:
        like: a first state for the ranks there are now, from ``init``.
        tensors: the leaves of this rank's state, or what :func:`portable` returned. Tensors of
            the framework of ``like``; they become part of the state.

    Raises:
        CompressionError: they are not of a state of this form; the message says what differs.
    """
    wanted = leaves(like)
    unknown = sorted(set(tensors) - {leaf.path for leaf in wanted})
    missing = [leaf.path for leaf in wanted if leaf.path not in tensors and leaf.kind != "piece"]
    if unknown or missing:
        raise CompressionError(
            f"the saved state holds {_spelt(tensors)}, but the compressor keeps "
            f"{_spelt({leaf.path: leaf.tensor for leaf in wanted})}"
        )
    for path, tensor, _ in wanted:
        if path in tensors and tuple(tensors[path].shape) != tuple(tensor.shape):
            raise CompressionError(
                f"{path or 'the state'} has shape {tuple(tensors[path].shape)} in the saved "
                f"state, but {tuple(tensor.shape)} here"
            )
    return rebuilt(like, iter([tensors.get(path, first) for path, first, _ in wanted]))


def _spelt(tensors: Mapping[str, Any]) -> str:
    return ", ".join(f"{path or 'one tensor'} {tuple(t.shape)}" for path, t in
                     sorted(tensors.items())) or "nothing"  # fmt: skip
