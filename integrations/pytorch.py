"""PyTorch's side of the shared API: Horovod's torch core behind the :class:`Adapter` verbs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hvdx.agreement import check_same, next_name
from hvdx.buckets import runs
from hvdx.comm import Work, sent_share
from hvdx.integrations import pytorch_engine
from hvdx.integrations.pytorch_collectives import Collectives, dtype_name
from hvdx.objects import pickled, unpickled
from hvdx.watchdog import add_source

__all__ = ["TorchAdapter", "dtype_name"]

add_source(pytorch_engine.blocked)
_BROADCAST_BYTES = 64 << 20  # parameters travel in pieces of this size


class TorchAdapter(Collectives):
    """See :class:`hvdx.frameworks.Adapter` for what each method does."""

    def take_device(self, local_rank: int) -> None:
        """Make the GPU the current one; the first is so already."""
        if not torch.cuda.is_initialized() and 0 < local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)

    def broadcast_object(self, value: Any, root_rank: int, name: str, process_set: Any) -> Any:
        """Send a picklable object from the root: its length, then its bytes."""
        mine = self.horovod.rank() == root_rank
        payload = _payload(value) if mine else torch.empty(0, dtype=torch.uint8, device="cpu")
        options = {"root_rank": root_rank, "process_set": process_set}
        length = torch.tensor([payload.numel()], device="cpu")  # whatever the default device is
        length = self.broadcast(length, name=f"{name}.size", **options)
        if not mine:
            payload = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        self._end(self.broadcast_async(payload, name=f"{name}.data", in_place=True, **options))
        return value if mine else unpickled(payload.numpy().tobytes())

    def allgather_object(self, value: Any, name: str, process_set: Any) -> list[Any]:
        """Gather picklable objects."""
        payload = _payload(value)
        sizes, whole = (
            self.allgather(tensor, name=f"{name}.{part}", process_set=process_set)
            for tensor, part in (
                (torch.tensor([payload.numel()], device="cpu"), "size"),
                (payload, "data"),
            )
        )
        return [unpickled(part.numpy().tobytes()) for part in whole.split(sizes.tolist())]

    def named_tensors(self, owner: Any) -> dict[str, torch.Tensor]:
        """Name the parameters and buffers of a module, or the tensors of other things."""
        if isinstance(owner, torch.nn.Module):
            entries: Iterable[tuple[str, Any]] = owner.state_dict().items()
        elif isinstance(owner, torch.Tensor):
            entries = [("tensor", owner)]
        elif isinstance(owner, Mapping):
            entries = owner.items()
        else:
            raise TypeError(f"{type(owner).__name__} holds no parameters that hvdx knows")
        return {name: value for name, value in entries if isinstance(value, torch.Tensor)}

    def broadcast_tensors(
        self, tensors: dict[str, torch.Tensor], root_rank: int, name: str, process_set: Any
    ) -> None:
        """Copy the root's tensors over these, as bytes, in a few large pieces."""
        for index, piece in enumerate(_pieces(tensors.values())):
            flat = torch.cat([_bytes_of(tensor) for tensor in piece])
            options = {"root_rank": root_rank, "process_set": process_set}
            self._end(self.broadcast_async(flat, name=f"{name}.{index}", in_place=True, **options))
            sizes = [tensor.numel() * tensor.element_size() for tensor in piece]
            for tensor, part in zip(piece, flat.split(sizes), strict=True):
                whole = part.clone().view(tensor.dtype).view(tensor.shape)  # clone: alignment
                with torch.no_grad():
                    tensor.copy_(whole)

    def broadcast_optimizer(
        self, optimizer: torch.optim.Optimizer, root_rank: int, process_set: Any
    ) -> None:
        """Send the structure of ``state_dict()`` as an object and its tensors as tensors."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS keeps a history that differs in length between ranks, and so cannot be "
                "kept equal; use a first-order optimizer"
            )
        if getattr(getattr(optimizer, "reducer", None), "sharded", False):
            raise ValueError(
                "with sync='parameter_server' each rank keeps its own part of the optimizer's "
                "state, and none can be broadcast. To go on from a checkpoint, load on every rank "
                "what optimizer.portable_state_dict() has returned"
            )
        name = next_name("optimizer", process_set)
        groups = enumerate(optimizer.param_groups)
        held = {
            f"group {index}": str([tuple(p.shape) for p in options["params"]])
            for index, options in groups
        }
        check_same(self, "parameters of the optimizer", held, f"{name}.groups", process_set)
        tensors: list[torch.Tensor] = []

        def leave(tensor: torch.Tensor) -> _Placeholder:
            tensors.append(tensor.detach())
            return _Placeholder(tensor.shape, tensor.dtype, str(tensor.device.type))

        def arrive(mark: _Placeholder) -> torch.Tensor:
            device = mark.device if mark.device == "cpu" else _device_of(optimizer)
            tensors.append(torch.empty(mark.shape, dtype=mark.dtype, device=device))
            return tensors[-1]

        state = optimizer.state_dict()
        is_root = self.horovod.rank() == root_rank
        outline = _mapped(state, torch.Tensor, leave) if is_root else None
        outline = self.broadcast_object(outline, root_rank, name, process_set)
        if not is_root:
            state = _mapped(outline, _Placeholder, arrive)
        named = {str(index): tensor for index, tensor in enumerate(tensors)}
        if named:
            self.broadcast_tensors(named, root_rank, f"{name}.state", process_set)
        if not is_root:
            optimizer.load_state_dict(state)

    def at_once(self) -> contextlib.AbstractContextManager[Any]:
        """Do without derivatives."""
        return torch.no_grad()

    def carry_out(self, work: Work[Any], name: str, process_set: Any) -> Any:
        """Run a generator of requests."""
        return pytorch_engine.Flight(self, work, name, process_set).finish()

    def count(self, operation: str, tensor: torch.Tensor, ranks: int) -> None:
        """Count bytes that are sent."""
        size = tensor.numel() * tensor.element_size()
        self.bytes_sent += size * sent_share(operation, ranks)

    def device_use(self) -> dict[str, float]:
        """Ask CUDA, if it is in use."""
        if not torch.cuda.is_initialized():
            return {}
        found = {
            "gpu_memory_mb": torch.cuda.memory_reserved() / 1e6,
            "peak_gpu_memory_mb": torch.cuda.max_memory_reserved() / 1e6,
        }
        with contextlib.suppress(ImportError, RuntimeError):  # without NVIDIA's management library
            found["gpu"] = torch.cuda.utilization() / 100
        return found

    def agree(self, number: int, name: str) -> list[int]:
        """Gather one integer per rank; the core puts ``allgather.`` before the name."""
        mine = torch.tensor([number], dtype=torch.int32, device="cpu")
        return [int(each) for each in self.allgather(mine, name=name, process_set=None)]

    def reduce_rows(self, tensor: Any, compressor: Any, **options: Any) -> None:
        """Leave sparse tensors to :func:`hvdx.torch.sparse_allreduce_async`."""

    def to_numpy(self, tensor: torch.Tensor) -> Any:
        """Copy to NumPy, which has no bfloat16."""
        tensor = tensor.detach().cpu()
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def from_numpy(self, array: Any) -> torch.Tensor:
        """Copy from NumPy."""
        return torch.as_tensor(array).clone()

    def dtype_name(self, tensor: torch.Tensor) -> str:
        """Name the dtype."""
        return dtype_name(tensor.dtype)


def on_host(numbers: Sequence[torch.Tensor]) -> list[Any]:
    """Return what tensors without dimensions hold, waiting for each device only once."""
    found: list[Any] = [None] * len(numbers)
    by_device: dict[torch.device, list[int]] = {}
    for place, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(place)
    for places in by_device.values():
        values = torch.stack([numbers[place] for place in places]).tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found


def _payload(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickled(value)), dtype=torch.uint8)


class _Placeholder:
    """Stands for a tensor in an outline of ``state_dict()``."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device


def _mapped(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Copy nested dictionaries, lists and tuples with every ``kind`` in them changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, kind, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, kind, change) for value in tree)
    return tree


def _device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    device: torch.device = optimizer.param_groups[0]["params"][0].device
    return device


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    return runs(
        tensors,
        lambda tensor: tensor.numel() * tensor.element_size(),
        _BROADCAST_BYTES,
        lambda tensor: tensor.device,
    )
