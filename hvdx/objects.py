"""Objects as bytes between ranks. Ranks of a job trust each other; see docs/launching.md."""

from __future__ import annotations

from typing import Any


def pickled(value: Any) -> bytes:
    """Serialise ``value``, functions and classes of the main script included."""
    import cloudpickle

    return bytes(cloudpickle.dumps(value))


def unpickled(data: bytes) -> Any:
    """Restore what :func:`pickled` made on another rank."""
    import cloudpickle

    return cloudpickle.loads(data)
