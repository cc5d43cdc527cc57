"""Keep the ranks' copies of a model equal: broadcast, compare, gather objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from hvdx import world
from hvdx.agreement import check_same, next_name
from hvdx.frameworks import Adapter, framework_of_kind, kind_of


def broadcast_parameters(params: Any, root_rank: int = 0, process_set: Any = None) -> None:
    """Overwrite ``params`` on every rank with those of ``root_rank``, in place.

    Names, shapes and dtypes are compared first. Any dtype travels, bool and bfloat16 too
    (Horovod refuses both).

    Args:
        params: an ``nn.Module``, its ``state_dict()`` or ``named_parameters()``; a Keras
            model, layer or optimizer; a list of tensors or variables.
        root_rank: global rank to copy from.
        process_set: the ranks that take part; all by default.

    Raises:
        MismatchError: ranks hold different parameters (raised on every rank).
        ValueError: a Keras model has no variables yet; build it first.
    """
    adapter, tensors = named_tensors(params)
    process_set = world.own_set(adapter.framework, process_set)
    name = next_name("parameters", process_set)
    check_same(adapter, "parameters to broadcast", _described(adapter, tensors), name, process_set)
    adapter.broadcast_tensors(tensors, root_rank, name, process_set)


def broadcast_optimizer_state(
    optimizer: Any, root_rank: int = 0, model: Any = None, process_set: Any = None
) -> None:
    """Give ``optimizer`` the state and options of the root's.

    Args:
        optimizer: a ``torch.optim.Optimizer`` or a built Keras optimizer.
        root_rank: global rank to copy from.
        model: accepted for Horovod's sake and not needed.
        process_set: the ranks that take part; all by default.

    Raises:
        MismatchError: the ranks' optimizers hold other parameters (raised on every rank).
        ValueError: the optimizer is LBFGS, as with Horovod.
    """
    library = kind_of(type(optimizer))
    if library == "keras":
        broadcast_parameters(optimizer, root_rank, process_set)
    elif library == "torch":
        own = world.own_set("torch", process_set)
        world.core("torch").broadcast_optimizer(optimizer, root_rank, own)
    else:
        raise TypeError(f"{type(optimizer).__name__} is no torch or Keras optimizer")


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: Any = None,
    *,
    framework: str | None = None,
) -> Any:
    """Return the root's picklable ``obj`` on every rank.

    Args:
        obj: only the root's matters.
        root_rank: global rank whose object it is.
        name: of the operation; equal on all ranks.
        process_set: the ranks that take part; all by default.
        framework: whose core carries it; the first that runs by default.
    """
    adapter = world.core(framework)
    process_set = world.own_set(adapter.framework, process_set)
    name = name or next_name("object", process_set)
    return adapter.broadcast_object(obj, root_rank, name, process_set)


def allgather_object(
    obj: Any, name: str | None = None, process_set: Any = None, *, framework: str | None = None
) -> list[Any]:
    """Return a list of every rank's picklable ``obj``, in rank order.

    Arguments as of :func:`broadcast_object`.
    """
    adapter = world.core(framework)
    process_set = world.own_set(adapter.framework, process_set)
    return adapter.allgather_object(obj, name or next_name("objects", process_set), process_set)


def parameter_hash(params: Any) -> str:
    """Return a hash of names, dtypes and bytes of ``params``: equal replicas, equal hashes.

    Args:
        params: what :func:`broadcast_parameters` takes. No communication.
    """
    adapter, tensors = named_tensors(params)
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = adapter.to_numpy(tensor)
        whole.update(f"{name} {adapter.dtype_name(tensor)} {array.shape}".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()[:16]


def named_tensors(params: Any) -> tuple[Adapter, dict[str, Any]]:
    """Return the core that serves ``params`` and its tensors by name, in a fixed order."""
    library = kind_of(type(params))
    if library == "keras":
        return world.core(framework_of_kind("keras")), _keras_tensors(params)
    if library in ("torch", "tensorflow"):
        adapter = world.core(library)
        return adapter, adapter.named_tensors(params)
    pairs = params
    if isinstance(params, Mapping):  # ranks may have filled it in another order
        pairs = sorted(params.items(), key=lambda item: str(item[0]))
    tensors = _unique(_named(pairs))
    libraries = {kind_of(type(tensor)) for tensor in tensors.values()}
    if libraries == {"keras"}:
        adapter = world.core(framework_of_kind("keras"))
        return adapter, {name: variable.value for name, variable in tensors.items()}
    if len(libraries) != 1 or not libraries <= {"torch", "tensorflow"}:
        raise TypeError(
            f"parameters of {' and '.join(sorted(map(str, libraries))) or 'no framework'} given; "
            "give a model, its state_dict(), or tensors of one framework that can be written to"
        )
    return world.core(libraries.pop()), tensors


def _named(pairs: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    for index, entry in enumerate(pairs):
        if isinstance(entry, tuple) and len(entry) == 2:
            name, tensor = entry
        else:
            name, tensor = getattr(entry, "path", None) or str(index), entry
        if kind_of(type(tensor)) is not None and not isinstance(tensor, (int, float)):
            yield str(name), tensor


def _keras_tensors(owner: Any) -> dict[str, Any]:
    if hasattr(owner, "value") and hasattr(owner, "path"):
        variables = [owner]
    else:  # models and layers; optimizers and metrics
        variables = owner.weights if hasattr(owner, "weights") else owner.variables
    if not variables:
        raise ValueError(
            f"{type(owner).__name__} {owner.name!r} has no variables yet; build it, or call it once"
        )
    return _unique((variable.path, variable.value) for variable in variables)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Name all, in order; Keras allows two variables of one path."""
    named: dict[str, Any] = {}
    for name, value in pairs:
        free, copy = name, 0
        while free in named:
            copy += 1
            free = f"{name}#{copy}"
        named[free] = value
    return named


def _described(adapter: Adapter, tensors: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{adapter.dtype_name(tensor)} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
    }
