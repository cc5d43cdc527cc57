"""``hvd.DistributedOptimizer`` for either framework."""

from __future__ import annotations

import importlib
from typing import Any

from hvdx.frameworks import kind_of

_WRAPPERS = {
    "torch": "hvdx.integrations.pytorch_optimizer",
    "keras": "hvdx.integrations.keras3",
}


def DistributedOptimizer(optimizer: Any, *args: Any, **options: Any) -> Any:
    """Make ``optimizer`` average gradients over the ranks before each update.

    Args:
        optimizer: a ``torch.optim.Optimizer`` or a Keras 3 optimizer (TensorFlow or torch
            backend).
        *args: see the framework's own: for torch the model or ``named_parameters``.
        **options: likewise; ``compression=`` and ``op=`` are common to both.

    Returns:
        An optimizer to be used in the place of the one given.

    Raises:
        TypeError: it is no optimizer of these frameworks.
    """
    library = kind_of(type(optimizer)) if optimizer is not None else None
    if library not in _WRAPPERS:
        kind = type(optimizer)
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} is no optimizer that hvdx knows; give a "
            "torch.optim.Optimizer or a keras.optimizers.Optimizer"
        )
    module = importlib.import_module(_WRAPPERS[library])
    return module.DistributedOptimizer(optimizer, *args, **options)
