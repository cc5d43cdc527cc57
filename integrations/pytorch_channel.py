"""How PyTorch's tensors travel between ranks: as bytes, or by ``torch.distributed``."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, TCPStore

from hvdx.errors import HvdxError, PlanError
from hvdx.frameworks import Adapter
from hvdx.pipeline.channel import Key, Tensors
from hvdx.pipeline.post import MAX_PART, Codec, Packed
from hvdx.pipeline.zmq_channel import ZmqChannel

#: Backends of ``torch.distributed`` -> type of the device whose tensors they carry.
BACKENDS = {"nccl": "cuda", "gloo": "cpu"}
_DAY = 86400.0  # seconds; no timeout may be infinite
_NEWS_SECONDS = 1.0  # within which a death is told
_GAPS = 1024  # times as many elements as travel: how many the memory of a tensor may have at most


class TorchCodec:
    """Tensors as bytes, with dtype, shape and strides; see :class:`post.Codec`."""

    def pack(self, tensor: torch.Tensor) -> Packed:
        """Copy only what lies on a GPU or is not contiguous."""
        packed = dense(tensor.detach().cpu())
        return packed._replace(data=packed.data.numpy())

    def unpack(self, packed: Packed) -> torch.Tensor:
        """Build on the memory given, where strides allow."""
        size = described_bytes(packed)
        if size != len(packed.data):
            raise ValueError(f"{len(packed.data)} bytes for {packed[:3]}")
        data = torch.frombuffer(packed.data, dtype=torch.uint8) if size else torch.empty(0)
        return restored(packed._replace(data=data))


def dense(tensor: torch.Tensor) -> Packed:
    """Describe ``tensor``; ``data`` has its elements once each, in a line of uint8.

    The line is on the same device, and on the same memory if the tensor is contiguous.
    """
    layout = None if tensor.is_contiguous() else list(tensor.stride())
    if layout is not None and _too_wide(Packed("", tensor.shape, layout, None)):
        tensor, layout = tensor.contiguous(), None
    whole = tensor if layout is None else tensor[_once(layout)].contiguous()
    line = whole.as_strided((whole.numel(),), (1,))  # reshape may keep a stride of 0
    name = str(tensor.dtype).removeprefix("torch.")
    return Packed(name, tensor.shape, layout, line.view(torch.uint8))


def described_bytes(packed: Packed) -> int:
    """Return how many bytes :func:`dense` makes of a tensor that is described so.

    Raises:
        ValueError: no tensor is.
    """
    dtype = getattr(torch, str(packed.dtype), None)
    numbers = [*packed.shape, *(packed.layout or [])]
    if not isinstance(dtype, torch.dtype) or not all(
        type(n) is int and 0 <= n <= MAX_PART for n in numbers
    ):
        raise ValueError(f"no tensor is {packed[:3]}")
    size = math.prod(_held(packed)) * dtype.itemsize
    if size and packed.layout is not None and _too_wide(packed):
        raise ValueError(f"no tensor is {packed[:3]}")
    return size


def restored(packed: Packed) -> torch.Tensor:
    """Undo :func:`dense`, on the memory of ``packed.data`` where strides allow."""
    dtype, shape = getattr(torch, packed.dtype), list(packed.shape)
    if not packed.data.numel():
        return packed.data.to(dtype).view(shape)
    line = packed.data.view(dtype)
    if packed.layout is None:
        return line.view(shape)
    held, strides = _held(packed), packed.layout
    memory = torch.empty(_span(packed), dtype=dtype, device=line.device)
    memory.as_strided(held, strides).copy_(line.view(held))
    return memory.as_strided(shape, strides)


def _held(packed: Packed) -> list[int]:
    """Return the shape without what an expanded dimension repeats."""
    if packed.layout is None:
        return list(packed.shape)
    pairs = zip(packed.shape, packed.layout, strict=True)
    return [1 if stride == 0 and n else n for n, stride in pairs]


def _span(packed: Packed) -> int:
    """Return how many elements the memory of a strided tensor has."""
    pairs = zip(packed.shape, packed.layout, strict=True)
    return 1 + sum((n - 1) * stride for n, stride in pairs)


def _too_wide(packed: Packed) -> bool:
    """Tell whether the memory would have far more elements than travel: mere gaps are not kept."""
    return _span(packed) > max(_GAPS * math.prod(_held(packed)), 1 << 16)


def _once(strides: Sequence[int]) -> tuple[slice, ...]:
    """Index one of the elements that an expanded dimension repeats."""
    return tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)


class _Coming(NamedTuple):
    """A tensor whose description is here, and whose bytes are on their way."""

    packed: Packed
    work: Any


class DistributedChannel(ZmqChannel):
    """Tensors by point-to-point operations of ``torch.distributed``, what they are by ZeroMQ.

    Those operations know no names: the nth receive from a rank takes what its nth send gave, and
    needs the size beforehand. So a message's header goes by ZeroMQ, and the receiver starts to
    receive its tensors when it reads that, in the order in which the other has sent them. Failures
    and deaths are told by ZeroMQ, too. There is one group of ranks for each of the two directions:
    in one, two ranks that send to each other at once would each wait for the other's receive.

    Args:
        place: by stage, the rank that has it, or its replicas.
        rank: this one.
        exchange: as of :class:`ZmqChannel`.
        codec: of tensors on other devices, which travel by ZeroMQ.
        backend: one of :data:`BACKENDS`.
        device: of this rank's tensors.
        address: of this rank's own network interface.
        seconds: deadline of a get and of the meeting; 0: wait for ever.

    Raises:
        HvdxError: the ranks could not connect; raised on every rank.
    """

    def __init__(
        self,
        place: Sequence[int | Sequence[int]],
        rank: int,
        exchange: Callable[[Any], list[Any]],
        codec: Codec | None = None,
        *,
        backend: str,
        device: torch.device,
        address: str = "127.0.0.1",
        seconds: float = 30.0,
    ) -> None:
        super().__init__(place, rank, exchange, codec, address=address, seconds=seconds)
        self._device = device if device.type == BACKENDS[backend] else torch.device("cpu")
        self._members = sorted({each for row in self._rows for each in row})
        self._groups: dict[bool, Any] = {}  # whether upwards
        self._sent: list[tuple[int, Any, torch.Tensor]] = []  # to whom, the work and what
        problem = None
        try:
            self._join(backend, exchange, address)
        except (RuntimeError, OSError) as error:
            problem = f"rank {rank}: {str(error).splitlines()[0]}"
        except BaseException:
            self.close()
            raise
        problems = [each for each in exchange(problem) if each]
        if problems:
            self.close()
            raise HvdxError(f"the pipeline's ranks cannot connect by {backend}: "
                            f"{'; '.join(problems)}")  # fmt: skip

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Return when all that was sent meanwhile has been received: within it others do so."""
        yield
        for peer, work, _ in self._sent:
            self._finish(peer, work)
        self._sent.clear()

    def receive(self, peer: int, key: Key) -> Tensors:
        """See :meth:`PostChannel.receive`."""
        return [self._arrived_whole(peer, each) for each in super().receive(peer, key)]

    def close(self) -> None:
        """See :meth:`ZmqChannel.close`."""
        super().close()
        for held in (self._arrived, self._sent, self._groups):  # whose works hold the groups'
            held.clear()  # sockets

    # --- meeting

    def _join(self, backend: str, exchange: Callable[[Any], list[Any]], address: str) -> None:
        """Make the two groups, and connect each pair of ranks in both."""
        first, own = self._members[0], self._members.index(self._rank)
        seconds = datetime.timedelta(seconds=min(self._seconds, _DAY))
        options: dict[str, Any] = {"world_size": len(self._members), "timeout": seconds}
        options["wait_for_workers"] = False
        store: Any = None
        port, problem = 0, None
        if self._rank == first:
            try:
                door = socket.create_server((address, 0))  # the store itself would listen to all
                port = door.getsockname()[1]
                store = TCPStore(
                    address, port, is_master=True, master_listen_fd=door.detach(), **options
                )
            except (RuntimeError, OSError) as error:
                problem = error
        host, port = exchange((address, port))[first]
        if problem is not None:
            raise problem
        if not port:
            raise OSError(f"rank {first} cannot listen")
        store = store or TCPStore(host, port, is_master=False, **options)
        for upwards in (False, True):
            prefix = PrefixStore(str(upwards), store)
            self._groups[upwards] = _group(backend, prefix, own, len(self._members), seconds)
        for low, high in itertools.combinations(self._members, 2):  # equal order: nobody waits long
            for sender, receiver in (low, high), (high, low):
                word = torch.zeros(1, dtype=torch.uint8, device=self._device)
                if self._rank == sender:
                    self._operate("send", receiver, word).wait()
                elif self._rank == receiver:
                    self._operate("recv", sender, word).wait()

    # --- messages

    def _pack(self, peer: int, tensor: torch.Tensor) -> Packed:
        """Send what is here already; nothing is left for ZeroMQ."""
        if tensor.device.type != self._device.type or not tensor.numel():
            return super()._pack(peer, tensor)
        packed = dense(tensor.detach())
        try:
            work = self._operate("send", peer, packed.data)
        except RuntimeError as error:
            raise self._explained(peer, error) from None
        self._sent.append((peer, work, packed.data))
        return packed._replace(data=b"")

    def _measure(self, packed: Packed) -> int:
        return described_bytes(packed)

    def _unpack(self, peer: int, packed: Packed) -> Any:
        """Begin to receive what did not come by ZeroMQ."""
        size = described_bytes(packed)
        if len(packed.data) or not size:
            return super()._unpack(peer, packed)
        line = torch.empty(size, dtype=torch.uint8, device=self._device)
        try:
            work = self._operate("recv", peer, line)
        except RuntimeError as error:  # told to who asks for it
            work = error
        return _Coming(packed._replace(data=line), work)

    def _arrived_whole(self, peer: int, tensor: Any) -> Any:
        if not isinstance(tensor, _Coming):
            return tensor
        start = time.perf_counter()
        self._finish(peer, tensor.work)
        self.seconds_waited += time.perf_counter() - start
        return restored(tensor.packed)

    def _operate(self, verb: str, peer: int, line: torch.Tensor) -> Any:
        group = self._groups[(peer > self._rank) == (verb == "send")]
        return getattr(group, verb)([line], self._members.index(peer), 0)

    def _finish(self, peer: int, work: Any) -> None:
        try:
            if isinstance(work, RuntimeError):
                raise work
            work.wait()
        except RuntimeError as error:
            raise self._explained(peer, error) from None

    def _explained(self, peer: int, error: RuntimeError) -> Exception:
        """Say why a connection broke: ZeroMQ may be about to bring the news."""
        until = time.monotonic() + _NEWS_SECONDS
        while self._failure is None and peer not in self._left | self._lost:
            if (left := until - time.monotonic()) <= 0:
                break
            self._service(left)
        self._read(peer)
        if self._failure is not None:
            return self._failure.exception()
        return ConnectionError(f"{self._gone(peer)}: {str(error).splitlines()[0]}")


def _group(backend: str, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """Make a group that leaves the program's own use of ``torch.distributed`` alone."""
    if backend == "gloo":
        return distributed.ProcessGroupGloo(store, rank, size, timeout)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return distributed.ProcessGroupNCCL(store, rank, size, options)


def check_gpus(device: torch.device, core: Adapter, name: str) -> None:
    """Check that each rank of the job has a GPU of its own, on which its model lies.

    Args:
        device: of the model.
        core: to ask the other ranks through.
        name: of the collective, equal on all ranks.

    Raises:
        PlanError: it is not so; raised on every rank.
    """
    has_nccl = distributed.is_available() and distributed.is_nccl_available()
    told = socket.gethostname(), str(device), torch.cuda.device_count(), has_nccl
    everyone = core.allgather_object(told, name, None)
    refused = "channel='nccl' needs a GPU of its own for each rank, but"
    remedy = "use channel='zmq'"
    for host in dict.fromkeys(each[0] for each in everyone):
        here = [each for each in everyone if each[0] == host]
        if (gpus := here[0][2]) < len(here):
            raise PlanError(f"{refused} {host} has {gpus} for its {len(here)} ranks: {remedy}")
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, own, _, has_nccl) in enumerate(everyone):
        if not has_nccl:
            raise PlanError(f"PyTorch of rank {rank} has no NCCL: {remedy}")
        if not own.startswith("cuda"):
            raise PlanError(
                f"{refused} the model of rank {rank} is on {own!r}: move it before the pipeline is "
                "made, by model.to(f'cuda:{hvd.local_rank()}'), or " + remedy
            )
        if owners.setdefault((host, own), rank) != rank:
            raise PlanError(f"{refused} ranks {owners[host, own]} and {rank} have {own!r} of "
                            f"{host}: move their models to different ones")  # fmt: skip
