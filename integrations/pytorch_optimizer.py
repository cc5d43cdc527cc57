"""PyTorch's ``DistributedOptimizer``: the user's optimizer, with hooks on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hvdx import world
from hvdx.compression import as_compressor, as_local, fp16, none
from hvdx.compression.base import refuse_momentum
from hvdx.integrations.pytorch_optimizer_adasum import DeltaStepper
from hvdx.integrations.pytorch_optimizer_local import METHODS as LOCAL_METHODS
from hvdx.integrations.pytorch_optimizer_local import LocalStepper
from hvdx.integrations.pytorch_optimizer_reducer import METHODS as REDUCER_METHODS
from hvdx.integrations.pytorch_optimizer_reducer import Reducer
from hvdx.integrations.pytorch_optimizer_servers import METHODS as SERVER_METHODS
from hvdx.integrations.pytorch_optimizer_servers import ServedReducer, check_elementwise
from hvdx.integrations.pytorch_optimizer_wrapper import Options
from hvdx.reduce_op import ReduceOp
from hvdx.servers import checked_servers, refuse_measuring

_METHODS = ("synchronize", "skip_synchronize", "set_backward_passes_per_step")


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
    sync: str = "allreduce",
    servers: Sequence[int] | None = None,
) -> torch.optim.Optimizer:
    """Make ``optimizer`` average gradients over the ranks; returns the same object.

    Gradients are averaged in flat buckets while ``backward()`` goes on, and are averaged when
    it returns: clip, log and unscale them as in a single process. ``scaler.step(optimizer)`` of
    a ``torch.amp.GradScaler`` finds infinities in the means, so that all ranks skip a step or
    none. The optimizer keeps its class, state, defaults and schedulers, and gains
    ``synchronize()``, ``skip_synchronize()``, ``no_sync()``, ``set_backward_passes_per_step()``,
    ``communication_seconds`` and what belongs to compression, below.

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

    A compressor may keep something from step to step: what it has not delivered yet, above all.
    ``state_dict()`` stays that of the plain optimizer, which loads it and the other way round, as
    scripts do in which rank 0 alone saves. What compressors keep differs from rank to rank and is
    saved besides::

        torch.save({"optimizer": optimizer.state_dict(),
                    "compression": optimizer.compression_state()}, f"checkpoint.{hvd.rank()}")

    ``optimizer.load_compression_state(state)``, before or after the first step, then goes on to
    the last bit, with the same number of ranks. For any other number, or for one file, save what
    ``optimizer.portable_compression_state()`` returns: all ranks call it, and it is equal on all,
    of about the size of the model. Loaded on all ranks, or on one, what is owed is the same as
    before but for rounding. Left out, training starts with nothing owed. Take states after
    ``step()``; a parameter that a state does not know starts afresh. In elastic training the
    ranks that are left bring what they owe by themselves; what a dead rank owed is lost.

    With a ``GradScaler``, say ``optimizer.loss_scale = scaler.get_scale``: what is owed is then
    kept unscaled, since the scale changes. A step that is skipped changes nothing that is kept.

    With ``compression=hvd.Compression.local_sgd(steps)`` or ``diloco(...)`` gradients are not
    averaged either: each rank takes ``steps`` steps of its own (calls of ``step()``, also those
    in which a ``GradScaler`` finds an overflow: that rank does without), and what they have
    changed is averaged at the end of the last one. Parameters must be equal at the start; then
    they are after each such round. ``optimizer.flush()``, on all ranks, ends a round early, as at
    the end of training or before replicas are compared or saved. Gradients, clipping, closures,
    ``backward_passes_per_step`` and the state of ``optimizer`` are each rank's own;
    ``synchronize()``, ``skip_synchronize()`` and ``no_sync()`` do nothing. Buffers, such as
    ``BatchNorm`` statistics, are not averaged: broadcast them before saving. A parameter that is
    frozen is averaged as it was left, one added or unfrozen from then on. Where parameters are
    replaced during training, ``optimizer.load_compression_state({})`` begins anew from them.

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

        sync: ``"allreduce"``, or ``"parameter_server"``: servers own parts of the parameters. Means
            go to their owners, which alone step the optimizer there, and its results to all; so
            each server keeps one part of the optimizer's state. After ``backward()`` a gradient is
            the mean where this rank owns it, and elsewhere zeros but for one number, which gives
            it the mean's norm, so that ``clip_grad_norm_`` and ``GradScaler`` do as always. What
            must see every element of a mean does not work. See docs/synchronization.md.
        servers: ranks that own parts; by default all, which is ZeRO's first stage.

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
    adapter, own_set = world.core("torch"), _set_of_ranks(process_set)
    ranks = range(adapter.ranks(None)) if own_set is None else own_set.ranks
    places = checked_servers(sync, servers, list(ranks))
    if places is not None:
        _check_served(optimizer, ReduceOp.of(op), local)
        refuse_measuring(as_compressor(compression))
    options = Options(
        _names(optimizer, named_parameters),
        none if local is not None else as_compressor(compression),
        ReduceOp(op),
        own_set,
        _checked_groups(groups),
        sparse_as_dense,
    )
    for place, group in enumerate(optimizer.param_groups):
        kind = f"{type(optimizer).__name__} (group {place})"
        refuse_momentum(options.compressor, kind, group)
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
    elif places is not None:
        served = ServedReducer(optimizer, options, backward_passes_per_step, places)
        served.attach(SERVER_METHODS)
    else:
        Reducer(optimizer, options, backward_passes_per_step).attach(REDUCER_METHODS)
    return optimizer


def _check_served(optimizer: torch.optim.Optimizer, op: ReduceOp, local: Any) -> None:
    """Refuse what parameter servers cannot do."""
    if local is not None or op == ReduceOp.Adasum:
        what = f"compression={local}" if local is not None else "op=hvd.Adasum"
        raise ValueError(
            f"sync='parameter_server' with {what}: there, each rank steps on all parameters by "
            "itself; leave one of them out"
        )
    check_elementwise(optimizer)


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
