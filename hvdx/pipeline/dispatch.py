"""``hvd.Pipeline`` for either framework."""

from __future__ import annotations

import importlib
from typing import Any

from hvdx.frameworks import kind_of

_PIPELINES = {
    "torch": "hvdx.integrations.pytorch_pipeline",
    "keras": "hvdx.integrations.keras3_pipeline",
}


def Pipeline(model: Any, *args: Any, **options: Any) -> Any:
    """Train ``model`` in stages, on several devices of this process or over the job's ranks.

    Args:
        model: a ``torch.nn.Module``, or a Sequential or functional Keras model.
        *args: see the framework's own, :class:`hvdx.integrations.pytorch_pipeline.Pipeline` and
            :class:`hvdx.integrations.keras3_pipeline.Pipeline`.
        **options: likewise.

    Returns:
        A pipeline: ``loss = pipe.step(x, y)``, the same line on every rank.

    Raises:
        TypeError: it is no model of a framework that has pipelines.
    """
    library = kind_of(type(model))
    if library not in _PIPELINES:
        kind = type(model)
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} is no model that a pipeline can cut; give a "
            "torch.nn.Module or a keras.Model"
        )
    return importlib.import_module(_PIPELINES[library]).Pipeline(model, *args, **options)
