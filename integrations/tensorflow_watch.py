"""Which operations of running graphs wait, for the watchdog: a graph cannot call Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from hvdx.watchdog import Pending, add_source, describe

_EXECUTION = ("tensorflow/python/eager/execute.py", "tensorflow/python/eager/context.py")
#: What is told about an operation -> when it began, 0 when it has ended.
_began: dict[Pending, Any] = {}


def in_graph(
    call: Callable[[], Any], operation: str, name: str | None, tensors: Any, process_set: Any
) -> Any:
    """Return ``call()``; where it adds to a graph, note beginning and end whenever that runs.

    The operation waits for nothing that it did not wait for before.
    """
    if not tf.inside_function() or control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    ):
        return call()
    own = getattr(process_set, "process_set_id", 0)
    ranks = tuple(process_set.ranks) if own else None
    key = Pending(operation, name, describe(tensors), ranks)
    if key not in _began:
        # Not by tf.Variable, which a function that is traced again may not make.
        with tf.init_scope(), tf.device("CPU:0"):
            _began[key] = ResourceVariable(0.0, trainable=False, dtype=tf.float64)
    began = _began[key]
    with tf.control_dependencies(tf.nest.flatten(tensors, expand_composites=True)):
        start = began.assign(tf.timestamp(), read_value=False)
    result = call()
    with tf.control_dependencies([start, *tf.nest.flatten(result, expand_composites=True)]):
        began.assign(0.0, read_value=False)
    return result


def running() -> dict[Any, Pending]:
    """Find operations that have begun and not ended, while a thread executes something.

    Without that, one that was cut short by an error would seem to wait.
    """
    begun = {pending: float(began.numpy()) for pending, began in list(_began.items())}
    if not any(begun.values()):
        return {}
    threads = [thread for thread, frame in sys._current_frames().items() if _executes(frame)]
    return {
        ("graph", pending, since): pending._replace(thread=threads[0])
        for pending, since in begun.items()
        if since and threads
    }


def _executes(frame: FrameType) -> bool:
    return frame.f_code.co_filename.endswith(_EXECUTION)


add_source(running)
