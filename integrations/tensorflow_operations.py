"""Horovod's operations in TensorFlow: their names, their gradients, their faults, and graphs."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_char_p
from typing import Any, TypeVar

import tensorflow as tf
from horovod.tensorflow import mpi_ops
from tensorflow.python.ops import control_flow_util

from hvdx.errors import MismatchError
from hvdx.integrations.tensorflow_watch import in_graph
from hvdx.mismatch import explain, is_mismatch
from hvdx.watchdog import waiting

Call = TypeVar("Call", bound=Callable[..., Any])

#: Whether TensorFlow's name scopes are part of an operation's name, as the caller decided.
_scopes_kept: contextvars.ContextVar[bool | None] = contextvars.ContextVar("scopes", default=None)


class TensorFlowMismatchError(MismatchError, tf.errors.FailedPreconditionError):
    """Also what Horovod raises here, for scripts that catch TensorFlow's class."""

    def __init__(self, message: str) -> None:
        tf.errors.FailedPreconditionError.__init__(self, None, None, message)


@contextlib.contextmanager
def name_scopes(kept: bool) -> Iterator[None]:
    """Decide for the operations within whether name scopes are part of their names.

    Otherwise they are of unnamed operations only: an explicit name is the same in all graphs.
    """
    token = _scopes_kept.set(kept)
    try:
        yield
    finally:
        _scopes_kept.reset(token)


def as_is(call: Call) -> Call:
    """Let ``tf.function`` call it as it is written: AutoGraph would rewrite all that it calls.

    Nothing in there depends on the values of tensors, and rewriting takes longer than tracing.
    """
    return tf.autograph.experimental.do_not_convert(call)  # type: ignore[no-any-return]


def refuse_xla() -> None:
    """Say at once what XLA would say late and in its own terms."""
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ValueError(
            "XLA cannot compile Horovod's operations, and this function is being compiled by it: "
            "use tf.function(jit_compile=False), with Keras model.compile(..., jit_compile=False), "
            "or hvd.callbacks.BroadcastGlobalVariablesCallback(0), which turns it off"
        )


def explained(call: Call) -> Call:
    """Say on every rank what each submitted, where Horovod only says that they differ.

    Works for eager calls; inside a ``tf.function`` Horovod's own message surfaces, with the
    name of the graph's node.
    """

    @as_is
    @functools.wraps(call)
    def checked(self: Any, tensors: Any, **options: Any) -> Any:
        if not tf.executing_eagerly():
            refuse_xla()
        about = call.__name__, options["name"], tensors, options["process_set"]
        try:
            with waiting(*about):
                return in_graph(functools.partial(call, self, tensors, **options), *about)
        except tf.errors.OpError as error:
            if not is_mismatch(error) or isinstance(error, MismatchError):
                raise
            given = list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]
            told = explain(self, call.__name__, options["name"], given, options["process_set"])
            raise TensorFlowMismatchError(str(told)) from None

    return checked  # type: ignore[return-value]


@contextlib.contextmanager
def operation(
    kind: str, name: str | None, tensors: Sequence[Any]
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Prepare one of Horovod's operations: its tensors, and its arguments for the name.

    TensorFlow's optimisers of graphs know of no side effect of Horovod's operations. On a rank
    whose tensors happen to be constants they would carry them out once and for all, and merge
    those that look alike, while the other ranks wait for them in every step. See :func:`_fresh`.

    A name goes without slashes: where scopes are left out, Horovod takes what follows the last.
    """
    kept = _scopes_kept.get()
    named = {"name": name, "ignore_name_scope": name is not None if kept is None else not kept}
    if tf.executing_eagerly():
        tell = _teller() if name else None
        if tell is not None:
            tell(str(name).replace("/", ".").encode())
        try:
            yield list(tensors), named
        finally:
            if tell is not None:  # where the operation did not take it
                tell(None)
        return
    if name is None:  # as Horovod does
        name = "_".join(dict.fromkeys([tensors[0].name, tensors[-1].name]))
        name = mpi_ops._normalize_name(f"Horovod{kind}_{name}")
    named["name"] = name.replace("/", ".")
    yield [_fresh(tensor) for tensor in tensors], named


@functools.cache
def _teller() -> Callable[[bytes | None], None] | None:
    """Return what names this thread's next eager operation in Horovod; TensorFlow drops the name.

    None where Horovod was not built by hvdx: it then pairs eager operations by their order, as it
    does where TensorFlow was set to compute them in other threads.
    """
    tell = getattr(mpi_ops._basics.MPI_LIB_CTYPES, "horovod_tensorflow_name", None)
    if tell is not None:
        tell.argtypes, tell.restype = [c_char_p], None
    return tell


def _fresh(tensor: Any) -> Any:
    """Return ``tensor``, uncopied, as something that a graph's optimisers cannot foresee."""
    with tf.device("CPU:0"):  # of a shape that ends in as many ones as a die with one side shows
        zero = tf.raw_ops.RandomUniformInt(
            shape=tf.constant([1]), minval=tf.constant(0), maxval=tf.constant(1), seed=1, seed2=1
        )
        shape = tf.concat([tf.shape(tensor), tf.fill(zero, 1)], 0)
    fresh = tf.reshape(tensor, shape)
    fresh.set_shape(tensor.shape)
    return fresh


def differentiable(call: Callable[..., Any], back: Callable[..., list[Any]], *given: Any) -> Any:
    """Return ``call(*tensors)``, whose gradients are those that ``back`` returns.

    Args:
        call: returns a tensor, or a list or tuple of them.
        back: called with the lists of the results' gradients, the tensors and the results.
        *given: tensors, or what can be converted to them.
    """
    tensors = [tf.convert_to_tensor(each) for each in given]
    if not any(tensor.dtype.is_floating for tensor in tensors):
        return call(*tensors)

    @tf.custom_gradient
    def run(*xs: Any) -> Any:
        results = call(*xs)
        return results, lambda *grads: back(grads, xs, tf.nest.flatten(results))

    return run(*tensors)
