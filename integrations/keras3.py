"""Keras 3's ``DistributedOptimizer``, on the TensorFlow and on the torch backend.

``fit`` and custom loops hand gradients to ``optimizer.apply``, in graphs and eagerly, on every
backend; that is where they are averaged. Clipping, weight decay, moving averages of weights and
gradient accumulation then see the mean, as a single process with all the data would.
"""

from __future__ import annotations

import abc
import functools
import importlib
import json
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras.src import api_export
from keras.src.saving import object_registration

from hvdx import buckets, world
from hvdx.agreement import check_same, next_name
from hvdx.comm import Allreduce, Work, together
from hvdx.compression import Compressor, Spec, as_compressor, none
from hvdx.frameworks import Adapter, framework_of_kind
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

_ENGINES = {
    "tensorflow": ("hvdx.integrations.keras3_tensorflow", "TensorFlowAverager"),
    "torch": ("hvdx.integrations.keras3_torch", "TorchAverager"),
}


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = none,
    sparse_as_dense: bool = True,
    gradient_predivide_factor: float = 1.0,
    op: int = ReduceOp.Average,
    num_groups: int = 0,
    groups: Any = None,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    process_set: Any = None,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Make ``optimizer`` average gradients over the ranks; returns the same object.

    The optimizer keeps its class, configuration, learning rate or schedule, iterations and
    state. A model compiled with it saves and loads as without hvdx; a loaded optimizer is the
    user's plain one, to be wrapped and compiled again. It gains ``communication_seconds``.

    Gradients travel in flat buckets (``HVDX_BUCKET_MB``), in a graph while later ones are
    computed. Sparse gradients (``tf.IndexedSlices``) become dense. Where a rank has no gradient
    for a variable it sends zeros; a variable that no rank has a gradient for stays without.

    Args:
        optimizer: any Keras 3 optimizer. For mixed float16 give the ``LossScaleOptimizer``
            itself, so that all ranks agree whether a step overflowed.
        name: of the operations; equal on all ranks. Default: counted.
        device_dense: accepted for Horovod's sake and not needed.
        device_sparse: likewise.
        compression: a compressor of ``hvd.Compression`` or a Horovod ``Compressor`` class.
        sparse_as_dense: accepted for Horovod's sake: sparse gradients always travel dense.
        gradient_predivide_factor: with Average, divides before the sum and multiplies after.
        op: ``hvd.Average`` or ``hvd.Sum``.
        num_groups: accepted for Horovod's sake; buckets take its place.
        groups: likewise.
        backward_passes_per_step: must be 1: Keras accumulates by itself, with
            ``gradient_accumulation_steps`` of the optimizer.
        average_aggregated_gradients: accepted for Horovod's sake.
        process_set: the ranks to average over; all by default.
        scale_local_gradients: accepted for Horovod's sake.

    Raises:
        TypeError: it is wrapped already, is no Keras 3 optimizer, or Keras runs on jax.
        ValueError: an option has no meaning here; the message names it.
        NotInitializedError: ``hvd.init()`` has not been called.
        MismatchError: at the first step, on every rank, where models, optimizers or options
            differ between ranks.

    Example:
        >>> optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(1e-3 * hvd.size()))
        >>> model.compile(optimizer, loss="mse")
    """
    _check_fresh(optimizer)
    if op not in (ReduceOp.Average, ReduceOp.Sum):
        raise ValueError(
            f"DistributedOptimizer(op={ReduceOp.of(op).name}): use hvd.Average or hvd.Sum"
        )
    if gradient_predivide_factor != 1.0 and op != ReduceOp.Average:
        raise ValueError("gradient_predivide_factor needs op=hvd.Average")
    if backward_passes_per_step != 1:
        raise ValueError(
            f"backward_passes_per_step={backward_passes_per_step}: Keras 3 accumulates gradients "
            f"itself; use {type(optimizer).__name__}(..., gradient_accumulation_steps="
            f"{backward_passes_per_step}), which averages over the steps"
        )
    backend = framework_of_kind("keras")
    options = Options(
        name or next_name("keras", process_set),
        as_compressor(compression),
        ReduceOp(op),
        gradient_predivide_factor,
        process_set,
    )
    module, averager = _ENGINES[backend]
    engine = getattr(importlib.import_module(module), averager)
    optimizer._averager = engine(world.core(backend), options)
    kind: Any = type(optimizer)
    optimizer.__class__ = _averaging_class(kind)
    return optimizer


def _check_fresh(optimizer: Any) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is no keras.optimizers.Optimizer")
    for inner in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if isinstance(inner, AveragingOptimizer):
            raise TypeError(
                f"{optimizer.name!r} is wrapped by hvdx.DistributedOptimizer already; wrap once, "
                "and a LossScaleOptimizer rather than the optimizer in it"
            )
        if hasattr(inner, "register_local_var"):
            raise TypeError(
                f"{optimizer.name!r} is wrapped by Horovod's DistributedOptimizer, which averages "
                "nothing on Keras 3; give hvdx the optimizer itself"
            )


class AveragingOptimizer:
    """What :func:`DistributedOptimizer` puts before the class of the user's optimizer.

    The optimizer becomes an instance of a subclass of its own class, made once per class. A
    wrapper object would hide variables from ``fit``, callbacks and files, or copy them; so
    would a second optimizer built from the first one's configuration. Files name the user's
    class and load where there is no hvdx.
    """

    _averager: Averager

    @property
    def communication_seconds(self) -> float:
        """Seconds this rank has waited for averages, without what overlapped with computing."""
        return self._averager.seconds

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Average ``grads`` over the ranks, then update as the user's class does."""
        grads = list(grads)
        variables = list(
            self._trainable_variables if trainable_variables is None else trainable_variables  # type: ignore[attr-defined]
        )
        if grads and len(grads) == len(variables):  # else Keras says what is wrong
            grads = self._averager.average(self, grads, variables)
        super().apply(grads, trainable_variables)  # type: ignore[misc]


@functools.cache
def _averaging_class(kind: type) -> type:
    own = type(
        kind.__name__,
        (AveragingOptimizer, kind),
        {
            "__doc__": kind.__doc__,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "from_config": kind.from_config,  # type: ignore[attr-defined]
        },
    )
    # What files call a class. A property `__class__` would do without Keras' tables, but under
    # torch.compile it makes Adam's steps run past `apply` above, and replicas drift apart.
    for names in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
        if kind in names:
            names[own] = names[kind]
    return own


class Options(NamedTuple):
    """What the user chose, but for the optimizer."""

    name: str
    compressor: Compressor
    op: ReduceOp
    predivide: float
    process_set: Any


class Bucket:
    """Gradients of one dtype and device that travel side by side.

    Attributes:
        name: of its operations, equal on all ranks.
        members: places among the variables.
        shapes: of the members.
        sizes: of the members, in elements.
        dtype: of all of them, as NumPy names it.
        states: the compressor's, one per member; none for elementwise compressors.
        flat: what the engine keeps from step to step.
    """

    def __init__(self, name: str, members: list[int], specs: list[Spec], states: list[Any]) -> None:
        self.name = name
        self.members = members
        self.shapes = [spec.shape for spec in specs]
        self.sizes = [_elements(spec.shape) for spec in specs]
        self.dtype = specs[0].dtype
        self.states = states
        self.flat: Any = None


class Layout(NamedTuple):
    """How the gradients of one list of variables travel."""

    variables: list[Any]  # kept alive, since layouts are found by their identity
    buckets: list[Bucket]
    idle: frozenset[int]  # places for which no rank had a gradient in the first step


_averagers: weakref.WeakSet[Averager] = weakref.WeakSet()


def _forget() -> None:
    if not world.running():
        for averager in _averagers:
            averager.forget()


world.on_change(_forget)


class Averager(abc.ABC):
    """Averages lists of gradients; a subclass per backend says how tensors are handled."""

    ops: Ops
    seconds: float

    def __init__(self, adapter: Adapter, options: Options) -> None:
        self.adapter = adapter
        self.options = options
        self._layouts: dict[tuple[int, ...], Layout] = {}
        _averagers.add(self)

    def forget(self) -> None:
        """Have the ranks agree again at the next step: others may have joined since."""
        self._layouts.clear()

    def average(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """Return the means of ``grads`` over the ranks, None where no rank has a gradient."""
        if self.ranks() == 1 and self.options.compressor is none:
            return grads
        key = tuple(map(id, variables))
        layout = self._layouts.get(key)
        if layout is None:
            self._check_caller(optimizer)
            layout = self._layouts[key] = self._agree(optimizer, grads, variables)
        return self.reduce(layout, grads)

    def ranks(self) -> int:
        """Return how many ranks take part."""
        return self.adapter.ranks(self.options.process_set)

    @abc.abstractmethod
    def reduce(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """Carry out the :meth:`work` of all buckets, side by side."""

    @abc.abstractmethod
    def pack(self, bucket: Bucket, grads: list[Any]) -> tuple[Any, bool]:
        """Return gradients as one flat tensor, and whether it may be overwritten."""

    @abc.abstractmethod
    def unpack(self, bucket: Bucket, flat: Any) -> list[Any]:
        """Cut a flat tensor into gradients."""

    @abc.abstractmethod
    def device(self, variable: Any) -> str:
        """Name the device of ``variable``, as far as it is known."""

    def work(self, bucket: Bucket, grads: list[Any]) -> Work[list[Any]]:
        """Average one bucket's gradients, as its compressor does."""
        compressor, op, predivide = self.options[1:4]
        factor = self.ranks() if op is ReduceOp.Sum and compressor is not none else predivide
        if compressor.elementwise:
            flat, in_place = self.pack(bucket, grads)
            if predivide != 1.0:
                flat = self.ops.scale(flat, 1.0 / predivide)
            if compressor is none:
                mean = yield Allreduce(flat, op=op, in_place=in_place)
            else:
                mean = (yield from compressor.reduce(self.ops, flat, None)).mean
            return self.unpack(bucket, self.ops.scale(mean, factor) if factor != 1.0 else mean)
        if predivide != 1.0:
            grads = [self.ops.scale(grad, 1.0 / predivide) for grad in grads]
        results = yield from together(
            [
                compressor.reduce(self.ops, grad, state)
                for grad, state in zip(grads, bucket.states, strict=True)
            ]
        )
        bucket.states = [result.state for result in results]
        means = [result.mean for result in results]
        return [self.ops.scale(mean, factor) for mean in means] if factor != 1.0 else means

    def _agree(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> Layout:
        """Plan buckets, after all ranks have said that they plan the same."""
        name, process_set = "hvdx.keras.agreement", self.options.process_set
        specs = [
            Spec(
                getattr(variable, "path", variable.name),
                tuple(variable.shape),
                keras.backend.standardize_dtype(variable.dtype),
            )
            for variable in variables
        ]
        limit = buckets.limit_bytes()
        entries = {
            "operations": self.options.name,
            "optimizer": f"{type(optimizer).__name__} {self.configuration(optimizer)}",
            "options": f"op={self.options.op.name}, compression={self.options.compressor}, "
            f"gradient_predivide_factor={self.options.predivide}, buckets of {limit} bytes",
            **{f"{i} {spec.name}": f"{spec.dtype} {spec.shape}" for i, spec in enumerate(specs)},
        }
        subject = "variables, optimizer or options of DistributedOptimizer"
        check_same(self.adapter, subject, entries, name, process_set)
        missing = frozenset(place for place, grad in enumerate(grads) if grad is None)
        everyone = self.adapter.allgather_object(missing, f"{name}.missing", process_set)
        # Backward meets the last layers first, so that their bucket shall fill first.
        order = range(len(specs))[::-1]
        plan = buckets.plan(
            [
                buckets.Entry(
                    specs[i].name,
                    _elements(specs[i].shape),
                    specs[i].dtype,
                    self.device(variables[i]),
                )
                for i in order
            ],
            limit,
        )
        prefix = f"{self.options.name}.{len(self._layouts)}"
        return Layout(
            variables,
            [
                self._bucket(f"{prefix}.{number}", [order[i] for i in members], specs)
                for number, members in enumerate(plan)
            ],
            frozenset.intersection(*everyone),
        )

    def _bucket(self, name: str, members: list[int], specs: list[Spec]) -> Bucket:
        own = [specs[place] for place in members]
        compressor = self.options.compressor
        states = [] if compressor.elementwise else [compressor.init(self.ops, s) for s in own]
        return Bucket(name, members, own, states)

    def configuration(self, optimizer: Any) -> str:
        """Describe the optimizer's options, equal on ranks that train alike."""
        return json.dumps(_nameless(optimizer.get_config()), sort_keys=True, default=str)

    def _check_caller(self, optimizer: Any) -> None:
        """Refuse to work inside a loss scaler: it calls only on ranks without overflow."""
        frame = sys._getframe(2)
        while frame.f_back is not None:
            frame = frame.f_back
            caller = frame.f_locals.get("self")
            if isinstance(caller, keras.optimizers.LossScaleOptimizer) and caller is not optimizer:
                raise ValueError(
                    f"a LossScaleOptimizer calls {optimizer.name!r} on those ranks only whose own "
                    "gradients are finite, so that the others would never answer. Wrap the scaler "
                    "instead (compile() makes one for mixed_float16 where there is none): "
                    "hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))"
                )


def _nameless(tree: Any) -> Any:
    """Drop names, which Keras counts up with every optimizer made before."""
    if isinstance(tree, dict):
        return {key: _nameless(value) for key, value in tree.items() if key != "name"}
    return tree


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
