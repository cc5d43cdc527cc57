"""Parameter servers on Keras' torch backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import keras
import torch

from hvdx.integrations.keras3_averager import Layout
from hvdx.integrations.keras3_servers import Served
from hvdx.integrations.keras3_torch import TorchAverager
from hvdx.integrations.pytorch_engine import Flight


class TorchServed(Served, TorchAverager):
    """Parts lie in the variables' own memory: they take no more of it."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(
        self, optimizer: Any, grads: list[Any], variables: list[Any], update: Callable[..., None]
    ) -> None:
        """See :meth:`Served.step`."""
        super().step(optimizer, grads, variables, update)

    def make_part(self, variable: Any, size: int) -> Any:
        """See :meth:`Served.make_part`."""
        part = keras.Variable(torch.zeros(size), dtype=variable.dtype, name=variable.name)
        part._path = variable.path
        return part

    @torch.no_grad()
    def enter(self, layout: Layout) -> dict[int, torch.Tensor]:
        """See :meth:`Served.enter`; returns what others have of parts whose changes are sent."""
        before: dict[int, torch.Tensor] = {}
        for variable, part, (start, stop) in zip(self.wholes, self.parts, self._spans, strict=True):
            own = _flat(variable)[start:stop]
            part._value = torch.nn.Parameter(own, requires_grad=False)
        for bucket in layout.buckets:
            for index in self.remembered(bucket):
                place = bucket.members[index]
                own = self.parts[place]._value
                before[place] = own.clone()
                own.add_(self.sent[bucket.specs[index].name].owed)
        return before

    @torch.no_grad()
    def leave(self, layout: Layout, before: dict[int, torch.Tensor]) -> None:
        """See :meth:`Served.leave`."""
        flights = []
        for bucket in layout.buckets:
            exact = []
            for place in bucket.members:
                own = self.parts[place]._value.detach()
                if place in before:
                    exact.append(own.clone())
                    own.copy_(before[place])
                else:
                    exact.append(own)
            wholes = [_flat(self.wholes[place]) for place in bucket.members]
            work, name = self.pulled(bucket, exact, wholes), f"{bucket.name(0)}.pull"
            flights.append(Flight(self.adapter, work, name, self.options.process_set))
        began = time.perf_counter()
        for bucket, flight in zip(layout.buckets, flights, strict=True):
            flats, states = flight.finish()
            for place, flat in zip(bucket.members, flats, strict=True):
                _flat(self.wholes[place]).copy_(flat)
            for name, state in states.items():
                self.sent.replace(name, state)
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def flush(self, layout: Layout) -> None:
        """See :meth:`Served.flush`."""
        self.enter(layout)
        for bucket in layout.buckets:
            coded = self.remembered(bucket)
            parts = [self.parts[place]._value.detach() for place in bucket.members]
            flats = self.brought(bucket, parts)
            for place, flat in zip(bucket.members, flats, strict=True):
                _flat(self.wholes[place]).copy_(flat)
            for index in coded:
                name = bucket.specs[index].name
                kept = self.sent[name]
                self.sent.replace(name, kept._replace(owed=torch.zeros_like(kept.owed)))

    def tensor(self, variable: Any) -> torch.Tensor:
        """See :meth:`Served.tensor`."""
        return variable.value.detach()


def _flat(variable: Any) -> torch.Tensor:
    """Return a variable's own memory in one dimension."""
    return variable.value.detach().view(-1)
