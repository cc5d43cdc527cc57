"""Average gradients while backward goes on."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hvdx import buckets, world
from hvdx.comm import Allreduce, Work, together
from hvdx.compression import CompressionError, Compressor, Reduced, Spec, none
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_engine import Flight
from hvdx.integrations.pytorch_optimizer_backward import follow
from hvdx.integrations.pytorch_optimizer_buckets import AnyBucket, Bucket, SparseBucket, finite
from hvdx.integrations.pytorch_optimizer_states import Kept
from hvdx.integrations.pytorch_optimizer_wrapper import Named, Options, Wrapper, retire
from hvdx.ops import Ops, ops_for
from hvdx.reduce_op import ReduceOp

METHODS = (
    "synchronize",
    "skip_synchronize",
    "set_backward_passes_per_step",
    "no_sync",
    "compression_state",
    "portable_compression_state",
    "load_compression_state",
)
_LARGE = 16384  # elements from which a gradient is moved alone, and at once


class Slot:
    """A parameter's place: in its reducer and, once ranks have met, in a bucket."""

    def __init__(self, reducer: Reducer, name: str, parameter: torch.Tensor) -> None:
        self.reducer = reducer
        self.name = name
        self._parameter = weakref.ref(parameter)
        self.large = parameter.numel() >= _LARGE
        self.bucket: AnyBucket | None = None
        self.index = 0
        self.hooks: list[Any] = []

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter, which lives as long as anything asks for it."""
        parameter = self._parameter()
        assert parameter is not None, f"parameter {self.name!r} is gone"
        return parameter

    @property
    def lives(self) -> bool:
        """Whether the parameter does."""
        return self._parameter() is not None

    def free(self) -> None:
        """Take the hooks off the parameter."""
        for hook in self.hooks:
            hook.remove()


_slots = WeakIdKeyDictionary()  # parameter -> weak reference to its slot; it has one at most


def _slot_of(parameter: torch.Tensor) -> Slot | None:
    reference = _slots.get(parameter)
    return reference() if reference is not None else None


def release(parameter: torch.Tensor) -> None:
    """Have the reducer that averages the gradient of ``parameter``, if one does, give it up."""
    slot = _slot_of(parameter)
    if slot is not None:
        slot.reducer.give_up(slot)


class Reducer(Wrapper):
    """Watches a backward pass, sends each bucket as it fills and brings the means back.

    Life of a bucket: every parameter's hook counts down; at zero the bucket is filled and its
    reduction takes off; when backward ends, what has not left is sent (parameters without a
    gradient as zeros), and all are awaited. The next backward before ``step()`` starts another
    round: it adds to the means, and the mean of sums is the sum of means. Rounds have names of
    their own, so that ranks that call backward unequally often stall instead of mixing them.

    Parameters that are new wait for the end of a backward. Ranks then meet (:meth:`Wrapper.meet`)
    and the new ones get their buckets.
    """

    strategy = ""  # what ranks must agree on besides; begins with a comma

    def __init__(
        self, optimizer: torch.optim.Optimizer, options: Options, passes_per_step: int
    ) -> None:
        super().__init__(optimizer, options)
        self.kept = Kept(options.compressor)
        self._lock = threading.RLock()  # each device has a thread of its own in backward
        self._held = False  # inside no_sync()
        self._skipped = False  # inside skip_synchronize()
        self._asked = False  # synchronize() was called since the last step
        self._nests = False  # backward passes have been seen inside others
        self._scale: float | None = None  # of the loss, in this round
        self._empty()
        self.set_backward_passes_per_step(passes_per_step)

    def _empty(self) -> None:
        self.buckets: list[AnyBucket] = []
        self._slots: list[Slot] = []
        self._fresh: list[Slot] = []  # in no bucket yet
        self._aloft: list[AnyBucket] = []
        self._known: set[int] = set()  # ids: hashing a tensor costs ten times as much
        self._frozen = 0  # parameters that may be trained later
        self._groups = 0  # the optimizer's, when it was last looked at
        self._passes = 0  # backward calls since the last reduction
        self._stale = True  # gradients may have changed since the last reduction
        self._task = -1  # the backward under way, as the engine numbers it
        self._quiet = False  # in which no bucket leaves before the end

    def begin(self) -> None:
        """See :meth:`Wrapper.begin`."""
        self._empty()
        self.kept.join(self.adapter, self.options.process_set, self.name)
        self._adopt()

    def end(self) -> None:
        """See :meth:`Wrapper.end`."""
        for slot in self._slots:
            slot.free()
            if slot.lives and _slot_of(slot.parameter) is slot:
                del _slots[slot.parameter]
        self.kept.leave()
        self._empty()

    def attach(self, methods: Sequence[str]) -> None:
        """See :meth:`Wrapper.attach`."""
        super().attach(methods)
        optimizer: Any = self.optimizer
        optimizer.loss_scale = None
        optimizer.register_load_state_dict_post_hook(self._loaded)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sum the gradients of ``passes`` backward calls before they are averaged."""
        super().set_backward_passes_per_step(passes)
        self._passes_per_step = passes

    @property
    def adds_up(self) -> bool:
        """Whether what backward adds to may be something else than a mean."""
        return self.options.op == ReduceOp.Sum

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward only accumulate on this rank; the next one outside averages the sum."""
        self._held, before = True, self._held
        try:
            yield
        finally:
            self._held = before

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let ``step()`` take the gradients as they are; Horovod's scripts say so themselves."""
        self._skipped, before = True, self._skipped
        try:
            yield
        finally:
            self._skipped = before

    def synchronize(self) -> None:
        """Average what has not been averaged yet, and wait. Backward does this at its end."""
        self._catch_up()
        self._asked = True

    def _catch_up(self) -> None:
        self.require_place()
        if self.active:
            self._adopt()
            if self._stale or self._fresh:
                for bucket in self.buckets:
                    bucket.let_go()
                self.take_off()
                self.land()

    # -- which parameters, and in which buckets

    def _adopt(self) -> None:
        """Follow parameters that are new to the optimizer, or newly trainable."""
        known = self._known
        for name, parameter in self.named(known):
            if id(parameter) in known:  # named twice
                continue
            known.add(id(parameter))
            release(parameter)
            slot = Slot(self, name, parameter)
            _slots[parameter] = weakref.ref(slot)
            self._slots.append(slot)
            self._fresh.append(slot)
            ready: Callable[..., Any] = functools.partial(self._ready, slot)
            slot.hooks.append(parameter.register_post_accumulate_grad_hook(ready))
            if self.adds_up:
                slot.hooks.append(parameter.register_hook(functools.partial(self._share, slot)))
        if self.optimizer is not None:
            groups = self.optimizer.param_groups
            self._groups = len(groups)
            self._frozen = sum(len(group["params"]) for group in groups) - len(known)

    def give_up(self, lost: Slot) -> None:
        """Leave a parameter to another optimizer's reducer, which was wrapped later.

        Averaged twice, a gradient would be copied while it is being reduced. Whoever steps, the
        gradient is the mean.
        """
        lost.free()
        del _slots[lost.parameter]
        self._slots.remove(lost)
        self._fresh = [slot for slot in self._slots if slot.lives]
        self.buckets = []
        if not self._slots:
            retire(self)

    def settle(self) -> list[AnyBucket]:
        """Put parameters that are new into buckets, after all ranks have compared notes."""
        fresh = self._fresh
        limit = buckets.limit_bytes()
        together_ = self._together(fresh)
        more = (
            f"backward_passes_per_step={self._passes_per_step}, groups={together_}, "
            f"sparse_as_dense={self.options.sparse_as_dense}, buckets of {limit} bytes"
            f"{self.strategy}"
        )
        sparse = self.meet([Named(slot.name, slot.parameter) for slot in fresh], more)
        if self.options.sparse_as_dense:
            sparse = set()
        self.check_sparse([fresh[place].name for place in sorted(sparse)])
        layout = buckets.plan(
            [
                buckets.Entry(s.name, s.parameter.numel(), dtype_name(s.parameter.dtype),
                              "sparse" if place in sparse else str(s.parameter.device))
                for place, s in enumerate(fresh)
            ],
            limit,
            [[place for place in group if place not in sparse] for group in together_],
        )  # fmt: skip
        dense = [slot for place, slot in enumerate(fresh) if place not in sparse]
        self.kept.meet(
            [self._spec(slot.name, slot.parameter) for slot in dense],
            {slot.name: slot.parameter for slot in dense},
        )
        made: list[AnyBucket] = []
        for members in layout:
            slots = [fresh[place] for place in members]
            if members[0] in sparse:
                made += [self._sparse_bucket(len(self.buckets) + len(made), s) for s in slots]
            else:
                made.append(self._dense_bucket(len(self.buckets) + len(made), slots))
        self._fresh = []
        self.buckets += made
        return made

    def check_sparse(self, names: list[str]) -> None:
        """Refuse sparse gradients, of these parameters, if they cannot be averaged."""

    def _together(self, slots: list[Slot]) -> list[list[int]]:
        """Return the places in ``slots`` that travel together by the user's ``groups``."""
        groups = self.options.groups
        if groups is None:
            return []
        if isinstance(groups, int):  # cut once: what comes later travels in plain buckets
            return [] if self.buckets else [*map(list, buckets.evenly(len(slots), groups))]
        places = {id(slot.parameter): place for place, slot in enumerate(slots)}
        return [[places[each] for each in group if each in places] for group in groups]

    def _dense_bucket(self, index: int, slots: list[Slot]) -> Bucket:
        bucket = self.bucket(
            index, [slot.name for slot in slots], [slot.parameter for slot in slots], self.ranks
        )
        self._adjust(bucket)
        for place, slot in enumerate(slots):
            slot.bucket, slot.index = bucket, place
        return bucket

    def bucket(self, *members: Any) -> Bucket:
        """Make a bucket."""
        return Bucket(*members)

    def _adjust(self, bucket: Bucket) -> None:
        """Have a bucket travel as its parameters' compressors do from now on."""
        taken = self.kept.taken(bucket.names)
        plain = taken.shared is none
        mean = self.options.op == ReduceOp.Average
        bucket.adjust(
            taken,
            scale=1.0 / self.ranks if plain and mean else 1.0,
            full=1 if mean and not plain else self.ranks,
        )

    def _sparse_bucket(self, index: int, slot: Slot) -> SparseBucket:
        scale = 1.0 / self.ranks if self.options.op == ReduceOp.Average else 1.0
        compressor = self.kept.compressor.of(self._spec(slot.name, slot.parameter))
        bucket = SparseBucket(
            index,
            slot.name,
            slot.parameter,
            scale=scale,
            ranks=self.ranks,
            compressor=compressor,
        )
        slot.bucket = bucket
        return bucket

    # -- during backward

    def _ready(self, slot: Slot, parameter: torch.Tensor) -> None:
        """Count one gradient in."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._begin_backward(task)
        if self._quiet:
            return
        bucket = slot.bucket
        assert bucket is not None
        if bucket.flight is not None:
            raise RuntimeError(
                f"rank {world.rank()}: {slot.name!r} got another gradient while its last one is "
                "being averaged. Either an earlier backward failed half-way: restart from a "
                "checkpoint. Or one backward computes it twice: run it under optimizer.no_sync() "
                "and call optimizer.synchronize() after it"
            )
        bucket.note_stream()
        if slot.large:
            bucket.place(slot.index, parameter)
        bucket.waiting -= 1
        if bucket.waiting == 0:
            with self._lock:
                for other in self.buckets:  # a second phase may start while backward goes on
                    if other.flight is not None:
                        other.flight.advance()
                self._send(bucket)

    def _begin_backward(self, task: int) -> None:
        """Note that another backward began; the engine calls back when it is over."""
        with self._lock:
            if task == self._task:  # another device's thread was first
                return
            self._nests = follow(task, self) or self._nests
            for bucket in self.buckets:
                if bucket.flight is None:
                    bucket.begin()
                    bucket.let_go()
            # Inside another backward, or around one, a gradient may be added to once more.
            early = self._passes + 1 < self._passes_per_step
            self._quiet = self._held or early or self._nests or bool(self._fresh)
            self._task = task

    def _share(self, slot: Slot, grad: torch.Tensor) -> None:
        """Before this rank's gradient is added to what is no mean on this rank."""
        if slot.bucket is not None:
            slot.bucket.share(slot.index)

    def backward_ended(self) -> bool:
        """See :class:`Follower`."""
        self._task = -1
        self._stale = True
        if self._held or not self.active:
            return False
        self._passes += 1
        if self._passes < self._passes_per_step:
            return False
        optimizer = self.optimizer
        if optimizer is not None and (self._frozen or len(optimizer.param_groups) != self._groups):
            self._adopt()
        return True

    # -- reductions

    def take_off(self) -> None:
        """Start the reductions of all that is not under way yet; new parameters come last.

        That order is the same on a rank whose backward saw none of the parameters, and which
        meets the others' in ``step()``.
        """
        try:
            self._aloft = list(self.buckets) if self._stale else []
            for bucket in self._aloft:
                if bucket.flight is None:
                    self._send(bucket)
            if self._fresh:
                for bucket in self.settle():
                    self._send(bucket)
                    self._aloft.append(bucket)
        except BaseException:
            self.abandon()
            raise
        self._stale = False
        self._passes = 0

    def land(self) -> None:
        """Wait for the reductions and hand the means out."""
        start = time.perf_counter()
        self._scale = None
        try:
            for bucket in self._aloft:
                assert bucket.flight is not None
                bucket.flight.finish()
                bucket.deliver(self.options.op)
            self.arrived(self._aloft)
            self._settle_states()
        except BaseException:
            self.abandon()
            raise
        optimizer: Any = self.optimizer
        if optimizer is not None:
            optimizer.communication_seconds += time.perf_counter() - start

    def arrived(self, landed: Sequence[AnyBucket]) -> None:
        """Finish what the means of ``landed`` buckets need to be complete."""

    def _settle_states(self) -> None:
        """Keep the compressor's new states, if the means are finite.

        Loss scaling skips a step that is not, on all ranks, and what was sent in it is not
        applied: error feedback must not count it as delivered.
        """
        if self.kept.unsettled:
            self.kept.settle(delivered=finite(self._aloft))

    def abandon(self) -> None:
        """Forget what is under way after an error, so that training can go on."""
        self._stale = True
        self._scale = None
        self.kept.settle(delivered=False)
        for bucket in self.buckets:
            bucket.flight = None
            bucket.begin()

    def _send(self, bucket: AnyBucket) -> None:
        bucket.fill()
        name = f"{self.name}.{bucket.index}" + (f".turn{bucket.turn}" if bucket.turn else "")
        name += f".again{bucket.rounds}" if bucket.rounds else ""
        bucket.rounds += 1
        work = bucket.reduction() if isinstance(bucket, SparseBucket) else self.reduction(bucket)
        bucket.flight = Flight(self.adapter, work, name, self.options.process_set)

    def reduction(self, bucket: Bucket) -> Work[None]:
        """Replace the bucket's gradients by their means (or sums), as its compressor will."""
        if bucket.compressor is none:  # a mean's 1/N is in the gradients already
            yield Allreduce(bucket.flat, op=ReduceOp.Sum, in_place=True)
            return
        ops = ops_for(torch.Tensor).beside(bucket.flat)
        if bucket.compressor is not None:
            compressor = bucket.compressor.at(self.kept.steps)
            reduced = yield from compressor.reduce(ops, bucket.flat, None)
            bucket.flat.copy_(reduced.mean)
        else:
            yield from self.each(ops, bucket)
        if self.options.op == ReduceOp.Sum:
            bucket.flat.mul_(self.ranks)

    def each(self, ops: Ops, bucket: Bucket) -> Work[None]:
        """Compress parameter by parameter, in rounds shared by the whole bucket."""
        scale = self._loss_scale()
        works: list[Work[Reduced]] = []
        views = bucket.tensors()
        for view, method in zip(views, bucket.methods, strict=True):
            grad = view if scale == 1.0 else _wide(view) * (1.0 / scale)
            works.append(self.start(bucket, len(works), grad, method))
        results = yield from together([*works, none.reduce(ops, bucket.presence, None)], ops)
        bucket.presence.copy_(results.pop().mean)
        for index, reduced in enumerate(results):
            mean = reduced.mean if scale == 1.0 else reduced.mean * scale
            views[index].copy_(mean)
            if reduced.state is not None and not bucket.idle(index):
                self.kept.await_settling(bucket.names[index], reduced.state)

    def start(
        self, bucket: Bucket, index: int, grad: torch.Tensor, method: Compressor
    ) -> Work[Reduced]:
        """Start to compress, by ``method``, the gradient that is ``index`` in ``bucket``."""
        return self.kept.reduce(bucket.names[index], grad, method)

    def _loss_scale(self) -> float:
        """Return what the loss was multiplied by, as far as we were told.

        Asked for once a round: a ``GradScaler`` has its scale on the GPU, which is waited for.
        """
        if self._scale is None:
            told = getattr(self.optimizer, "loss_scale", None)
            self._scale = float(told() if callable(told) else told or 1.0)
        return self._scale

    # -- what the compressor keeps

    def compression_state(self) -> dict[str, Any]:
        """Return what this rank's compressor keeps; see ``DistributedOptimizer``.

        Returns:
            ``parameters``: tensors by name and path, copies; ``kinds``: what each of them is;
            ``compressor``, ``step``, ``rank`` and ``ranks``: that all this belongs to.
        """
        self.require_place()
        return self.kept.saved()

    def portable_compression_state(self) -> dict[str, Any]:
        """Return what compressors keep, for any number of ranks; all ranks call it.

        Raises:
            CompressionError: the ranks have changed, or some have loaded a state, and they have
                not met since.
        """
        self.require_place()
        return self.kept.portable()

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what either of the other two has returned.

        Raises:
            CompressionError: the state is of another compressor, model or, where it is not
                portable, number of ranks; the message names both.
        """
        self.require_place()
        if not self.active:  # this rank trains alone
            return
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        named = {
            self.name_of(parameter, group, place): parameter
            for group, options in enumerate(groups)
            for place, parameter in enumerate(options["params"])
        }
        try:
            self.kept.load(state, [self._spec(*each) for each in named.items()], named)
        except CompressionError as error:
            raise CompressionError(f"rank {world.rank()}: {error}") from None

    def _spec(self, name: str, parameter: torch.Tensor) -> Spec:
        return Spec(name, tuple(parameter.shape), dtype_name(parameter.dtype), self.ranks)

    # -- around step()

    def before_step(self, optimizer: Any, args: Any, options: dict[str, Any]) -> Any:
        """Average what has not been; after the closure, if there is one."""
        if self._asked and not self._skipped:
            warnings.warn(
                "optimizer.step() called without optimizer.skip_synchronize() after "
                "optimizer.synchronize(). Horovod would average twice; hvdx does not, so that "
                "both calls can go",
                stacklevel=3,
            )
        positional = len(args) > 1
        closure = args[1] if positional else options.get("closure")
        if closure is None:
            self._about_to_step()
            return None

        def averaged() -> Any:
            loss = closure()
            self._about_to_step()
            return loss

        if positional:
            return (args[0], averaged, *args[2:]), options
        return args, {**options, "closure": averaged}

    def _about_to_step(self) -> None:
        if not self._skipped:
            self._catch_up()
        self.enter_step()

    def enter_step(self) -> None:
        """Do what remains once gradients are averaged, before the optimizer reads them."""

    def after_step(self, optimizer: Any, args: Any, options: Any) -> None:
        """Begin to count rounds and passes anew."""
        self._stale = True
        self._asked = False
        self._passes = 0
        self.kept.steps += 1
        for bucket in self.buckets:
            bucket.rounds = 0
        if self.active and self.kept.review():
            for bucket in self.buckets:
                if isinstance(bucket, Bucket):
                    self._adjust(bucket)

    def _loaded(self, optimizer: Any) -> None:
        """Forget passes of an accumulation that a checkpoint, once loaded, has overtaken."""
        self._passes = 0
        self._stale = True


def _wide(grad: torch.Tensor) -> torch.Tensor:
    """Return a gradient that can be divided by a loss scale: halves would lose small ones."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))
