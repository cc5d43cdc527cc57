"""Do replicas still hold the same parameters? Bits are compared, so that NaN equal NaN.

Each rank adds up its parameters' bits, as whole numbers with a weight by place: exact in any
order, on the device where they are, at about the speed of reading them. Ranks exchange one short
hash of all sums; only where hashes differ do they look which parameter it is.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from hvdx import world
from hvdx.agreement import first_difference, next_name
from hvdx.errors import MismatchError
from hvdx.frameworks import Adapter, kind_of
from hvdx.ops import Ops, ops_for
from hvdx.replicas import named_tensors

_ELEMENTS = 1 << 22  # that are looked at together: bounds memory
_calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _forget() -> None:
    """Count from the start when the job does, as ranks do that have joined."""
    if not world.running():
        _calls.clear()


world.on_change(_forget)


def check_consistency(model: Any, every: int = 1, process_set: Any = None) -> None:
    """Stop training where replicas have drifted apart; say which parameter is the first to differ.

    A line for the training loop, after the optimizer's step, on all ranks: it counts its calls,
    and compares in each ``every``-th. Bits are compared, of trainable parameters and frozen ones;
    buffers such as the statistics of batch normalization, which each rank has of its own data,
    are not. To compare these too, give ``model.state_dict()``.

    With ``compression=hvd.Compression.local_sgd(...)`` or ``diloco(...)`` replicas differ within
    a round: check after ``optimizer.flush()``. A pipeline's ranks are no replicas.

    Args:
        model: an ``nn.Module`` or a Keras model. With ``every=1`` also what
            :func:`hvdx.broadcast_parameters` takes: a ``state_dict()``, or a list of tensors.
        every: calls from one comparison to the next; equal on all ranks.
        process_set: the ranks that compare; all by default.

    Raises:
        MismatchError: parameters differ, in bits, names or shapes; raised on every rank.
        ValueError: ``every`` is no number from 1, or ``model`` is none.

    Example:
        >>> for x, y in batches:
        ...     train(x, y)
        ...     hvd.check_consistency(model, every=100)
    """
    if type(every) is not int or every < 1:
        raise ValueError(f"check_consistency(every={every!r}): give a number from 1")
    if every > 1 and not _due(model, every):
        return
    adapter, tensors = named_tensors(_parameters(model))
    process_set = world.own_set(adapter.framework, process_set)
    name = next_name("consistency", process_set)
    with adapter.at_once():
        sums = checksums(adapter, tensors)
    told = [(key, f"{adapter.dtype_name(t)} {tuple(t.shape)}") for key, t in tensors.items()]
    own = hashlib.blake2b(repr(told).encode(), digest_size=16)
    for each in sums.values():
        own.update(each.tobytes())
    everyone = adapter.allgather_object(own.digest(), name, process_set)
    if len(set(everyone)) > 1:
        _explain(adapter, tensors, sums, told, name, process_set)


def _due(model: Any, every: int) -> bool:
    try:
        _calls[model] = count = _calls.get(model, 0) + 1
    except TypeError:
        raise ValueError(
            f"check_consistency(every={every}) counts the calls for a model, and this is a "
            f"{type(model).__name__}: give the model, or count yourself and leave out every="
        ) from None
    return count % every == 0


def _parameters(model: Any) -> Any:
    """Return what replicas have alike."""
    library = kind_of(type(model))
    if library == "keras" and hasattr(model, "trainable_variables"):
        return list(model.trainable_variables)
    if library == "torch" and hasattr(model, "named_parameters"):
        return list(model.named_parameters())
    return model


def checksums(adapter: Adapter, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return by name sums of a tensor's bits, one for each run of elements; int64."""
    found = {name: list(_sums(tensor)) for name, tensor in tensors.items()}
    devices: dict[str, list[Any]] = {}
    for own in found.values():
        for each in own:
            devices.setdefault(str(getattr(each, "device", "")), []).append(each)
    # One way to the host for each device.
    read = {
        id(each): value
        for own in devices.values()
        for each, value in zip(own, _to_host(adapter, own), strict=True)
    }
    return {
        name: np.array([read[id(each)] for each in own], np.int64) for name, own in found.items()
    }


def _to_host(adapter: Adapter, sums: list[Any]) -> np.ndarray:
    return np.asarray(adapter.to_numpy(ops_for(type(sums[0])).concat(sums)))


def _sums(tensor: Any) -> Iterator[Any]:
    """Yield sums of shape (1,)."""
    tensor = tensor.detach() if hasattr(tensor, "detach") else tensor
    ops = ops_for(type(tensor))
    for run in _runs(ops, tensor):
        data = ops.to_bytes(run)
        size = int(data.shape[0])
        words = ops.from_bytes(data[: size // 8 * 8], "int64")
        total = ops.sum(words * _weights(ops, words))
        if size % 8:
            rest = ops.cast(data[size // 8 * 8 :], "int64")
            total = total + ops.sum(rest * _weights(ops, rest))
        yield ops.reshape(total, (1,))


def _runs(ops: Ops, tensor: Any) -> Iterator[Any]:
    flat = ops.reshape(tensor, (-1,))
    if ops.dtype(flat) == "bool":
        flat = ops.cast(flat, "uint8")
    for start in range(0, int(flat.shape[0]), _ELEMENTS):
        yield flat[start : start + _ELEMENTS]


def _weights(ops: Ops, like: Any) -> Any:
    """Return odd numbers, a different one for each place: opposite changes do not cancel."""
    return _longest(type(ops), str(getattr(like, "device", "")))[: int(like.shape[0])]


@functools.lru_cache(maxsize=8)
def _longest(ops: type[Ops], device: str) -> Any:
    numbers = ops().arange(_ELEMENTS) * 2 + 1
    return numbers.to(device) if hasattr(numbers, "to") and device else numbers


def _explain(
    adapter: Adapter,
    tensors: dict[str, Any],
    sums: dict[str, np.ndarray],
    told: list[tuple[str, str]],
    name: str,
    process_set: Any,
) -> None:
    """Raise, on every rank, with the first parameter that differs."""
    everyone = adapter.allgather_object((told, sums), f"{name}/sums", process_set)
    ranks = list(process_set.ranks) if process_set is not None else list(range(len(everyone)))
    names = [own for own, _ in everyone]
    if any(own != names[0] for own in names):
        raise MismatchError(f"ranks hold different parameters: {first_difference(names)}")
    differing = [
        key
        for key in tensors
        if any(not np.array_equal(own[key], sums[key]) for _, own in everyone)
    ]
    first = differing[0]
    others = [place for place, (_, own) in enumerate(everyone)
              if not np.array_equal(own[first], everyone[0][1][first])]  # fmt: skip
    theirs = everyone[others[0]][1][first]
    run = int(np.flatnonzero(theirs != everyone[0][1][first])[0])
    where = _where(adapter, tensors[first], run, others[0], name, process_set)
    raise MismatchError(
        f"replicas have drifted apart: {len(differing)} of {len(tensors)} parameters are not equal "
        f"on all ranks. The first is {first!r}, {dict(told)[first]}: ranks "
        f"{[ranks[place] for place in others]} hold other bits than rank {ranks[0]}"
        f"{where.format(ranks[0], ranks[others[0]])}. Ranks may have skipped a step, changed "
        "parameters by hand, or begun without hvd.broadcast_parameters(model); go on from a "
        "checkpoint once that is mended"
    )


def _where(adapter: Adapter, tensor: Any, run: int, other: int, name: str, process_set: Any) -> str:
    """Tell the first element in which two ranks differ: rank 0 of the set, and ``other``."""
    root = 0 if process_set is None else process_set.ranks[0]
    place, ops = adapter.place(process_set), ops_for(type(tensor))
    own = list(_runs(ops, tensor.detach() if hasattr(tensor, "detach") else tensor))[run]
    data = np.asarray(adapter.to_numpy(ops.to_bytes(own)))
    wide = len(data) // int(own.shape[0])
    theirs = adapter.broadcast_object(data, root, f"{name}/values", process_set)
    different = np.flatnonzero((data != theirs).reshape(-1, wide).any(-1))
    index = int(different[0]) if place == other else 0
    index = adapter.allgather_object(index, f"{name}/index", process_set)[other]
    values = adapter.allgather_object(repr(_plain(own[index])), f"{name}/element", process_set)
    flat = run * _ELEMENTS + index
    at = tuple(int(i) for i in np.unravel_index(flat, tuple(tensor.shape)))
    return f", at {at}: {values[0]} on rank {{}}, {values[other]} on rank {{}}"


def _plain(element: Any) -> Any:
    return element.item() if hasattr(element, "item") else float(element)
