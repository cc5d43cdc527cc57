"""What moves with the units of a PyTorch model: their state, and that of their optimizers.

A stage's optimizer stays the same object, so that learning-rate schedulers keep it; what changes
are the parameters in its groups. Which group a parameter goes into, the user's own function says:
it is asked for an optimizer of the new parameters, whose groups stand in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hvdx.errors import PlanError
from hvdx.integrations.pytorch_graph import Graph, Unit

Optimizers = Mapping[int, torch.optim.Optimizer]
Shares = Mapping[int, Mapping[str, torch.nn.Parameter]]


def trained(graph: Graph) -> tuple[float, ...]:
    """Return by unit the share of its parameters' elements that require gradients."""
    return tuple(_share(list(unit.params.values())) for unit in graph.units)


def _share(params: Sequence[torch.nn.Parameter]) -> float:
    flags = {p.requires_grad for p in params}
    if len(flags) < 2:
        return float(True in flags)
    return sum(p.numel() for p in params if p.requires_grad) / sum(p.numel() for p in params)


def options_of(unit: Unit, states: Mapping[str, Any]) -> dict[str, Any]:
    """Return by parameter the options that its optimizer has for it, as plain data."""
    return {name: _plain(states[name]["options"]) for name in unit.params if name in states}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.tolist, dict(options))


def packed(
    graph: Graph, unit: int, known: Sequence[int], states: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what this process has of a unit.

    Args:
        graph: of the model.
        unit: that moves.
        known: units whose weights the receiver has; what is tied to them stays here.
        states: by parameter, its optimizer's state and options.
    """
    own = graph.units[unit]
    there = {id(p) for index in known for p in graph.units[index].params.values()}
    return {
        "model": {name: value.detach() if isinstance(value, torch.Tensor) else value
                  for name, value in graph.entries(own).items() if id(value) not in there},
        "optimizer": {name: states[name] for name, p in own.params.items()
                      if name in states and id(p) not in there},
    }  # fmt: skip


def copied(states: Any) -> Any:
    """Copy tensors that have come by a channel into memory of their own."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, states)


def check_groups(
    optimizers: Optimizers, made: Optimizers, shares: Shares, told: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check that each parameter goes into a group of optimizers that treats it as before.

    Args:
        optimizers: those there are, by stage.
        made: of the new parameters, by the user's function; none where there are none.
        shares: by stage, those parameters.
        told: by parameter, the options that it has had so far.

    Raises:
        PlanError: one does not; the message names it.
    """
    for number, fresh in made.items():
        groups = optimizers[number].param_groups
        if len(groups) != len(fresh.param_groups):
            raise PlanError(
                f"the optimizer of stage {number} has {len(groups)} groups, but the function that "
                f"makes optimizers makes {len(fresh.param_groups)} of the parameters that would be "
                "there: let it make as many of any, if need be without parameters"
            )
        names = {id(p): name for name, p in shares[number].items()}
        for group, new in zip(groups, fresh.param_groups, strict=True):
            own = _plain({key: value for key, value in group.items() if key != "params"})
            for p in new["params"]:
                _check_options(number, own, names[id(p)], _plain(told[names[id(p)]]))


def _check_options(number: int, own: Mapping[str, Any], name: str, came: Mapping[str, Any]) -> None:
    for option in [*own, *(each for each in came if each not in own)]:
        if own.get(option) != came.get(option):
            raise PlanError(
                f"parameter {name!r} is trained with {option}={came.get(option)}, but in stage "
                f"{number}, to which it would move, {option}={own.get(option)}: give the "
                "optimizers of all stages the same options"
            )


def rehome(
    optimizers: Optimizers, made: Optimizers, shares: Shares, states: Mapping[str, Any]
) -> None:
    """Give each stage's optimizer its new parameters, with their states.

    Args:
        optimizers: by stage.
        made: of the new parameters, by the user's function; none where there are none.
        shares: by stage, those parameters.
        states: by parameter, state and options.
    """
    for number, optimizer in optimizers.items():
        names = {id(p): name for name, p in shares[number].items()}
        optimizer.state.clear()
        for index, group in enumerate(optimizer.param_groups):
            fresh = made.get(number)
            group["params"] = list(fresh.param_groups[index]["params"]) if fresh else []
            for p in group["params"]:
                state = states[names[id(p)]]["state"]
                if state:
                    optimizer.state[p] = _beside(p, state)


def _beside(p: torch.nn.Parameter, state: Any) -> Any:
    """Put a state where its parameter is; single numbers stay where they are."""

    def put(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(p.device) if tensor.dim() else tensor

    return pytree.tree_map_only(torch.Tensor, put, state)
