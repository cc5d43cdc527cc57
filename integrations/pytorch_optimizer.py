"""PyTorch's ``DistributedOptimizer``: the user's optimizer, with hooks on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hvdx import world
from hvdx.compression import CompressionError, Compressor, as_compressor, as_local, fp16, none
from hvdx.integrations.pytorch_optimizer_adasum import DeltaStepper
from hvdx.integrations.pytorch_optimizer_local import METHODS as LOCAL_METHODS
from hvdx.integrations.pytorch_optimizer_local import LocalStepper
from hvdx.integrations.pytorch_optimizer_reducer import Reducer
from hvdx.integrations.pytorch_optimizer_wrapper import Options
from hvdx.reduce_op import ReduceOp

_METHODS = ("synchronize", "skip_synchronize", "set_backward_passes_per_step")
_REDUCER_METHODS = (
    *_METHODS,
    "no_sync",
    "compression_state",
    "portable_compression_state",
    "load_compression_state",
)


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: torch.nn.Module | Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = none,
    backward_passes_per_step: int = 1,
    op: int = ReduceOp.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
) -> torch.optim.Optimizer:
    """Make ``optimizer`` average gradients over the ranks; returns the same object.

    Gradients are averaged in flat buckets while ``backward()`` goes on, and are averaged when
    it returns: clip, log and unscale them as in a single process. ``scaler.step(optimizer)`` of
    a ``torch.amp.GradScaler`` finds infinities in the means, so that all ranks skip a step or
    none. The optimizer keeps its class, state, defaults and schedulers, and gains
    ``synchronize()``, ``skip_synchronize()``, ``no_sync()``, ``set_backward_passes_per_step()``
    and ``communication_seconds``.

    Differences from Horovod's: the optimizer is not rebuilt, so that state is kept;
    ``zero_grad(set_to_none=...)`` works, at any time; a parameter that no rank used keeps
    ``grad=None``, one that some ranks used gets the mean with zeros for the others; parameters
    added to the optimizer or unfrozen later are averaged too; any number of ``backward()`` calls
    may come before ``step()``, from any number of losses, for any number of optimizers. Before
    the first average, ranks compare models and options, and warn where parameters or the
    optimizer's options (learning rate) differ: somebody forgot to broadcast.

    With ``op=hvd.Adasum`` gradients are not averaged: each rank steps by its own, and the
    changes are combined in ``step()``, tensor by tensor. Unlike Horovod's it needs no MPI, no
    power of two of ranks, and takes process sets. As with Horovod's, a ``GradScaler`` cannot be
    used with it, since ranks would skip steps each for itself.

    Args:
        optimizer: any first-order ``torch.optim.Optimizer`` of float16, bfloat16, float32 or
            float64 parameters.
        named_parameters: the model, or its ``named_parameters()``; names for messages and
            compressors. Without it, parameters are named by their place.
        compression: a compressor of ``hvd.Compression`` or a Horovod ``Compressor`` class.
            Sparse gradients travel as they are.
        backward_passes_per_step: gradients of so many ``backward()`` calls are summed on this
            rank before they are averaged; calls that give only some parameters a gradient
            count too (Horovod counts for each parameter). After fewer, as at the end of an
            epoch, ``step()`` averages; a ``GradScaler`` must see means before, so call
            ``synchronize()`` first.
        op: ``hvd.Average``, ``hvd.Sum`` or ``hvd.Adasum``.
        gradient_predivide_factor: accepted for Horovod's sake, with Average: gradients are
            always divided before they are summed.
        num_groups: Horovod's older spelling of an integer ``groups``.
        groups: which gradients are averaged together, whatever the size of buckets
            (``HVDX_BUCKET_MB``): a list of lists of parameters, or into how many groups to cut
            them. Parameters in no group travel in buckets as usual.
        sparse_as_dense: send sparse gradients (of ``Embedding(sparse=True)``) as dense ones:
            better where most rows have a gradient. Either way they are sparse again when
            averaged, as ``SparseAdam`` wants them.
        process_set: the ranks to average over; all by default. Ranks outside train alone.

    Raises:
        TypeError: ``optimizer`` is wrapped already or is none.
        ValueError: an option has no meaning here, or a parameter is of another dtype; the
            message names it.
        NotInitializedError: ``hvd.init()`` has not been called.
        MismatchError: at the first step, on every rank, where models, optimizers or options
            differ between ranks.
    """
    _refuse_optimizer(optimizer)
    if ReduceOp.of(op) not in (ReduceOp.Average, ReduceOp.Sum, ReduceOp.Adasum):
        raise ValueError(
            f"DistributedOptimizer(op={ReduceOp.of(op).name}): use hvd.Average, hvd.Sum or "
            "hvd.Adasum"
        )
    if gradient_predivide_factor != 1.0 and op != ReduceOp.Average:
        raise ValueError("gradient_predivide_factor needs op=hvd.Average")
    if not gradient_predivide_factor > 0:
        raise ValueError(f"gradient_predivide_factor={gradient_predivide_factor} is not positive")
    if num_groups != 0:
        warnings.warn("num_groups is now called groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    local = as_local(compression)
    if local is not None and op != ReduceOp.Average:
        raise ValueError(
            f"DistributedOptimizer(op={ReduceOp.of(op).name}, compression={local}): what ranks "
            "have learnt alone is averaged; use op=hvd.Average"
        )
    world.core("torch")
    options = Options(
        _names(optimizer, named_parameters),
        as_compressor(compression) if local is None else local.outer,
        ReduceOp(op),
        _set_of_ranks(process_set),
        _checked_groups(groups),
        sparse_as_dense,
    )
    _refuse_momentum(optimizer, options.compressor)
    if local is not None:
        local_stepper = LocalStepper(optimizer, options, local)
        local_stepper.set_backward_passes_per_step(backward_passes_per_step)
        local_stepper.attach(LOCAL_METHODS)
    elif options.op == ReduceOp.Adasum:
        if options.compressor not in (none, fp16):
            raise ValueError(f"op=hvd.Adasum takes no compression={options.compressor}")
        stepper = DeltaStepper(optimizer, options)
        stepper.set_backward_passes_per_step(backward_passes_per_step)
        stepper.attach(_METHODS)
    else:
        Reducer(optimizer, options, backward_passes_per_step).attach(_REDUCER_METHODS)
    return optimizer


def _refuse_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is no torch.optim.Optimizer")
    if hasattr(optimizer, "reducer"):
        raise TypeError("this optimizer is wrapped by hvdx.DistributedOptimizer already")
    if hasattr(optimizer, "_allreduce_delay"):
        raise TypeError(
            "this optimizer is wrapped by horovod.torch.DistributedOptimizer already; wrap the "
            "plain one, once"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS decides from each rank's own loss how often to evaluate, so that ranks would "
            "wait for each other for ever; use a first-order optimizer"
        )


def _refuse_momentum(optimizer: torch.optim.Optimizer, compressor: Compressor) -> None:
    if compressor.owns_momentum:
        for place, group in enumerate(optimizer.param_groups):
            for option in ("momentum", "betas"):
                value = group.get(option)
                if value and value != (0.0, 0.0):
                    raise CompressionError(
                        f"compression={compressor} applies momentum itself, and group {place} of "
                        f"{type(optimizer).__name__} would do so once more ({option}={value}): "
                        "use torch.optim.SGD(..., momentum=0)"
                    )


def _names(
    optimizer: torch.optim.Optimizer,
    named: torch.nn.Module | Iterable[tuple[str, torch.Tensor]] | None,
) -> Mapping[torch.Tensor, str]:
    """Return names of parameters, unique, and of all in ``optimizer`` if any are given."""
    names: Mapping[torch.Tensor, str] = WeakIdKeyDictionary()
    if named is None:
        return names
    pairs = list(named.named_parameters() if isinstance(named, torch.nn.Module) else named)
    if any(not (isinstance(pair, tuple) and len(pair) == 2) for pair in pairs):
        raise ValueError(
            "named_parameters must be the model or its named_parameters(), not parameters()"
        )
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in pairs:
        if seen.setdefault(name, parameter) is not parameter:
            raise ValueError(f"two parameters are named {name!r} in named_parameters")
    names = WeakIdKeyDictionary({parameter: name for name, parameter in reversed(pairs)})
    missing = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if missing:
        raise ValueError(
            f"{missing} parameters of the optimizer are not in named_parameters; give the model "
            "that the optimizer was made for"
        )
    return names


def _set_of_ranks(process_set: Any) -> Any:
    """Return ``process_set``, or None for the set of all ranks."""
    if process_set is None or process_set.process_set_id == 0:
        return None
    if process_set.process_set_id is None:
        raise ValueError(
            f"process set {process_set.ranks} is not known to Horovod: give it to "
            "hvd.init(process_sets=[...]), or to hvd.add_process_set()"
        )
    return process_set


def _checked_groups(groups: Any) -> int | list[list[int]] | None:
    """Return ``groups``, a positive number or lists in which no parameter comes twice, as ids."""
    if groups is None:
        return None
    if isinstance(groups, int):
        if groups <= 0:
            raise ValueError(f"groups={groups} must be positive, or a list of lists of parameters")
        return groups
    if not isinstance(groups, (list, tuple)):
        raise ValueError(
            f"groups is a {type(groups).__name__}; give a number, or a list of lists of parameters"
        )
    seen: set[int] = set()
    for place, group in enumerate(groups):
        if not isinstance(group, (list, tuple)):
            raise ValueError(f"groups[{place}] is a {type(group).__name__}, not a list")
        for parameter in group:
            if not isinstance(parameter, torch.Tensor):
                raise ValueError(
                    f"groups[{place}] holds a {type(parameter).__name__}, not a parameter"
                )
            if id(parameter) in seen:
                raise ValueError(f"a parameter of groups[{place}] appears twice in groups")
            seen.add(id(parameter))
    return [[id(parameter) for parameter in group] for group in groups]
