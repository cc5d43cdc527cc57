"""PyTorch's side of a pipeline of Keras layers: their units in the stages of PyTorch's pipelines.

Forward, backward, splitting and recomputing are :class:`TorchStage`'s; see there for what makes the
bits the same. Here is what Keras does in its own way: calls of layers, seeds, losses, devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import torch

from hvdx.integrations import keras3_graph as keras3
from hvdx.integrations import pytorch_profile
from hvdx.integrations.keras3_losses import Objective
from hvdx.integrations.keras_batch_norm import gathering, over_replicas
from hvdx.integrations.pytorch_channel import TorchCodec as Codec
from hvdx.integrations.pytorch_graph import flat
from hvdx.integrations.pytorch_stages import Batch, TorchStage
from hvdx.integrations.pytorch_stages import usable_device as device
from hvdx.pipeline import ir
from hvdx.pipeline.abreast import Abreast

FRAMEWORK = "torch"
_Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
__all__ = [
    "FRAMEWORK",
    "Codec",
    "KerasStage",
    "apply",
    "arrived",
    "device",
    "finite",
    "norms",
    "numbers",
    "profiled",
]


def numbers(told: Sequence[float]) -> torch.Tensor:
    """Return them as a tensor of float64 in host memory."""
    return torch.tensor(told, dtype=torch.float64)


def norms(gradients: Sequence[torch.Tensor]) -> list[float]:
    """Return the 2-norm of each."""
    each = [torch.linalg.vector_norm(gradient).double().cpu() for gradient in gradients]
    return torch.stack(each).tolist() if each else []


@torch.no_grad()
def apply(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Step the optimizer."""
    optimizer.apply(gradients, variables)


def finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Tell whether all numbers in them are finite."""
    return all(bool(torch.isfinite(each).all()) for each in gradients)


def arrived(gradient: torch.Tensor, variable: Any) -> torch.Tensor:
    """Put another rank's gradient where the variable is."""
    return gradient.to(variable.value.device)


@dataclass
class _Unit:
    """A unit as :class:`TorchStage` knows them: with parameters in the place of variables."""

    name: str
    reads: list[str]
    makes: list[str]
    params: dict[str, torch.nn.Parameter]
    tied: set[str]
    random: bool
    whole: keras3.Unit
    index: int


class _Graph:
    """A graph of Keras units as :class:`TorchStage` and its profiler know them."""

    def __init__(self, graph: keras3.Graph) -> None:
        self.whole, self.model, self.line = graph, graph.model, graph.line
        self.inputs = graph.inputs
        tied = set(graph.line.tied())
        self.units = [
            _Unit(
                unit.name,
                unit.reads,
                unit.makes,
                {name: v.value for name, v in unit.owned.items()},
                tied.intersection(unit.owned),
                bool(unit.generators),
                unit,
                index,
            )
            for index, unit in enumerate(graph.units)
        ]
        values = [*graph.inputs, *(name for unit in graph.units for name in unit.makes)]
        self.kinds = dict.fromkeys(values, flat(torch.zeros(()))[:2])
        self._variables = graph.variables(graph.units)
        self.sums = keras3.Sums(graph.units)
        self.counts = True  # what batch normalization finds; not again where it is computed again
        self.abreast: Abreast | None = None  # replicas that normalize together
        self.micro_batch = 0

    def bind(self, given: Any) -> dict[str, Any]:
        """See :meth:`keras3_graph.Graph.tensors`."""
        return self.whole.tensors(given)

    def written(self, units: Sequence[_Unit]) -> list[str]:
        """Name what computing the units may change."""
        return list(self.whole.changing([unit.whole for unit in units]))

    def buffer(self, name: str) -> Any:
        """Return one of :meth:`written`."""
        return self._variables[name].value

    def set_buffer(self, name: str, value: Any) -> None:
        """Put another tensor in its place."""
        self._variables[name]._value = value

    def results(self) -> list[str]:
        """Name the values that the last stage needs behind its units."""
        return self.whole.ends

    def perform(
        self, unit: _Unit, values: dict[str, Any], aliases: Mapping[str, Any], train: bool
    ) -> None:
        """Compute a unit: read from ``values`` and add to them."""
        given = {name: values[name] for name in unit.reads}
        add = over_replicas(self.abreast, _WithGradient.apply, unit.index, self.micro_batch)
        with gathering(unit.whole.norms if train else [], add) as sums:
            values.update(unit.whole.call(given, train, aliases))
        if self.counts:
            self.sums.add(unit.index, [[each.detach() for each in calls] for calls in sums])


class KerasStage(TorchStage):
    """Units ``first`` to ``stop - 1`` of a graph; see :class:`TorchStage`.

    Args:
        graph: of the model.
        first: unit.
        stop: unit behind the last.
        loss: of the outputs.
        device: to compute on; None: where the model is.
        seed: of random units; equal on all ranks.
        split: whether schedules have I and W.
    """

    def __init__(
        self,
        graph: keras3.Graph,
        first: int,
        stop: int,
        *,
        loss: Objective,
        device: torch.device | None,
        seed: int,
        split: bool,
    ) -> None:
        self._keras = own = _Graph(graph)
        home = next((v.value.device for v in graph.model.variables), torch.device("cpu"))
        for variable in graph.variables(graph.units[first:stop]).values():
            if device is not None and variable.value.device != device:
                variable.value.data = variable.value.data.to(device)
        super().__init__(
            own,  # type: ignore[arg-type]  # does as a Graph of PyTorch's
            first,
            stop,
            loss=None,
            device=device or home,
            seed=seed,
            split=split,
            deferred=False,  # in PyTorch's way; see commit()
        )
        self._objective = loss

    def begin(
        self,
        batch: Any,
        again: frozenset[int] = frozenset(),
        abreast: Abreast | None = None,
    ) -> None:
        """Forget the last step and take the batch, a :class:`keras3_graph.Batch`, of the next."""
        self._keeps_outputs = batch.outputs
        given = batch.step, batch.inputs, batch.targets, batch.weights, batch.train
        scale = 1.0 if batch.scale is None else batch.scale
        super().begin(Batch(*given, scale=scale), again)
        self._keras.sums = keras3.Sums(self._keras.whole.units)
        self._keras.abreast = abreast

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running statistics of batch normalization that were put off in this step."""
        with keras.device(str(self._device)):
            self._keras.sums.commit(self._keras.abreast)

    def _compute(self, values: Any, micro_batch: int, *args: Any, **options: Any) -> list[Any]:
        self._keras.counts = not options.get("again", False)
        self._keras.micro_batch = micro_batch
        with keras.device(str(self._device)):  # where Keras makes tensors
            return super()._compute(values, micro_batch, *args, **options)

    def _finish(self, local: dict[str, Any], micro_batch: int, made: dict[Any, Any]) -> None:
        """Compute the loss, and keep the outputs."""
        batch = self._batch
        graph = self._keras.whole
        outputs = [*graph.outputs, *graph.masks] if self._keeps_outputs else []
        self.results[micro_batch] = [local[name].detach() for name in outputs]
        if batch.targets:
            ends = {name: local[name] for name in graph.ends}
            targets, weights = batch.targets[micro_batch]
            share = batch.weights[micro_batch]
            loss = self._counted(self._objective(targets, weights, share, ends), made)
            self.results[micro_batch].insert(0, loss)

    @contextlib.contextmanager
    def _random(self, unit: Any, index: int, micro_batch: int) -> Iterator[None]:
        """Seed PyTorch's generator as well: Keras' dropout draws from it where it has no seed."""
        told = f"{self.seed} {self._batch.step} {micro_batch} {index}"
        drawing = keras3.drawing(unit.whole, told, unit.random and self._batch.train)
        with super()._random(unit, index, micro_batch), drawing:
            yield


class _WithGradient(torch.autograd.Function):
    """Apply ``forward`` to a tensor, and ``backward`` to its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, forward: _Change, backward: _Change) -> Any:
        ctx.backward = backward
        return forward(tensor.detach()).clone()  # what is remembered shall have no gradient

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.backward(gradient), None, None


def profiled(graph: keras3.Graph, sample: Any, micro_batches: int, *options: Any) -> ir.Graph:
    """Return ``graph.line`` with times and bytes per micro-batch; variables stay as they are."""
    states = [v for v in graph.model.variables if not v.trainable]
    before = [v.value.detach().clone() for v in states]
    try:
        whole: Any = _Graph(graph)
        return pytorch_profile.profiled(whole, sample, micro_batches, *options)
    finally:
        for variable, value in zip(states, before, strict=True):
            variable.assign(value)
