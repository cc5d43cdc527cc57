"""Do all replicas start alike? Whoever forgets to broadcast trains N models, unnoticed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hvdx.agreement import digest
from hvdx.frameworks import Adapter

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def warn_of_differences(
    adapter: Adapter,
    parameters: Mapping[str, torch.Tensor],
    groups: Iterable[Mapping[str, Any]],
    name: str,
    process_set: Any,
) -> None:
    """Warn, on every rank, where ranks hold different values or options; a collective call.

    Args:
        adapter: the core to ask through.
        parameters: by name, the same names on all ranks.
        groups: the optimizer's ``param_groups``.
        name: of the collective.
        process_set: the ranks that compare.
    """
    values, options = checksums(parameters), plain_options(groups)
    told = (digest(values), digest(options))
    everyone = adapter.allgather_object(told, f"{name}/start", process_set)
    if len(set(everyone)) == 1:
        return
    ranks = process_set.ranks if process_set is not None else range(len(everyone))
    details = adapter.allgather_object((values, options), f"{name}/values", process_set)
    ours = [own for own, _ in details]
    differing = [key for key in values if len({own.get(key) for own in ours}) > 1]
    if differing:
        first = differing[0]
        others = [
            rank for rank, own in zip(ranks, ours, strict=True) if own[first] != ours[0][first]
        ]
        warnings.warn(
            f"replicas start different: {len(differing)} of {len(values)} parameters are not "
            f"equal on all ranks. The first is {first!r}: ranks {others} hold other values than "
            f"rank {ranks[0]}. Averaged gradients keep such replicas apart: call "
            "hvd.broadcast_parameters(model, root_rank=0) before training",
            stacklevel=2,
        )
    theirs = [own for _, own in details]
    keys = dict.fromkeys(key for own in theirs for key in own)
    for key in keys:
        each = [own.get(key, "nothing") for own in theirs]
        if len(set(each)) > 1:
            spelt = ", ".join(f"rank {r}: {v}" for r, v in zip(ranks, each, strict=True))
            warnings.warn(
                f"the ranks' optimizers start with different options: {key} is {spelt}. Replicas "
                "will drift apart: give the same on all ranks, or call "
                "hvd.broadcast_optimizer_state(optimizer, root_rank=0)",
                stacklevel=2,
            )
            return


def checksums(parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Sum each parameter's bytes as whole numbers: exact in any order, on any device."""
    sums = {}
    for name, parameter in parameters.items():
        words = parameter.detach().contiguous().view(-1).view(_WORDS[parameter.element_size()])
        sums[name] = words.sum(dtype=torch.int64)
    return {name: str(int(value)) for name, value in sums.items()}


def plain_options(groups: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Spell each group's options, such as the learning rate."""
    return {
        f"{key} of group {index}": str(_plain(value))
        for index, group in enumerate(groups)
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
