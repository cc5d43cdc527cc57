"""What moves with the units of a Keras model: variables, and what the optimizer has for them.

The optimizer stays the same object, which callbacks know; it is built anew for the variables that
the rank has now. Keras' optimizers keep by variable lists of variables, momenta for instance, and
single variables for all: iterations, the learning rate, Nadam's product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from hvdx.integrations.keras3_graph import Graph, size

_OTHERS = "_variables", "_trainable_variables"  # lists of variables that are no slots


def trained(graph: Graph) -> tuple[float, ...]:
    """Return by unit the share of its variables' bytes that are trained, as last refreshed."""
    return tuple(_share(unit.params, unit.owned) for unit in graph.units)


def _share(part: Mapping[str, Any], whole: Mapping[str, Any]) -> float:
    if part.keys() == whole.keys():
        return float(bool(whole))
    return sum(map(size, part.values())) / sum(map(size, whole.values()))


def packed(graph: Graph, unit: int, known: Sequence[int], optimizer: Any) -> dict[str, Any]:
    """Return what this process has of a unit.

    Args:
        graph: of the model.
        unit: that moves.
        known: units whose variables the receiver has; what is tied to them stays here.
        optimizer: of this process; None: there is none.
    """
    there = {id(v) for index in known for v in graph.units[index].variables}
    variables = graph.variables([graph.units[unit]])
    told = {name: _tensor(v) for name, v in variables.items() if id(v) not in there}
    owned = {name: v for name, v in graph.units[unit].owned.items() if name in told}
    states = {} if optimizer is None else slots_of(optimizer, owned)
    single = {name: _tensor(v) for name, v in _singles(optimizer).items()} if states else {}
    return {"model": told, "optimizer": states, "single": single}


def slots_of(optimizer: Any, variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by variable the tensors that a built optimizer has for it, by the lists' names."""
    lists = _slots(optimizer)
    found: dict[str, dict[str, Any]] = {}
    for name, variable in variables.items():
        index = optimizer._get_variable_index(variable)
        found[name] = {slot: _tensor(each[index]) for slot, each in lists.items()
                       if each[index] is not None}  # fmt: skip
    return found


def rebuild(
    optimizer: Any, variables: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]
) -> None:
    """Build an optimizer for other variables.

    Args:
        optimizer: no wrapper of another.
        variables: all that this process trains now, by name.
        states: by variable, what :func:`slots_of` returned of the optimizer that had it.
    """
    before = {name: _tensor(v) for name, v in _singles(optimizer).items()}
    old = [*_singles(optimizer).items()]
    for each in _slots(optimizer).values():
        for variable in filter(lambda v: v is not None, each):
            optimizer._tracker.untrack(variable)
    optimizer._trainable_variables_indices.clear()
    optimizer.built = False
    optimizer.build(list(variables.values()))
    now = _singles(optimizer)
    for name, variable in old:
        if now[name] is not variable:
            optimizer._tracker.untrack(variable)
    assign(now, before)
    lists = _slots(optimizer)
    for name, variable in variables.items():
        index = optimizer._get_variable_index(variable)
        assign({slot: each[index] for slot, each in lists.items()}, states.get(name, {}))


def single(optimizer: Any, told: Mapping[str, Any]) -> None:
    """Take the single variables of an optimizer that has been stepped, where this one was not."""
    assign(_singles(optimizer), told)


def assign(variables: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Give variables the values under their names."""
    for name, value in values.items():
        variables[name].assign(value)


def _slots(optimizer: Any) -> dict[str, list[Any]]:
    """Return the lists of a built optimizer that have a variable, or None, for each it trains."""
    count = len(optimizer._trainable_variables)
    return {
        name: value for name, value in vars(optimizer).items()
        if isinstance(value, list) and name not in _OTHERS and len(value) == count
        and _all_variables(value)
    }  # fmt: skip


def _all_variables(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, keras.Variable) for value in values)


def _singles(optimizer: Any) -> dict[str, Any]:
    return {name: v for name, v in vars(optimizer).items() if isinstance(v, keras.Variable)}


def _tensor(variable: Any) -> Any:
    return keras.ops.stop_gradient(variable.value)
