"""PyTorch's side of a pipeline: compute an interval of a model's units, forward and backward.

What makes training the same to the last bit however a model is cut, placed and scheduled:

* Micro-batches add to the weights' gradients in ascending order, per unit and weight; the uses of
  a weight by several units are added at the end of a step, in the order of the units.
* A value that several later units use gets their gradients from the last to the first, as autograd
  itself goes, wherever a cut lies between them.
* A unit draws its random numbers from a state of its own: a hash of seed, step, micro-batch, unit.
* Values are cast by autocast wherever they are used, and not kept: a cut would show in sums.
* Tensors keep their strides on the way, since matrix products may round differently with others.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hvdx.errors import PlanError
from hvdx.integrations.pytorch_batch_norm import Deferred
from hvdx.integrations.pytorch_graph import (
    Graph,
    Unit,
    batch_norms,
    differentiable,
    flat,
    is_smooth,
    result_of,
    unflat,
)
from hvdx.integrations.pytorch_precision import Casts, casting
from hvdx.pipeline.abreast import Abreast
from hvdx.pipeline.run import unreached

_LOSS = ("the loss", 0)  # where others have (value, number of its leaf)
_lock = threading.RLock()  # of the generators, which all threads of a process share


def usable_device(told: Any) -> torch.device:
    """Return a device that exists.

    Raises:
        PlanError: it does not.
    """
    try:
        found = torch.empty(1, device=torch.device(told)).device  # "cuda" has no number
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"place has {told!r}, which cannot be used: {reason}") from None
    return found


@dataclass
class Batch:
    """What stages get for a step.

    Attributes:
        step: its number.
        inputs: by micro-batch, the inputs of the model by name.
        targets: by micro-batch, what the loss compares with.
        weights: by micro-batch, its share of the batch.
        train: whether there will be a backward.
        casts: of the caller's ``torch.autocast``, for threads that know it not.
        scale: that gradients are multiplied by on their way, a ``GradScaler``'s.
    """

    step: int
    inputs: Sequence[dict[str, Any]]
    targets: Sequence[Any]
    weights: Sequence[float]
    train: bool
    casts: Casts = field(default_factory=dict)
    scale: float = 1.0


@dataclass
class _Segment:
    """Units under one autograd graph: all of a stage, or one each where I and W are split."""

    units: list[tuple[int, Unit]]
    reads: list[str]
    makes: list[str]
    has_loss: bool


@dataclass
class _Pass:
    """What a segment's forward leaves for its backward, with (value, leaf) as keys."""

    entered: dict[Any, torch.Tensor]
    made: dict[Any, torch.Tensor]
    weights: dict[tuple[int, str], torch.Tensor]
    gradients: list[torch.Tensor] | None = None


class TorchStage:
    """Units ``first`` to ``stop - 1`` of a graph; see :class:`hvdx.pipeline.run.Stage`.

    Args:
        graph: of the model: a :class:`Graph`, or what does as one (Keras' on torch).
        first: unit.
        stop: unit behind the last.
        loss: function of outputs and targets.
        device: to compute on.
        seed: of random units; equal on all ranks.
        split: whether schedules have I and W, so that units need graphs of their own.
        deferred: whether running statistics of BatchNorm wait for :meth:`commit`.

    Attributes:
        unit: name of the unit at work.
        results: by micro-batch, on the last stage: the weighted loss or, without training, the
            tensors that the model returns.
        gradients: (unit, weight) -> sum over micro-batches.
    """

    def __init__(
        self,
        graph: Graph,
        first: int,
        stop: int,
        *,
        loss: Callable[[Any, Any], torch.Tensor] | None,
        device: torch.device,
        seed: int,
        split: bool,
        deferred: bool,
    ) -> None:
        self._graph, self._loss, self._device, self.seed = graph, loss, device, seed
        self._first, self._last = first == 0, stop == len(graph.units)
        self._entering, self._leaving = (
            list(graph.line.live(cut)) if cut else [] for cut in (first, stop)
        )
        own = list(enumerate(graph.units))[first:stop]
        parts = [[each] for each in own] if split else [own]
        self._segments = [self._segment(units, units is parts[-1]) for units in parts]
        norms = batch_norms(graph, graph.units[first:stop]) if deferred else {}
        self._norms = Deferred(norms.values())
        self._written = [name for name in graph.written(graph.units[first:stop])
                         if name.rpartition(".")[0] not in norms]  # fmt: skip
        self._entering_keys, self._leaving_keys = (
            self._keys(names) for names in (self._entering, self._leaving)
        )
        self.unit: str | None = None

    def _segment(self, units: list[tuple[int, Unit]], last: bool) -> _Segment:
        made = {name for _, unit in units for name in unit.makes}
        read = [name for _, unit in units for name in unit.reads]
        has_loss = last and self._last
        read += self._graph.results() if has_loss else []
        later = {name for unit in self._graph.units[units[-1][0] + 1 :] for name in unit.reads}
        if not has_loss:
            later |= set(self._graph.results())
        makes = [name for _, unit in units for name in unit.makes if name in later]
        reads = [name for name in dict.fromkeys(read) if name not in made]
        return _Segment(units, reads, makes, has_loss)

    def begin(
        self,
        batch: Batch,
        again: frozenset[int] = frozenset(),
        abreast: Abreast | None = None,
    ) -> None:
        """Forget the last step and take the batch of the next.

        Args:
            batch: of the step.
            again: micro-batches of which only the inputs are kept; their backward begins with
                their forward.
            abreast: the replicas whose micro-batches BatchNorm normalizes together.
        """
        self._batch, self._again = batch, again
        self._inputs: dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
        self._kept: dict[int, list[_Pass]] = {}
        self.gradients: dict[tuple[int, str], torch.Tensor] = {}
        self._own: set[tuple[int, str]] = set()  # whose memory nobody else has
        self.results: dict[int, list[torch.Tensor]] = {}
        self.unit = None
        self._norms.begin(abreast)
        self._differentiable = differentiable(self._graph) if batch.train else set()
        returns = self._last or not self._differentiable.isdisjoint(self._leaving)
        self._trains = batch.train and returns
        self._aliases = {
            index: {name: unit.params[name].detach().requires_grad_(
                batch.train and unit.params[name].requires_grad) for name in unit.tied}
            for segment in self._segments for index, unit in segment.units
        }  # fmt: skip

    def forward(self, micro_batch: int, inputs: Sequence[Any] | None) -> list[Any]:
        """See :meth:`Stage.forward`."""
        values = self._entered(micro_batch, inputs)
        if self._trains and micro_batch in self._again:
            self._skim(values, micro_batch)
        else:  # without a gradient to come, all that is below frozen units keeps nothing
            passes = self._compute(values, micro_batch, self._trains)
            self._kept[micro_batch] = passes if self._trains else []
        self.unit = None
        return [leaf.detach() for name in self._leaving for leaf in flat(values[name])[2]]

    def backward(self, micro_batch: int, gradients: Sequence[Any] | None) -> list[Any]:
        """See :meth:`Stage.backward`."""
        found = self._returned(gradients)
        self._recall(micro_batch)
        passes = self._kept.pop(micro_batch)
        for done in reversed(passes):
            self._differentiate(done, found, [*done.entered.items(), *done.weights.items()])
        self._check_reached(passes)
        return self._passed_back(found)

    def input_gradient(self, micro_batch: int, gradients: Sequence[Any] | None) -> list[Any]:
        """See :meth:`Stage.input_gradient`."""
        found = self._returned(gradients)
        self._recall(micro_batch)
        for done in reversed(self._kept[micro_batch]):
            self._differentiate(done, found, list(done.entered.items()), retain=True)
        self._check_reached(self._kept[micro_batch])
        return self._passed_back(found)

    def weight_gradient(self, micro_batch: int) -> None:
        """See :meth:`Stage.weight_gradient`."""
        for done in reversed(self._kept.pop(micro_batch)):
            self._differentiate(done, {}, list(done.weights.items()))

    def found(self) -> dict[int, list[torch.Tensor]]:
        """Return by micro-batch the weighted loss, or the outputs."""
        return self.results

    def commit(self) -> None:
        """Move the running statistics of BatchNorm that were put off in this step."""
        self._norms.commit()

    # --- forward

    def _entered(self, micro_batch: int, inputs: Sequence[Any] | None) -> dict[str, Any]:
        """Return the values that come into this stage, by name."""
        if inputs is None:
            given = self._batch.inputs[micro_batch]
            return {name: _on(self._device, value) for name, value in given.items()}
        leaves = (leaf.to(self._device) for leaf in inputs)
        return {name: unflat(*self._graph.kinds[name], leaves) for name in self._entering}

    def _compute(
        self, values: dict[str, Any], micro_batch: int, grad: bool, again: bool = False
    ) -> list[_Pass]:
        """Compute all segments, for the first time or ``again``; fill ``values``."""
        cast = casting(self._batch.casts, self._device.type)
        norms = self._norms.gathering(micro_batch, counts=not again)
        with torch.set_grad_enabled(grad), cast, norms:
            return [self._advance(segment, values, micro_batch) for segment in self._segments]

    def _skim(self, values: dict[str, Any], micro_batch: int) -> None:
        """Compute what the next stage needs, and keep only what :meth:`_recall` does.

        The last stage, whose results nobody waits for, leaves all to its backward.
        """
        given = dict(values)
        copies = {} if self._last else {n: b.clone() for n, b in self._buffers().items()}
        self._inputs[micro_batch] = given, copies
        if self._last:
            return
        before = [x._version for x in _tensors_of(given)]
        self._compute(values, micro_batch, grad=False)
        if [x._version for x in _tensors_of(given)] != before:
            raise ValueError(
                "the stage writes into its inputs, so that it cannot compute them again: use "
                "checkpoint='never'"
            )

    def _recall(self, micro_batch: int) -> None:
        """Make what was not kept of a micro-batch: by the same numbers, so the same to the bit."""
        if micro_batch not in self._inputs:
            return
        given, before = self._inputs.pop(micro_batch)
        now = self._buffers()
        self._set_buffers(before)
        try:
            again = not self._last
            self._kept[micro_batch] = self._compute(given, micro_batch, grad=True, again=again)
        finally:
            self._set_buffers(now)
        self.unit = None

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {name: self._graph.buffer(name) for name in self._written}

    def _set_buffers(self, values: dict[str, torch.Tensor]) -> None:
        """Put tensors in their place: autograd may still need what the others hold."""
        for name, value in values.items():
            self._graph.set_buffer(name, value)

    def _advance(self, segment: _Segment, values: dict[str, Any], micro_batch: int) -> _Pass:
        """Compute a segment; what it makes goes to ``values``."""
        entered: dict[Any, torch.Tensor] = {}
        local: dict[str, Any] = {}
        for name in segment.reads:
            local[name] = self._cut_off(name, values[name], entered)
        weights: dict[tuple[int, str], torch.Tensor] = {}
        for index, unit in segment.units:
            self.unit = unit.name
            aliases = self._aliases[index]
            with self._random(unit, index, micro_batch):
                self._graph.perform(unit, local, aliases, self._batch.train)
            for name, p in unit.params.items():
                if p.requires_grad:
                    weights[index, name] = aliases.get(name, p)
        made: dict[Any, torch.Tensor] = {}
        if segment.has_loss:
            self.unit = None
            self._finish(local, micro_batch, made)
        for name in segment.makes:
            values[name] = local[name]
            if name in self._differentiable:
                made.update({(name, i): x for i, x in enumerate(flat(local[name])[2])})
        return _Pass(entered, made, weights)

    def _cut_off(self, name: str, value: Any, entered: dict[Any, torch.Tensor]) -> Any:
        """Return ``value`` with fresh leaves of autograd in it, noted in ``entered``."""
        spec, kinds, tensors = flat(value)
        fresh = []
        for i, tensor in enumerate(tensors):
            leaf = tensor.detach()
            if name in self._differentiable and is_smooth(leaf):
                entered[name, i] = leaf.requires_grad_()
            fresh.append(leaf)
        return unflat(spec, kinds, iter(fresh))

    def _finish(self, local: dict[str, Any], micro_batch: int, made: dict[Any, Any]) -> None:
        """Compute the loss, or keep the outputs."""
        if not self._batch.train:
            names = dict.fromkeys(self._graph.results())
            self.results[micro_batch] = [x for name in names for x in flat(local[name])[2]]
            return
        outputs = result_of(self._graph, local)
        assert self._loss is not None
        loss = self._loss(outputs, _on(self._device, self._batch.targets[micro_batch]))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            told = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(
                f"loss(output, target) returns {told}, no scalar tensor: take the mean over the "
                "micro-batch"
            )
        weighted = loss.reshape(()) * self._batch.weights[micro_batch]
        self.results[micro_batch] = [self._counted(weighted, made)]

    def _counted(self, weighted: torch.Tensor, made: dict[Any, Any]) -> torch.Tensor:
        """Take a micro-batch's share of the loss, where its backward begins; return its value."""
        if self._batch.train and not weighted.requires_grad:
            raise ValueError(
                "the loss depends on no parameter that requires a gradient: are all frozen, or is "
                "something detached?"
            )
        made[_LOSS] = weighted
        return weighted.detach()

    @contextlib.contextmanager
    def _random(self, unit: Unit, index: int, micro_batch: int) -> Iterator[None]:
        """Give a random unit its own state; others' draws stay as they would have been."""
        if not unit.random:
            yield
            return
        told = f"{self.seed} {self._batch.step} {micro_batch} {index}".encode()
        seed = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1
        private = torch.Generator(self._device).manual_seed(seed)
        shared = torch.default_generator
        if self._device.type == "cuda":
            shared = torch.cuda.default_generators[self._device.index or 0]
        with _lock:
            before = shared.get_state()
            shared.set_state(private.get_state())
            try:
                yield
            finally:
                shared.set_state(before)

    # --- backward

    def _returned(self, gradients: Sequence[Any] | None) -> dict[Any, Any]:
        """Name the gradients that came back."""
        if gradients is None:
            return {_LOSS: torch.full((), self._batch.scale, device=self._device)}
        return {
            key: gradient.to(self._device)
            for key, gradient in zip(self._leaving_keys, gradients, strict=True)
            if gradient is not None
        }

    def _passed_back(self, found: dict[Any, Any]) -> list[Any]:
        return [found.get(key) for key in self._entering_keys]

    def _check_reached(self, passes: Sequence[_Pass]) -> None:
        """Raise if no gradient reaches any weight of this stage, which would never learn."""
        trained = [done for done in passes if done.weights]
        if trained and not any(done.made for done in trained):
            raise ValueError(unreached(next(name for _, name in trained[0].weights)))

    def _keys(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Number the tensors of the values of a cut."""
        travels = {name: self._graph.kinds[name][1] for name in names}
        return [
            (name, i)
            for name, kinds in travels.items()
            for i in range(sum(not isinstance(kind, tuple) for kind in kinds))
        ]

    def _differentiate(
        self,
        done: _Pass,
        found: dict[Any, Any],
        wanted: list[tuple[Any, torch.Tensor]],
        retain: bool = False,
    ) -> None:
        """Find the gradients of ``wanted``, values' and weights', from those in ``found``.

        What later stages found for a value that enters here goes in at the start: added to a sum
        of this segment's own, numbers would be summed in another order than without the cut.
        """
        if done.gradients is None:
            done.made = {k: x for k, x in done.made.items() if x.requires_grad and k in found}
            done.gradients = [_fit(found.pop(key), x) for key, x in done.made.items()]
        if not done.made or not wanted:
            return
        relayed = {key: x for key, x in wanted if key in done.entered and key in found}
        results = torch.autograd.grad(
            [*done.made.values(), *relayed.values()],
            [x for _, x in wanted],
            [*done.gradients, *(found[key] for key in relayed)],
            retain_graph=retain,
            allow_unused=True,
        )
        for (key, _), gradient in zip(wanted, results, strict=True):
            if gradient is None:
                continue
            if key in done.entered:
                found[key] = gradient
            else:
                self._accumulate(key, gradient)

    def _accumulate(self, key: tuple[int, str], gradient: torch.Tensor) -> None:
        """Add a micro-batch's gradient; autograd may hand out one memory twice."""
        if key not in self.gradients:
            self.gradients[key] = gradient
        elif key not in self._own:
            self.gradients[key] = self.gradients[key] + gradient
            self._own.add(key)
        else:
            self.gradients[key].add_(gradient)


def _on(device: torch.device, value: Any) -> Any:
    if type(value) is torch.Tensor:  # nearly always: no search for leaves
        return value.to(device)
    return pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), value)


def _tensors_of(values: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def _fit(gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return gradient if gradient.dtype == value.dtype else gradient.to(value.dtype)
