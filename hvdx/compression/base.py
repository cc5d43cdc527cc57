"""What a compressor is, and the ones without state."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from hvdx.comm import Allreduce, Ranks, Work
from hvdx.compression import codecs
from hvdx.compression.codecs import Codec
from hvdx.compression.updates import Messenger, coded
from hvdx.errors import HvdxError
from hvdx.ops import Ops, ops_for
from hvdx.reduce_op import ReduceOp

FORMAT = 1  # of what travels (docs/wire-format.md); ranks compare it
BEFORE = -1  # with a clock: the turn of what comes before all others
_HALF_LIMIT = 60000.0  # float16 ends at 65504, and sums of halves round up on their way there


Make = TypeVar("Make", bound=Callable[..., Any])


class CompressionError(HvdxError, ValueError):
    """A compressor was given what it cannot compress; names rank and parameter."""


class Spec(NamedTuple):
    """What a compressor may know of a parameter before its first gradient."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as NumPy names it
    ranks: int = 1  # how many take part


class Reduced(NamedTuple):
    """What ``reduce`` returns."""

    mean: Any  # the estimate of the mean gradient, equal on every rank
    own: Any
    """What this rank contributed to it, or a function that works that out, since only error
    feedback needs it; None where error feedback has been applied."""
    state: Any


class Compressor(NamedTuple):
    """A way of averaging a gradient over ranks.

    ``init(ops, spec)`` returns the first state of a parameter. ``reduce(ops, grad, state)``
    is a generator of the requests of :mod:`hvdx.comm` that returns :class:`Reduced`, and may
    write the mean over ``grad``. Both are plain functions without hidden state, so state can be
    saved, moved and compared.
    """

    name: str
    init: Callable[[Ops, Spec], Any]
    reduce: Callable[[Ops, Any, Any], Work[Reduced]]
    elementwise: bool = False
    """Each element is treated alone and no state is kept, so that an engine may hand over a
    whole bucket as one flat tensor instead of parameter by parameter."""

    stateful: bool = False
    """It keeps something from step to step."""

    phases: tuple[tuple[int, Compressor], ...] = ()
    """(step, compressor) in rising order: what takes over from that step on. They share the
    state, and have no phases themselves. Requests then depend on nothing but the step, which
    is equal on all ranks."""
    owns_momentum: bool = False
    """It applies momentum itself, so that the optimizer must not."""

    policy: Callable[[Spec], Compressor] | None = None
    """Chooses for each parameter; what it returns has no policy itself."""

    prepare: Callable[[Any, list[Spec], Any], Compressor] | None = None
    """``prepare(adapter, specs, process_set)`` returns what to use instead. All ranks call it at
    the same moment, with equal ``specs``, before the first reduction: it may measure."""

    clock: Any = None
    """Says which of ``phases`` gradients are in, in the place of the optimizer's step: see
    :class:`hvdx.compression.turns.Clock`."""

    rows: Callable[[int], Codec] | None = None
    """What writes the rows, of so many numbers each, of sparse gradients; None: they travel raw."""

    sharers: int = 1
    """How many ranks, which follow each other, keep equal states; 0: that is known once
    :attr:`prepare` has returned. See :mod:`hvdx.compression.hierarchy`."""

    updates: Messenger | None = None
    """How parameter servers send back what they have changed; None: parameters travel raw."""

    def __repr__(self) -> str:
        return f"Compression.{self.name}"

    def of(self, spec: Spec) -> Compressor:
        """Return what reduces the gradient of the parameter ``spec``."""
        return self.policy(spec) if self.policy is not None else self

    def at(self, step: int) -> Compressor:
        """Return what reduces gradients in optimizer step, or turn, ``step``, counted from 0."""
        chosen = self
        for start, phase in self.phases:
            if step >= start:
                chosen = phase
        return chosen


class HorovodCompressor(Compressor):
    """A compressor with the two methods of Horovod's, which scripts may call themselves."""

    def compress(self, tensor: Any) -> tuple[Any, str]:
        """Return ``tensor`` as it travels, and its dtype, which :meth:`decompress` restores.

        A plain cast, as Horovod's: only a reduction can divide before it sums.
        """
        ops = ops_for(type(tensor))
        dtype = ops.dtype(tensor)
        halved = self.name == "fp16" and "float" in dtype
        return (ops.cast(tensor, "float16") if halved else tensor), dtype

    def decompress(self, tensor: Any, ctx: str) -> Any:
        """Return what :meth:`compress` was given, but for what the cast has lost."""
        return ops_for(type(tensor)).cast(tensor, ctx)


def refuse_momentum(compressor: Compressor, optimizer: str, options: Mapping[str, Any]) -> None:
    """Refuse an optimizer with momentum for a compressor that applies it.

    Args:
        compressor: any.
        optimizer: what to call it in the message.
        options: its own, by name.

    Raises:
        CompressionError: momentum would be applied twice.
    """
    for name in _MOMENTUM if compressor.owns_momentum else ():
        value = options.get(name)
        if value[0] if isinstance(value, (tuple, list)) else value:
            raise CompressionError(
                f"compression={compressor} applies momentum itself, and {optimizer} would do so "
                f"once more ({name}={value}): use SGD(..., momentum=0)"
            )


#: What libraries call it.
_MOMENTUM = ("momentum", "betas", "beta_1", "adam_beta_1")


def name_hash(seed: int, name: str) -> int:
    """Return 31 random bits for (seed, parameter), equal on all ranks and in all versions."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def remembered(make: Make) -> Make:
    """Have equal arguments make one and the same compressor.

    States belong to a compressor, and a training loop may make its own anew in each step, as
    Horovod's scripts do where they wrap a tape.
    """
    made: dict[Any, Any] = {}

    @functools.wraps(make)
    def find(*args: Any, **options: Any) -> Any:
        key = args, tuple(sorted(options.items()))
        try:
            hash(key)
        except TypeError:  # a list, say
            return make(*args, **options)
        if key not in made:
            made[key] = make(*args, **options)
        return made[key]

    return find  # type: ignore[return-value]


def stateless(ops: Ops, spec: Spec) -> None:
    """Return the state of a compressor that keeps none."""
    return None


def _identity(ops: Ops, grad: Any, state: None) -> Work[Reduced]:
    mean = yield Allreduce(grad)
    return Reduced(mean, grad, state)


def _half(ops: Ops, grad: Any, state: None) -> Work[Reduced]:
    if ops.dtype(grad) not in ("float32", "float64"):
        return (yield from _identity(ops, grad, state))
    ranks = yield Ranks()
    # Divided in full precision before the cast: a sum of halves overflows long before a mean.
    # Infinities pass: loss scaling must see them.
    limit = _HALF_LIMIT / ranks
    share = ops.clip(ops.scale(grad, 1.0 / ranks), -limit, limit)
    payload = ops.cast(share, "float16")
    total = yield Allreduce(payload, op=ReduceOp.Sum)

    def own() -> Any:
        return ops.scale(ops.cast(payload, ops.dtype(grad)), ranks)

    return Reduced(ops.cast(total, ops.dtype(grad)), own, state)


none = HorovodCompressor("none", stateless, _identity, elementwise=True)
fp16 = HorovodCompressor(
    "fp16",
    stateless,
    _half,
    elementwise=True,
    rows=lambda columns: codecs.float16(),
    updates=coded(codecs.float16()),
)


@remembered
def from_horovod(kind: Any) -> Compressor:
    """Use a compressor written for Horovod: a class with static ``compress``, ``decompress``."""

    def reduce(ops: Ops, grad: Any, state: None) -> Work[Reduced]:
        payload, context = kind.compress(grad)
        mean = yield Allreduce(payload)
        return Reduced(kind.decompress(mean, context), kind.decompress(payload, context), state)

    return Compressor(kind.__name__, stateless, reduce)
