"""A ``tf.GradientTape`` whose gradients are averaged over the ranks."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from hvdx import collectives, world
from hvdx.compression import CompressionError, Compressor, as_compressor, none
from hvdx.elastic import runs
from hvdx.frameworks import kind_of
from hvdx.integrations.tensorflow2 import TensorFlowAdapter, elastic
from hvdx.reduce_op import ReduceOp


class TapeOptions(NamedTuple):
    """What the user chose. Hashable: tapes come and go, plans are found by their options."""

    compressor: Compressor
    op: ReduceOp
    predivide: float
    sparse_as_dense: bool
    process_set: Any

    @classmethod
    def of(
        cls, compression: Any, op: int, predivide: float, sparse_as_dense: bool, process_set: Any
    ) -> TapeOptions:
        """Check what ``DistributedGradientTape`` was given.

        Raises:
            ValueError: the options do not go together.
            CompressionError: ``compression`` is none that hvdx knows.
        """
        compressor = as_compressor(compression)
        if predivide != 1.0 and op != ReduceOp.Average:
            raise ValueError("gradient_predivide_factor needs op=hvd.Average")
        if compressor is not none and op not in (ReduceOp.Average, ReduceOp.Sum):
            raise ValueError(f"compression={compressor} needs op=hvd.Average or hvd.Sum")
        own = world.own_set("tensorflow", process_set)
        return cls(compressor, ReduceOp(op), float(predivide), sparse_as_dense, own)


def distributed(tape: tf.GradientTape, options: TapeOptions, scale_local: bool) -> tf.GradientTape:
    """Return a tape of the same class that continues ``tape`` and averages.

    The tape given stays what it was, for gradients that are this rank's own.

    Raises:
        TypeError: it averages already, or is no tape.
    """
    if isinstance(tape, AveragingTape):
        raise TypeError("the tape is wrapped by DistributedGradientTape already; wrap it once")
    if not isinstance(tape, tf.GradientTape):
        raise TypeError(f"{type(tape).__name__} is no tf.GradientTape")
    given: Any = type(tape)
    kind = _averaging_class(given)
    own = kind.__new__(kind)
    own.__dict__.update(tape.__dict__, _recording=False)  # the record is shared
    own._recorder = tape
    own._options, own._scale_local, own._local, own._averages = options, scale_local, {}, True
    return own


@functools.cache
def _averaging_class(kind: type) -> Any:
    return type(kind.__name__, (AveragingTape, kind), {"__doc__": kind.__doc__})


class AveragingTape(tf.GradientTape):
    """What ``DistributedGradientTape`` puts before the class of the user's tape."""

    _recorder: tf.GradientTape  # the tape given, which may record still
    _options: TapeOptions
    _scale_local: bool
    _local: dict[int, Any]  # by identity; kept alive, lest another take the number
    _averages: bool

    def register_local_source(self, source: Any) -> None:
        """Have the gradient of ``source``, a TensorFlow or Keras variable, stay this rank's own."""
        value = variable_of(source)
        self._local[id(value)] = value

    @tf.autograph.experimental.do_not_convert
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """Differentiate, and average the gradients over the ranks.

        Args:
            target: as for ``tf.GradientTape``.
            sources: variables or tensors, nested as one likes; Keras variables too.
            output_gradients: as for ``tf.GradientTape``.
            use_generic_names: accepted for Horovod's sake: names never depend on variables.
            unconnected_gradients: as for ``tf.GradientTape``.

        Returns:
            Gradients in the structure of ``sources``, None where no rank has one. Those of
            local sources are divided by the number of ranks unless ``scale_local_gradients``
            was False: they then weigh as much as they do in the others' mean.
        """
        if self._recorder._recording and not self._persistent:
            self._recorder._pop_tape()  # as a tape does that is asked before it is left
        values = tf.nest.map_structure(variable_of, sources)
        own = super().gradient(target, values, output_gradients, unconnected_gradients)
        if not self._averages:
            return own
        flat, grads = tf.nest.flatten(values), tf.nest.flatten(own)
        shared = [place for place, value in enumerate(flat) if id(value) not in self._local]
        means = average(
            self._options, [flat[place] for place in shared], [grads[place] for place in shared]
        )
        result = self._scaled(grads) if self._local else grads
        for place, mean in zip(shared, means, strict=True):
            result[place] = mean
        return tf.nest.pack_sequence_as(values, result)

    def get_local_and_global_gradients(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """Return pairs of source and gradient: those of local sources, then all others."""
        grads = self.gradient(target, sources, output_gradients, use_generic_names)
        pairs: tuple[list[Any], list[Any]] = [], []
        for source, grad in zip(tf.nest.flatten(sources), tf.nest.flatten(grads), strict=True):
            pairs[id(variable_of(source)) not in self._local].append((source, grad))
        return pairs

    def compression_state(self, sources: Any) -> dict[str, Any]:
        """Return what the compressor keeps on this rank of the gradients of ``sources``.

        It belongs to the sources and to the tape's options, so that any tape with these will do.
        To be saved on every rank; loaded by as many, in their order, training goes on as if it
        had never stopped. Called on all ranks, and not in a ``tf.function``.

        Args:
            sources: variables, as they are given to :meth:`gradient`.

        Returns:
            Numbers, strings and NumPy arrays: under ``"parameters"`` arrays by name of the
            variable and name; ``"step"``; and whose state it is.

        Raises:
            CompressionError: the compressor cannot keep anything of ``sources``.
        """
        state: dict[str, Any] = self._averager_of(sources).saved_state()
        return state

    def portable_compression_state(self, sources: Any) -> dict[str, Any]:
        """Return what any number of ranks can go on from, equal on all; a collective call.

        See :meth:`compression_state`. What is owed is the same then; which rank owes how much of
        it is not.
        """
        state: dict[str, Any] = self._averager_of(sources).portable_state()
        return state

    def load_compression_state(self, state: Mapping[str, Any], sources: Any) -> None:
        """Go on from what was saved of ``sources``; on all ranks, before or during training.

        Args:
            state: this rank's own, or the portable one.
            sources: as for :meth:`compression_state`, in the same order.

        Raises:
            CompressionError: it is of another compressor or number of ranks, or nothing of the
                kind; of other variables: in the first step, unless training has begun before.
        """
        self._averager_of(sources).load_state(state)

    def _averager_of(self, sources: Any) -> Any:
        values = map(variable_of, tf.nest.flatten(sources))
        shared = [value for value in values if id(value) not in self._local]
        if (hindrance := _hindrance(self._options, shared)) is not None:
            raise _stateless(self._options, hindrance)
        return _plan(_core(), self._options, shared).averager

    def jacobian(self, *args: Any, **options: Any) -> Any:
        """Differentiate as ``tf.GradientTape`` does: only :meth:`gradient` averages."""
        with self._alone():
            return super().jacobian(*args, **options)

    def batch_jacobian(self, *args: Any, **options: Any) -> Any:
        """See :meth:`jacobian`."""
        with self._alone():
            return super().batch_jacobian(*args, **options)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._averages = False
        try:
            yield
        finally:
            self._averages = True

    def _scaled(self, grads: list[Any]) -> list[Any]:
        if not self._scale_local:
            return list(grads)
        size = _core().size_in_graph(self._options.process_set)
        return [_divided(grad, size) for grad in grads]


def _divided(grad: Any, by: Any) -> Any:
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(_divided(grad.values, by), grad.indices, grad.dense_shape)
    return grad / tf.cast(by, grad.dtype)


def variable_of(source: Any) -> Any:
    """Return the ``tf.Variable`` of a Keras variable, anything else as it is."""
    return source.value if kind_of(type(source)) == "keras" else source


def _core() -> TensorFlowAdapter:
    return world.core("tensorflow")  # type: ignore[return-value]


def average(options: TapeOptions, sources: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """Reduce ``grads`` of ``sources`` over the ranks.

    In buckets, as Keras' optimizer does, after the ranks have compared what they have. One
    operation per gradient, as in Horovod, where that cannot be: with an ``op`` that looks at
    whole tensors, for shapes that are not known, in TensorFlow 1's graphs, and in elastic
    training of Horovod's, where a rank that joins traces while the others have long compared
    (``hvd.elastic.run`` has all trace anew).
    """
    adapter = _core()
    if adapter.ranks(options.process_set) == 1 and options.compressor is none:
        return list(grads)
    if not adapter.included(options.process_set):
        return list(grads)
    hindrance = _hindrance(options, sources)
    if hindrance is None:
        return _plan(adapter, options, sources).average(list(grads))
    if options.compressor.stateful:
        raise _stateless(options, hindrance)
    return [_alone(options, grad) for grad in grads]


def _stateless(options: TapeOptions, hindrance: str) -> CompressionError:
    return CompressionError(
        f"compression={options.compressor}: a tape cannot keep state from step to step "
        f"{hindrance}: use hvd.DistributedOptimizer for it"
    )


def _hindrance(options: TapeOptions, sources: Sequence[Any]) -> str | None:
    """Say why ranks cannot agree once and for all how gradients travel, if they cannot."""
    with tf.init_scope():
        if not tf.executing_eagerly():
            return "in TensorFlow 1's graphs"
    if elastic() and not runs():
        return "in elastic training that hvd.elastic.run does not run"
    if options.op not in (ReduceOp.Average, ReduceOp.Sum):
        return f"with op=hvd.{options.op.name}"
    if not all(source.shape.is_fully_defined() for source in sources):
        return "for shapes that are not known"
    return None


def _alone(options: TapeOptions, grad: Any) -> Any:
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices) and options.sparse_as_dense:
        grad = tf.convert_to_tensor(grad)
    return collectives.allreduce(
        grad,
        op=options.op,
        compression=options.compressor,
        prescale_factor=1.0 / options.predivide,
        postscale_factor=options.predivide,
        process_set=options.process_set,
    )


_plans: dict[Any, _Plan] = {}
_numbers: collections.Counter[int] = collections.Counter()  # of plans, by process set


_left: dict[Any, _Plan] = {}  # of the job before, for what their averagers hold back


@world.on_change
def _start_anew() -> None:
    """Forget all plans with the job in which they were agreed upon, but for what is owed."""
    _left.update(
        (key, plan)
        for key, plan in _plans.items()
        if plan.averager.remembers and all(each() is not None for each in plan.alive)
    )
    _plans.clear()
    _numbers.clear()


def averagers(before: bool = True) -> list[Any]:
    """Return what holds something back of gradients for tapes; also those of the job before."""
    plans = [*_plans.values(), *(_left.values() if before else ())]
    return [plan.averager for plan in plans if plan.averager.remembers]


def _plan(adapter: TensorFlowAdapter, options: TapeOptions, sources: Sequence[Any]) -> _Plan:
    """Find the plan for these sources, or make it, which is a collective call.

    Variables are known by identity and not kept alive: their end is the end of the plan. Other
    tensors are new at every step, and known by their shapes and dtypes.
    """
    key = (options, *map(_identity, sources))
    if key not in _plans:
        plan = _plans[key] = _Plan(adapter, options, sources)
        if (before := _left.pop(key, None)) is not None:
            plan.averager.states = before.averager.states
        plan.alive = [
            weakref.ref(source, lambda _: (_plans.pop(key, None), _left.pop(key, None)))
            for source in sources
            if isinstance(source, tf.Variable)
        ]
    return _plans[key]


def _identity(source: Any) -> Any:
    return id(source) if isinstance(source, tf.Variable) else (tuple(source.shape), source.dtype)


class _Plan:
    """How the gradients of one list of sources travel, and what compressors keep of them."""

    alive: Sequence[Any] = ()

    def __init__(
        self, adapter: TensorFlowAdapter, options: TapeOptions, sources: Sequence[Any]
    ) -> None:
        for place, source in enumerate(sources):
            if options.compressor.stateful and not isinstance(source, tf.Variable):
                raise CompressionError(
                    f"compression={options.compressor} keeps state of each variable from step to "
                    f"step, but source {place} is a tensor: use a tape without it for that"
                )
        known = options.process_set.process_set_id if options.process_set is not None else 0
        _numbers[known] += 1  # ranks outside a set make no plans for it
        # In the sources' place, which the averager would keep alive.
        self.specs = [
            tf.TensorSpec(source.shape, source.dtype, getattr(source, "name", None) or "tensor")
            if tf.executing_eagerly() or isinstance(source, tf.Variable)
            else tf.TensorSpec(source.shape, source.dtype, "tensor")
            for source in sources
        ]
        self.averager = _averager(adapter, f"hvdx.tape.{known}.{_numbers[known]}", options)

    def average(self, grads: list[Any]) -> list[Any]:
        """Reduce this list of gradients, dense or sparse or None."""
        means: list[Any] = self.averager.average(_Nobody(), grads, self.specs)
        return means


class _Nobody:
    """Stands where Keras' averaging asks about an optimizer."""

    gradient_accumulation_steps = None


def _averager(adapter: TensorFlowAdapter, name: str, options: TapeOptions) -> Any:
    """Make what averages for Keras' optimizer do so for a tape; imports Keras."""
    module: Any = importlib.import_module("hvdx.integrations.keras3_averager")
    chosen = {**options._asdict(), "name": name, "times": 1, "scale_local": True}
    known = module.Options(**{field: chosen[field] for field in module.Options._fields})
    return _averager_class()(adapter, known)


@functools.cache
def _averager_class() -> Callable[..., Any]:
    from hvdx.integrations.keras3_tensorflow import TensorFlowAverager

    class TapeAverager(TensorFlowAverager):
        """There is no optimizer to compare, and no values of variables."""

        def configuration(self, optimizer: Any) -> str:
            return ""

        def _check_caller(self, optimizer: Any) -> None:
            pass

        def _compare(self, layout: Any) -> None:
            pass

    return TapeAverager
