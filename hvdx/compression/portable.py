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
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hvdx.comm import Allreduce, Rank, Ranks, Work
from hvdx.compression.base import CompressionError
from hvdx.compression.state import Leaf, leaves, plain, rebuilt, sharers
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

Origin: TypeAlias = tuple[int, int]
"""The rank that has kept something, and of how many."""

PORTABLE: Origin = (0, 1)
"""What the only rank of a job has kept is all that is owed: any number of ranks may start so."""


def in_order(origins: Sequence[Origin | None]) -> bool:
    """Tell whether every rank has its own state, all have a portable one, or none has any."""
    own = [(rank, len(origins)) for rank in range(len(origins))]
    return list(origins) in ([None] * len(origins), [PORTABLE] * len(origins), own)


def warn_of_lost(origins: Sequence[Origin | None]) -> None:
    """Warn of ranks that have gone with what they owed; ``origins`` is what there is now."""
    known = {origin for origin in origins if origin is not None}
    for ranks in {ranks for _, ranks in known}:
        lost = sorted(set(range(ranks)) - {rank for rank, of in known if of == ranks})
        if lost:
            warnings.warn(
                f"what compression has held back of gradients of ranks {lost} of {ranks} is "
                "lost: none of the ranks there are now has their states",
                stacklevel=3,
            )


def shared_alike(like: Any, held: Sequence[Leaf]) -> bool:
    """Tell whether as many ranks have the leaves ``held`` in common as those of state ``like``.

    If not, ranks that must have equal states may hold different ones.
    """
    told = {leaf.path: sharers(leaf.kind) for leaf in held}
    return all(sharers(kind) == told.get(path, sharers(kind)) for path, _, kind in leaves(like))


_FIELDS = frozenset({"compressor", "step", "rank", "ranks", "kinds", "parameters"})


def check_saved(saved: Any, compressor: str, origin: Origin) -> None:
    """Raise unless ``saved``, as optimizers' ``compression_state()`` is, fits this rank.

    Args:
        saved: what the user wants to be loaded.
        compressor: the name of the one in use.
        origin: this rank's place.

    Raises:
        CompressionError: it is nothing of the kind, of another compressor, or of another place.
    """
    if not isinstance(saved, Mapping) or not set(saved) >= _FIELDS:
        raise CompressionError(
            f"a {type(saved).__name__} without {', '.join(sorted(_FIELDS))} is not what "
            "compression_state() has returned"
        )
    if saved["compressor"] != compressor:
        raise CompressionError(
            f"the saved state is that of compression={saved['compressor']}, but the optimizer "
            f"has compression={compressor}: give it the former, or leave the state out to start "
            "afresh"
        )
    told = saved["rank"], saved["ranks"]
    if told not in (PORTABLE, origin):
        raise CompressionError(
            f"the saved state is that of rank {told[0]} of {told[1]}, but this is rank "
            f"{origin[0]} of {origin[1]}: for other ranks save what "
            "portable_compression_state() returns"
        )


def portable(ops: Ops, state: Any) -> Work[dict[str, Any]]:
    """Turn one parameter's state on each rank into one that any number of ranks can start from.

    A collective: all ranks run it; :func:`hvdx.comm.together` does so for all parameters at once.

    Returns:
        Tensors by path, as of :func:`hvdx.compression.state.leaves`, equal on all ranks; pieces
        are part of what is owed. To be given to :func:`restored`.
    """
    return (yield from pooled(ops, leaves(state)))


def pooled(ops: Ops, held: Sequence[Leaf]) -> Work[dict[str, Any]]:
    """Do what :func:`portable` does with a state that is a list of leaves, as in a file."""
    rank, ranks = (yield Rank()), (yield Ranks())
    tensors = shares(ops, held, rank, ranks)
    for path, _, kind in held:
        if plain(kind) in ("owed", "averaged"):
            tensors[path] = yield Allreduce(tensors[path], op=ReduceOp.Sum)
    return tensors


def carried(ops: Ops, like: Any, given: Mapping[str, Any], lead: bool) -> Work[Any]:
    """Bring together what ranks have left of a job that has ended, or of another compressor.

    A collective, like :func:`portable`, for when not all of those ranks are here.

    Args:
        ops: the verbs of the tensors.
        like: a first state for the ranks and the compressor there are now, from ``init``.
        given: what :func:`shares` told of this rank's old state; nothing if it has none, or if
            another rank gives the same.
        lead: on one rank only, which has an old state: what is equal on all comes from it.

    Returns:
        This rank's state. All that is given and has a place in ``like`` is owed again.
    """
    tensors = {}
    for path, first, kind in leaves(like):
        if plain(kind) == "piece":
            continue
        own = given.get(path)
        if own is None or tuple(own.shape) != tuple(first.shape):
            own = first
        if kind == "same" and not lead:
            own = ops.zeros(tuple(first.shape), ops.dtype(first))
        tensors[path] = yield Allreduce(own, op=ReduceOp.Sum)
    return restored(like, tensors)


def moved(ops: Ops, like: Any, held: Sequence[Leaf], origin: Origin) -> tuple[Any, list[str]]:
    """Turn one rank's state into one of another form, by what fits; no collective.

    Args:
        ops: the verbs of the tensors.
        like: a first state of the other form, from ``init``.
        held: the leaves of the old state.
        origin: whose that is. What the owner of a piece owes becomes part of its own residual.

    Returns:
        The state, and the paths of what is owed and has no place in it.
    """
    given = shares(ops, held, *origin)
    kinds = {leaf.path: plain(leaf.kind) for leaf in held}
    taken = {}
    for path, first, kind in leaves(like):
        own = given.get(path)
        if own is None or plain(kind) != kinds[path]:
            continue
        if tuple(own.shape) == tuple(first.shape):
            taken[path] = own if kind == "same" else ops.scale(own, origin[1])
    lost = [path for path, kind in kinds.items() if kind == "owed" and path not in taken]
    return rebuilt(like, iter([taken.get(path, first) for path, first, _ in leaves(like)])), lost


def shares(ops: Ops, held: Sequence[Leaf], rank: int, ranks: int) -> dict[str, Any]:
    """Return by path what rank ``rank`` of ``ranks`` has in the sums that :func:`portable` makes.

    And, unchanged, what is equal on all ranks.
    """
    tensors: dict[str, Any] = {}
    owed = ""
    for path, tensor, kind in held:
        if plain(kind) == "piece":  # of what is owed, which every state has before them
            place, last = rank // sharers(kind), (ranks - 1) // sharers(kind)
            around = [place * tensor.shape[0], (last - place) * tensor.shape[0]]
            before, after = (ops.zeros((size,), "float32") for size in around)
            shape = tuple(tensors[owed].shape)
            own = ops.scale(tensor, 1.0 / sharers(kind))
            whole = ops.concat([before, own, after])[: math.prod(shape)]
            tensors[owed] = tensors[owed] + ops.reshape(whole, shape)
        else:
            owed = path if plain(kind) == "owed" else owed
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
    needed = [leaf.path for leaf in wanted if plain(leaf.kind) != "piece"]
    missing = [path for path in needed if path not in tensors]
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
