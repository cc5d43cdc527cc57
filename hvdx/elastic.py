"""Elastic training: ranks may fail, leave and join while a job runs.

``hvdx run --min-np ...`` starts and replaces processes, or Horovod's own launcher does. In each of
them :func:`run_fn` calls the user's training function again after every change, with a
:class:`State` that all ranks have brought to the same point before:

    rank fails                               hosts come or go
    -> HorovodInternalError in the others    -> HostsUpdatedInterrupt from state.commit()
    -> state.restore(): the last commit         (nothing is undone)
    -> leave, and meet the ranks that are there now; state.on_reset()
    -> state.sync(): everybody gets what rank 0 has, which is never a newcomer
    -> the function again

The names are Horovod's; each framework's face has them in its module ``elastic``. Better than
Horovod's: what ``sync`` sends is what training has reached, also since the last commit; a later
``restore`` goes back to just that; lists and dictionaries are saved as copies, so that
``restore`` undoes changes within them; objects with ``state_dict`` and ``load_state_dict``
(schedules, samplers, scalers) keep their identity on every rank; errors of TensorFlow that are
not Horovod's are raised instead of ending the function with None; a mismatch between ranks,
which no retry can mend, is raised too.

Limits: one framework's core per job, and no process sets: Horovod forgets them when it starts
again.
"""

from __future__ import annotations

import abc
import copy
import functools
import importlib
import os
import queue
import time
from collections.abc import Callable, Iterable
from typing import Any

from hvdx import agreement, world
from hvdx.errors import LaunchError
from hvdx.mismatch import is_mismatch

ASK_SECONDS = 1.0

_leaving = False  # the ranks: they are met no more
_running = 0  # calls of what run_fn has returned


class Recoverable(abc.ABC):
    """What can be saved, undone and shared when ranks come and go."""

    @abc.abstractmethod
    def save(self) -> None:
        """Keep a copy on this rank."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Go back to what was saved last."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Give all ranks what rank 0 has."""

    def gather(self) -> None:  # noqa: B027 (most have nothing to do here)
        """Bring together what is each rank's own, so that it outlives some; on all ranks."""

    def leave(self) -> None:  # noqa: B027
        """Take what :meth:`gather` has brought together to the next ranks."""

    def reset(self) -> None:  # noqa: B027
        """Adapt to other ranks, before ``sync``."""


class State(Recoverable):
    """What training needs to go on, and how to save it, undo to it and share it.

    A subclass says how to ``save``, ``restore`` and ``sync``; one that lacks any cannot be made,
    where Horovod's finds out when a rank has failed.

    Args:
        bcast_object: returns rank 0's object on all ranks.
        get_rank: returns this rank's number.

    Attributes:
        conserve: bring together, at every commit, what compression holds back on each rank, so
            that it is not lost with a rank that dies. Costs a sum of the model's size.
    """

    conserve = False

    def __init__(
        self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int] | None
    ) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._host_messages: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._last_updated_timestamp: Any = 0
        self._reset_callbacks: list[Callable[[], Any]] = []
        self._ask_next = 0.0

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], Any]]) -> None:
        """Have functions called after every change of the ranks, before ``sync``.

        They may read ``hvd.size()``, to scale a learning rate for instance.
        """
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Take note that the ranks have changed."""
        self._host_messages = queue.Queue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: Any, update_res: Any) -> None:
        """Take note, from the launcher, that hosts come or go; called in another thread."""
        self._host_messages.put((timestamp, update_res))

    def commit(self) -> None:
        """Save this point, and look whether hosts come or go.

        Copies all of the state: every few batches is often enough.

        Raises:
            HostsUpdatedInterrupt: they do; raised on all ranks alike.
        """
        if self.conserve:
            self.gather()
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Look whether hosts come or go; a broadcast, so all ranks call it at the same point.

        Raises:
            HostsUpdatedInterrupt: they do; raised on all ranks alike.
        """
        from horovod.common.exceptions import HostsUpdatedInterrupt
        from horovod.runner.elastic.worker import HostUpdateResult

        self._ask_launcher()
        before = newest = self._last_updated_timestamp
        update = HostUpdateResult.no_update
        while not self._host_messages.empty():
            timestamp, told = self._host_messages.get()
            if timestamp > newest:
                newest = timestamp
                update |= told
        # The launcher tells rank 0 only.
        before, newest, update = self._bcast_object((before, newest, update))
        self._last_updated_timestamp = newest
        if newest > before:
            if update & HostUpdateResult.removed:
                self.gather()
                self.leave()
            raise HostsUpdatedInterrupt(update == HostUpdateResult.removed)

    def _ask_launcher(self) -> None:
        """Have rank 0 ask ``hvdx run`` about hosts, once a second at most."""
        now = time.monotonic()
        if "HVDX_WORKER" not in os.environ or now < self._ask_next or world.rank() != 0:
            return
        from horovod.runner.elastic.worker import HostUpdateResult

        from hvdx import launch

        self._ask_next = now + ASK_SECONDS
        if (told := launch.news()) is not None:
            self.on_hosts_updated(told[0], HostUpdateResult(told[1]))


class StateHandler(Recoverable):
    """Saves, restores and shares one object of a state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def set_value(self, value: Any) -> None:
        """Watch another object from now on."""
        self.value = value
        self.save()


class StatefulHandler(StateHandler):
    """For what has ``state_dict`` and ``load_state_dict``: schedules, samplers, scalers."""

    def __init__(self, value: Any, bcast_object: Callable[[Any], Any]) -> None:
        super().__init__(value)
        self._bcast_object = bcast_object
        self.save()

    def save(self) -> None:
        """Keep a copy."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Go back to the copy; loading it may share it, so another is loaded."""
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        """Give all ranks what rank 0 has."""
        self.value.load_state_dict(self._bcast_object(self.value.state_dict()))

    def reset(self) -> None:
        """Go on where it stands: a change that only takes ranks away needs no ``sync``.

        What shares out samples begins, when loaded, behind those that are done.
        """
        self.value.load_state_dict(self.value.state_dict())


class OwedHandler(StateHandler):
    """Keeps what compression holds back: each rank's own, and part of what training is owed.

    After a failure, training goes back to the last commit, and with it each rank to what it owed
    then. What a dead rank owed is lost, unless :meth:`gather` has brought all together at the
    commit, which costs a sum of the model's size. Ranks that leave as planned gather by
    themselves.

    Subclasses say how to :meth:`own`, :meth:`together` and :meth:`wait`.
    """

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self._gathered: Any = None
        self.save()

    @abc.abstractmethod
    def own(self) -> Any:
        """Return what this rank holds back; None if it never does."""

    @abc.abstractmethod
    def together(self) -> Any:
        """Return what any number of ranks can start from; on all ranks. None if that is none."""

    @abc.abstractmethod
    def load(self, saved: Any) -> None:
        """Go on from ``saved``, on the ranks there are; without effect if it is of others."""

    @abc.abstractmethod
    def wait(self, saved: Any) -> None:
        """Take ``saved`` to the ranks that are met next."""

    def save(self) -> None:
        """Keep what was gathered just now, or this rank's own."""
        self._saved = self.own() if self._gathered is None else self._gathered
        self._gathered = None

    def gather(self) -> None:
        """Bring together what all ranks hold back; a collective."""
        self._gathered = self.together()

    def leave(self) -> None:
        """Take to the next ranks what was gathered, so that all of them have all of it."""
        if self._gathered is not None:
            self.wait(self._gathered)
            self._saved, self._gathered = self._gathered, None

    def restore(self) -> None:
        """Go back: before other ranks are met, whatever ranks it is of."""
        self._gathered = None
        if self._saved is not None:
            (self.wait if _leaving else self.load)(self._saved)

    def sync(self) -> None:
        """Do nothing: ranks bring it together when they meet."""


class ObjectState(State):
    """A state of Python objects, which become attributes.

    Args:
        bcast_object: returns rank 0's object on all ranks.
        get_rank: returns this rank's number.
        **kwargs: the objects; they must allow ``copy.deepcopy`` and pickling.
    """

    def __init__(
        self,
        bcast_object: Callable[[Any], Any],
        get_rank: Callable[[], int] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(bcast_object, get_rank)
        self._handlers: dict[str, StateHandler] = {}
        self._saved_state: dict[str, Any] = {}
        for name, value in kwargs.items():
            setattr(self, name, value)
            handler = self._handler(value)
            if handler is None:
                self._saved_state[name] = copy.deepcopy(value)
            else:
                self._handlers[name] = handler

    def _handler(self, value: Any) -> StateHandler | None:
        """Return what saves and shares ``value``; None for an ordinary object."""
        stateful = all(
            callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")
        )
        if stateful and not isinstance(value, type):
            return StatefulHandler(value, self._bcast_object)
        return None

    def save(self) -> None:
        """Keep a copy of the state on this rank."""
        for handler in self._handlers.values():
            handler.save()
        self._saved_state = {name: copy.deepcopy(getattr(self, name)) for name in self._saved_state}

    def restore(self) -> None:
        """Go back to what was saved last."""
        for handler in self._handlers.values():
            handler.restore()
        for name, value in self._saved_state.items():
            setattr(self, name, copy.deepcopy(value))

    def sync(self) -> None:
        """Give all ranks what rank 0 has now, and save it: a later ``restore`` comes here."""
        for handler in self._handlers.values():
            handler.sync()
        if self._saved_state:
            own = {name: getattr(self, name) for name in self._saved_state}
            for name, value in self._bcast_object(own).items():
                setattr(self, name, value)
        self.save()

    def gather(self) -> None:
        """Bring together what is each rank's own, so that it outlives some; on all ranks."""
        for handler in self._handlers.values():
            handler.gather()

    def leave(self) -> None:
        """Take what :meth:`gather` has brought together to the next ranks."""
        for handler in self._handlers.values():
            handler.leave()

    def reset(self) -> None:
        """Adapt to other ranks, before ``sync``."""
        for handler in self._handlers.values():
            handler.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        handler = self.__dict__.get("_handlers", {}).get(name)
        if handler is not None:
            handler.set_value(value)
        super().__setattr__(name, value)


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``func(state, ...)`` again whenever ranks have failed, left or joined.

    Nothing may communicate between ``hvd.init()`` and the decorated function: ranks that join
    later would wait there for ranks that are training. With TensorFlow, every ``tf.function`` is
    traced anew after a change.

    Example:
        >>> @hvd.elastic.run
        ... def train(state):
        ...     for state.epoch in range(state.epoch, epochs):
        ...         ...  # a few batches, then
        ...         state.commit()
        >>> train(hvd.elastic.TorchState(model, optimizer, epoch=0))
    """
    return run_fn(func, reset)


def run_fn(func: Callable[..., Any], reset: Callable[[], None]) -> Callable[..., Any]:
    """Wrap ``func(state, ...)``, so that it is called again after every change of the ranks.

    Args:
        func: trains, from wherever its first argument, a :class:`State`, says it stands.
        reset: leaves the job and meets the ranks that are there then.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        global _running
        from horovod.common.elastic import notification_manager
        from horovod.common.exceptions import HostsUpdatedInterrupt

        # Only Horovod's launcher sends notifications, to a port that is opened for them here.
        if os.environ.get("HOROVOD_ELASTIC") == "1" and "HVDX_WORKER" not in os.environ:
            notification_manager.init()
        notification_manager.register_listener(state)
        _running += 1
        cause: BaseException | None = None
        behind = True  # this rank needs what rank 0 has
        try:
            while True:
                try:
                    if cause is not None:
                        _again(reset, cause)
                        state.on_reset()
                    if _meet(behind):
                        state.sync()
                    return func(state, *args, **kwargs)
                except HostsUpdatedInterrupt as interrupt:
                    cause, behind = interrupt, not interrupt.skip_sync
                except Exception as error:
                    if not is_lost_rank(error):
                        raise
                    world.cut_off()
                    _go_back(state)
                    cause, behind = error, True
        finally:
            _running -= 1
            notification_manager.remove_listener(state)

    return wrapper


def runs() -> bool:
    """Tell whether :func:`run` is at work, which has graphs traced anew after each change."""
    return _running > 0


def is_lost_rank(error: BaseException) -> bool:
    """Tell whether an operation failed because a rank is gone.

    TensorFlow raises errors of its own, which name the operation of Horovod's that failed.
    """
    from horovod.common.exceptions import HorovodInternalError

    if is_mismatch(error):
        return False
    if isinstance(error, HorovodInternalError):
        return True
    libraries = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return "tensorflow" in libraries and "Horovod" in str(error)


def reset() -> None:
    """Leave the job, and meet the ranks that are there now.

    Raises:
        ValueError: both frameworks' cores run, which Horovod's launcher cannot start again.
    """
    running = world.running()
    if len(running) > 1:
        raise ValueError(
            f"elastic training serves one framework, but {' and '.join(running)} are initialized"
        )
    world.shutdown()
    if "tensorflow" in running:
        importlib.import_module("hvdx.integrations.tensorflow_elastic").forget_graphs()
    world.init(framework=running or None)


def _go_back(state: State) -> None:
    """Restore the last commit, on a rank that leaves the others."""
    global _leaving
    _leaving = True
    try:
        state.restore()
    finally:
        _leaving = False


def _again(reset: Callable[[], None], cause: BaseException) -> None:
    try:
        reset()
    except LaunchError as error:  # no elastic launcher: say first what failed
        raise error from cause


def _meet(behind: bool) -> bool:
    """Count names alike on all ranks, and decide for all whether to synchronise.

    Newcomers have made fewer collectives than the others, and would name theirs otherwise.
    Ranks that need no synchronising go along where others need it: hosts may be found while
    some that left are being dealt with.
    """
    if not world.is_initialized():
        return behind
    told = world.core().allgather_object((behind, agreement.counts()), "hvdx.elastic", None)
    agreement.count_from([counts for _, counts in told])
    return any(each for each, _ in told)
