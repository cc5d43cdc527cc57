"""The tensor verbs that compressors need, one class per framework.

An algorithm written against :class:`Ops` names no framework. The class is picked by the
tensor's type, among frameworks that are imported already. NumPy is the reference.

    protocol                                what each verb does
    numpy_ops, torch_ops, tensorflow_ops    how; making the class asks for the framework
    shared                                  numbers that several of them go by
"""

from __future__ import annotations

from typing import Any

from hvdx.frameworks import framework_of_kind, kind_of
from hvdx.ops.numpy_ops import NumpyOps
from hvdx.ops.protocol import Ops
from hvdx.ops.tensorflow_ops import TensorFlowOps
from hvdx.ops.torch_ops import TorchOps

__all__ = ["NumpyOps", "Ops", "TensorFlowOps", "TorchOps", "ops_for"]

_CLASSES: dict[str, type[Any]] = {
    "numpy": NumpyOps,
    "torch": TorchOps,
    "tensorflow": TensorFlowOps,
}


_made: dict[type, Ops] = {}


def ops_for(kind: type) -> Ops:
    """Return the verbs for tensors of type ``kind``.

    Raises:
        TypeError: it is a tensor of no framework hvdx serves.
    """
    if kind in _made:
        return _made[kind]
    library = kind_of(kind)
    if library is None:
        raise TypeError(f"no tensor verbs for {kind.__module__}.{kind.__qualname__}")
    ops: Ops = _CLASSES[framework_of_kind(library)]()
    _made[kind] = ops
    return ops
