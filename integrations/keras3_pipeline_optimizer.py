"""The optimizer of a Keras pipeline: each rank's own, for the variables of its stages."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from hvdx.errors import PlanError
from hvdx.integrations.keras3_graph import size as size_of
from hvdx.integrations.keras_loss_scale import LossScale

_MEASURED = 1 << 26  # bytes of variables on which the optimizer is measured, and the one more
_UPDATES = 5  # of an optimizer, to measure it; the first makes its functions


def built(
    told: Any, policy: str, params: Mapping[str, Any], across: bool
) -> tuple[Any, LossScale | None]:
    """Return the optimizer, built for a process' variables, and its loss scale.

    Args:
        told: as a user gives it.
        policy: the model's dtype policy.
        params: what the process trains.
        across: whether there are other ranks.

    Raises:
        PlanError: it does what a stage's optimizer cannot do, or has other variables already.
    """
    if told is None:
        return None, None
    optimizer = keras.optimizers.get(told)
    scaling = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if policy == "mixed_float16" and not scaling:
        optimizer, scaling = keras.optimizers.LossScaleOptimizer(optimizer), True
    limit = getattr(optimizer, "inner_optimizer", optimizer).global_clipnorm
    if across and limit:
        raise PlanError(
            f"global_clipnorm={limit} needs the norm over all ranks, which an optimizer does "
            f"not know: give it to the pipeline, as clip_norm={limit}"
        )
    if optimizer.built:
        raise PlanError(
            f"optimizer {optimizer.name!r} is built for other variables already; give a new one"
        )
    if params or scaling:  # all ranks follow the scale
        optimizer.build(list(params.values()))
    return optimizer, LossScale(optimizer) if scaling else None


def measured(
    told: Any, trained: Sequence[Any], apply: Callable[[Any, Sequence[Any], Sequence[Any]], None]
) -> tuple[float, float]:
    """Return the seconds, and bytes of state, that an optimizer takes per byte of variables.

    Args:
        told: the optimizer, as a user gives it; an equal one is measured.
        trained: variables, of which the first are enough; they change.
        apply: steps an optimizer with gradients and their variables.
    """
    variables: list[Any] = []
    most = _MEASURED
    for variable in trained:
        if not variables or most > 0:
            variables.append(variable)
            most -= size_of(variable)
    if not variables:
        return 0.0, 0.0
    optimizer = keras.optimizers.get(anew(told))
    optimizer.build(variables)
    gradients = [keras.ops.full_like(each, 1e-3) for each in variables]
    taken = []
    for _ in range(_UPDATES):
        start = time.perf_counter()
        apply(optimizer, gradients, variables)
        keras.ops.convert_to_numpy(keras.ops.reshape(variables[-1], (-1,))[:1])  # it is done
        taken.append(time.perf_counter() - start)
    size = sum(map(size_of, variables))
    state = sum(size_of(each) for each in optimizer.variables if each.shape)
    return statistics.median(taken[1:]) / size, state / size


def pass_by(optimizer: Any) -> None:
    """Let a step go by that changes no variable here; schedules, and Nadam's product, go on."""
    if hasattr(optimizer, "_u_product"):
        product, beta = optimizer._u_product, optimizer.beta_1
        factor = 1.0 - 0.5 * keras.ops.power(
            keras.ops.cast(0.96, product.dtype),
            keras.ops.cast(optimizer.iterations + 1, product.dtype),
        )
        on_torch = keras.backend.backend() == "torch"  # in its order, to the same bits
        product.assign(product * (beta * factor) if on_torch else product * beta * factor)
    optimizer.iterations.assign_add(1)


def anew(optimizer: Any) -> Any:
    """Return an equal optimizer that has no variables yet."""
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return type(optimizer).from_config(optimizer.get_config())
    return optimizer


def summary(optimizer: Any) -> str:
    """Tell an optimizer's class and options, for other ranks to compare with."""
    if optimizer is None:
        return "none"
    options = {k: v for k, v in optimizer.get_config().items() if k != "name"}
    return f"{type(optimizer).__qualname__} {options}"
