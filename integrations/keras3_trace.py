"""The units of a Keras model, found in what Keras records of it and by one run on a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras.src.backend import get_keras_mask

from hvdx.errors import PlanError
from hvdx.integrations.keras3_graph import LOSSES, Graph, Unit, dtype_of, size
from hvdx.integrations.keras3_masks import MASK
from hvdx.integrations.keras_batch_norm import deferrable
from hvdx.pipeline import ir


def traced(model: Any, sample: Any, deferred: bool = False) -> Graph:
    """Find the units of a built or unbuilt model; compute ``sample`` once.

    Args:
        model: Sequential or functional.
        sample: a batch, or part of one.
        deferred: whether running statistics of batch normalization wait for the end of a step.

    Raises:
        PlanError: it is neither Sequential nor functional, or does what a pipeline cannot.
    """
    if not isinstance(model, keras.Model):
        raise PlanError(f"{type(model).__name__} is a layer; give a keras.Model")
    if isinstance(model, keras.Sequential):
        given = sample[0] if isinstance(sample, (tuple, list)) and len(sample) == 1 else sample
        if not model.built:
            model(keras.ops.convert_to_tensor(given))
        graph = _of_layers(model)
    elif hasattr(model, "_nodes_by_depth"):
        graph = _of_nodes(model)
    else:
        raise PlanError(
            f"{type(model).__name__} {model.name!r} is a subclassed model, whose calls Keras does "
            "not record: build it as keras.Sequential or keras.Model(inputs, outputs), of which it "
            "may be one layer"
        )
    _measure(graph, graph.tensors(sample), deferred)
    return graph


def _of_layers(model: Any) -> Graph:
    """Take the layers of a Sequential one after the other."""
    last = first = model.inputs[0].name if model.inputs else "input"
    units: list[Unit] = []
    for index, layer in enumerate(model.layers):

        def arguments(held: dict[int, Any], index: int = index) -> tuple[Any, Any]:
            return (held[index],), {}

        tensors = {last: index, layer.name: index + 1}
        units.append(Unit(layer.name, layer, arguments, [last], [layer.name], tensors))
        last = layer.name
    return Graph(model, units, [first], [last], 0)


def _of_nodes(model: Any) -> Graph:
    """Take the recorded calls of a functional model, from its inputs on."""
    values = {id(tensor): tensor.name for tensor in model.inputs}
    nodes = [node for _, level in sorted(model._nodes_by_depth.items(), reverse=True)
             for node in level]  # fmt: skip
    units: list[Unit] = []
    calls: dict[str, int] = {}
    for node in nodes:
        if not node.operation or node.is_input:
            continue
        name = node.operation.name
        calls[name] = calls.get(name, 0) + 1
        name += f"#{calls[name]}" if calls[name] > 1 else ""
        several = len(node.output_tensors) > 1
        for i, tensor in enumerate(node.output_tensors):
            values[id(tensor)] = f"{name}/{i}" if several else name
        reads = list(dict.fromkeys(values[id(tensor)] for tensor in node.input_tensors))
        makes = [values[id(tensor)] for tensor in node.output_tensors]
        tensors = {values[id(t)]: id(t) for t in [*node.input_tensors, *node.output_tensors]}
        units.append(Unit(name, node.operation, node.arguments.fill_in, reads, makes, tensors))
    inputs = [values[id(tensor)] for tensor in model.inputs]
    outputs = [values[id(tensor)] for tensor in model.outputs]
    return Graph(model, units, inputs, outputs, model._outputs_struct)


def _measure(graph: Graph, values: dict[str, Any], deferred: bool) -> None:
    """Run the units once: find masks, losses, sizes, variables and what has gradients."""
    _name_variables(graph)
    inputs = dict(values)
    counted: set[int] = set()  # variables whose regularizers some unit has
    for unit in graph.units:
        unit.reads += [name + MASK for name in unit.reads if name + MASK in values]
        given = {name: values[name] for name in unit.reads}
        held = getattr(unit.layer, "trainable_variables", [])
        unit.generators = _generators(unit)
        unit.norms = deferrable(unit.layer) if deferred else []
        unit.regularized = [v for v in held if v.regularizer is not None and id(v) not in counted]
        counted.update(id(v) for v in unit.regularized)
        if _may_add(unit):
            unit.adds = {training: _kinds(unit, given, training) for training in (False, True)}
        made, _ = unit.trial(given, False)
        values.update(zip(unit.tensors_made, made, strict=True))
        _extend(graph, unit, values)
        graph.floating.update(name for name in unit.makes if "float" in dtype_of(values[name]))
    graph.refresh()
    graph.masks = [name + MASK for name in dict.fromkeys(graph.outputs) if name + MASK in values]
    for name, mask in graph.masks_ahead(inputs).items():
        if not np.array_equal(*map(keras.ops.convert_to_numpy, (mask, values[name]))):
            raise PlanError(
                f"output {name.removesuffix(MASK)!r} has a mask that is not what the layers before "
                "it tell by compute_mask(): end the model with a layer that uses it up"
            )
    graph.line = _line(graph, values)


def _extend(graph: Graph, unit: Unit, values: dict[str, Any]) -> None:
    """Add to what a unit makes the masks and the losses that there are."""
    for name in unit.tensors_made:
        mask = get_keras_mask(values[name])
        if mask is not None:
            unit.makes.append(name + MASK)
            values[name + MASK] = mask
    if unit.has_losses:
        if graph.losses is not None:
            unit.before = graph.losses
            unit.reads.append(graph.losses)
        graph.losses = unit.name + LOSSES
        unit.makes.append(graph.losses)
        values[graph.losses] = keras.ops.zeros(2, keras.config.floatx())


def _may_add(unit: Unit) -> bool:
    """Tell whether a part of the unit calls ``add_loss``, as far as can be seen."""
    for part in unit.parts:
        own = [each for each in type(part).__mro__ if not each.__module__.startswith("keras.")]
        codes = [getattr(each, "__code__", None) for kind in own for each in vars(kind).values()]
        if part.activity_regularizer is not None or any(
            code is not None and "add_loss" in code.co_names for code in codes
        ):
            return True
    return False


def _kinds(unit: Unit, given: Mapping[str, Any], training: bool) -> list[bool]:
    """Tell of each loss that the unit adds whether it is a sum over the rows, or a mean.

    Twice the rows double a sum and leave a mean as it was.

    Raises:
        PlanError: they do neither.
    """
    once = unit.trial(given, training)[1]
    if not once:
        return []
    twice = unit.trial(
        {name: keras.ops.concatenate([x, x]) if len(x.shape) else x for name, x in given.items()},
        training,
    )[1]
    kinds = []
    for one, two in zip(once, twice, strict=True):
        near = 1e-3 * abs(one)
        if not (abs(two - one) <= near or abs(two - 2 * one) <= near):
            raise PlanError(
                f"layer {unit.name!r} adds a loss that is neither a mean nor a sum over the rows "
                f"of a batch: {one:g} for the sample, {two:g} for the sample taken twice. What it "
                "is by micro-batches is not known: let it be a mean"
            )
        kinds.append(abs(two - one) > near)
    return kinds


def _name_variables(graph: Graph) -> None:
    taken: set[str] = set()
    for variable in graph.model.variables:
        name, copy = variable.path, 0
        while name in taken:
            copy += 1
            name = f"{variable.path}#{copy}"
        taken.add(name)
        graph.names[id(variable)] = name


def _generators(unit: Unit) -> list[Any]:
    found = [each for part in unit.parts for each in part._seed_generators]
    return list({id(each): each for each in found}.values())


def _line(graph: Graph, values: Mapping[str, Any]) -> ir.Graph:
    units = tuple(
        ir.Unit(
            unit.name,
            tuple(unit.reads),
            {name: size(values[name]) for name in unit.makes},
            {name: size(v) for name, v in unit.params.items()},
            uses_rng=bool(unit.generators),
        )
        for unit in graph.units
    )
    return ir.Graph(units, {name: size(values[name]) for name in graph.inputs}, tuple(graph.ends))
