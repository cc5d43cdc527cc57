"""Which backward pass is under way, and what happens when it ends.

Several optimizers may get gradients from one ``backward()``. Their reductions must all be
under way before any is awaited: which optimizer is met first may differ from rank to rank.

A backward may also run inside another one (reentrant checkpointing). Averaging waits for the
outer one's end.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import torch


class Follower(Protocol):
    """What takes part in backward passes: a :class:`Reducer`."""

    serial: int

    def backward_ended(self) -> bool:
        """Note the end of a backward; tell whether gradients are to be averaged now."""

    def take_off(self) -> None:
        """Start the reductions."""

    def land(self) -> None:
        """Wait for them and hand out the means."""

    def abandon(self) -> None:
        """Forget them: something has failed."""


class Backward:
    """One backward pass. The engine calls it at the end.

    Only the engine keeps it alive, so that a pass that fails is forgotten with it.
    """

    def __init__(self, task: int) -> None:
        self.task = task
        self.outer: Backward | None = next(reversed(list(_under_way.values())), None)
        self.followers: list[Follower] = []
        self.ended = False

    def __call__(self) -> None:
        """Average what followed this pass, or leave it to the pass around it."""
        self.ended = True
        _under_way.pop(self.task, None)
        if self.outer is not None and not self.outer.ended:
            self.outer.followers += [f for f in self.followers if f not in self.outer.followers]
            return
        due = [f for f in sorted(self.followers, key=_serial) if f.backward_ended()]
        try:
            for follower in due:
                follower.take_off()
            for follower in due:
                follower.land()
        except BaseException:
            for follower in due:
                follower.abandon()
            raise


def _serial(follower: Follower) -> int:
    return follower.serial


_under_way: weakref.WeakValueDictionary[int, Backward] = weakref.WeakValueDictionary()
_lock = threading.Lock()  # each device has a thread of its own


def follow(task: int, follower: Follower) -> bool:
    """Have ``follower`` take part in the end of the backward that the engine calls ``task``.

    Returns:
        Whether other backward passes are around this one, or were in it.
    """
    with _lock:
        current = _under_way.get(task)
        if current is None:
            current = Backward(task)
            _under_way[task] = current
            torch.autograd.Variable._execution_engine.queue_callback(current)
        again = follower in current.followers
        if not again:
            current.followers.append(follower)
        return again or current.outer is not None
