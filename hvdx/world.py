"""The running job: which Horovod cores this process started, and its place among the ranks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from hvdx import frameworks
from hvdx.errors import MismatchError, NotInitializedError
from hvdx.frameworks import Adapter

#: Cores started by this process, by framework; the first answers rank(), size() and the like.
_started: dict[str, Adapter] = {}
#: Called whenever the set of running cores changes (caches that depend on it).
_on_change: list[Any] = []


def init(
    comm: Any = None,
    process_sets: Any = None,
    *,
    framework: str | Sequence[str] | None = None,
) -> None:
    """Start Horovod for the framework in use and meet the other ranks.

    A process started by ``hvdx run`` or ``horovodrun`` finds its rank in the environment;
    under ``torchrun``, ``srun``, ``mpirun`` or an indexed Kubernetes job hvdx derives it from
    theirs (see docs/launching.md); otherwise the job is this one process.

    Args:
        comm: ranks, or an mpi4py communicator, as Horovod takes them.
        process_sets: list of :class:`ProcessSet`, or ``"dynamic"`` to add them later.
        framework: ``"torch"``, ``"tensorflow"`` or a tuple of both. Default: the framework
            already imported; where both are, the one that ``KERAS_BACKEND`` names.

    Raises:
        ValueError: the framework cannot be told; the message says how to say it.
        HorovodMissingError: Horovod is not installed for the framework.
        LaunchError: the launcher's environment contradicts itself.
        MismatchError: ranks start different frameworks (raised on every rank).
    """
    from hvdx import launch

    chosen = frameworks.choose(framework)
    adapters = [frameworks.adapter(name) for name in chosen]
    fresh = [a for a in adapters if not a.horovod.is_initialized()]
    if fresh:
        launch.prepare(mpi_built=bool(fresh[0].horovod.mpi_built()))
    for adapter in adapters:
        if adapter in fresh:
            adapter.horovod.init(comm, _sets_for(adapter, adapters[0], process_sets))
        _started.setdefault(adapter.framework, adapter)
    _changed()
    if fresh:
        _check_frameworks(adapters)
        launch.report_up()


def _sets_for(adapter: Adapter, first: Adapter, process_sets: Any) -> Any:
    """Give each core process-set objects of its own: their numbers belong to one core."""
    if adapter is first or process_sets is None or isinstance(process_sets, str):
        return process_sets
    return [type(each)(each.ranks) for each in process_sets]


def _check_frameworks(adapters: list[Adapter]) -> None:
    """Refuse a job whose ranks started different cores, before their collectives mix."""
    code = sum(1 << frameworks.FRAMEWORKS.index(a.framework) for a in adapters)
    codes = adapters[0].agree(code, "hvdx.frameworks")
    if len(set(codes)) > 1:
        told = ", ".join(f"rank {rank}: {_spell(code)}" for rank, code in enumerate(codes))
        shutdown()
        raise MismatchError(
            f"ranks start different frameworks ({told}); say hvd.init(framework=...) alike on all"
        )


def _spell(code: int) -> str:
    return "+".join(name for i, name in enumerate(frameworks.FRAMEWORKS) if code >> i & 1)


def shutdown() -> None:
    """Leave the job: stop every core that :func:`init` started."""
    for adapter in _started.values():
        adapter.horovod.shutdown()
    _started.clear()
    _changed()


def _changed() -> None:
    for callback in _on_change:
        callback()


def on_change(callback: Any) -> None:
    """Have ``callback()`` called when cores start or stop."""
    _on_change.append(callback)


def running() -> tuple[str, ...]:
    """Name the frameworks whose cores run, as far as hvdx has seen; asks nobody."""
    return tuple(_started)


def is_initialized(framework: str | None = None) -> bool:
    """Tell whether a core runs: any, or that of ``framework``."""
    _adopt()
    adapters = _started.values() if framework is None else [_started.get(framework)]
    return any(adapter is not None and adapter.horovod.is_initialized() for adapter in adapters)


def core(framework: str | None = None) -> Adapter:
    """Return the adapter of the running core, or that of ``framework``.

    Raises:
        NotInitializedError: it does not run.
    """
    if not is_initialized(framework):
        if framework and _started:
            running = ", ".join(_started)
            raise NotInitializedError(
                f"Horovod's core for {framework} is not initialized (that for {running} is); "
                f"start both with hvd.init(framework=({running!r}, {framework!r}))"
            )
        raise NotInitializedError("Horovod has not been initialized; call hvd.init() first")
    return _started[framework] if framework else next(iter(_started.values()))


def _adopt() -> None:
    """Take over cores that were started by Horovod's own ``init``."""
    for name in frameworks.FRAMEWORKS:
        horovod = sys.modules.get(f"horovod.{name}")
        ready = horovod is not None and hasattr(horovod, "init") and horovod.is_initialized()
        if ready and name not in _started:
            _started[name] = frameworks.adapter(name)
            _changed()
        elif name in _started and not ready:
            del _started[name]
            _changed()


def rank() -> int:
    """Return this process's number among all, from 0."""
    return int(core().horovod.rank())


def size() -> int:
    """Return the number of processes in the job (the world size)."""
    return int(core().horovod.size())


def local_rank() -> int:
    """Return this process's number among those of its host, from 0."""
    return int(core().horovod.local_rank())


def local_size() -> int:
    """Return the number of processes on this host."""
    return int(core().horovod.local_size())


def cross_rank() -> int:
    """Return the number of this host among those that have a process of this local rank."""
    return int(core().horovod.cross_rank())


def cross_size() -> int:
    """Return the number of hosts that have a process of this local rank."""
    return int(core().horovod.cross_size())


def is_homogeneous() -> bool:
    """Tell whether every host runs the same number of processes."""
    module = importlib.import_module(f"horovod.{core().framework}.mpi_ops")
    return bool(module.is_homogeneous())


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Begin to record Horovod's timeline to ``file_path`` (JSON for chrome://tracing).

    Needs ``HOROVOD_TIMELINE=DYNAMIC`` in the environment at :func:`init`; ValueError without.
    """
    core().horovod.start_timeline(file_path, mark_cycles)


def stop_timeline() -> None:
    """End the recording and close its file."""
    core().horovod.stop_timeline()


def _horovod() -> Any:
    """Return the running core's module, or before init the one that init() would start."""
    if is_initialized():
        return core().horovod
    return frameworks.adapter(frameworks.choose(None)[0]).horovod


def mpi_threads_supported() -> bool:
    """Tell whether MPI may be called from several threads; needs :func:`init`."""
    return bool(core().horovod.mpi_threads_supported())


def mpi_enabled() -> bool:
    """Tell whether MPI is the controller of this job."""
    return bool(_horovod().mpi_enabled())


def mpi_built() -> bool:
    """Tell whether Horovod was built with MPI."""
    return bool(_horovod().mpi_built())


def gloo_enabled() -> bool:
    """Tell whether Gloo is the controller of this job."""
    return bool(_horovod().gloo_enabled())


def gloo_built() -> bool:
    """Tell whether Horovod was built with Gloo."""
    return bool(_horovod().gloo_built())


def nccl_built() -> int:
    """Return the NCCL version Horovod was built with, as a number, or 0."""
    return int(_horovod().nccl_built())


def ddl_built() -> bool:
    """Tell whether Horovod was built with IBM's DDL."""
    return bool(_horovod().ddl_built())


def ccl_built() -> bool:
    """Tell whether Horovod was built with oneCCL."""
    return bool(_horovod().ccl_built())


def cuda_built() -> bool:
    """Tell whether Horovod was built with CUDA."""
    return bool(_horovod().cuda_built())


def rocm_built() -> bool:
    """Tell whether Horovod was built with ROCm."""
    return bool(_horovod().rocm_built())


def process_set_class() -> Any:
    """Return Horovod's ``ProcessSet``; loads Horovod, but no framework."""
    from horovod.common.process_sets import ProcessSet

    return ProcessSet


def global_process_set() -> Any:
    """Return the set of all ranks."""
    return core().horovod.global_process_set


def add_process_set(process_set: Any) -> Any:
    """Add a set of ranks while the job runs; every rank must call it in the same order.

    Needs ``init(process_sets="dynamic")``.

    Args:
        process_set: a :class:`ProcessSet` or a list of ranks.

    Raises:
        ValueError: the same ranks form a set already (the set of all ranks included).
    """
    return core().horovod.add_process_set(process_set)


def remove_process_set(process_set: Any) -> bool:
    """Remove a set that :func:`add_process_set` made; False where it could not be."""
    return bool(core().horovod.remove_process_set(process_set))
