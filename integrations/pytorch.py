"""PyTorch's side of the shared API: Horovod's torch core behind the :class:`Adapter` verbs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from horovod.common.exceptions import HorovodInternalError

from hvdx.agreement import next_name
from hvdx.integrations import pytorch_engine
from hvdx.mismatch import explain, is_mismatch
from hvdx.objects import pickled, unpickled
from hvdx.reduce_op import ReduceOp
from hvdx.watchdog import add_source, waiting, watched

add_source(pytorch_engine.blocked)
_BROADCAST_BYTES = 64 << 20  # parameters travel in pieces of this size

#: What Horovod reduces; all else is summed in float32 or refused.
_REDUCIBLE = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.uint8,
     torch.int8}
)  # fmt: skip
_MOVABLE = _REDUCIBLE | {torch.int16}

Call = TypeVar("Call", bound=Callable[..., Any])


def _explained(call: Call) -> Call:
    """Say on every rank what each submitted, where Horovod only says that they differ."""

    @functools.wraps(call)
    def checked(self: TorchAdapter, tensors: Any, **options: Any) -> Any:
        try:
            with waiting(call.__name__, options["name"], tensors, options["process_set"]):
                return call(self, tensors, **options)
        except HorovodInternalError as error:
            if not is_mismatch(error):
                raise
            given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            raise explain(
                self, call.__name__, options["name"], given, options["process_set"]
            ) from None

    return checked  # type: ignore[return-value]


def dtype_name(dtype: torch.dtype) -> str:
    """Name ``dtype`` as NumPy does."""
    return str(dtype).removeprefix("torch.")


class TorchAdapter:
    """See :class:`hvdx.frameworks.Adapter` for what each method does.

    Unnamed operations are counted here, by process set. Horovod counts handles, over all
    sets: ranks outside a set fall behind, and the next unnamed operation of all ranks stalls.
    """

    framework = "torch"

    def __init__(self, horovod: Any) -> None:
        for op in ReduceOp:
            if getattr(horovod, op.name) != op:
                raise ImportError(f"Horovod numbers hvd.{op.name} otherwise than hvdx does")
        self.horovod = horovod
        self._everyone = horovod.global_process_set

    @_explained
    def allreduce(
        self,
        tensor: torch.Tensor,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> torch.Tensor:
        """Reduce; bfloat16 is summed in float32, since Horovod has no such type."""
        given = tensor
        if tensor.dtype not in _REDUCIBLE:
            tensor = _widened(tensor)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        result: torch.Tensor = self.horovod.allreduce(
            tensor,
            name=name or next_name("allreduce", process_set),
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set or self._everyone,
        )
        result = _differentiable(result)
        return result if result.dtype == given.dtype else result.to(given.dtype)

    @_explained
    def grouped_allreduce(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> list[torch.Tensor]:
        """Reduce several tensors as one operation."""
        results = self.horovod.grouped_allreduce(
            [(t if t.dtype in _REDUCIBLE else _widened(t)).contiguous() for t in tensors],
            name=name or next_name("grouped_allreduce", process_set),
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set or self._everyone,
        )
        return [
            _differentiable(result).to(given.dtype)
            for result, given in zip(results, tensors, strict=True)
        ]

    @_explained
    def allgather(
        self, tensor: torch.Tensor, *, name: str | None, process_set: Any
    ) -> torch.Tensor:
        """Gather along the first dimension."""
        with_core = functools.partial(
            self.horovod.allgather,
            name=name or next_name("allgather", process_set),
            process_set=process_set or self._everyone,
        )
        return _moved(tensor, with_core)

    @_explained
    def grouped_allgather(
        self, tensors: Sequence[torch.Tensor], *, name: str | None, process_set: Any
    ) -> list[torch.Tensor]:
        """Gather several tensors as one operation."""
        results = self.horovod.grouped_allgather(
            [_movable(tensor) for tensor in tensors],
            name=name or next_name("grouped_allgather", process_set),
            process_set=process_set or self._everyone,
        )
        return [_restored(result, given) for result, given in zip(results, tensors, strict=True)]

    @_explained
    def broadcast(
        self, tensor: torch.Tensor, *, root_rank: int, name: str | None, process_set: Any
    ) -> torch.Tensor:
        """Return the root's tensor."""
        with_core = functools.partial(
            self.horovod.broadcast,
            root_rank=root_rank,
            name=name or next_name("broadcast", process_set),
            process_set=process_set or self._everyone,
        )
        return _moved(tensor, with_core)

    @_explained
    def alltoall(
        self, tensor: torch.Tensor, *, splits: Any, name: str | None, process_set: Any
    ) -> Any:
        """Exchange slices of the first dimension."""
        if splits is not None:
            splits = torch.as_tensor(splits, dtype=torch.int32, device="cpu")
        result = self.horovod.alltoall(
            _movable(tensor),
            splits=splits,
            name=name or next_name("alltoall", process_set),
            process_set=process_set or self._everyone,
        )
        if splits is None:
            return _restored(result, tensor)
        return _restored(result[0], tensor), result[1]

    @_explained
    def reducescatter(
        self,
        tensor: torch.Tensor,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> torch.Tensor:
        """Reduce and keep this rank's slice."""
        given = tensor
        result: torch.Tensor = self.horovod.reducescatter(
            (tensor if tensor.dtype in _REDUCIBLE else _widened(tensor)).contiguous(),
            name=name or next_name("reducescatter", process_set),
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set or self._everyone,
        )
        return _differentiable(result).to(given.dtype)

    @watched
    def barrier(self, process_set: Any) -> None:
        """Wait for all ranks."""
        self.horovod.barrier(process_set=process_set or self._everyone)

    def ranks(self, process_set: Any) -> int:
        """Count the ranks of the set; asked of the set itself, which no core can confuse."""
        return len(process_set.ranks) if process_set is not None else int(self.horovod.size())

    @watched
    def join(self) -> int:
        """Say that this rank has no more data."""
        return int(self.horovod.join())

    @watched
    def broadcast_object(self, value: Any, root_rank: int, name: str, process_set: Any) -> Any:
        """Send a picklable object from the root."""
        return self.horovod.broadcast_object(value, root_rank, name, process_set or self._everyone)

    @watched
    def allgather_object(self, value: Any, name: str, process_set: Any) -> list[Any]:
        """Gather picklable objects."""
        payload = torch.frombuffer(bytearray(pickled(value)), dtype=torch.uint8)
        everyone = process_set or self._everyone
        sizes = self.horovod.allgather(
            torch.tensor([payload.numel()]), name=f"{name}.size", process_set=everyone
        )
        whole = self.horovod.allgather(payload, name=f"{name}.data", process_set=everyone)
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

    @watched
    def broadcast_tensors(
        self, tensors: dict[str, torch.Tensor], root_rank: int, name: str, process_set: Any
    ) -> None:
        """Copy the root's tensors over these, as bytes, in a few large pieces."""
        for index, piece in enumerate(_pieces(tensors.values())):
            flat = torch.cat([_bytes_of(tensor) for tensor in piece])
            self.horovod.broadcast_(
                flat, root_rank, f"{name}.{index}", process_set or self._everyone
            )
            sizes = [tensor.numel() * tensor.element_size() for tensor in piece]
            for tensor, part in zip(piece, flat.split(sizes), strict=True):
                whole = part.clone().view(tensor.dtype).view(tensor.shape)  # clone: alignment
                with torch.no_grad():
                    tensor.copy_(whole)

    def broadcast_optimizer(
        self, optimizer: torch.optim.Optimizer, root_rank: int, process_set: Any
    ) -> None:
        """Send the structure of ``state_dict()`` as an object and its tensors as tensors."""
        tensors: list[torch.Tensor] = []

        def leave(tensor: torch.Tensor) -> _Placeholder:
            tensors.append(tensor.detach())
            return _Placeholder(tensor.shape, tensor.dtype, str(tensor.device.type))

        def arrive(mark: _Placeholder) -> torch.Tensor:
            device = mark.device if mark.device == "cpu" else _device_of(optimizer)
            tensors.append(torch.empty(mark.shape, dtype=mark.dtype, device=device))
            return tensors[-1]

        name = "hvdx.optimizer"
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

    @watched
    def agree(self, number: int, name: str) -> list[int]:
        """Gather one integer per rank; the core puts ``allgather.`` before the name."""
        gathered = self.horovod.allgather(torch.tensor([number], dtype=torch.int32), name=name)
        return [int(each) for each in gathered]

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


class _Contiguous(torch.autograd.Function):
    """The identity with a contiguous gradient; Horovod's backward refuses sum()'s expanded one."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].contiguous()


def _differentiable(result: torch.Tensor) -> torch.Tensor:
    if not result.requires_grad:
        return result
    contiguous: torch.Tensor = _Contiguous.apply(result)  # type: ignore[no-untyped-call]
    return contiguous


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


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.float()
    if tensor.dtype == torch.int16:
        return tensor.int()
    raise ValueError(
        f"Horovod cannot reduce {dtype_name(tensor.dtype)} tensors; convert this one of shape "
        f"{tuple(tensor.shape)} first, bool to uint8 for instance"
    )


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` as a type that Horovod moves, of the same width where it must."""
    tensor = tensor.contiguous()
    if tensor.dtype in _MOVABLE:
        return tensor
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.element_size() not in width:
        raise ValueError(f"Horovod cannot move {dtype_name(tensor.dtype)} tensors")
    return tensor.detach().view(width[tensor.element_size()])


def _moved(tensor: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return _restored(call(_movable(tensor)), tensor)


def _restored(result: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    result = _differentiable(result)
    return result if result.dtype == given.dtype else result.view(given.dtype)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Split tensors into runs on one device of at most ``_BROADCAST_BYTES``, one at least."""
    piece: list[torch.Tensor] = []
    held = 0
    for tensor in tensors:
        weight = tensor.numel() * tensor.element_size()
        if piece and (held + weight > _BROADCAST_BYTES or tensor.device != piece[0].device):
            yield piece
            piece, held = [], 0
        piece.append(tensor)
        held += weight
    if piece:
        yield piece
