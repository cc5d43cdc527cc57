"""Masks of a Keras model's outputs, found before the model is computed.

Keras divides a loss by the entries that the output's mask leaves, in the whole batch. The first
micro-batch has its backward before the last one has its forward; so the masks must be known
earlier. They follow from the inputs, by what layers tell of theirs, without the layers' own work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras

from hvdx.errors import PlanError

if TYPE_CHECKING:
    from hvdx.integrations.keras3_graph import Unit

MASK = "/mask"  # after the name of a tensor: that of its mask


class Ahead:
    """Values of a batch that can be had without the work of layers.

    Args:
        units: of the model.
        inputs: of the model, by name.
    """

    def __init__(self, units: Sequence[Unit], inputs: Mapping[str, Any]) -> None:
        self._makers = {name: unit for unit in units for name in unit.makes}
        self._values = dict(inputs)

    def value(self, name: str) -> Any:
        """Return a mask, or a tensor that is made without weights.

        Raises:
            PlanError: a layer with weights has to compute it, or does not tell of it.
        """
        if name not in self._values:
            unit = self._makers[name]
            if name.endswith(MASK):
                self._values.update(self._masks(unit))
            else:
                self._values.update(self._computed(unit))
        if self._values.get(name) is None:
            raise PlanError(
                f"{name.removesuffix(MASK)!r} has a mask, of which its layer does not tell by "
                "compute_mask(): end the model with a layer that uses the mask up"
            )
        return self._values[name]

    def _computed(self, unit: Unit) -> dict[str, Any]:
        if unit.params or unit.generators or unit.has_losses:
            raise PlanError(
                f"the mask of an output depends on what layer {unit.name!r} computes, so that the "
                "share of a micro-batch in the loss is not known before: mask the model's inputs "
                "instead, or end the model with a layer that uses the mask up"
            )
        return unit.call({name: self.value(name) for name in unit.reads}, False)

    def _masks(self, unit: Unit) -> dict[str, Any]:
        """Ask a layer for the masks of what it makes."""
        if isinstance(unit.layer, keras.Model):
            raise PlanError(
                f"layer {unit.name!r} is a model with a mask that reaches an output of the whole: "
                "put its layers into the whole, or end that with a layer that uses the mask up"
            )
        masks = {n: self.value(n + MASK) for n in unit.reads if n + MASK in self._makers}
        ids = {unit.tensors[name]: name for name in unit.reads if name in unit.tensors}
        args, kwargs = unit.arguments({each: masks.get(name) for each, name in ids.items()})
        before = kwargs["mask"] if kwargs.get("mask") is not None else _first(args, kwargs)
        try:  # most pass masks on, whatever the tensors are
            told = unit.layer.compute_mask(_first(*unit.arguments(dict.fromkeys(ids))), before)
        except Exception:
            held = {each: self.value(name) for each, name in ids.items()}
            told = unit.layer.compute_mask(_first(*unit.arguments(held)), before)
        made = zip(unit.tensors_made, keras.tree.flatten(told), strict=False)
        return {name + MASK: mask for name, mask in made}


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
