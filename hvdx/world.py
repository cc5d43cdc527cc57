"""The running job: which Horovod cores this process started, and its place among the ranks."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from hvdx import frameworks, watchdog
from hvdx.connections import Connection, cut, cut_when, noted
from hvdx.errors import ConnectError, MismatchError, NotInitializedError
from hvdx.frameworks import Adapter

#: Cores started by this process, by framework; the first answers rank(), size() and the like.
_started: dict[str, Adapter] = {}
#: Called whenever the set of running cores changes (caches that depend on it).
_on_change: list[Any] = []
ATTEMPTS = 5  # of an elastic job's ranks to come together
#: Opened by cores since the first of them was started.
_connections: set[Connection] = set()


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

    Where a host has several GPUs, each process takes that of its ``local_rank()``, unless the
    script has chosen before (``torch.cuda.set_device``, ``tf.config.set_visible_devices``).
    Horovod leaves this to scripts; those that forget it all meet on the first GPU.

    Args:
        comm: ranks, or an mpi4py communicator, as Horovod takes them.
        process_sets: list of :class:`ProcessSet`, :class:`hvdx.groups.Groups`, or ``"dynamic"``
            to add sets later.
        framework: ``"torch"``, ``"tensorflow"`` or a tuple of both. Default: the framework
            already imported; where both are, the one that ``KERAS_BACKEND`` names.

    Raises:
        ValueError: the framework cannot be told; the message says how to say it.
        HorovodMissingError: Horovod is not installed for the framework.
        LaunchError: the launcher's environment contradicts itself.
        ConnectError: Horovod did not start; what it says itself has gone to stderr. In elastic
            jobs the ranks that are left try again with others.
        HvdxError: ``HVDX_TIMEOUT`` is no number of seconds.
        MismatchError: ranks start different frameworks (raised on every rank), or process sets
            (raised on those that have others than rank 0).
    """
    from hvdx import launch

    watchdog.timeout_seconds()  # a wrong one shall not be found half-way
    chosen = frameworks.choose(framework)
    adapters = [frameworks.adapter(name) for name in chosen]
    fresh = [a for a in adapters if not a.horovod.is_initialized()]
    if fresh and "HVDX_WORKER" in os.environ:
        for adapter in fresh:
            adapter.preload()
    elastic = os.environ.get("HOROVOD_ELASTIC") == "1" and len(fresh) == len(adapters)
    attempts = ATTEMPTS if elastic and not process_sets else 1
    while not _meet(adapters, fresh, comm, process_sets, last=attempts == 1):
        attempts -= 1
    if fresh:
        if len(fresh) == len(_started):  # the job's first cores; one watch serves all
            watchdog.start(adapters[0], _stop_cores)
        launch.report_up()


def _meet(
    adapters: list[Adapter], fresh: list[Adapter], comm: Any, process_sets: Any, *, last: bool
) -> bool:
    """Start cores and meet the other ranks; False if one of these has died meanwhile.

    Args:
        adapters: the cores that shall run.
        fresh: those of them that do not yet.
        comm: as :func:`init` takes it.
        process_sets: the same.
        last: raise what has failed; else leave, as the other ranks will.
    """
    from hvdx import launch
    from hvdx.elastic import is_lost_rank

    if fresh:
        launch.prepare(mpi_built=bool(fresh[0].horovod.mpi_built()))
        launch.check_as_first("process_sets", _sets(process_sets), "the process sets")
    try:
        for adapter in adapters:
            if adapter in fresh or process_sets:
                with noted(_connections):
                    _start(adapter, comm, process_sets, first=adapter is adapters[0])
            if adapter in fresh:
                # Of an elastic job's slots some may be empty: GPUs go by slot.
                local = adapter.horovod.local_rank()
                adapter.take_device(int(os.environ.get("HVDX_HOST_SLOT", local)))
            _started.setdefault(adapter.framework, adapter)
        _changed()
        if fresh:
            _check_frameworks(adapters)
    except Exception as error:
        if last or not (isinstance(error, ConnectError) or is_lost_rank(error)):
            raise
        cut_off()
        shutdown()
        return False
    return True


def _start(adapter: Adapter, comm: Any, process_sets: Any, first: bool) -> None:
    """Start one core; it numbers process sets for itself, so it gets objects of its own.

    One that runs already only tells the numbers of sets that it knows.
    """
    from hvdx.integrations.process_sets import ProcessSet, number, point_at

    dynamic = isinstance(process_sets, str)
    given = [] if dynamic else list(process_sets or [])
    known = [
        each if first and not isinstance(each, ProcessSet) else ProcessSet.unnumbered(each)
        for each in given
    ]
    point_at(adapter)  # else Horovod asks the core that was imported last for the numbers
    if adapter.horovod.is_initialized():
        number(known)
    else:
        _connect(adapter, comm, process_sets if dynamic else known)
    for each, numbered in zip(given, known, strict=True):
        if isinstance(each, ProcessSet):
            each.register(adapter.framework, numbered)


def _connect(adapter: Adapter, comm: Any, process_sets: Any) -> None:
    """Have Horovod start; give up soon where the launcher of an elastic job misses a rank.

    Raises:
        ConnectError: it did not start.
    """
    from hvdx import launch

    elastic = "HVDX_WORKER" in os.environ
    try:
        with cut_when(launch.is_over) if elastic else contextlib.nullcontext():
            adapter.horovod.init(comm, process_sets)
    except ValueError as error:
        if "initialization failed" not in str(error):
            raise
        if not process_sets:  # else Horovod may wait until all ranks have given them up
            adapter.horovod.shutdown()
        rank, interface = os.environ.get("HOROVOD_RANK", 0), os.environ.get("HOROVOD_GLOO_IFACE")
        raise ConnectError(
            f"rank {rank}: Horovod did not start; its own message is above. Has another rank ended "
            f"meanwhile? Else see that ranks reach each other over {interface or 'the network'}, "
            f"within {os.environ.get('HOROVOD_GLOO_TIMEOUT_SECONDS', 30)} s "
            "(HOROVOD_GLOO_TIMEOUT_SECONDS)"
        ) from None


def _sets(process_sets: Any) -> str:
    """Spell what ``init`` was given, for comparison."""
    if isinstance(process_sets, str) or not process_sets:
        return str(process_sets or "none")
    return str([getattr(each, "ranks", each) for each in process_sets])


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
    watchdog.stop("has left the job: it has called hvd.shutdown()")
    for adapter in _started.values():
        adapter.horovod.shutdown()
    _started.clear()
    _connections.clear()
    _changed()


def cut_off() -> None:
    """Cut this rank's connections: collectives fail on the other ranks, too, and at once."""
    cut(_connections)
    _connections.clear()


def _stop_cores() -> None:
    """Stop Horovod under running calls, which then fail.

    Torch's own ``shutdown`` would also forget the handles that they wait for.
    """
    for name in list(_started):
        importlib.import_module(f"horovod.{name}.mpi_ops")._basics.shutdown()


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
        StallError: it ran, and the job was stopped.
    """
    if not is_initialized(framework):
        stalled = watchdog.failure()  # AutoGraph, which may read this, knows no :=
        if stalled is not None:
            raise stalled
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
    """Return the class ``hvd.ProcessSet``; loads Horovod, but no framework."""
    from hvdx.integrations.process_sets import ProcessSet

    return ProcessSet


def global_process_set() -> Any:
    """Return the set of all ranks."""
    from hvdx.integrations.process_sets import everyone

    return everyone(core().framework)


def own_set(framework: str, process_set: Any) -> Any:
    """Return ``process_set`` as the core of ``framework`` numbers it; None stays None.

    Raises:
        ValueError: that core does not know the set.
        TypeError: it is none.
    """
    if process_set is None:
        return None
    if not hasattr(process_set, "process_set_id"):
        raise TypeError(f"process_set={process_set!r} is no hvd.ProcessSet")
    if process_set.process_set_id == 0:
        return None
    return process_set.of(framework) if hasattr(process_set, "of") else process_set


def add_process_set(process_set: Any, *, framework: str | None = None) -> Any:
    """Add a set of ranks while the job runs; every rank must call it in the same order.

    Needs ``init(process_sets="dynamic")``.

    Args:
        process_set: a :class:`ProcessSet` or a list of ranks.
        framework: the core that learns of it; every running one by default.

    Raises:
        ValueError: the same ranks form a set already (the set of all ranks included).
    """
    from hvdx.integrations.process_sets import ProcessSet, asking

    first = core(framework)
    if hasattr(process_set, "process_set_id") and not isinstance(process_set, ProcessSet):
        with asking(first):
            return first.horovod.add_process_set(process_set)  # Horovod's own: one core, one number
    added = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    for adapter in [first] if framework else list(_started.values()):
        known = added.unnumbered()
        with asking(adapter):
            adapter.horovod.add_process_set(known)
        added.register(adapter.framework, known)
    return added


def remove_process_set(process_set: Any, *, framework: str | None = None) -> bool:
    """Remove a set that :func:`add_process_set` made; False where it could not be."""
    from hvdx.integrations.process_sets import ProcessSet, asking

    adapters = [core(framework)]
    ours = isinstance(process_set, ProcessSet)
    if ours and framework is None:
        adapters = list(_started.values())
    removed = False
    for adapter in adapters:
        known = process_set.forget(adapter.framework) if ours else process_set
        if known is not None:
            with asking(adapter):
                removed |= bool(adapter.horovod.remove_process_set(known))
    return removed
