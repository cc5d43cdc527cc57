"""Methods that take turns with one parameter, without losing what any of them owes.

They share one residual: what one method has left unsent is added to the next gradient whichever
method then sends it. Methods without error feedback would not touch it. So before one of these
takes over, or one that owes otherwise (to the mean itself, as the owners of its pieces do), all
that is owed travels raw in a step of its own: :data:`DELIVER`.
"""

from __future__ import annotations

import abc
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hvdx.comm import Allreduce, Rank, Ranks, Work
from hvdx.compression.base import BEFORE, Compressor, Reduced, Spec, none
from hvdx.compression.feedback import Feedback
from hvdx.compression.portable import shares
from hvdx.compression.state import Leaf, Owed, leaves, rebuilt
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp

DELIVER = 0  # the turn in which all that is owed travels raw; methods' turns follow


class Clock(abc.ABC):
    """Says whose turn it is; equal on all ranks.

    Attributes:
        wait: after how many steps, from 1, to call :meth:`review` next; till then turns stay.
    """

    wait: int

    def __init__(self) -> None:
        self._later: dict[int, Later] = {}

    @abc.abstractmethod
    def turn(self, specs: Sequence[Spec]) -> int:
        """Return the phase in which parameters are that travel side by side."""

    @abc.abstractmethod
    def review(self, delivered: bool) -> int:
        """Think turns over, between steps; a collective call.

        Args:
            delivered: whether the last step's means were finite, so that they count.

        Returns:
            What :attr:`wait` is from now on.
        """

    def later(self, steps: int) -> Later:
        """Return the clock that begins to run after ``steps``."""
        return self._later.setdefault(steps, Later(self, steps))


class Later(Clock):
    """A clock that waits for its time, in which it is turn ``BEFORE``.

    Args:
        clock: whose turns follow.
        steps: how long to wait.
    """

    def __init__(self, clock: Clock, steps: int) -> None:
        super().__init__()
        self._clock, self.wait, self._begun = clock, steps, steps == 0

    def turn(self, specs: Sequence[Spec]) -> int:
        """See :meth:`Clock.turn`."""
        return self._clock.turn(specs) if self._begun else BEFORE

    def review(self, delivered: bool) -> int:
        """See :meth:`Clock.review`."""
        self.wait = self._clock.review(delivered) if self._begun else self._clock.wait
        self._begun = True
        return self.wait


class Shared(NamedTuple):
    """State of a parameter with which methods take turns."""

    residual: Owed  # float32, in the gradient's shape; None if no method has error feedback
    kept: Any  # by method, what it keeps beside that


def taking_turns(
    name: str, methods: Mapping[str, Compressor], turns: Sequence[str], clock: Clock
) -> Compressor:
    """Return the compressor whose phase ``n + 1`` is the method ``turns[n]``; phase 0 delivers.

    Args:
        name: of the whole.
        methods: by name; without phases. One that is not there is ``none``.
        turns: names.
        clock: says whose turn it is.
    """
    keeping = {each: methods[each] for each in turns if each in methods and methods[each].stateful}
    fields = {each: f"m{place}_{re.sub(r'[^a-z0-9]+', '_', each.lower())}"
              for place, each in enumerate(sorted(keeping))}  # fmt: skip

    def init(ops: Ops, spec: Spec) -> Shared | None:
        states = {fields[each]: method.init(ops, spec) for each, method in keeping.items()}
        if all(state is None for state in states.values()):
            return None
        owing = any(isinstance(state, Feedback) for state in states.values())
        rest = {field: _without_residual(state) for field, state in states.items()}
        residual = ops.zeros(spec.shape, "float32") if owing else None
        return Shared(residual, _keeps(tuple(rest))(**rest))

    phases = [_delivery, *(_turn(methods.get(each, none), fields.get(each)) for each in turns)]
    return Compressor(
        name,
        init,
        phases[-1].reduce,
        stateful=bool(keeping),
        phases=tuple(enumerate(phases)),
        clock=clock,
    )


@functools.lru_cache(maxsize=256)
def _keeps(fields: tuple[str, ...]) -> Any:
    return NamedTuple("Keeps", [(field, Any) for field in fields])


def _without_residual(state: Any) -> Any:
    return state._replace(residual=None) if isinstance(state, Feedback) else state


def _turn(method: Compressor, field: str | None) -> Compressor:
    """Return ``method`` as a phase: it takes what is its own out of the shared state."""
    if method.elementwise:  # passes any state on
        return method

    def reduce(ops: Ops, grad: Any, state: Shared | None) -> Work[Reduced]:
        if field is None or state is None:
            reduced = yield from method.reduce(ops, grad, None)
            return reduced._replace(state=state)
        own = getattr(state.kept, field)
        feeds = isinstance(own, Feedback)
        given = own._replace(residual=state.residual) if feeds else own
        reduced = yield from method.reduce(ops, grad, given)
        after = reduced.state
        kept = state.kept._replace(**{field: _without_residual(after)})
        return reduced._replace(state=Shared(after.residual if feeds else state.residual, kept))

    return method._replace(reduce=reduce)


def _deliver(ops: Ops, grad: Any, state: Shared | None) -> Work[Reduced]:
    """Send the gradient and all that is owed; of a step that is not finite, nothing counts."""
    if state is None or state.residual is None:
        return (yield from none.reduce(ops, grad, state))
    rank, ranks = (yield Rank()), (yield Ranks())
    owed = shares(ops, leaves(state), rank, ranks)["residual"]
    given = ops.scale(ops.cast(grad, "float32"), 1.0 / ranks) + owed
    mean = yield Allreduce(given, op=ReduceOp.Sum)
    good = ops.max(ops.reshape(ops.abs_bits(mean), (-1,))) < _INFINITE
    paid = [_paid(ops, leaf, good) for leaf in leaves(state)]
    return Reduced(ops.cast(mean, ops.dtype(grad)), None, rebuilt(state, iter(paid)))


def _paid(ops: Ops, leaf: Leaf, good: Any) -> Any:
    if leaf.kind not in ("owed", "piece"):
        return leaf.tensor
    shape = tuple(leaf.tensor.shape)
    return ops.either(good, lambda: ops.zeros(shape, "float32"), lambda: leaf.tensor)


_INFINITE = 0x7F800000  # bits of infinity in a float32; NaN lie above
_delivery = Compressor("delivery", none.init, _deliver)
