"""Drop-in face: ``import hvdx.tensorflow.keras as hvd`` for ``horovod.tensorflow.keras``.

The same as :mod:`hvdx.keras`, for Keras 3 on the TensorFlow backend, with the orders and defaults
of Horovod's other module.
"""

from __future__ import annotations

from typing import Any

import keras

import hvdx.keras as _face
from hvdx.integrations import keras3 as _keras3
from hvdx.keras import *  # noqa: F403
from hvdx.keras import Average, Compression
from hvdx.keras import __all__ as _names
from hvdx.tensorflow.keras import callbacks as callbacks  # type: ignore[no-redef]

__all__ = [*_names]

__all__.remove("PartialDistributedOptimizer")  # Horovod's module has none


def __getattr__(name: str) -> Any:
    return getattr(_face, name)


def DistributedOptimizer(  # type: ignore[no-redef]
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Make ``optimizer`` average gradients over the ranks.

    See :func:`hvdx.keras.DistributedOptimizer`, whose arguments have another order.
    """
    return _keras3.DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        num_groups,
        groups,
        backward_passes_per_step,
        average_aggregated_gradients,
        process_set,
        scale_local_gradients,
    )


def allreduce(  # type: ignore[no-redef]
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: Any = Compression.none,
    process_set: Any = None,
) -> Any:
    """Reduce a variable, tensor, array, list or number; see :func:`hvdx.keras.allreduce`.

    Raises:
        ValueError: both ``average`` and ``op`` are given.
    """
    if average is not None and op is not None:
        raise ValueError("give op= or average=, not both; average= is Horovod's older spelling")
    mean = average is not False
    return _face.allreduce(
        value, name, mean, prescale_factor, postscale_factor, op, compression, process_set
    )
