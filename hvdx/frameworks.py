"""Which framework an object belongs to, and the adapter that speaks to its Horovod core.

Only frameworks that the caller has imported are ever asked: no tensor can come from
another, and a broken TensorFlow must not stop a PyTorch run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from hvdx.errors import HorovodMissingError

#: Framework -> module and class of its adapter; named, not imported: core never loads one.
_ADAPTERS = {
    "torch": ("hvdx.integrations.pytorch", "TorchAdapter"),
    "tensorflow": ("hvdx.integrations.tensorflow2", "TensorFlowAdapter"),
}
FRAMEWORKS = tuple(_ADAPTERS)
_kinds: dict[type, str | None] = {}  # what kind_of() has found


class Adapter(Protocol):
    """One Horovod core: what the framework-free API asks of PyTorch's or TensorFlow's.

    Tensors are the framework's own; results too. ``process_set=None`` means all ranks.
    Every method raises :class:`hvdx.errors.MismatchError`, on every rank of the set, where
    ranks submit tensors that do not fit together.
    """

    framework: str
    horovod: Any  #: ``horovod.torch`` or ``horovod.tensorflow``

    @property
    def bytes_sent(self) -> float:
        """What this process has sent for requests; see :meth:`count`."""

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
        """Reduce ``tensor`` over the ranks; same shape and dtype."""

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
        """Reduce ``tensors`` as one operation."""

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
        """Reduce a sparse ``tensor`` whose rows ``compressor`` writes; None if it is dense.

        The result is the mean, or the sum, times ``factor``.
        """

    def allgather(self, tensor: Any, *, name: str | None, process_set: Any) -> Any:
        """Concatenate the ranks' tensors along the first dimension, which may differ."""

    def grouped_allgather(
        self, tensors: Sequence[Any], *, name: str | None, process_set: Any
    ) -> list[Any]:
        """Gather ``tensors`` as one operation."""

    def broadcast(self, tensor: Any, *, root_rank: int, name: str | None, process_set: Any) -> Any:
        """Return the root's tensor; ``root_rank`` is a global rank."""

    def alltoall(self, tensor: Any, *, splits: Any, name: str | None, process_set: Any) -> Any:
        """Scatter slices to all ranks; a pair with the received splits if ``splits`` is given."""

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
        """Reduce ``tensor`` and keep this rank's slice of the first dimension."""

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
        """Reduce ``tensors`` as one operation and keep slices."""

    def barrier(self, process_set: Any) -> None:
        """Return once every rank has called it."""

    def ranks(self, process_set: Any) -> int:
        """Count the ranks of ``process_set``."""

    def place(self, process_set: Any) -> int:
        """Return this rank's place among those of ``process_set``."""

    def preload(self) -> None:
        """Load what the framework loads late: in elastic jobs, before others wait for this rank."""

    def take_device(self, local_rank: int) -> None:
        """Compute on this host's GPU number ``local_rank``, if nobody has chosen before."""

    def join(self) -> int:
        """Send zeros for this rank until all have joined; the last rank to join."""

    def broadcast_object(self, value: Any, root_rank: int, name: str, process_set: Any) -> Any:
        """Return the root's picklable ``value``."""

    def allgather_object(self, value: Any, name: str, process_set: Any) -> list[Any]:
        """Return every rank's picklable ``value``, in rank order."""

    def named_tensors(self, owner: Any) -> dict[str, Any]:
        """Name the tensors of a model, a state dictionary, an optimizer or a list."""

    def broadcast_tensors(
        self, tensors: dict[str, Any], root_rank: int, name: str, process_set: Any
    ) -> None:
        """Overwrite ``tensors`` with the root's, in place; any dtype."""

    def broadcast_optimizer(self, optimizer: Any, root_rank: int, process_set: Any) -> None:
        """Give ``optimizer`` the root's state and options."""

    def at_once(self) -> contextlib.AbstractContextManager[Any]:
        """Within this, compute at once, also where a graph is being traced."""

    def carry_out(self, work: Any, name: str, process_set: Any) -> Any:
        """Run a generator of the requests of :mod:`hvdx.comm`; return its result.

        Collectives are called ``<name>/<phase>``; ``name`` must be equal on all ranks.
        """

    def count(self, operation: str, tensor: Any, ranks: int) -> None:
        """Add to :attr:`bytes_sent` what one of ``ranks`` sends in an operation on ``tensor``.

        By formula (:func:`hvdx.comm.sent_share`). In a graph it is added whenever that runs.
        """

    def device_use(self) -> dict[str, float]:
        """Return what this process occupies of its GPU; nothing if it has none.

        ``gpu_memory_mb``, ``peak_gpu_memory_mb`` and, where that can be told, ``gpu``: the share of
        the last moments in which it computed.
        """

    def agree(self, number: int, name: str) -> list[int]:
        """Gather one small integer per rank under a name that every framework's core shares."""

    def to_numpy(self, tensor: Any) -> Any:
        """Copy ``tensor`` to a NumPy array (bfloat16 as its raw uint16)."""

    def from_numpy(self, array: Any) -> Any:
        """Return ``array`` as a tensor of this framework."""

    def dtype_name(self, tensor: Any) -> str:
        """Name the dtype as NumPy would, such as ``float32``."""


def kind_of(kind: type) -> str | None:
    """Name the library whose objects ``kind`` are: keras, torch, tensorflow, numpy or None.

    Keras first: its variables and layers also inherit from TensorFlow's or torch's classes.
    Plain Python numbers count as NumPy's.
    """
    if kind in _kinds:
        return _kinds[kind]
    _kinds[kind] = found = _library(kind)
    return found


def _library(kind: type) -> str | None:
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if "tf_keras" in roots:
        raise TypeError(f"{kind.__qualname__} is Keras 2; hvdx supports Keras 3: import keras")
    for library in ("keras", "torch", "tensorflow", "numpy"):
        if library in roots:
            return library
    return "numpy" if issubclass(kind, (int, float)) else None


def framework_of_kind(library: str) -> str:
    """Name the framework that computes for ``library``; Keras answers with its backend."""
    if library != "keras":
        return library
    backend = sys.modules["keras"].backend.backend()
    if backend not in FRAMEWORKS:
        raise TypeError(
            f"Keras runs on the {backend!r} backend, which Horovod cannot serve; set "
            "KERAS_BACKEND to 'tensorflow' or 'torch' before importing keras"
        )
    return str(backend)


@functools.cache
def adapter(framework: str) -> Adapter:
    """Load the adapter of ``framework`` with Horovod's core for it.

    Raises:
        ValueError: ``framework`` is none that Horovod serves.
        HorovodMissingError: Horovod is not installed, or not for this framework.
    """
    if framework not in _ADAPTERS:
        raise ValueError(f"unknown framework {framework!r}; use one of {', '.join(FRAMEWORKS)}")
    module, name = _ADAPTERS[framework]
    horovod = _load_horovod(framework)
    made: Adapter = getattr(importlib.import_module(module), name)(horovod)
    return made


def _load_horovod(framework: str) -> Any:
    if importlib.util.find_spec("horovod") is None:
        raise HorovodMissingError(
            f"Horovod is not installed for {sys.executable}; build it with: hvdx install"
        )
    if importlib.util.find_spec(framework) is None:
        raise HorovodMissingError(f"{framework} is not installed for {sys.executable}")
    try:
        horovod = importlib.import_module(f"horovod.{framework}")
    except ImportError as error:
        raise HorovodMissingError(_misfit(framework, str(error))) from error
    if not hasattr(horovod, "init"):  # horovod.torch swallows the failure and prints it
        raise HorovodMissingError(_misfit(framework, "its library for it does not load"))
    return horovod


def _misfit(framework: str, cause: str) -> str:
    module = importlib.import_module(framework)
    return (
        f"Horovod does not serve {framework} {module.__version__} in this environment ({cause}); "
        "rebuild it for what is installed now with: hvdx install"
    )


def choose(framework: str | Sequence[str] | None) -> tuple[str, ...]:
    """Decide whose core ``init`` starts; the first is the one that rank() and size() ask.

    Order: what the caller says; the framework already imported; of two, the one that
    ``KERAS_BACKEND`` names; of none, the only one installed.

    Raises:
        ValueError: the choice is open, or names no framework.
    """
    if framework is not None:
        wanted = (framework,) if isinstance(framework, str) else tuple(framework)
        for name in wanted:
            if name not in FRAMEWORKS:
                raise ValueError(
                    f"unknown framework {name!r}; use one of {', '.join(FRAMEWORKS)}, or both"
                )
        if wanted:
            return wanted
    backend = os.environ.get("KERAS_BACKEND")
    loaded = [name for name in FRAMEWORKS if name in sys.modules]
    candidates = loaded or [n for n in FRAMEWORKS if importlib.util.find_spec(n) is not None]
    if backend in candidates:
        return (str(backend),)
    if len(candidates) == 1:
        return (candidates[0],)
    if not candidates:
        raise ValueError("neither torch nor tensorflow is installed; hvdx needs one of them")
    state = "imported" if loaded else "installed, none imported yet"
    raise ValueError(
        f"{' and '.join(candidates)} are both {state}: say hvd.init(framework='torch') or "
        "hvd.init(framework='tensorflow'), or both as a tuple, or set KERAS_BACKEND"
    )
