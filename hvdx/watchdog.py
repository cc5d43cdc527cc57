"""No job waits for ever: say which ranks do not meet in which collective, and stop them all.

Horovod pairs collectives by name. Where one rank does not come, the others wait, and rank 0 writes
a warning once a minute. Here a thread in every rank tells rank 0 each second what its rank waits
for and, when rank 0 begins to wonder, where it is (:mod:`hvdx.star` carries it,
:mod:`hvdx.verdict` judges). After ``HVDX_TIMEOUT`` seconds rank 0 tells all; each rank then

1. prints why,
2. stops Horovod, so that calls blocked in it return, with :class:`hvdx.StallError`,
3. is interrupted, and at last ended, if it was in no collective and comes to none.

What a rank waits for is known from :class:`waiting`, which surrounds blocking calls, and from
sources: functions that look at what cannot call Python (a running graph) or is not ours.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hvdx.errors import HvdxError, StallError
from hvdx.frameworks import Adapter
from hvdx.whereabouts import whereabouts

if TYPE_CHECKING:
    from hvdx.star import Listener, Wire

DEFAULT_SECONDS = 30.0
_SHUT_DOWN = "Horovod has been shut down"  # how it answers calls that it has cut short
_MEET_SECONDS = 10.0  # for all ranks to connect
_NEWS_SECONDS = 3.0  # for the word that explains Horovod's end, which may be here before it
_GRACE_SECONDS = 3.0  # from the verdict to the interruption, and from there to the end

Call = TypeVar("Call", bound=Callable[..., Any])


class Pending(NamedTuple):
    """What a source found waiting."""

    operation: str
    name: str | None
    what: str = ""
    ranks: tuple[int, ...] | None = None
    thread: int | None = None  # that waits; None: the main thread


#: Each returns what waits now: key -> Pending; a key is that of one call, never used again.
_sources: list[Callable[[], Mapping[Any, Pending]]] = []
_waiting: dict[int, waiting] = {}  # by thread
_last: tuple[str, str | None, float] | None = None  # the last collective that ended
_patient_until = 0.0
_watch: Watch | None = None


def add_source(source: Callable[[], Mapping[Any, Pending]]) -> None:
    """Have ``source`` asked about once a second, from the watching thread."""
    _sources.append(source)


class waiting:  # a context manager, named like one
    """Surround a call that returns only when other ranks make it too.

    Costs half a microsecond. What Horovod raises because the job was stopped, or because
    another rank has left it, comes out as :class:`hvdx.StallError`.

    Args:
        operation: ``"allreduce"`` and the like.
        name: of the tensor, as the ranks agree on it.
        tensors: what is submitted, for messages.
        process_set: the ranks that take part; None: all.
    """

    __slots__ = ("_before", "name", "operation", "process_set", "since", "tensors")

    def __init__(
        self, operation: str, name: str | None = None, tensors: Any = (), process_set: Any = None
    ) -> None:
        self.operation = operation
        self.name = name
        self.tensors = tensors
        self.process_set = process_set

    def __enter__(self) -> None:
        if _watch is not None and _watch.failure is not None:
            raise _watch.error()
        thread = threading.get_ident()
        self._before = _waiting.get(thread)
        self.since = time.monotonic()
        _waiting[thread] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        global _last
        try:
            if error is not None and _watch is not None:
                _watch.explain(self, error)  # may wait for others' news, as this call still does
        finally:
            thread = threading.get_ident()
            if self._before is None:
                _waiting.pop(thread, None)
            else:
                _waiting[thread] = self._before
            _last = self.operation, self.name, self.since


def watched(call: Call) -> Call:
    """Surround a method with :class:`waiting`, by its name and its arguments ``name`` and so on."""
    code = call.__code__
    places = {name: place for place, name in enumerate(code.co_varnames[: code.co_argcount])}

    @functools.wraps(call)
    def inside(*args: Any, **options: Any) -> Any:
        def given(name: str) -> Any:
            place = places.get(name, len(args))
            return options.get(name, args[place] if place < len(args) else None)

        with waiting(call.__name__, given("name"), process_set=given("process_set")):
            return call(*args, **options)

    return inside  # type: ignore[return-value]


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Let all ranks wait for this one, up to ``seconds``, without being stopped.

    For what takes one rank long while the others wait in a collective: validation, writing a
    checkpoint, compiling the first step.

    Example:
        >>> with hvd.patience(600):
        ...     if hvd.rank() == 0:
        ...         validate(model)

    Args:
        seconds: from now on; other ranks' ``HVDX_TIMEOUT`` begins when the block ends, or when
            they are over.
    """
    if not seconds >= 0:  # nan neither
        raise ValueError(f"patience({seconds}): give a number of seconds")
    before = _patient_until
    _be_patient(max(before, time.monotonic() + seconds))
    try:
        yield
    finally:
        _be_patient(before)


def _be_patient(until: float) -> None:
    """Begin or end; the others shall know at once, lest they wait for one who is gone by then."""
    global _patient_until
    _patient_until = until
    if _watch is not None:
        _watch.wake()


def timeout_seconds() -> float:
    """Return ``HVDX_TIMEOUT``; 0 means for ever.

    Raises:
        HvdxError: it is no number of seconds.
    """
    return seconds_of("HVDX_TIMEOUT", DEFAULT_SECONDS, "30, or 0")


def seconds_of(variable: str, default: float, example: str) -> float:
    """Return the seconds that an environment variable gives.

    Raises:
        HvdxError: it is no number of seconds.
    """
    told = os.environ.get(variable, str(default))
    with contextlib.suppress(ValueError):
        seconds = float(told)
        if 0 <= seconds < float("inf"):
            return seconds
    raise HvdxError(f"{variable}={told!r} is no number of seconds: give one such as {example}")


def failure() -> StallError | None:
    """Return the error that has stopped the job, or None."""
    return None if _watch is None or _watch.failure is None else _watch.error()


def start(adapter: Adapter, stop_cores: Callable[[], None]) -> None:
    """Begin to watch the job that ``adapter``'s core has joined; every rank calls it, once.

    Nothing is watched in a job of one rank, with ``HVDX_TIMEOUT=0`` on any rank, nor in elastic
    jobs, where Horovod restarts what hvdx would end.

    Args:
        adapter: the core through which the ranks find each other.
        stop_cores: stops Horovod in this process.
    """
    global _last, _watch
    seconds = timeout_seconds()
    rank, size = int(adapter.horovod.rank()), int(adapter.horovod.size())
    if size == 1 or os.environ.get("HOROVOD_ELASTIC", "0") not in ("", "0"):
        _watch = None
        return
    met = _meet(adapter, rank, size, seconds)
    if met is None:
        _watch = None
        return
    seconds, wires = met
    _last = None
    _watch = Watch(rank, size, seconds, wires, stop_cores)
    atexit.unregister(_at_exit)  # again the last registered, so that it comes before Horovod's
    atexit.register(_at_exit)
    _watch.begin()


def stop(reason: str) -> None:
    """End the watch on this rank, which leaves the job; the others learn ``reason``."""
    if _watch is not None:
        _watch.leave(reason)


def _at_exit() -> None:
    error = getattr(sys, "last_value", None)
    if error is None:
        stop("has left the job: its script has ended")
    else:
        if _watch is not None and _SHUT_DOWN in str(error) and not isinstance(error, StallError):
            _watch.comment()
        first = str(error).partition("\n")[0][:300]
        stop(f"has left the job after {type(error).__name__}: {first}")


def _forget() -> None:
    """In a forked child: it is no rank, and its copies must not keep connections open."""
    global _watch
    if _watch is not None:
        _watch.abandon()
    _watch = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _meet(
    adapter: Adapter, rank: int, size: int, seconds: float
) -> tuple[float, dict[int, Wire]] | None:
    """Connect all ranks with rank 0; None where they shall not or cannot be watched."""
    import socket

    from hvdx.star import knock

    def exchanged(what: Any, step: str) -> list[Any]:
        return adapter.allgather_object(what, f"hvdx.watchdog.{step}", None)

    told = exchanged((seconds, socket.gethostname()), "hosts")
    if min(each for each, _ in told) == 0:
        return None
    seconds = max(each for each, _ in told)
    listener, problem = None, None
    if rank == 0:
        try:
            listener = _listen(adapter, size, [host for _, host in told])
        except (OSError, HvdxError) as error:
            problem = str(error)
    place = exchanged(listener and listener.place, "place")[0]
    wires: dict[int, Wire] = {}
    if place is not None:
        try:
            wires = listener.admit(_MEET_SECONDS) if listener else {
                0: knock(place, rank, _MEET_SECONDS)
            }  # fmt: skip
        except OSError as error:
            problem = str(error)
    problems = [each for each in exchanged(problem, "met") if each]
    if problems:
        for wire in wires.values():
            wire.close()
        if rank == 0:
            _print(f"HVDX_TIMEOUT has no effect, since ranks cannot connect: {problems[0]}")
        return None
    return seconds, wires


def _listen(adapter: Adapter, size: int, hosts: list[str]) -> Listener:
    """Listen where the other ranks reach this one, and no wider."""
    from hvdx.launch import network
    from hvdx.star import Listener

    interface = os.environ.get("HOROVOD_GLOO_IFACE", "").split(",")[0]
    if int(adapter.horovod.local_size()) == size:
        return Listener(size, "127.0.0.1")
    if interface and interface != network.loopback():
        return Listener(size, network.address_of(interface))
    own = network.resolve(hosts[0])
    if own is None or own.startswith("127."):  # Debian's idea of the own name
        others = filter(None, map(network.resolve, hosts))
        far = next((each for each in others if not network.is_local(each)), None)
        if far is None:
            raise HvdxError("no host name of the job leads to another machine")
        own = network.route_to(far)[1]
    return Listener(size, own)


class Watch:
    """One rank's part in the watch over a job.

    Args:
        rank: of this process.
        size: of the job.
        seconds: the timeout.
        wires: to all other ranks on rank 0, to rank 0 elsewhere.
        stop_cores: stops Horovod in this process.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        seconds: float,
        wires: dict[int, Wire],
        stop_cores: Callable[[], None],
    ) -> None:
        import selectors
        import socket

        from hvdx.verdict import Picture

        now = time.monotonic()
        self.failure: str | None = None
        self._rank = rank
        self._seconds = seconds
        self._tick = min(seconds / 8, max(1.0, size / 64))  # rank 0 shall not drown in reports
        self._wires = wires
        self._stop_cores = stop_cores
        self._picture = Picture(size, seconds, now) if rank == 0 else None
        self._heard = now  # of rank 0
        self._patience = 0.0  # of others, as rank 0 has told
        self._where = False  # whether it wants to know where this rank is
        self._left: dict[int, str] = {}
        self._cut_off = False  # rank 0 has left without a word
        self._over = False  # the watch, by a fault of its own
        self._news = threading.Event()  # a rank has left, or the job has failed
        self._leaving: str | None = None
        self._gone = threading.Event()  # set with it
        self._told = False  # the program knows of the failure
        self._blocked = False  # it was in a collective when the job failed
        self._seen: dict[Any, float] = {}  # when a source's key first showed
        self._stopped = threading.Event()  # Horovod has been stopped after a failure
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._alarm, selectors.EVENT_READ)
        for other, wire in wires.items():
            self._selector.register(wire, selectors.EVENT_READ, other)
        self._thread = threading.Thread(target=self._run, name="hvdx watchdog", daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at once."""
        with contextlib.suppress(OSError):
            self._bell.send(b"!")

    def error(self) -> StallError:
        """Return the job's failure as an error; the program knows of it from now on."""
        self._told = True
        return StallError(self.failure or "")

    def leave(self, reason: str) -> None:
        """Tell the others that this rank leaves, and end the thread."""
        if threading.current_thread() is self._thread:
            return
        self._leaving = reason
        self._gone.set()
        self.wake()
        if self.failure is not None:
            # Two threads must not stop Horovod at once, and what it cannot end we must.
            self._told = True
            if not self._stopped.wait(_GRACE_SECONDS + 2):
                _end_process()
        self._thread.join(2 * _GRACE_SECONDS)

    def abandon(self) -> None:
        """Close what a forked child has inherited."""
        for wire in self._wires.values():
            wire.close()
        for end in (self._alarm, self._bell):
            end.close()
        self._selector.close()

    def explain(self, call: waiting, error: BaseException) -> None:
        """Raise StallError in the place of what Horovod raised because the job was stopped."""
        if isinstance(error, StallError) or not isinstance(error, Exception):
            return
        shut_down = _SHUT_DOWN in str(error)
        if shut_down and self.failure is None:
            self._news.wait(_NEWS_SECONDS)
        if self.failure is not None:
            if shut_down or "not been initialized" in str(error):
                raise self.error() from None
            return
        told = self._departures() or self._silences(time.monotonic())
        if shut_down and told:
            wait = self._described(call, time.monotonic(), True)
            at = f" (called at {wait.at})" if wait.at else ""
            raise StallError(
                f"rank {self._rank} waits for {wait}{at}, which can never finish: {told}"
            ) from None

    def comment(self) -> None:
        """Say why the program ends with an error of a graph's, which could not be replaced."""
        self._news.wait(_NEWS_SECONDS)
        if self.failure is None and self._left:
            _print(f"rank {self._rank}: the collective can never finish: {self._departures()}")

    def _departures(self) -> str:
        return "; ".join(f"rank {rank} {why}" for rank, why in sorted(self._left.items()))

    def _silences(self, now: float) -> str:
        """Say which of the ranks that should tell each second have not: Gloo may notice before."""
        if self._picture is not None:
            silent = self._picture.silent(now)
        else:
            silent = [0] if now - self._heard > 2 * self._tick else []
        each = ", ".join(f"rank {rank}" for rank in silent)
        return each and f"{each} not heard of: stopped, out of reach, or busy with Python's lock"

    # --- the thread

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # a fault here must not look like one of the job
            self._send({"over": True})
            self._flush()
            if self._leaving is None:
                _print(f"the job is watched no more (HVDX_TIMEOUT): {error!r}")
        finally:
            self._news.set()
            for wire in self._wires.values():
                wire.close()

    def _watch(self) -> None:
        due = time.monotonic()
        while self._leaving is None and self.failure is None and not self._over:
            now = time.monotonic()
            if now >= due:
                self._report(now)
                self._judge(now)
                due = now + self._tick
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is self._alarm:
                    with contextlib.suppress(BlockingIOError):
                        self._alarm.recv(64)
                    due = 0.0
                else:
                    self._read(key.data)
        if self.failure is not None:
            self._flush()
            self._stop_job()
        elif self._leaving is not None:
            self._send({"left": [self._rank, self._leaving]})
            self._flush()

    def _report(self, now: float) -> None:
        from hvdx.verdict import to_plain

        if self._picture is not None:
            self._where = self._picture.curious(now)
        report = self._look(now, self._where)
        if self._picture is not None:
            self._picture.hear(0, report, now)
            self._send({"patience": self._picture.patience(), "where": self._where})
        else:
            self._send({"report": to_plain(report)})

    def _read(self, rank: int) -> None:
        now = time.monotonic()
        try:
            for message in self._wires[rank].receive():
                self._take(rank, message, now)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            if self.failure is None and rank not in self._left:
                reason = "has left the job without a word: killed, crashed or cut off"
                if not isinstance(error, OSError):
                    reason = f"has left the watch: it sent nonsense ({error})"
                self._lose(rank, reason, now, certain=False)
        if rank in self._left and rank in self._wires:
            wire = self._wires.pop(rank)
            self._selector.unregister(wire)
            wire.close()

    def _take(self, rank: int, message: dict[str, Any], now: float) -> None:
        """Act on one message."""
        from hvdx.verdict import from_plain

        if self._picture is not None and "report" in message:
            self._picture.hear(rank, from_plain(message["report"]), now)
        elif "left" in message:
            who, reason = message["left"]
            certain = self._picture is not None or bool(message.get("certain", True))
            self._lose(rank if self._picture else int(who), str(reason)[:500], now, certain)
        elif "over" in message:
            self._over = True
            if self._picture is not None:
                self._send(message)
                self._flush()
        elif self._picture is None and "failure" in message:
            self._fail(str(message["failure"]))
        elif self._picture is None:
            self._patience = float(message["patience"])
            self._where = bool(message["where"])
            self._heard = now

    def _lose(self, rank: int, reason: str, now: float, certain: bool = True) -> None:
        self._left[rank] = reason
        self._cut_off |= rank == 0 and not certain
        self._news.set()
        if self._picture is not None:
            self._picture.lose(rank, reason, now, certain=certain)
            self._send({"left": [rank, reason], "certain": certain})

    def _judge(self, now: float) -> None:
        if self._picture is None:
            self._judge_alone(now)
            return
        told = self._picture.stalled(now)
        if told is not None:
            self._send({"failure": told})
            self._fail(told)
        elif (warning := self._picture.slow(now)) is not None:
            _print(warning)

    def _judge_alone(self, now: float) -> None:
        """Without a word from rank 0, which should tell every second, decide alone."""
        from hvdx.verdict import LEFT_SECONDS

        silent, limit = now - self._heard, self._seconds
        why = f"has not been heard of for {silent:.0f} s: its process is stopped, out of reach, or "
        why += "busy in code that keeps Python's lock"
        if 0 in self._left:
            why = self._left[0]
            limit = self._seconds if self._cut_off else LEFT_SECONDS
        elif silent < limit + self._patience:
            return
        for wait in self._look(now, where=silent > limit / 2).waits:
            if wait.seconds > limit and 0 in (wait.ranks or [0]):
                self._fail(
                    f"rank {self._rank} waited {wait.seconds:.0f} s for {wait}, called at "
                    f"{wait.at}, but rank 0 {why}"
                )
                return

    def _fail(self, told: str) -> None:
        self._blocked = bool(self._look(time.monotonic(), where=False).waits)
        self.failure = told
        self._news.set()
        if not _waiting:  # else the call that waits raises it
            _print(f"rank {self._rank} is stopped (HVDX_TIMEOUT={self._seconds:g}):\n{told}")

    def _send(self, message: Any) -> None:
        for rank, wire in self._wires.items():
            if rank in self._left:
                continue
            try:
                wire.send(message)
            except OSError:  # the next read says so, too
                continue

    def _flush(self) -> None:
        """Give the network a moment to take the last words."""
        until = time.monotonic() + 1.0
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                while not wire.flush() and time.monotonic() < until:
                    time.sleep(0.01)

    def _stop_job(self) -> None:
        """Make every call of Horovod on this rank return; see that the program ends."""

        def stop_cores() -> None:
            self._stop_cores()
            self._stopped.set()

        try:
            threading.Thread(target=stop_cores, name="hvdx stop", daemon=True).start()
        except RuntimeError:  # Python is ending already
            stop_cores()
        if self._stopped.wait(_GRACE_SECONDS + 2) and self._blocked:
            return  # its call has returned, with an error
        if self._gone.wait(_GRACE_SECONDS) or self._told:
            return
        at = whereabouts(None)
        _print(f"rank {self._rank} is interrupted at {at}, since the job has been stopped")
        with contextlib.suppress(Exception):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self._gone.wait(_GRACE_SECONDS) and not self._told:
            _end_process()

    # --- what this rank does

    def _look(self, now: float, where: bool) -> Any:
        """Return this rank's report, with ``where`` naming the lines."""
        from hvdx.verdict import Report, Wait

        waits = [self._described(call, now, where) for call in list(_waiting.values())]
        seen: dict[Any, float] = {}
        threads = set(_waiting)
        for source in list(_sources):
            for key, found in source().items():
                if found.thread in threads:
                    continue  # a call of ours that waits within Horovod's
                since = seen[key] = self._seen.get(key, now)
                at = whereabouts(found.thread) if where else ""
                ranks = list(found.ranks) if found.ranks else None
                waits.append(Wait(*found[:3], now - since, ranks, at))
        self._seen = seen
        last, at = _last, whereabouts(None) if where else ""
        told = f"{last[0]} {last[1]!r}" if last and last[1] else last[0] if last else ""
        patience = max(0.0, _patient_until - now)
        progress = f"{last} {sorted(map(str, seen))}"[:300]
        return Report(waits[:8], at, told[:200], patience, progress)

    def _described(self, call: waiting, now: float, where: bool) -> Any:
        from hvdx.verdict import Wait

        own = call.process_set
        ranks = getattr(own, "ranks", None) if getattr(own, "process_set_id", 0) else None
        thread = next((t for t, c in list(_waiting.items()) if c is call), None)
        at = whereabouts(thread) if where else ""
        return Wait(
            call.operation,
            call.name and call.name[:200],
            describe(call.tensors)[:200],
            now - call.since,
            list(ranks) if ranks else None,
            at,
        )


def describe(tensors: Any) -> str:
    """Return dtypes and shapes: ``float32 (3, 4)``."""
    given = list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]
    told = []
    for tensor in given[:3]:
        with contextlib.suppress(Exception):  # for a message only
            dtype = getattr(tensor.dtype, "name", None) or str(tensor.dtype).removeprefix("torch.")
            told.append(f"{dtype} {tuple(tensor.shape)}")
    return ", ".join(told) + (f" and {len(given) - 3} more" if len(given) > 3 else "")


def _print(text: str) -> None:
    """Write to stderr in one piece, whatever else is being written."""
    with contextlib.suppress(Exception):
        sys.stderr.write("hvdx: " + text.replace("\n", "\nhvdx: ") + "\n")
        sys.stderr.flush()


def _end_process() -> None:
    """End a rank that neither answers nor ends: nothing could come of it any more."""
    _print("this rank does not end; ending it. It was here:")
    with contextlib.suppress(Exception):
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        sys.stdout.flush()
    os._exit(1)
