"""Keras 3's ``DistributedOptimizer``, on the TensorFlow and on the torch backend.

``fit`` and custom loops hand gradients to ``optimizer.apply``, in graphs and eagerly, on every
backend; that is where they are averaged. Clipping, weight decay, moving averages of weights and
gradient accumulation then see the mean, as a single process with all the data would.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras.src import api_export
from keras.src.saving import object_registration

from hvdx import world
from hvdx.agreement import next_name
from hvdx.compression import as_compressor, as_local, none
from hvdx.compression.base import refuse_momentum
from hvdx.frameworks import framework_of_kind
from hvdx.integrations.keras3_averager import Averager, Options
from hvdx.reduce_op import ReduceOp
from hvdx.servers import checked_servers, refuse_measuring

_ENGINES = {
    "tensorflow": ("hvdx.integrations.keras3_tensorflow", "TensorFlowAverager"),
    "torch": ("hvdx.integrations.keras3_torch", "TorchAverager"),
}
_SERVED_ENGINES = {
    "tensorflow": ("hvdx.integrations.keras3_servers_tensorflow", "TensorFlowServed"),
    "torch": ("hvdx.integrations.keras3_servers_torch", "TorchServed"),
}
_LOCAL_ENGINES = {
    "tensorflow": ("hvdx.integrations.keras3_local_tensorflow", "TensorFlowRounds"),
    "torch": ("hvdx.integrations.keras3_local_torch", "TorchRounds"),
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
    sync: str = "allreduce",
    servers: Sequence[int] | None = None,
) -> keras.optimizers.Optimizer:
    """Make ``optimizer`` average gradients over the ranks; returns the same object.

    The optimizer keeps its class, configuration, learning rate or schedule, iterations and
    state. A model compiled with it saves and loads as without hvdx. What is loaded from a file,
    and copies that Keras makes of models (``clone_model``, ``copy.deepcopy``, pickles), hold the
    user's plain optimizer, to be wrapped and compiled again: :func:`hvdx.keras.load_model` does.
    The optimizer gains ``communication_seconds``, ``register_local_var``, and
    ``compression_state``, ``portable_compression_state`` and ``load_compression_state``.

    Gradients travel in flat buckets (``HVDX_BUCKET_MB``), in a graph while later ones are
    computed. Where a rank has no gradient for a variable it sends zeros; a variable that no rank
    has a gradient for stays without. With Keras' ``gradient_accumulation_steps`` ranks
    communicate once per update, or every step where a ``LossScaleOptimizer`` is wrapped.

    XLA cannot compile Horovod's operations. Where Keras would choose it by itself
    (``jit_compile="auto"`` with a GPU), models with this optimizer train without;
    ``jit_compile=True`` is an error at the first step.

    With ``compression=hvd.Compression.local_sgd(steps)`` or ``diloco(...)`` gradients are not
    averaged: each rank makes ``steps`` updates of its own (those that its ``LossScaleOptimizer``
    skips count too), and what they have changed is averaged with the last one. Variables must be
    equal at the start; then they are after each such round. ``optimizer.flush()``, on all ranks,
    ends a round early, as after ``fit``; ``CheckpointCallback`` does so before it saves. Metrics
    within a round are of each rank's own model. Clipping, accumulation and the optimizer's state
    stay each rank's own, as do variables that are not trained, such as statistics of
    ``BatchNormalization``. Where variables are replaced during training,
    ``optimizer.load_compression_state({})`` begins anew from them.

    Args:
        optimizer: any Keras 3 optimizer. For mixed float16, a ``LossScaleOptimizer`` that is
            wrapped itself costs least: where ``compile()`` puts one around the wrapped
            optimizer, ranks agree in an operation of its own whether a step overflowed.
        name: of the operations; equal on all ranks. Default: counted.
        device_dense: accepted for Horovod's sake and not needed.
        device_sparse: likewise.
        compression: a compressor of ``hvd.Compression`` or a Horovod ``Compressor`` class.
            What it keeps from step to step is no variable of the optimizer and not in Keras'
            files; :class:`CheckpointCallback` saves it.
        sparse_as_dense: send sparse gradients (``tf.IndexedSlices``) in the dense buckets. Else
            they stay sparse: all ranks' rows are gathered, their values by 2 bytes or 1 a number
            under a ``compression``, and as they are without.
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
        sync: ``"allreduce"``, or ``"parameter_server"``: servers own parts of the variables. Means
            go to their owners, which alone step the optimizer there, and its results to all; so
            each server keeps one part of the optimizer's state. ``optimizer.settle()``, on all
            ranks, before rank 0 saves the model with its optimizer; ``CheckpointCallback`` does
            so. See docs/synchronization.md.
        servers: ranks that own parts; by default all, which is ZeRO's first stage.

    Raises:
        TypeError: it is wrapped already, is no Keras 3 optimizer, or Keras runs on jax.
        CompressionError: the compressor is unknown, or applies momentum as the optimizer does.
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
    local = as_local(compression)
    if local is not None and op != ReduceOp.Average:
        raise ValueError(
            f"DistributedOptimizer(op={ReduceOp.of(op).name}, compression={local}): what ranks "
            "have learnt alone is averaged; use op=hvd.Average"
        )
    compressor = none if local is not None else as_compressor(compression)
    inner = _innermost(optimizer)
    ranks = range(world.core(backend).ranks(None)) if process_set is None else process_set.ranks
    places = checked_servers(sync, servers, list(ranks))
    if places is not None:
        if local is not None:
            raise ValueError(
                f"sync='parameter_server' with compression={local}: there, each rank steps on all "
                "variables by itself; leave one of them out"
            )
        refuse_measuring(compressor)
        importlib.import_module("hvdx.integrations.keras3_servers").check_served(inner)
    refuse_momentum(compressor, type(inner).__name__, inner.get_config())
    options = Options(
        name or next_name("keras", process_set),
        compressor,
        ReduceOp(op),
        gradient_predivide_factor,
        process_set,
        sparse_as_dense,
        1 if average_aggregated_gradients else backward_passes_per_step,
        scale_local_gradients,
    )
    engines = _ENGINES if local is None else _LOCAL_ENGINES
    module, averager = (engines if places is None else _SERVED_ENGINES)[backend]
    engine = getattr(importlib.import_module(module), averager)
    scaler = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if backward_passes_per_step > 1:
        inner.gradient_accumulation_steps = backward_passes_per_step
    if places is not None:
        return _served(optimizer, engine(world.core(backend), options, places))
    if local is None:
        optimizer._averager = engine(world.core(backend), options)
        mixin: type = AveragingScaler if scaler else AveragingOptimizer
    else:
        optimizer._averager = engine(world.core(backend), options, local)
        rounds = importlib.import_module("hvdx.integrations.keras3_local")
        mixin = rounds.LocalScaler if scaler else rounds.LocalOptimizer
    optimizer.__class__ = _class_with(mixin, optimizer)
    return optimizer


def _served(optimizer: Any, averager: Any) -> Any:
    """Have ``optimizer``, or the one in a scaler, step on parts; a scaler then asks all ranks."""
    module = importlib.import_module("hvdx.integrations.keras3_servers")
    inner = _innermost(optimizer)
    inner._averager = averager
    inner.__class__ = _class_with(module.ServedOptimizer, inner)
    if inner is not optimizer:
        optimizer.__class__ = _class_with(AgreeingScaler, optimizer)
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
    has_parts = False  # of the state, of which each rank then has its own

    def without_parts(self, variables: Iterable[Any]) -> list[Any]:
        """Return those of ``variables`` that are equal on all ranks."""
        return list(variables)

    def hand_out_parts(self) -> None:
        """Give each rank its part of the state that rank 0 has loaded; a collective call."""

    @property
    def communication_seconds(self) -> float:
        """Seconds this rank has waited for averages, without what overlapped with computing."""
        return self._averager.seconds

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables; a list that may also be called, as Horovod's may."""
        return _Variables(super().variables)  # type: ignore[misc]

    @property
    def compute_gradients(self) -> Any:
        """Refuse what Keras 3's optimizers do not have.

        A property, since torch.compile cannot follow ``__getattr__``.
        """
        raise AttributeError(
            "Keras 3's optimizers have no compute_gradients or get_gradients: take gradients with "
            "tf.GradientTape, or by loss.backward(), and give them to apply_gradients, which "
            "averages them"
        )

    get_gradients = compute_gradients

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

    def compression_state(self) -> dict[str, Any]:
        """Return what the compressor keeps on this rank.

        To be saved on every rank, since what is still owed to training differs between them.
        Loaded by as many ranks, in their order, training goes on as if it had never stopped.

        Returns:
            Numbers, strings and NumPy arrays: under ``"parameters"`` arrays by path of the
            parameter and name; ``"step"``; and whose state it is.
        """
        return self._averager.saved_state()

    def portable_compression_state(self) -> dict[str, Any]:
        """Return what any number of ranks can go on from, equal on all; a collective call.

        What is owed is the same then; which rank owes how much of it is not.
        """
        return self._averager.portable_state()

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved; on all ranks, before or during training.

        Args:
            state: this rank's own, or the portable one.

        Raises:
            CompressionError: it is of another compressor or number of ranks, or nothing of the
                kind; of another model: in the first step, unless training has begun before.
        """
        self._averager.load_state(state)

    def begin_anew(self) -> None:
        """Note that variables were replaced, equally on all ranks; of no matter to gradients."""

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables; a scaler around it learns to ask all ranks.

        A ``LossScaleOptimizer`` builds what is in it, and later calls it only if this rank's own
        gradients are finite: the other ranks would wait for its gradients.
        """
        self._meet_scaler(sys._getframe(1).f_locals.get("self"))
        super().build(variables)  # type: ignore[misc]

    def _meet_scaler(self, caller: Any) -> None:
        """Have ``caller``, if it is a scaler that builds this optimizer, ask all ranks."""
        plain = isinstance(caller, keras.optimizers.LossScaleOptimizer)
        if plain and caller.inner_optimizer is self and not isinstance(caller, AgreeingScaler):
            caller.__class__ = _class_with(AgreeingScaler, caller)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Average ``grads`` over the ranks, then update as the user's class does."""
        grads = list(grads)
        variables = list(
            self._trainable_variables if trainable_variables is None else trainable_variables  # type: ignore[attr-defined]
        )
        if not self._averager.started and self._averager.ranks() > 1:
            _check_caller(self)
        if grads and len(grads) == len(variables):  # else Keras says what is wrong
            grads = self._averaged(grads, variables)
        super().apply(grads, trainable_variables)  # type: ignore[misc]

    def _averaged(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        return self._averager.average(self, grads, variables)


class AveragingScaler(AveragingOptimizer):
    """A ``LossScaleOptimizer`` that averages: an overflow anywhere reaches all with the mean."""

    def _averaged(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        """Compress gradients without their scale: what is owed is paid under another one.

        Scales are powers of two, so that nothing is rounded.
        """
        if not self._averager.remembers:
            return super()._averaged(grads, variables)
        given: Any = self
        scale = keras.ops.convert_to_tensor(
            given.dynamic_scale if given.built else given.initial_scale, "float32"
        )
        means = super()._averaged(_divided(grads, scale), variables)
        return _divided(means, 1.0 / scale)

    def check_finite(self, grads: Sequence[Any]) -> Any:
        """Tell whether all are finite, asking all ranks where gradients stay on one of them."""
        finite = super().check_finite(grads)  # type: ignore[misc]
        return self._averager.everywhere(finite) if self._averager.local else finite


def _divided(grads: list[Any], divisor: Any) -> list[Any]:
    return [
        None if grad is None else keras.ops.divide(grad, keras.ops.cast(divisor, grad.dtype))
        for grad in grads
    ]


class AgreeingScaler:
    """A ``LossScaleOptimizer`` around one that averages."""

    inner_optimizer: Any

    @property
    def communication_seconds(self) -> float:
        """See :attr:`AveragingOptimizer.communication_seconds`."""
        return self.inner_optimizer.communication_seconds

    def save_own_variables(self, store: Any) -> None:
        """Save the scale, and what the optimizer saves."""
        if not self.inner_optimizer.has_parts:
            super().save_own_variables(store)  # type: ignore[misc]
            return
        own = [keras.ops.convert_to_numpy(variable) for variable in self._variables]  # type: ignore[attr-defined]
        whole = self.inner_optimizer._averager.whole_state(self.inner_optimizer)
        for place, array in enumerate([*own, *whole]):
            store[str(place)] = array

    def load_own_variables(self, store: Any) -> None:
        """Load them."""
        own = self._variables  # type: ignore[attr-defined]
        if not self.inner_optimizer.has_parts or len(store.keys()) != len(self.variables):  # type: ignore[attr-defined]
            super().load_own_variables(store)  # type: ignore[misc]
            return
        arrays = [np.array(store[str(place)]) for place in range(len(store.keys()))]
        for variable, array in zip(own, arrays, strict=False):
            variable.assign(array)
        inner = self.inner_optimizer
        inner._averager.put(inner, arrays[len(own) :])

    def check_finite(self, grads: Sequence[Any]) -> Any:
        """Tell whether the gradients of all ranks are finite."""
        return self.inner_optimizer._averager.everywhere(super().check_finite(grads))  # type: ignore[misc]


def _check_caller(optimizer: Any) -> None:
    """Refuse to work inside a scaler that calls only on ranks without overflow.

    Such a scaler was built before its optimizer was wrapped.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.optimizers.LossScaleOptimizer) and not isinstance(
            caller, (AgreeingScaler, AveragingScaler)
        ):
            raise ValueError(
                f"a LossScaleOptimizer calls {optimizer.name!r} on those ranks only whose own "
                "gradients are finite, so that the others would never answer. Wrap the scaler "
                "instead: hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))"
            )
        frame = frame.f_back


def _class_with(mixin: type, optimizer: Any) -> type:
    kind: Any = type(optimizer)
    return _subclass(mixin, kind)


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
