"""TensorFlow's side of the shared API: Horovod's TensorFlow core behind :class:`Adapter`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from hvdx.integrations.tensorflow_watch import in_graph
from hvdx.mismatch import explain, is_mismatch
from hvdx.objects import pickled, unpickled
from hvdx.reduce_op import ReduceOp
from hvdx.watchdog import waiting, watched

#: What Horovod reduces; all else is summed in float32 or refused.
_REDUCIBLE = frozenset({tf.float32, tf.float64, tf.float16, tf.int32, tf.int64, tf.uint8, tf.int8})
_MOVABLE = _REDUCIBLE | {tf.uint16, tf.int16, tf.bool}
_SAME_WIDTH = {1: tf.uint8, 2: tf.uint16, 4: tf.int32, 8: tf.int64}
_BROADCAST_BYTES = 64 << 20  # parameters travel in pieces of this size

Call = TypeVar("Call", bound=Callable[..., Any])


def _explained(call: Call) -> Call:
    """Say on every rank what each submitted, where Horovod only says that they differ.

    Works for eager calls; inside a ``tf.function`` Horovod's own message surfaces, with the
    name of the graph's node.
    """

    @functools.wraps(call)
    def checked(self: TensorFlowAdapter, tensors: Any, **options: Any) -> Any:
        about = call.__name__, options["name"], tensors, options["process_set"]
        try:
            with waiting(*about):
                return in_graph(functools.partial(call, self, tensors, **options), *about)
        except tf.errors.OpError as error:
            if not is_mismatch(error):
                raise
            given = list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]
            raise explain(
                self, call.__name__, options["name"], given, options["process_set"]
            ) from None

    return checked  # type: ignore[return-value]


class TensorFlowAdapter:
    """See :class:`hvdx.frameworks.Adapter` for what each method does.

    Every method but those for objects also works while a ``tf.function`` is traced.
    """

    framework = "tensorflow"

    def __init__(self, horovod: Any) -> None:
        for op in ReduceOp:
            if getattr(horovod, op.name) != op:
                raise ImportError(f"Horovod numbers hvd.{op.name} otherwise than hvdx does")
        self.horovod = horovod
        self._everyone = horovod.global_process_set

    @_explained
    def allreduce(
        self,
        tensor: Any,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> Any:
        """Reduce; bfloat16 is summed in float32, since Horovod has no such type."""
        result = self.horovod.allreduce(
            tensor if isinstance(tensor, tf.IndexedSlices) else _reducible(tensor),
            name=_node(name),
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set or self._everyone,
            ignore_name_scope=True,
        )
        return result if result.dtype == tensor.dtype else tf.cast(result, tensor.dtype)

    @_explained
    def grouped_allreduce(
        self,
        tensors: Sequence[Any],
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> list[Any]:
        """Reduce several tensors as one operation."""
        results = self.horovod.grouped_allreduce(
            [_reducible(tensor) for tensor in tensors],
            name=_node(name),
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set or self._everyone,
            ignore_name_scope=True,
        )
        return [tf.cast(result, given.dtype) for result, given in zip(results, tensors)]  # noqa: B905

    @_explained
    def allgather(self, tensor: Any, *, name: str | None, process_set: Any) -> Any:
        """Gather along the first dimension."""
        result = self.horovod.allgather(
            _movable(tensor),
            name=_node(name),
            process_set=process_set or self._everyone,
            ignore_name_scope=True,
        )
        return _restored(result, tensor.dtype)

    @_explained
    def grouped_allgather(
        self, tensors: Sequence[Any], *, name: str | None, process_set: Any
    ) -> list[Any]:
        """Gather several tensors as one operation."""
        results = self.horovod.grouped_allgather(
            [_movable(tensor) for tensor in tensors],
            name=_node(name),
            process_set=process_set or self._everyone,
            ignore_name_scope=True,
        )
        return [_restored(result, given.dtype) for result, given in zip(results, tensors)]  # noqa: B905

    @_explained
    def broadcast(self, tensor: Any, *, root_rank: int, name: str | None, process_set: Any) -> Any:
        """Return the root's tensor."""
        result = self.horovod.broadcast(
            _movable(tensor),
            root_rank,
            name=_node(name),
            process_set=process_set or self._everyone,
            ignore_name_scope=True,
        )
        return _restored(result, tensor.dtype)

    @_explained
    def alltoall(self, tensor: Any, *, splits: Any, name: str | None, process_set: Any) -> Any:
        """Exchange slices of the first dimension."""
        if splits is not None:
            splits = tf.cast(tf.convert_to_tensor(splits), tf.int32)
        result = self.horovod.alltoall(
            _movable(tensor),
            splits=splits,
            name=_node(name),
            process_set=process_set or self._everyone,
            ignore_name_scope=True,
        )
        if splits is None:
            return _restored(result, tensor.dtype)
        return _restored(result[0], tensor.dtype), result[1]

    @_explained
    def reducescatter(
        self,
        tensor: Any,
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> Any:
        """Reduce and keep this rank's slice."""
        result = self.horovod.reducescatter(
            _reducible(tensor),
            name=_node(name),
            op=int(op),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set or self._everyone,
            ignore_name_scope=True,
        )
        return tf.cast(result, tensor.dtype)

    @watched
    def barrier(self, process_set: Any) -> None:
        """Wait for all ranks; Horovod's TensorFlow face has no barrier, so a sum serves."""
        self.allreduce(
            tf.zeros([1]),
            op=ReduceOp.Sum,
            name="hvdx.barrier",
            prescale_factor=1.0,
            postscale_factor=1.0,
            process_set=process_set,
        )

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
        return self.horovod.broadcast_object(
            value, root_rank, name=_node(name), process_set=process_set or self._everyone
        )

    @watched
    def allgather_object(self, value: Any, name: str, process_set: Any) -> list[Any]:
        """Gather picklable objects."""
        payload = np.frombuffer(pickled(value), np.uint8)
        with tf.init_scope():  # eagerly, also where a graph is being traced
            sizes, whole = (
                self.allgather(tf.constant(part), name=f"{name}.{kind}", process_set=process_set)
                for part, kind in ((np.array([payload.size]), "size"), (payload, "data"))
            )
        parts = np.split(whole.numpy(), np.cumsum(sizes.numpy())[:-1])
        return [unpickled(part.tobytes()) for part in parts]

    def named_tensors(self, owner: Any) -> dict[str, Any]:
        """Name the variables of a ``tf.Module``, or one variable."""
        if isinstance(owner, tf.Variable):
            return {owner.name: owner}
        if isinstance(owner, tf.Module):
            return {f"{index}/{v.name}": v for index, v in enumerate(owner.variables)}
        if isinstance(owner, Mapping):
            return dict(owner)
        raise TypeError(f"{type(owner).__name__} holds no variables that hvdx knows")

    @watched
    def broadcast_tensors(
        self, tensors: dict[str, Any], root_rank: int, name: str, process_set: Any
    ) -> None:
        """Assign the root's values to these variables, as bytes, in a few large pieces."""
        fixed = [name for name, v in tensors.items() if not hasattr(v, "assign")]
        if fixed:
            raise TypeError(f"cannot write to {fixed[0]!r}: give tf.Variable, not tf.Tensor")
        with tf.init_scope():
            for index, piece in enumerate(_pieces(tensors.values())):
                arrays = [np.asarray(variable.numpy(), order="C") for variable in piece]
                flat = np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays])
                result = self.broadcast(
                    tf.constant(flat),
                    root_rank=root_rank,
                    name=f"{name}.{index}",
                    process_set=process_set,
                ).numpy()
                ends = np.cumsum([array.nbytes for array in arrays])
                for variable, array, end in zip(piece, arrays, ends, strict=True):
                    part = result[end - array.nbytes : end].copy().view(array.dtype)
                    variable.assign(part.reshape(array.shape))

    def broadcast_optimizer(self, optimizer: Any, root_rank: int, process_set: Any) -> None:
        """Refuse: TensorFlow's optimizers are Keras's, which broadcast as variables."""
        raise TypeError(f"{type(optimizer).__name__} is no Keras 3 optimizer")

    @watched
    def agree(self, number: int, name: str) -> list[int]:
        """Gather one integer per rank under the name that the torch core gives it."""

        @tf.function
        def gather(value: Any) -> Any:
            return self.horovod.allgather(value, name=f"allgather.{name}", ignore_name_scope=True)

        gathered = gather(tf.constant([number], tf.int32))
        return [int(each) for each in gathered.numpy()]

    def to_numpy(self, tensor: Any) -> Any:
        """Copy to NumPy; bfloat16 as raw uint16, as the torch adapter gives it."""
        array = tf.convert_to_tensor(tensor).numpy()
        return array.view(np.uint16) if tensor.dtype == tf.bfloat16 else array

    def from_numpy(self, array: Any) -> Any:
        """Copy from NumPy."""
        return tf.constant(np.asarray(array))

    def dtype_name(self, tensor: Any) -> str:
        """Name the dtype."""
        return str(tensor.dtype.name)


def _node(name: str | None) -> str | None:
    """Return ``name`` without slashes: of a node's name Horovod takes what follows the last.

    The rest is the graph's name scopes, which differ between graphs and ranks.
    """
    return name and name.replace("/", ".")


def _reducible(tensor: Any) -> Any:
    tensor = tf.convert_to_tensor(tensor)
    if tensor.dtype in _REDUCIBLE:
        return tensor
    if tensor.dtype.is_floating:
        return tf.cast(tensor, tf.float32)
    if tensor.dtype in (tf.int16, tf.uint16):
        return tf.cast(tensor, tf.int32)
    raise ValueError(
        f"Horovod cannot reduce {tensor.dtype.name} tensors; convert this one of shape "
        f"{tuple(tensor.shape)} first, bool to uint8 for instance"
    )


def _movable(tensor: Any) -> Any:
    tensor = tf.convert_to_tensor(tensor)
    if tensor.dtype in _MOVABLE:
        return tensor
    if tensor.dtype.size not in _SAME_WIDTH:
        raise ValueError(f"Horovod cannot move {tensor.dtype.name} tensors")
    return tf.bitcast(tensor, _SAME_WIDTH[tensor.dtype.size])


def _restored(result: Any, dtype: Any) -> Any:
    return result if result.dtype == dtype else tf.bitcast(result, dtype)


def _pieces(variables: Iterable[Any]) -> Iterable[list[Any]]:
    """Split variables into runs of at most ``_BROADCAST_BYTES``, one variable at least."""
    piece: list[Any] = []
    held = 0
    for variable in variables:
        weight = int(np.prod(variable.shape)) * variable.dtype.size
        if piece and held + weight > _BROADCAST_BYTES:
            yield piece
            piece, held = [], 0
        piece.append(variable)
        held += weight
    if piece:
        yield piece
