"""``hvd.Pipeline`` and ``hvd.plan`` for either framework."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hvdx.frameworks import kind_of

if TYPE_CHECKING:
    from hvdx.pipeline.dry_run import DryRun
    from hvdx.pipeline.plan import Plan

_PIPELINES = {
    "torch": "hvdx.integrations.pytorch_pipeline",
    "keras": "hvdx.integrations.keras3_pipeline",
}
_PROFILERS = {"torch": "hvdx.integrations.pytorch_profile"}


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
    return importlib.import_module(_module(model, _PIPELINES)).Pipeline(model, *args, **options)


def plan(model: Any, sample: Any, ranks: int, **options: Any) -> Plan:
    """Cut and schedule ``model`` for ``ranks`` ranks, by what it takes here; launch nothing.

    Args:
        model: a ``torch.nn.Module``.
        sample: a batch, which is cut into micro-batches to measure the model.
        ranks: of the pipeline.
        **options: ``by`` (``"time"``, ``"params"`` or ``"memory"``), ``micro_batches`` (8),
            ``schedule`` (``"auto"``), ``stages``, ``memory``, ``leaves`` and rows of ranks, or
            ``"auto"``, as ``place`` as of
            :class:`hvdx.integrations.pytorch_pipeline.Pipeline`; ``link``, a
            :class:`hvdx.pipeline.plan.Link`, by default between processes of one machine.

    Returns:
        A plan, for ``Pipeline(..., stages=plan)`` or ``plan.save("plan.json")``.

    Raises:
        PlanError: it cannot be done; the message says why, and what can be.
    """
    return dry_run(model, sample, ranks, **options).plan


def dry_run(model: Any, sample: Any, ranks: int, **options: Any) -> DryRun:
    """Plan as :func:`plan` does; return with it what it was made of."""
    from hvdx.pipeline import dry_run as dry

    return dry.dry_run(_module(model, _PROFILERS), model, sample, ranks, **options)


def _module(model: Any, modules: Mapping[str, str]) -> str:
    """Return the one for the model's framework."""
    kind = type(model)
    framework = kind_of(kind) or ""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if framework not in _PIPELINES:
        raise TypeError(
            f"{name} is no model that a pipeline can cut; give a torch.nn.Module or a keras.Model"
        )
    if framework not in modules:
        raise TypeError(
            f"{name} cannot be planned without ranks yet, only a torch.nn.Module; let the job "
            "measure it: hvd.Pipeline(..., schedule='auto')"
        )
    return modules[framework]
