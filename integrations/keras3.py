"""Keras 3's ``DistributedOptimizer``, on the TensorFlow and on the torch backend.

``fit`` and custom loops hand gradients to ``optimizer.apply``, in graphs and eagerly, on every
backend; that is where they are averaged. Clipping, weight decay, moving averages of weights and
gradient accumulation then see the mean, as a single process with all the data would.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras.src import api_export
from keras.src.saving import object_registration

from hvdx import buckets, collectives, world
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
    sparse_as_dense: bool = False,
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
    state. A model compiled with it saves and loads as without hvdx. What is loaded from a file,
    and copies that Keras makes through one (``copy.deepcopy`` and pickles of models), hold the
    user's plain optimizer, to be wrapped and compiled again: :func:`hvdx.keras.load_model` does.
    The optimizer gains ``communication_seconds`` and ``register_local_var``.

    Gradients travel in flat buckets (``HVDX_BUCKET_MB``), in a graph while later ones are
    computed. Where a rank has no gradient for a variable it sends zeros; a variable that no rank
    has a gradient for stays without. With Keras' ``gradient_accumulation_steps`` ranks
    communicate once per update, or every step where a ``LossScaleOptimizer`` is wrapped.

    XLA cannot compile Horovod's operations. Where Keras would choose it by itself
    (``jit_compile="auto"`` with a GPU), models with this optimizer train without;
    ``jit_compile=True`` is an error at the first step.

    Args:
        optimizer: any Keras 3 optimizer. For mixed float16, a ``LossScaleOptimizer`` that is
            wrapped itself costs least: where ``compile()`` puts one around the wrapped
            optimizer, ranks agree in an operation of its own whether a step overflowed.
        name: of the operations; equal on all ranks. Default: counted.
        device_dense: accepted for Horovod's sake and not needed.
        device_sparse: likewise.
        compression: a compressor of ``hvd.Compression`` or a Horovod ``Compressor`` class.
        sparse_as_dense: send sparse gradients (``tf.IndexedSlices``) in the dense buckets. Else
            they stay sparse: all ranks' rows are gathered, uncompressed, as in Horovod.
        gradient_predivide_factor: with Average, divides before the sum and multiplies after.
        op: ``hvd.Average`` or ``hvd.Sum``.
        num_groups: accepted for Horovod's sake; buckets take its place.
        groups: likewise: a positive number or lists of variables.
        backward_passes_per_step: how many steps to accumulate before an update: sets
            ``gradient_accumulation_steps`` of the optimizer, which must have no state yet.
        average_aggregated_gradients: update with the mean over those steps rather than, as in
            Horovod by default, with their sum.
        process_set: the ranks to average over; all by default.
        scale_local_gradients: divide the gradients of local variables by the number of ranks.

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
    _check_groups(num_groups or groups)
    _check_passes(optimizer, backward_passes_per_step)
    backend = framework_of_kind("keras")
    options = Options(
        name or next_name("keras", process_set),
        as_compressor(compression),
        ReduceOp(op),
        gradient_predivide_factor,
        process_set,
        sparse_as_dense,
        1 if average_aggregated_gradients else backward_passes_per_step,
        scale_local_gradients,
    )
    module, averager = _ENGINES[backend]
    engine = getattr(importlib.import_module(module), averager)
    optimizer._averager = engine(world.core(backend), options)
    if backward_passes_per_step > 1:
        _innermost(optimizer).gradient_accumulation_steps = backward_passes_per_step
    scaler = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    optimizer.__class__ = _class_with(AveragingScaler if scaler else AveragingOptimizer, optimizer)
    return optimizer


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = ReduceOp.Average,
    groups: Any = None,
    process_set: Any = None,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Make ``optimizer`` average gradients over the ranks, but for those of ``local_layers``.

    These layers train on their own rank's data alone and may differ between ranks, in shape
    too. Give their variables to ``BroadcastGlobalVariablesCallback(local_variables=...)`` also.

    Args:
        optimizer: see :func:`DistributedOptimizer`, as for the other arguments.
        name: likewise.
        device_dense: likewise.
        device_sparse: likewise.
        compression: likewise.
        sparse_as_dense: likewise.
        gradient_predivide_factor: likewise.
        op: likewise.
        groups: likewise.
        process_set: likewise.
        local_layers: a layer or several; they need not be built yet.
        scale_local_gradients: divide their gradients by the number of ranks, since the others'
            are averaged.

    Raises:
        ValueError: ``local_layers`` holds something else.
    """
    layers = [local_layers] if isinstance(local_layers, keras.Layer) else list(local_layers or ())
    for layer in layers:
        if not isinstance(layer, keras.Layer):
            raise ValueError(f"local_layers: {layer!r} is no keras.layers.Layer")
    optimizer = DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    optimizer._averager.local.extend(layers)
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


def _check_groups(groups: Any) -> None:
    lists = isinstance(groups, (list, tuple)) and all(isinstance(g, (list, tuple)) for g in groups)
    if groups is not None and not lists and not (isinstance(groups, int) and groups >= 0):
        raise ValueError(f"groups={groups!r}: give a number, or a list of lists of variables")


def _check_passes(optimizer: Any, passes: int) -> None:
    if not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step={passes!r}: give a number from 1")
    inner = _innermost(optimizer)
    if passes > 1 and inner.gradient_accumulation_steps:
        raise ValueError(
            f"backward_passes_per_step={passes}, but {inner.name!r} accumulates already, over "
            f"gradient_accumulation_steps={inner.gradient_accumulation_steps}; give one of them"
        )
    if passes > 1 and inner.built:
        raise ValueError(
            f"backward_passes_per_step={passes}: {inner.name!r} is built already, without room "
            "for accumulated gradients. Wrap it before it is built, or make it with "
            f"{type(inner).__name__}(..., gradient_accumulation_steps={passes}), which averages "
            "over the steps"
        )


def _innermost(optimizer: Any) -> Any:
    return getattr(optimizer, "inner_optimizer", optimizer)


def averaging(optimizer: Any) -> AveragingOptimizer | None:
    """Return ``optimizer``, or the one in a loss scaler, if it averages over the ranks."""
    for one in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if isinstance(one, AveragingOptimizer):
            return one
    return None


class _Variables(list):  # type: ignore[type-arg]
    """A list that may be called: scripts for Horovod write ``optimizer.variables()``."""

    def __call__(self) -> list[Any]:
        return self


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

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables; a list that may also be called, as Horovod's may."""
        return _Variables(super().variables)  # type: ignore[misc]

    def register_local_var(self, var: Any) -> None:
        """Keep the gradients of ``var`` on this rank.

        Raises:
            ValueError: training has begun: what travels is settled then.
        """
        if self._averager.started:
            raise ValueError(
                f"register_local_var({getattr(var, 'name', var)!r}) after the first step; call it "
                "before training"
            )
        self._averager.local.append(var)

    def settle(self) -> None:
        """Give every rank the mean of the gradients accumulated so far; a collective call.

        Between updates each rank has its own. The update is the same with their mean, and one
        rank's state is then that of all, as it must be to be saved.
        """
        steps = self.gradient_accumulation_steps  # type: ignore[attr-defined]
        if steps and self.built and int(self._iterations) % steps:  # type: ignore[attr-defined]
            self._averager.settle(self._accumulated_gradients)  # type: ignore[attr-defined]

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables; a scaler around it learns to ask all ranks.

        A ``LossScaleOptimizer`` builds what is in it, and later calls it only if this rank's own
        gradients are finite: the other ranks would wait for its gradients.
        """
        caller = sys._getframe(1).f_locals.get("self")
        plain = isinstance(caller, keras.optimizers.LossScaleOptimizer)
        if plain and caller.inner_optimizer is self and not isinstance(caller, AgreeingScaler):
            caller.__class__ = _class_with(AgreeingScaler, caller)
        super().build(variables)  # type: ignore[misc]

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Average ``grads`` over the ranks, then update as the user's class does."""
        grads = list(grads)
        variables = list(
            self._trainable_variables if trainable_variables is None else trainable_variables  # type: ignore[attr-defined]
        )
        if grads and len(grads) == len(variables):  # else Keras says what is wrong
            grads = self._averager.average(self, grads, variables)
        super().apply(grads, trainable_variables)  # type: ignore[misc]


class AveragingScaler(AveragingOptimizer):
    """A ``LossScaleOptimizer`` that averages: an overflow anywhere reaches all with the mean."""

    def check_finite(self, grads: Sequence[Any]) -> Any:
        """Tell whether all are finite, asking all ranks where gradients stay on one of them."""
        finite = super().check_finite(grads)  # type: ignore[misc]
        return self._averager.everywhere(finite) if self._averager.local else finite


class AgreeingScaler:
    """A ``LossScaleOptimizer`` around one that averages."""

    inner_optimizer: Any

    def check_finite(self, grads: Sequence[Any]) -> Any:
        """Tell whether the gradients of all ranks are finite."""
        return self.inner_optimizer._averager.everywhere(super().check_finite(grads))  # type: ignore[misc]


def _class_with(mixin: type, optimizer: Any) -> type:
    return _subclass(mixin, type(optimizer))


@functools.cache
def _subclass(mixin: type, kind: type) -> type:
    own = type(
        kind.__name__,
        (mixin, kind),
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
    sparse_as_dense: bool
    times: int  # what Keras' mean over accumulated steps is multiplied by
    scale_local: bool


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
    """How the gradients of one list of variables travel; places count from 0 in that list."""

    variables: list[Any]  # kept alive, since layouts are found by their identity
    buckets: list[Bucket]
    sparse: dict[int, str]  # place -> name of the operations that gather its rows
    local: frozenset[int]  # places whose gradients stay here
    idle: frozenset[int]  # places for which no rank had a gradient in the first step


class Averager(abc.ABC):
    """Averages lists of gradients; a subclass per backend says how tensors are handled.

    Attributes:
        local: variables, and layers, whose gradients stay on this rank.
        broadcast_follows: ranks are made equal after the first step, so that they may differ now.
    """

    ops: Ops
    seconds: float

    def __init__(self, adapter: Adapter, options: Options) -> None:
        self.adapter = adapter
        self.options = options
        self.local: list[Any] = []
        self.broadcast_follows = False
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._unseen: set[tuple[int, ...]] = set()  # layouts whose replicas are yet to compare

    @property
    def started(self) -> bool:
        """Whether ranks have agreed about what travels."""
        return bool(self._layouts)

    def average(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """Return the means of ``grads`` over the ranks, None where no rank has a gradient."""
        if self.ranks() == 1 and self.options.compressor is none:
            return [self._scaled(grad, self.options.times) for grad in grads]
        layout = self._layout(optimizer, grads, variables)
        if optimizer.gradient_accumulation_steps:
            means = self._accumulated(optimizer, layout, grads)
        else:
            means = self.reduce(layout, grads)
        factor = self.options.times / (self.ranks() if self.options.scale_local else 1)
        for place in layout.local:
            means[place] = self._scaled(grads[place], factor)
        for place in layout.idle:
            if grads[place] is None and self.is_zero(means[place]):
                means[place] = None
        return means

    def _layout(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> Layout:
        key = tuple(map(id, variables))
        layout = self._layouts.get(key)
        if layout is None:
            self._check_caller(optimizer)
            layout = self._layouts[key] = self._agree(optimizer, grads, variables)
            self._unseen.add(key)
            if not self.is_tracing():  # a graph is traced once, and has no second step
                return layout
        if key in self._unseen:  # scripts may broadcast after the first step, as Horovod's do
            self._unseen.discard(key)
            self._compare(layout)
        return layout

    def _accumulated(self, optimizer: Any, layout: Layout, grads: list[Any]) -> list[Any]:
        """Average what this and earlier steps have gathered, in the step that updates only.

        Keras divides by the number of steps, and adds what is in its accumulators: nothing then.
        """
        if not optimizer.built:
            optimizer.build(layout.variables)
        shared = [place for place in range(len(grads)) if place not in layout.local]
        sums = [
            optimizer._accumulated_gradients[optimizer._get_variable_index(layout.variables[place])]
            for place in shared
        ]
        whole = self.dense(layout, grads)
        own = [whole[place] for place in shared]

        def update() -> list[Any]:
            for place, total in zip(shared, sums, strict=True):
                whole[place] = whole[place] + total.value
            means = self.reduce(layout, whole)
            for total in sums:
                total.assign(keras.ops.zeros_like(total))
            return [means[place] for place in shared]

        steps = optimizer.gradient_accumulation_steps
        due = (optimizer._iterations + 1) % steps == 0
        results = keras.ops.cond(due, update, lambda: own)
        means: list[Any] = [None] * len(grads)
        for place, result in zip(shared, results, strict=True):
            means[place] = result
        return means

    def settle(self, sums: list[Any]) -> None:
        """Replace the values of variables by their means over the ranks."""
        means = collectives.grouped_allreduce(
            sums, name=f"{self.options.name}.settle", process_set=self.options.process_set
        )
        for total, mean in zip(sums, means, strict=True):
            total.assign(mean)

    def everywhere(self, condition: Any) -> Any:
        """Tell whether ``condition``, a boolean tensor, holds on every rank."""
        if self.ranks() == 1:
            return condition
        flag = keras.ops.cast(condition, "float32")
        least = self.adapter.allreduce(
            flag,
            op=ReduceOp.Min,
            name=f"{self.options.name}.finite",
            prescale_factor=1.0,
            postscale_factor=1.0,
            process_set=self.options.process_set,
        )
        return least > 0.5

    @staticmethod
    def _scaled(grad: Any, factor: float) -> Any:
        return grad if grad is None or factor == 1 else keras.ops.multiply(grad, factor)

    def ranks(self) -> int:
        """Return how many ranks take part."""
        return self.adapter.ranks(self.options.process_set)

    @abc.abstractmethod
    def reduce(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """Carry out the :meth:`work` of all buckets, side by side; None in local places."""

    @abc.abstractmethod
    def dense(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """Return dense tensors of the variables' types, zeros where there is no gradient."""

    @abc.abstractmethod
    def is_tracing(self) -> bool:
        """Tell whether a graph is being made."""

    @abc.abstractmethod
    def is_zero(self, mean: Any) -> bool:
        """Tell whether a mean is all zeros, as far as it is known yet."""

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
        factor *= self.options.times
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
        """Plan what travels how, after all ranks have said that they plan the same."""
        name, process_set = "hvdx.keras.agreement", self.options.process_set
        local = self._local_places(variables)
        specs = {
            place: Spec(
                getattr(variable, "path", variable.name),
                tuple(variable.shape),
                keras.backend.standardize_dtype(variable.dtype),
            )
            for place, variable in enumerate(variables)
            if place not in local
        }
        limit = buckets.limit_bytes()
        each = {f"{i} {s.name}": f"{s.dtype} {s.shape}" for i, s in enumerate(specs.values())}
        entries = {
            "operations": self.options.name,
            "optimizer": f"{type(optimizer).__name__} {self.configuration(optimizer)}",
            "options": f"op={self.options.op.name}, compression={self.options.compressor}, "
            f"gradient_predivide_factor={self.options.predivide}, buckets of {limit} bytes, "
            f"sparse_as_dense={self.options.sparse_as_dense}, gradients times {self.options.times}",
            **each,
        }
        subject = "variables, optimizer or options of DistributedOptimizer"
        check_same(self.adapter, subject, entries, name, process_set)
        as_dense = self.options.sparse_as_dense or optimizer.gradient_accumulation_steps
        own = ["dense" if as_dense and grads[i] is not None else self.kind(grads[i]) for i in specs]
        everyone = self.adapter.allgather_object(own, f"{name}.kinds", process_set)
        kinds = {place: {k[i] for k in everyone} for i, place in enumerate(specs)}
        prefix = f"{self.options.name}.{len(self._layouts)}"
        sparse = {
            p: f"{prefix}.rows.{i}" for i, p in enumerate(specs) if kinds[p] - {None} == {"sparse"}
        }
        return Layout(
            variables,
            self._buckets(prefix, {p: s for p, s in specs.items() if p not in sparse}, variables),
            sparse,
            local,
            frozenset(place for place, found in kinds.items() if found == {None}),
        )

    def kind(self, grad: Any) -> str | None:
        """Say how a gradient would travel: ``dense``, ``sparse``, or None if there is none."""
        return None if grad is None else "dense"

    def _local_places(self, variables: list[Any]) -> frozenset[int]:
        own = [
            variable
            for owner in self.local
            for variable in (owner.trainable_weights if isinstance(owner, keras.Layer) else [owner])
        ]
        known = {id(tensor) for v in own for tensor in (v, getattr(v, "value", v))}
        return frozenset(
            place
            for place, v in enumerate(variables)
            if id(v) in known or id(getattr(v, "value", v)) in known
        )

    def _compare(self, layout: Layout) -> None:
        """Warn where replicas differ: averaged gradients do not make them equal again."""
        own = []
        for place, variable in enumerate(layout.variables):
            if place not in layout.local:
                value = self.adapter.to_numpy(getattr(variable, "value", variable))
                name = getattr(variable, "path", variable.name)
                own.append((name, hashlib.sha256(value.tobytes()).hexdigest()[:8]))
        name = "hvdx.keras.replicas"
        everyone = self.adapter.allgather_object(own, name, self.options.process_set)
        differing = [names[0][0] for names in zip(*everyone, strict=True) if len(set(names)) > 1]
        if differing and not self.broadcast_follows:
            warnings.warn(
                f"ranks train {len(differing)} of {len(own)} variables from different values, the "
                f"first being {differing[0]!r}, and will stay different: use "
                "hvd.callbacks.BroadcastGlobalVariablesCallback(0), or "
                "hvd.broadcast_parameters(model) before training",
                stacklevel=2,
            )

    def _buckets(self, prefix: str, specs: dict[int, Spec], variables: list[Any]) -> list[Bucket]:
        # Backward meets the last layers first, so that their bucket shall fill first.
        order = list(specs)[::-1]
        plan = buckets.plan(
            [
                buckets.Entry(
                    specs[place].name,
                    _elements(specs[place].shape),
                    specs[place].dtype,
                    self.device(variables[place]),
                )
                for place in order
            ],
            buckets.limit_bytes(),
        )
        return [
            self._bucket(f"{prefix}.{number}", [order[i] for i in members], specs)
            for number, members in enumerate(plan)
        ]

    def _bucket(self, name: str, members: list[int], specs: dict[int, Spec]) -> Bucket:
        own = [specs[place] for place in members]
        compressor = self.options.compressor
        states = [] if compressor.elementwise else [compressor.init(self.ops, s) for s in own]
        return Bucket(name, members, own, states)

    def configuration(self, optimizer: Any) -> str:
        """Describe the optimizer's options, equal on ranks that train alike."""
        return json.dumps(_nameless(optimizer.get_config()), sort_keys=True, default=str)

    def _check_caller(self, optimizer: Any) -> None:
        """Refuse to work inside a scaler that calls only on ranks without overflow."""
        frame = sys._getframe(2)
        while frame.f_back is not None:
            frame = frame.f_back
            caller = frame.f_locals.get("self")
            if isinstance(caller, keras.optimizers.LossScaleOptimizer) and not isinstance(
                caller, (AgreeingScaler, AveragingScaler)
            ):
                raise ValueError(
                    f"a LossScaleOptimizer calls {optimizer.name!r} on those ranks only whose own "
                    "gradients are finite, so that the others would never answer. Wrap the scaler "
                    "instead: "
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
