"""TensorFlow's side of the shared API: Horovod's TensorFlow core behind :class:`Adapter`."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops
from tensorflow.python.ops import resource_variable_ops

from hvdx.collectives import perform
from hvdx.comm import Work, drive, sent_share
from hvdx.compression import Spec
from hvdx.compression.codecs import Codec
from hvdx.compression.rows import gather_rows, row_codec
from hvdx.integrations.tensorflow_operations import differentiable, explained, operation
from hvdx.integrations.tensorflow_types import (
    as_splits,
    by_dtype,
    movable,
    reducible,
    restored,
    scatterable,
    times,
)
from hvdx.integrations.tensorflow_variables import broadcast_bytes, broadcast_in_graph
from hvdx.objects import pickled, unpickled
from hvdx.ops import ops_for
from hvdx.reduce_op import ReduceOp
from hvdx.watchdog import watched


class TensorFlowAdapter:
    """See :class:`hvdx.frameworks.Adapter` for what each method does.

    Every method but those for objects also works while a ``tf.function`` is traced. All
    collectives differentiate, as Horovod's do. Sizes and places within a process set are those
    that the set itself holds: Horovod's Python asks the core that was initialised last.
    """

    framework = "tensorflow"

    def __init__(self, horovod: Any) -> None:
        for op in ReduceOp:
            if getattr(horovod, op.name) != op:
                raise ImportError(f"Horovod numbers hvd.{op.name} otherwise than hvdx does")
        self.horovod = horovod
        self._everyone = horovod.global_process_set
        self._sent = 0.0  # eagerly
        self._sent_in_graphs: Any = None

    @explained
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
        """Reduce; ``tf.IndexedSlices`` by gathering them.

        bfloat16 is summed in float32, since Horovod has no such type. The average of float16
        is divided before it is summed, so that no sum overflows where the mean would not.
        """
        if op == ReduceOp.Adasum:
            self.check_adasum(process_set)
        if isinstance(tensor, tf.IndexedSlices):
            return self._allreduce_slices(
                tensor, ReduceOp(op), name, prescale_factor * postscale_factor, process_set
            )
        sent = reducible(tensor)
        before, after, options = self._reduction(
            sent.dtype, op, prescale_factor, postscale_factor, process_set
        )
        with operation("Allreduce", name, [times(sent, before)]) as ([sent], named):
            result = mpi_ops._allreduce(sent, **named, **options)
        return tf.cast(times(result, after), tensor.dtype)

    def reduce_rows(
        self,
        tensor: Any,
        compressor: Any,
        *,
        op: int,
        name: str | None,
        factor: float,
        process_set: Any,
    ) -> Any:
        """Gather the rows of ``tf.IndexedSlices`` as ``compressor`` writes them."""
        if not isinstance(tensor, tf.IndexedSlices):
            return None
        codec = _codec_of(tensor, compressor, name or "", self.ranks(process_set))
        return self._allreduce_slices(tensor, ReduceOp(op), name, factor, process_set, codec)

    def _allreduce_slices(
        self,
        slices: Any,
        op: ReduceOp,
        name: str | None,
        factor: float,
        process_set: Any,
        codec: Codec | None = None,
    ) -> Any:
        """Concatenate all ranks' slices: rows that several ranks have are there several times."""
        if op not in (ReduceOp.Average, ReduceOp.Sum):
            raise NotImplementedError(
                f"tf.IndexedSlices cannot be reduced with op=hvd.{op.name}: use hvd.Average or "
                "hvd.Sum, or make them dense (sparse_as_dense=True, or tf.convert_to_tensor)"
            )
        if codec is not None:
            rows = gather_rows(ops_for(tf.Tensor), codec, slices.indices, slices.values)
            answer = functools.partial(perform, self, name=name, process_set=process_set)
            indices, values, _ = drive(rows, answer)
        else:
            values, indices = (
                self.allgather(part, name=name and f"{name}.{kind}", process_set=process_set)
                for part, kind in ((slices.values, "values"), (slices.indices, "indices"))
            )
        if op is ReduceOp.Average:
            values = values / tf.cast(self.size_in_graph(process_set), values.dtype)
        return tf.IndexedSlices(times(values, factor), indices, slices.dense_shape)

    def _reduction(
        self, dtype: Any, op: int, before: float, after: float, process_set: Any
    ) -> tuple[float, float, dict[str, Any]]:
        """Choose how Horovod is to reduce tensors of ``dtype``.

        Returns:
            Factors to be applied before and after it, since its own are float32 in TensorFlow,
            and Horovod's arguments.
        """
        first = last = 1.0
        if dtype == tf.float16 and op == ReduceOp.Average and not elastic():
            # By a power of two, which is exact; what is missing to the mean comes afterwards.
            ranks = self.ranks(process_set)
            power = 1 << (ranks - 1).bit_length()
            op, before, after = ReduceOp.Sum, before / power, after * power / ranks
        if dtype == tf.float64:
            first, last, before, after = before, after, 1.0, 1.0
        return (
            first,
            last,
            {
                "op": int(op),
                "prescale_factor": before,
                "postscale_factor": after,
                "process_set": process_set or self._everyone,
            },
        )

    def check_adasum(self, process_set: Any) -> None:
        """Refuse what Horovod's Adasum cannot do, where its core would end the process.

        Raises:
            NotImplementedError: on every rank alike; the message says what is missing.
        """
        ranks = self.ranks(process_set)
        if ranks != int(self.horovod.size()):
            raise NotImplementedError("Adasum does not support process sets; leave process_set out")
        if ranks & (ranks - 1):
            raise NotImplementedError(f"Adasum needs 2, 4, 8, ... ranks; this job has {ranks}")
        if ranks > 1 and not self.horovod.mpi_enabled():
            raise NotImplementedError(
                "Adasum needs MPI, and Gloo is the controller of this job: build Horovod with MPI "
                "(see `hvdx doctor`) and launch with --mpi, or use op=hvd.Average"
            )

    @explained
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
        """Reduce several tensors as one operation per dtype; slices one by one."""
        if op == ReduceOp.Adasum:
            self.check_adasum(process_set)

        def reduce(sent: list[Any], name: str | None) -> list[Any]:
            if isinstance(sent[0], tf.IndexedSlices):
                factor = prescale_factor * postscale_factor
                return [
                    self._allreduce_slices(
                        each, ReduceOp(op), name and f"{name}.{i}", factor, process_set
                    )
                    for i, each in enumerate(sent)
                ]
            before, after, options = self._reduction(
                sent[0].dtype, op, prescale_factor, postscale_factor, process_set
            )
            scaled = [times(each, before) for each in sent]
            with operation("GroupedAllreduce", name, scaled) as (given, named):
                results = mpi_ops._grouped_allreduce(given, **named, **options)
            return [times(result, after) for result in results]

        return by_dtype(tensors, reducible, reduce, tf.cast, name)

    @explained
    def allgather(self, tensor: Any, *, name: str | None, process_set: Any) -> Any:
        """Gather along the first dimension."""

        def gather(x: Any) -> Any:
            with operation("Allgather", name, [movable(x)]) as ([sent], named):
                result = mpi_ops.allgather(sent, process_set=process_set or self._everyone, **named)
            return restored(result, x.dtype)

        def back(grads: Any, xs: Any, results: Any) -> list[Any]:
            return self._own_rows(grads, xs, process_set)

        return differentiable(gather, back, tensor)

    @explained
    def grouped_allgather(
        self, tensors: Sequence[Any], *, name: str | None, process_set: Any
    ) -> list[Any]:
        """Gather several tensors as one operation per dtype."""

        def send(sent: list[Any], name: str | None) -> list[Any]:
            with operation("GroupedAllgather", name, sent) as (given, named):
                results: list[Any] = mpi_ops.grouped_allgather(
                    given, process_set=process_set or self._everyone, **named
                )
            return results

        def gather(*xs: Any) -> list[Any]:
            return by_dtype(xs, movable, send, restored, name)

        def back(grads: Any, xs: Any, results: Any) -> list[Any]:
            return self._own_rows(grads, xs, process_set)

        return list(differentiable(gather, back, *tensors))

    def _own_rows(self, grads: Sequence[Any], xs: Sequence[Any], process_set: Any) -> list[Any]:
        """Return the mean over the ranks of those rows of each gradient that came from here."""
        place = self.place(process_set)
        counts = tf.stack([tf.shape(x)[0] for x in xs])
        everyone = self.allgather(counts[tf.newaxis], name=None, process_set=process_set)
        starts = tf.reduce_sum(everyone[:place], axis=0)
        rows: list[Any] = []
        for i, (grad, x) in enumerate(zip(grads, xs, strict=True)):
            if not x.dtype.is_floating:
                rows.append(None)
                continue
            mean = self._mean(tf.cast(grad, x.dtype), process_set)
            rows.append(tf.ensure_shape(mean[starts[i] : starts[i] + counts[i]], x.shape))
        return rows

    def _mean(self, grad: Any, process_set: Any) -> Any:
        return self.allreduce(
            grad,
            op=ReduceOp.Average,
            name=None,
            prescale_factor=1.0,
            postscale_factor=1.0,
            process_set=process_set,
        )

    @explained
    def broadcast(self, tensor: Any, *, root_rank: int, name: str | None, process_set: Any) -> Any:
        """Return the root's tensor."""

        def send(x: Any) -> Any:
            with operation("Broadcast", name, [movable(x)]) as ([sent], named):
                result = mpi_ops.broadcast(
                    sent, root_rank, process_set=process_set or self._everyone, **named
                )
            return restored(result, x.dtype)

        def back(grads: Any, xs: Any, results: Any) -> list[Any]:
            mean = self._mean(grads[0], process_set)
            if int(self.horovod.rank()) == root_rank:
                return [mean]
            # Not a constant: a graph would drop the allreduce, and the root would wait for it.
            return [tf.math.multiply_no_nan(mean, tf.zeros([], mean.dtype))]

        return differentiable(send, back, tensor)

    @explained
    def alltoall(self, tensor: Any, *, splits: Any, name: str | None, process_set: Any) -> Any:
        """Exchange slices of the first dimension."""
        given = splits is not None
        splits = as_splits(splits) if given else tf.constant([], tf.int32)

        def exchange(x: Any) -> tuple[Any, Any]:
            # Splits are always given, so that received ones come back.
            with operation("Alltoall", name, [movable(x)]) as ([sent], named):
                result, received = mpi_ops.alltoall(
                    sent, splits, process_set=process_set or self._everyone, **named
                )
            return restored(result, x.dtype), received

        def back(grads: Any, xs: Any, results: Any) -> list[Any]:
            (x,), received = xs, results[1]
            own, _ = self.alltoall(grads[0], splits=received, name=None, process_set=process_set)
            unsent = tf.shape(x)[0] - tf.shape(own)[0]  # rows beyond the sum of the splits
            padding = [[0, unsent], *[[0, 0]] * (len(x.shape) - 1)]
            return [tf.ensure_shape(tf.pad(own, padding), x.shape)]

        result, received = differentiable(exchange, back, tensor)
        return (result, received) if given else result

    @explained
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
        return self._scatter([tensor], op, name, prescale_factor, postscale_factor, process_set)[0]

    @explained
    def grouped_reducescatter(
        self,
        tensors: Sequence[Any],
        *,
        op: int,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        process_set: Any,
    ) -> list[Any]:
        """Reduce several tensors as one operation per dtype and keep this rank's slices."""
        return self._scatter(tensors, op, name, prescale_factor, postscale_factor, process_set)

    def _scatter(
        self,
        tensors: Sequence[Any],
        op: int,
        name: str | None,
        before: float,
        after: float,
        process_set: Any,
    ) -> list[Any]:
        def send(sent: list[Any], name: str | None) -> list[Any]:
            first, last, options = self._reduction(sent[0].dtype, op, before, after, process_set)
            sent = [times(each, first) for each in sent]
            if len(sent) == 1:
                with operation("Reducescatter", name, sent) as ([own], named):
                    results = [mpi_ops._reducescatter(own, **named, **options)]
            else:
                with operation("GroupedReducescatter", name, sent) as (given, named):
                    results = mpi_ops._grouped_reducescatter(given, **named, **options)
            return [times(result, last) for result in results]

        def scatter(*xs: Any) -> list[Any]:
            return by_dtype(xs, scatterable, send, tf.cast, name)

        def back(grads: Any, xs: Any, results: Any) -> list[Any]:
            factor = before * after * (self.ranks(process_set) if op == ReduceOp.Sum else 1)
            grads = [
                tf.cast(grad, result.dtype) for grad, result in zip(grads, results, strict=True)
            ]
            gathered = self.grouped_allgather(grads, name=None, process_set=process_set)
            return [
                tf.ensure_shape(times(each, factor), x.shape) if x.dtype.is_floating else None
                for each, x in zip(gathered, xs, strict=True)
            ]

        return list(differentiable(scatter, back, *tensors))

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

    def take_device(self, local_rank: int) -> None:
        """Let TensorFlow see this GPU only: it takes memory on all that it sees."""
        gpus = tf.config.list_physical_devices("GPU")
        alone = self.horovod.local_size() == 1
        if alone or local_rank >= len(gpus) or tf.config.get_visible_devices("GPU") != gpus:
            return
        try:
            tf.config.set_visible_devices(gpus[local_rank], "GPU")
        except RuntimeError:
            warnings.warn(
                f"TensorFlow has taken all {len(gpus)} GPUs of this host before hvd.init() could "
                f"give rank {self.horovod.rank()} its own; call hvd.init() first",
                stacklevel=4,
            )

    def ranks(self, process_set: Any) -> int:
        """Count the ranks of the set; asked of the set itself, which no core can confuse."""
        if process_set is None or process_set.process_set_id == 0:
            return int(self.horovod.size())
        return len(process_set.ranks)

    def place(self, process_set: Any) -> int:
        """Return this rank's place among those of the set."""
        rank = int(self.horovod.rank())
        if process_set is None or process_set.process_set_id == 0:
            return rank
        return int(process_set.ranks.index(rank))

    def included(self, process_set: Any) -> bool:
        """Tell whether this rank is one of the set."""
        return (
            process_set is None
            or process_set.process_set_id == 0
            or int(self.horovod.rank()) in process_set.ranks
        )

    def size_in_graph(self, process_set: Any) -> Any:
        """Count the ranks; under elastic training by a tensor, since graphs outlive changes."""
        if elastic():
            return mpi_ops.size_op(process_set.process_set_id if process_set is not None else 0)
        return self.ranks(process_set)

    @watched
    def join(self) -> int:
        """Say that this rank has no more data."""
        return int(self.horovod.join())

    @watched
    def broadcast_object(self, value: Any, root_rank: int, name: str, process_set: Any) -> Any:
        """Send a picklable object from the root; at once, also where a graph is being traced."""
        is_root = int(self.horovod.rank()) == root_rank
        payload = np.frombuffer(pickled(value) if is_root else b"", np.uint8)

        def send(array: Any, part: str) -> Any:
            return self.broadcast(
                tf.constant(array),
                root_rank=root_rank,
                name=f"{name}.{part}",
                process_set=process_set,
            ).numpy()

        with tf.init_scope():
            (size,) = send(np.array([payload.size], np.int64), "size")
            data = send(payload if is_root else np.zeros(size, np.uint8), "data")
        return value if is_root else unpickled(data.tobytes())

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
        texts = [v for v in tensors.values() if v.dtype == tf.string]
        others = [v for v in tensors.values() if v.dtype != tf.string]
        if tf.executing_eagerly():
            broadcast_bytes(self, others, root_rank, name, process_set)
        else:
            broadcast_in_graph(self, others, root_rank, name, process_set)
        for index, variable in enumerate(texts):
            with tf.init_scope():
                value = variable.numpy()
                value = self.broadcast_object(value, root_rank, f"{name}.text.{index}", process_set)
            variable.assign(value)

    def broadcast_optimizer(self, optimizer: Any, root_rank: int, process_set: Any) -> None:
        """Refuse: TensorFlow's optimizers are Keras's, which broadcast as variables."""
        raise TypeError(f"{type(optimizer).__name__} is no Keras 3 optimizer")

    def at_once(self) -> contextlib.AbstractContextManager[Any]:
        """Leave the graph."""
        scope: contextlib.AbstractContextManager[Any] = tf.init_scope()
        return scope

    def carry_out(self, work: Work[Any], name: str, process_set: Any) -> Any:
        """Run a generator of requests, one after the other."""
        return drive(work, functools.partial(perform, self, name=name, process_set=process_set))

    @property
    def bytes_sent(self) -> float:
        """What this process has sent, eagerly and in graphs."""
        graphs = self._sent_in_graphs
        return self._sent + (0.0 if graphs is None else float(graphs.numpy()))

    def count(self, operation: str, tensor: Any, ranks: int) -> None:
        """Count bytes that are sent: in a graph by a variable on the host."""
        wide = 2 if operation == "allreduce" and tensor.dtype == tf.bfloat16 else 1  # sums floats
        each = tensor.dtype.size * wide * sent_share(operation, ranks)
        if tf.executing_eagerly():
            self._sent += each * tensor.shape.num_elements()
        elif tf.compat.v1.executing_eagerly_outside_functions():  # TensorFlow 1 adds only on demand
            if self._sent_in_graphs is None:
                with tf.init_scope(), tf.device("CPU:0"):
                    self._sent_in_graphs = resource_variable_ops.ResourceVariable(
                        0.0, trainable=False, dtype=tf.float64
                    )
            size = tf.cast(tf.size(tensor, tf.int64), tf.float64)  # a constant, where it is known
            self._sent_in_graphs.assign_add(each * size, read_value=False)

    def device_use(self) -> dict[str, float]:
        """Ask the first GPU, if one is in use; TensorFlow tells no utilisation."""
        if not tf.config.list_logical_devices("GPU"):
            return {}
        told = tf.config.experimental.get_memory_info("GPU:0")
        return {
            "gpu_memory_mb": told["current"] / 1e6,
            "peak_gpu_memory_mb": told["peak"] / 1e6,
        }

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


def elastic() -> bool:
    """Tell whether ranks may come and go."""
    return os.environ.get("HOROVOD_ELASTIC", "0") not in ("", "0")


def _codec_of(slices: Any, compressor: Any, name: str, ranks: int) -> Codec | None:
    """Return what writes rows of ``slices``; None if they travel as they are."""
    shape, whole = slices.values.shape[1:], slices.dense_shape
    rows = None if whole is None else tf.get_static_value(whole)
    if not shape.is_fully_defined() or (rows is None and slices.indices.dtype != tf.int32):
        return None  # of which it is not known whether 32 bits can number them
    spec = Spec(name, (0 if rows is None else int(rows[0]), *shape), slices.dtype.name, ranks)
    return row_codec(compressor.of(spec), spec.shape, spec.dtype)
