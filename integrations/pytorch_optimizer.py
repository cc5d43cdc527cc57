"""PyTorch's ``DistributedOptimizer``: gradients in flat buckets, averaged during backward."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hvdx import buckets, world
from hvdx.agreement import check_same, next_name
from hvdx.comm import Allreduce, Work, together
from hvdx.compression import Compressor, Spec, as_compressor, none
from hvdx.frameworks import Adapter
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_engine import Flight
from hvdx.ops import Ops, ops_for
from hvdx.reduce_op import ReduceOp

_LARGE = 16384  # elements from which a gradient is moved alone, and at once


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: torch.nn.Module | Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = none,
    backward_passes_per_step: int = 1,
    op: int = ReduceOp.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = True,
    process_set: Any = None,
) -> torch.optim.Optimizer:
    """Make ``optimizer`` average gradients over the ranks; returns the same object.

    Gradients are averaged in flat buckets while ``backward()`` goes on, and are averaged when
    it returns: clip, log and unscale them as in a single process. The optimizer keeps its
    class, state, defaults and schedulers, and gains ``synchronize()``, ``skip_synchronize()``,
    ``no_sync()``, ``set_backward_passes_per_step()`` and ``communication_seconds``.

    Differences from Horovod's: the optimizer is not rebuilt, so that state is kept;
    ``zero_grad(set_to_none=...)`` works; a parameter that no rank used keeps ``grad=None``, one
    that some ranks used gets the mean with zeros for the others; parameters added to the
    optimizer later are averaged too.

    Args:
        optimizer: any ``torch.optim.Optimizer``. Its gradients must be dense or sparse
            tensors; sparse ones become dense.
        named_parameters: the model, or its ``named_parameters()``; names for messages and
            compressors. Without it, parameters are named by their place.
        compression: a compressor of ``hvd.Compression`` or a Horovod ``Compressor`` class.
        backward_passes_per_step: gradients of so many ``backward()`` calls are summed on this
            rank before they are averaged.
        op: ``hvd.Average`` or ``hvd.Sum``.
        gradient_predivide_factor: accepted for Horovod's sake, with Average: gradients are
            always divided before they are summed.
        num_groups: accepted for Horovod's sake; buckets (``HVDX_BUCKET_MB``) take its place.
        groups: likewise.
        sparse_as_dense: must be True; sparse gradients travel as dense ones.
        process_set: the ranks to average over; all by default.

    Raises:
        TypeError: ``optimizer`` is wrapped already or is none.
        ValueError: an option has no meaning here; the message names it.
        NotInitializedError: ``hvd.init()`` has not been called.
        MismatchError: at the first step, on every rank, where models, optimizers or options
            differ between ranks.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is no torch.optim.Optimizer")
    if hasattr(optimizer, "reducer"):
        raise TypeError("this optimizer is wrapped by hvdx.DistributedOptimizer already")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS decides from each rank's own loss how often to evaluate, so that ranks would "
            "wait for each other for ever; use a first-order optimizer"
        )
    if op not in (ReduceOp.Average, ReduceOp.Sum):
        raise ValueError(
            f"DistributedOptimizer(op={ReduceOp.of(op).name}): use hvd.Average or hvd.Sum"
        )
    if gradient_predivide_factor != 1.0 and op != ReduceOp.Average:
        raise ValueError("gradient_predivide_factor needs op=hvd.Average")
    if not sparse_as_dense:
        raise ValueError("sparse_as_dense=False: hvdx sends sparse gradients as dense ones")
    reducer = Reducer(
        optimizer,
        _names(optimizer, named_parameters),
        as_compressor(compression),
        backward_passes_per_step,
        ReduceOp(op),
        process_set,
    )
    reducer.attach()
    return optimizer


def _names(
    optimizer: torch.optim.Optimizer,
    named: torch.nn.Module | Iterable[tuple[str, torch.Tensor]] | None,
) -> dict[torch.Tensor, str]:
    """Return names of parameters, unique, and of all in ``optimizer`` if any are given."""
    if named is None:
        return {}
    pairs = list(named.named_parameters() if isinstance(named, torch.nn.Module) else named)
    if any(not (isinstance(pair, tuple) and len(pair) == 2) for pair in pairs):
        raise ValueError(
            "named_parameters must be the model or its named_parameters(), not parameters()"
        )
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in pairs:
        if seen.setdefault(name, parameter) is not parameter:
            raise ValueError(f"two parameters are named {name!r} in named_parameters")
    names = {parameter: name for name, parameter in reversed(pairs)}
    missing = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if missing:
        raise ValueError(
            f"{missing} parameters of the optimizer are not in named_parameters; give the model "
            "that the optimizer was made for"
        )
    return names


class Bucket:
    """Gradients of one dtype and device, side by side in one flat tensor.

    Behind the gradients lies one number per parameter, 1 where this rank has a gradient: the
    sum tells whether any rank has. A rank that lacks one then knows whether the mean is a
    gradient to apply, or whether there is none anywhere.

    Args:
        index: of the bucket, for names.
        names: of the parameters.
        parameters: in the order of the flat tensor.
        scale: what gradients are multiplied by on their way in. The 1/N of a mean costs
            nothing in the same pass, and a pass of its own afterwards.
    """

    def __init__(
        self, index: int, names: list[str], parameters: list[torch.Tensor], scale: float
    ) -> None:
        self.index = index
        self.names = names
        self.parameters = parameters
        self.scale = scale
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(
            sum(sizes) + len(sizes), dtype=parameters[0].dtype, device=parameters[0].device
        )
        *parts, self.presence = self.flat.split([*sizes, len(sizes)])
        self.views = [_shaped(part, p) for part, p in zip(parts, parameters, strict=True)]
        self._pointers = [view.data_ptr() for view in self.views]
        self.waiting = len(parameters)
        self.placed: set[int] = set()  # moved in already
        self.rounds = 0  # reductions since the last step
        self.absent: list[int] = []
        self.flight: Flight | None = None

    def place(self, index: int) -> None:
        """Copy one large gradient in, as soon as it is there: it still lies in the cache."""
        grad = self.parameters[index].grad
        if grad is None or grad.is_sparse or grad.data_ptr() == self._pointers[index]:
            return
        with torch.no_grad():
            torch.mul(grad, self.scale, out=self.views[index])
        self.placed.add(index)

    def begin(self) -> None:
        """Forget what an earlier backward pass left that has failed half-way."""
        self.placed.clear()
        self.waiting = len(self.parameters)

    @torch.no_grad()
    def fill(self) -> None:
        """Move the other gradients in; from here on all are views of the flat tensor."""
        self.absent = []
        into, given, unscaled = [], [], []
        own = zip(self.parameters, self.views, self._pointers, strict=True)
        for index, (parameter, view, pointer) in enumerate(own):
            if index in self.placed:
                parameter.grad = view
                continue
            grad = parameter.grad
            if grad is None:
                self.absent.append(index)
                continue
            unscaled.append(view)
            if grad.is_sparse or grad.data_ptr() != pointer:
                into.append(view)
                given.append(grad.to_dense() if grad.is_sparse else grad)
                parameter.grad = view
        if into:
            torch._foreach_copy_(into, given)
        if unscaled and self.scale != 1.0:
            torch._foreach_mul_(unscaled, self.scale)
        self.presence.fill_(1)
        for index in self.absent:
            self.views[index].zero_()
            self.presence[index] = 0

    def deliver(self) -> None:
        """Hand the means to the parameters that have no gradient here but elsewhere."""
        if self.absent:
            present = self.presence.tolist()
            for index in self.absent:
                if present[index]:
                    self.parameters[index].grad = self.views[index]
        self.placed.clear()
        self.waiting = len(self.parameters)
        self.flight = None


def _shaped(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """View a flat piece in the parameter's shape, and in its memory order if channels-last."""
    turned = parameter.dim() == 4 and not parameter.is_contiguous()
    if turned and parameter.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(parameter.shape, parameter.stride())
    return part.view(parameter.shape)


class Reducer:
    """Watches a backward pass, sends each bucket as it fills and brings the means back.

    Life of a bucket: every parameter's hook counts down; at zero the bucket is filled and its
    reduction takes off; when backward ends, what has not left is sent (parameters without a
    gradient as zeros), and all are awaited. The next backward before ``step()`` starts another
    round: it adds to the means, and the mean of sums is the sum of means. Rounds have names of
    their own, so that ranks that call backward unequally often stall instead of mixing them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[torch.Tensor, str],
        compressor: Compressor,
        passes_per_step: int,
        op: ReduceOp,
        process_set: Any,
    ) -> None:
        self.adapter: Adapter = world.core("torch")
        self.optimizer = optimizer
        self.compressor = compressor
        self.states: dict[str, Any] = {}  # the compressor's, by parameter name
        self.buckets: list[Bucket] = []
        self._names = names
        self._op = op
        plain_mean = op == ReduceOp.Average and compressor is none
        self._scale = 1.0 / self.adapter.ranks(process_set) if plain_mean else 1.0
        self._process_set = process_set
        self._name = next_name("gradients", process_set)
        self._known: set[int] = set()  # ids: hashing a tensor costs ten times as much
        self._unchecked: list[str] = []
        self._passes = 0  # backward calls since the last reduction
        self._stale = True  # gradients may have changed since the last reduction
        self._task = -1  # the backward under way, as the engine numbers it
        self._held = False  # inside no_sync()
        self._skipped = False  # inside skip_synchronize()
        self.set_backward_passes_per_step(passes_per_step)

    def attach(self) -> None:
        """Hook into the optimizer and its parameters."""
        self._adopt_parameters()
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)
        for name in (
            "synchronize", "skip_synchronize", "no_sync", "set_backward_passes_per_step"
        ):  # fmt: skip
            setattr(self.optimizer, name, getattr(self, name))
        self.optimizer.reducer = self  # type: ignore[attr-defined]
        self.optimizer.communication_seconds = 0.0  # type: ignore[attr-defined]

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sum the gradients of ``passes`` backward calls before they are averaged."""
        if passes < 1:
            raise ValueError(f"backward_passes_per_step={passes} must be at least 1")
        self._passes_per_step = passes

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
        if self._stale:
            self._average(self.buckets)
            self._passes = 0
            self._stale = False

    def _average(self, chosen: list[Bucket]) -> None:
        for bucket in chosen:
            if bucket.flight is None:
                self._take_off(bucket)
        start = time.perf_counter()
        for bucket in chosen:
            assert bucket.flight is not None
            bucket.flight.finish()
            bucket.deliver()
        elapsed = time.perf_counter() - start
        self.optimizer.communication_seconds += elapsed  # type: ignore[attr-defined]

    def _adopt_parameters(self) -> list[Bucket]:
        """Put parameters that are new to the optimizer, or newly trainable, into buckets."""
        fresh = [
            (group, place, parameter)
            for group, options in enumerate(self.optimizer.param_groups)
            for place, parameter in enumerate(options["params"])
            if parameter.requires_grad and id(parameter) not in self._known
        ]
        if not fresh:
            return []
        # Backward meets the last layers first, so that their bucket shall fill first.
        entries: list[tuple[str, torch.Tensor]] = []
        for group, place, parameter in reversed(fresh):
            entries.append((self._names.get(parameter, f"{group}.{place}"), parameter))
            self._known.add(id(parameter))
        layout = buckets.plan(
            [
                buckets.Entry(name, p.numel(), dtype_name(p.dtype), str(p.device))
                for name, p in entries
            ],
            buckets.limit_bytes(),
        )
        known = len(self.buckets)
        for members in layout:
            names, parameters = zip(*(entries[i] for i in members), strict=True)
            bucket = Bucket(len(self.buckets), list(names), list(parameters), self._scale)
            self.buckets.append(bucket)
            for index, parameter in enumerate(parameters):
                hook = functools.partial(self._ready, bucket, index)
                parameter.register_post_accumulate_grad_hook(hook)
        if not self.compressor.flat:
            for name, parameter in entries:
                spec = Spec(name, tuple(parameter.shape), dtype_name(parameter.dtype))
                self.states[name] = self.compressor.init(ops_for(torch.Tensor), spec)
        self._unchecked += [
            f"{name}: {dtype_name(p.dtype)} {tuple(p.shape)}" for name, p in entries
        ]
        return self.buckets[known:]

    def _ready(self, bucket: Bucket, index: int, parameter: torch.Tensor) -> None:
        """Count one gradient in, from within backward."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._begin(task)
        if self._held or self._passes + 1 < self._passes_per_step:
            return
        if bucket.flight is not None:
            raise RuntimeError(
                f"rank {world.rank()}: {bucket.names[index]!r} got another gradient while its last "
                "one is being averaged. Either an earlier backward failed half-way: restart from "
                "a checkpoint. Or one backward computes it twice: run it under "
                "optimizer.no_sync() and call optimizer.synchronize() after it"
            )
        if parameter.numel() >= _LARGE:
            bucket.place(index)
        bucket.waiting -= 1
        if bucket.waiting == 0:
            for other in self.buckets:  # a second phase may start while backward goes on
                if other.flight is not None:
                    other.flight.advance()
            self._take_off(bucket)

    def _begin(self, task: int) -> None:
        """Note that another backward began; the engine calls back when it is over."""
        self._task = task
        for bucket in self.buckets:
            if bucket.flight is None:
                bucket.begin()
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._task = -1
        self._stale = True
        if self._held:
            return
        self._passes += 1
        if self._passes >= self._passes_per_step:
            self.synchronize()

    def _before_step(self, optimizer: Any, args: Sequence[Any], options: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else options.get("closure")
        if self._skipped or closure is not None:
            return  # a closure calls backward, which averages
        fresh = self._adopt_parameters()
        if fresh and not self._stale:
            self._average(fresh)
        self.synchronize()

    def _after_step(self, *_: Any) -> None:
        self._stale = True
        for bucket in self.buckets:
            bucket.rounds = 0

    def _take_off(self, bucket: Bucket) -> None:
        if self._unchecked:
            self._compare()
        bucket.fill()
        if bucket.rounds and self._op == ReduceOp.Sum:
            raise RuntimeError(
                "op=hvd.Sum sums each backward's gradients over the ranks; for several before a "
                "step set backward_passes_per_step, or use optimizer.no_sync()"
            )
        name = f"{self._name}.{bucket.index}" + (f".again{bucket.rounds}" if bucket.rounds else "")
        bucket.rounds += 1
        bucket.flight = Flight(self.adapter, self._reduction(bucket), name, self._process_set)

    def _reduction(self, bucket: Bucket) -> Work[None]:
        """Replace the bucket's gradients by their means (or sums), as its compressor will."""
        if self.compressor is none:  # a mean's 1/N is in the gradients already
            yield Allreduce(bucket.flat, op=ReduceOp.Sum, in_place=True)
            return
        ops = ops_for(torch.Tensor)
        if self.compressor.flat:
            reduced = yield from self.compressor.reduce(ops, bucket.flat, None)
            bucket.flat.copy_(reduced.mean)
        else:
            yield from self._each(ops, bucket)
        if self._op == ReduceOp.Sum:
            bucket.flat.mul_(self.adapter.ranks(self._process_set))

    def _each(self, ops: Ops, bucket: Bucket) -> Work[None]:
        """Compress parameter by parameter, in rounds shared by the whole bucket."""
        works = [
            self.compressor.reduce(ops, view, self.states[name])
            for name, view in zip(bucket.names, bucket.views, strict=True)
        ]
        results = yield from together([*works, none.reduce(ops, bucket.presence, None)])
        bucket.presence.copy_(results.pop().mean)
        for name, view, reduced in zip(bucket.names, bucket.views, results, strict=True):
            view.copy_(reduced.mean)
            self.states[name] = reduced.state

    def _compare(self) -> None:
        """Refuse, on every rank, to average models or options that differ; once."""
        entries = {str(place): told for place, told in enumerate(self._unchecked)}
        entries["options"] = (
            f"{type(self.optimizer).__name__}, op={self._op.name}, compression="
            f"{self.compressor}, backward_passes_per_step={self._passes_per_step}, "
            f"{len(self.buckets)} buckets"
        )
        self._unchecked = []
        check_same(
            self.adapter,
            "parameters or options of DistributedOptimizer",
            entries,
            f"{self._name}.check{len(self._known)}",
            self._process_set,
        )
