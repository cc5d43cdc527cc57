"""What the units of a PyTorch model cost, measured on one micro-batch: for plans by time.

Each unit runs alone, on the values it has in the model: forward, the whole backward, and that in
two parts. A stage that is not split runs its units under one autograd graph, which takes less per
unit than many small ones do; so the model is measured whole, too, and the units' times are scaled
to add up to that. What remains is what splitting costs. The loss is not measured.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hvdx.compression.base import Compressor
from hvdx.compression.local import Local
from hvdx.errors import PlanError
from hvdx.integrations.pytorch_graph import (
    Graph,
    Unit,
    differentiable,
    is_smooth,
    mode,
    traced,
)
from hvdx.integrations.pytorch_precision import uncached
from hvdx.pipeline import ir
from hvdx.scaling.profile import Parameter, Profile, timed

_UPDATES = 5  # of an optimizer, of which the first makes its state


def measured(model: Any, sample: Any, micro_batches: int, leaves: Sequence[Any] = ()) -> ir.Graph:
    """Trace and profile a model: what the planner needs; see :func:`traced`, :func:`profiled`."""
    with uncached():
        return profiled(traced(model, sample, leaves), sample, micro_batches)


def described(
    model: Any,
    sample: Any,
    methods: Mapping[str, Compressor | Local],
    name: str = "model",
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam,
) -> Profile:
    """Measure what predictions for many ranks need: see :class:`hvdx.scaling.profile.Profile`.

    The loss is not measured.

    Args:
        model: a module.
        sample: the batch of a rank's step.
        methods: those whose computing is measured, by name.
        name: of the model.
        optimizer: makes one of a list of parameters.
    """
    graph = measured(model, sample, 1)
    weights = [(each, p) for each, p in model.named_parameters() if p.requires_grad]
    if not weights:
        raise PlanError(f"{name} has no parameter that is trained: ranks have nothing to exchange")
    told = [
        Parameter(each, tuple(p.shape) or (1,), str(p.dtype).rpartition(".")[2])
        for each, p in weights
    ]
    adapter: Any = _Alone(weights[0][1].device)
    batch = next((len(each) for each in _tensors(sample) if each.dim()), 1)
    own = [torch.nn.Parameter(torch.zeros_like(p)) for _, p in weights]
    each_byte, slots = update_seconds(optimizer, own)
    return Profile(
        name,
        batch,
        sum(unit.forward for unit in graph.units),
        sum(unit.inputs + unit.weights for unit in graph.units),
        each_byte * sum(p.numel() * p.element_size() for p in own),
        tuple(told),
        about=f"PyTorch {torch.__version__}, {adapter.device}, {torch.get_num_threads()} threads",
        slots=round(slots, 3),
        kept=sum(unit.kept_bytes for unit in graph.units),
        codecs={each: timed(adapter, method, told) for each, method in methods.items()},
        graph=graph,
    )


class _Alone:
    """The little of an adapter that watching a compressor takes, without Horovod."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def from_numpy(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def to_numpy(self, tensor: torch.Tensor) -> Any:
        return tensor.cpu().numpy()


def profiled(
    graph: Graph,
    sample: Any,
    micro_batches: int,
    runs: int = 5,
    of: Callable[[Iterable[float]], float] = min,
) -> ir.Graph:
    """Return ``graph.line`` with times and bytes per micro-batch.

    Parameters, buffers, gradients and random states stay as they are.

    Args:
        graph: of the model.
        sample: a batch.
        micro_batches: that a batch is cut into.
        runs: after one to warm up.
        of: takes one of each time's runs. The lowest, since what else the machine does only adds;
            where other ranks compute as they will in training, the median.
    """
    model = graph.model
    with _undisturbed(model), torch.enable_grad():
        meter = _Meter(graph, _micro_batch(graph.bind(sample), micro_batches))
        kept = meter.kept()
        rounds = [meter.round() for _ in range(runs + 1)][1:]
    least = [_Taken(*map(of, zip(*each, strict=True))) for each in zip(*rounds, strict=True)]
    sizes = {name: _size(value) for name, value in meter.values.items()}
    line = graph.line
    units = [
        replace(unit, makes={name: sizes[name] for name in unit.makes}, kept_bytes=each, **times)
        for unit, each, times in zip(line.units, kept, _scaled(*least), strict=True)
    ]
    return replace(line, units=tuple(units), inputs={name: sizes[name] for name in line.inputs})


def update_seconds(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], params: list[nn.Parameter]
) -> tuple[float, float]:
    """Return what an optimizer takes for each byte of parameters: seconds, and bytes of state.

    The parameters change; who calls this puts them back.
    """
    optimizer = make(params)
    size = sum(p.numel() * p.element_size() for p in params)
    wait = torch.cuda.synchronize if params[0].is_cuda else lambda: None
    taken = []
    for _ in range(_UPDATES):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        wait()
        start = time.perf_counter()
        optimizer.step()
        wait()
        taken.append(time.perf_counter() - start)
    state = _size([list(each.values()) for each in optimizer.state.values()])
    return statistics.median(taken[1:]) / size, state / size


class _Taken(NamedTuple):
    """Seconds of one run of some units."""

    forward: float
    backward: float
    inputs: float
    weights: float


def _scaled(whole: _Taken, *units: _Taken) -> list[dict[str, float]]:
    """Return times of the units that add up to those of the whole model."""
    forward, backward = (
        getattr(whole, part) / (sum(getattr(unit, part) for unit in units) or 1.0)
        for part in ("forward", "backward")
    )
    found = []
    for unit in units:
        halves = unit.inputs + unit.weights
        ahead, back = forward * unit.forward, backward * unit.backward
        inputs = back * unit.inputs / halves if halves else 0.0
        found.append({
            "forward": ahead,
            "inputs": inputs,
            "weights": back - inputs if halves else 0.0,
            "apart": max(0.0, unit.forward + halves - ahead - back),
        })  # fmt: skip
    return found


class _Meter:
    """Runs units of a graph on one micro-batch; ``values`` are all that they make from it."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Any]) -> None:
        self._graph = graph
        self._smooth = differentiable(graph)
        self._inputs = dict(inputs)
        self.values: dict[str, Any] = {}
        cuda = any(each.is_cuda for each in _tensors([*graph.model.parameters(), inputs]))
        self._wait = torch.cuda.synchronize if cuda else lambda: None

    def kept(self) -> list[int]:
        """Run the model once; return by unit the bytes that autograd keeps for its backward.

        Memory that several units keep counts once, for the first of them; parameters do not.
        """
        local = _fresh(self._inputs)
        self.values.update(_fresh(self._inputs))
        model = self._graph.model
        seen = {each.untyped_storage().data_ptr() for each in [*model.parameters(),
                                                               *model.buffers()]}  # fmt: skip
        held: list[torch.Tensor] = []  # or their memory might be given to others
        sizes = []
        for unit in self._graph.units:
            size = 0

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal size
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    size += storage.nbytes()
                    held.append(tensor.detach())
                return tensor.detach()

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                self._graph.perform(unit, local, {}, True)
            sizes.append(size)
            self.values.update({name: _detached(local[name]) for name in unit.makes})
        return sizes

    def round(self) -> list[_Taken]:
        """Measure the model whole, then each unit."""
        graph = self._graph
        results = list(dict.fromkeys(graph.results()))
        whole = self._take(graph.units, list(graph.inputs), results)
        return [whole, *(self._take([unit], unit.reads, unit.makes) for unit in graph.units)]

    def _take(self, units: Sequence[Unit], reads: Sequence[str], makes: Sequence[str]) -> _Taken:
        weights = [p for unit in units for p in unit.params.values() if p.requires_grad]
        sums = [torch.zeros_like(each) for each in weights]
        forward, entered, made = self._forward(units, reads, makes)
        if not made or not (entered or weights):
            return _Taken(forward, 0.0, 0.0, 0.0)
        backward = self._backward(made, entered, weights, sums)
        if len(units) > 1:  # the model as a whole is never split
            return _Taken(forward, backward, 0.0, 0.0)
        del made
        _, entered, made = self._forward(units, reads, makes)
        inputs = self._backward(made, entered, (), (), retain=True)
        return _Taken(forward, backward, inputs, self._backward(made, (), weights, sums))

    def _forward(
        self, units: Sequence[Unit], reads: Sequence[str], makes: Sequence[str]
    ) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
        """Return seconds, differentiable inputs and differentiable results."""
        local = {name: _fresh(self.values[name]) for name in reads}
        entered = [each for name in reads if name in self._smooth
                   for each in _tensors(local[name]) if is_smooth(each)]  # fmt: skip
        for each in entered:
            each.requires_grad_()
        start = self._now()
        for unit in units:
            self._graph.perform(unit, local, {}, True)
        seconds = self._now() - start
        made = [each for name in makes for each in _tensors(local[name]) if each.requires_grad]
        return seconds, entered, made

    def _backward(
        self,
        made: Sequence[torch.Tensor],
        entered: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor],
        retain: bool = False,
    ) -> float:
        """Find gradients, and add those of weights to ``sums``, as each micro-batch's are."""
        wanted = [*entered, *weights]
        if not wanted:
            return 0.0
        given = [torch.ones_like(each) for each in made]
        start = self._now()
        found = torch.autograd.grad(made, wanted, given, retain_graph=retain, allow_unused=True)
        for total, gradient in zip(sums, found[len(entered) :], strict=True):
            if gradient is not None:
                total.add_(gradient)
        return self._now() - start

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Train for a while, and leave no trace of it."""
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with mode(model, True), torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, saved in buffers.items():
                buffer.copy_(saved)


def _micro_batch(inputs: Mapping[str, Any], micro_batches: int) -> Any:
    """Take as many rows of a batch as its largest micro-batch has."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: -(-len(tensor) // micro_batches)] if tensor.dim() else tensor

    return pytree.tree_map_only(torch.Tensor, cut, dict(inputs))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _fresh(value: Any) -> Any:
    """Copy, since a unit may write into what it reads; strides stay."""
    return pytree.tree_map_only(torch.Tensor, lambda each: each.detach().clone(), value)


def _size(value: Any) -> int:
    return sum(each.numel() * each.element_size() for each in _tensors(value))
