"""Local SGD and DiLoCo under Keras: ranks update alone, and average once in a while.

The optimizer's ``apply`` updates as the user's class does, with this rank's own gradients; then
it counts, and in every ``steps``-th call moves all ranks' variables by what all have learnt: in
graphs by a ``cond``, whose condition is the same on all ranks.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hvdx.compression import CompressionError, Local, Spec
from hvdx.frameworks import Adapter
from hvdx.integrations.keras3 import AveragingOptimizer, AveragingScaler
from hvdx.integrations.keras3_averager import Averager, Layout, Options
from hvdx.reduce_op import ReduceOp

_ALONE = "steps alone"  # in a saved state


class Rounds(Averager):
    """Follows lists of variables from one outer step to the next; a subclass per backend.

    Variables are reduced as gradients are elsewhere. Each list has rounds of its own.
    """

    def __init__(self, adapter: Adapter, options: Options, training: Local) -> None:
        self.training = training
        self._times = options.times
        self._variables: dict[str, Any] = {}  # by name
        self._alone: dict[int, Any] = {}  # layout: its calls since the last outer step, counted
        self._loaded: list[int] = []  # such counts of layouts yet to come
        self._layout_now: Layout | None = None  # between before_step() and after_step()
        means = options._replace(
            compressor=training.outer(self._start),
            op=ReduceOp.Average,
            predivide=1.0,
            sparse_as_dense=True,
            times=1,
        )
        super().__init__(adapter, means)

    def forget(self) -> None:
        """See :meth:`Averager.forget`; rounds begin from the variables as they are then."""
        super().forget()
        self.states.forget()
        self._variables.clear()
        self._alone.clear()
        self._loaded = []

    def before_step(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """Note where variables start, when they are new; return this rank's own gradients."""
        key = tuple(map(id, variables))
        if key not in self._layouts:
            self._variables.update({self._name(variable): variable for variable in variables})
            layout = self._layouts[key] = self._agree(optimizer, variables, variables)
            alone = self._loaded.pop(0) if self._loaded else 0
            if not alone:  # else variables may differ, anchors do not
                self._compare(layout)
            self._alone[id(layout)] = self.counter(alone)
        self._layout_now = self._layouts[key]
        return [self._scaled(grad, self._times) for grad in grads]

    def after_step(self, optimizer: Any) -> None:
        """Count, and take the outer step when its time has come."""
        layout, self._layout_now = self._layout_now, None
        if layout is None:
            return
        counter = self._alone[id(layout)]
        alone = self.count(counter) + 1

        def outer_step() -> Any:
            self.outer_step(layout)
            return alone * 0

        period = self.training.steps * (optimizer.gradient_accumulation_steps or 1)
        self.set_count(counter, keras.ops.cond(alone >= period, outer_step, lambda: alone))

    def outer_step(self, layout: Layout) -> None:
        """Replace all ranks' variables by what the outer optimizer makes of them."""
        values = [self.snapshot(variable) for variable in layout.variables]
        for place, value in enumerate(self.reduce(layout, values)):
            if place not in layout.local:
                layout.variables[place].assign(value)

    def flush(self) -> None:
        """End rounds early; eagerly, on all ranks."""
        for layout in self._layouts.values():
            counter = self._alone[id(layout)]
            if int(self.count(counter)):
                self.outer_step(layout)
                self.set_count(counter, 0)

    @property
    def alone(self) -> list[int]:
        """The calls since the last outer step, of each list of variables."""
        return [int(self.count(self._alone[id(layout)])) for layout in self._layouts.values()]

    @alone.setter
    def alone(self, counts: Sequence[int]) -> None:
        left = list(counts)
        for layout in self._layouts.values():
            self.set_count(self._alone[id(layout)], left.pop(0) if left else 0)
        self._loaded = left

    def configuration(self, optimizer: Any) -> str:
        """See :meth:`Averager.configuration`."""
        return f"{super().configuration(optimizer)}, {self.training}"

    def _start(self, spec: Spec) -> Any:
        return self.snapshot(self._variables[spec.name])

    # -- how a backend does it

    @abc.abstractmethod
    def snapshot(self, variable: Any) -> Any:
        """Return the value of ``variable`` as a tensor that later steps leave alone."""

    @abc.abstractmethod
    def counter(self, value: int) -> Any:
        """Return what counts, in graphs and eagerly; it stands at ``value``."""

    @abc.abstractmethod
    def count(self, counter: Any) -> Any:
        """Return where it stands."""

    @abc.abstractmethod
    def set_count(self, counter: Any, value: Any) -> None:
        """Set it."""


class LocalOptimizer(AveragingOptimizer):
    """What ``DistributedOptimizer`` puts before the user's class for training in rounds."""

    _averager: Rounds

    def _averaged(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        return self._averager.before_step(self, grads, variables)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Update as the user's class does; then take the outer step, if it is time."""
        super().apply(grads, trainable_variables)
        self._averager.after_step(self)

    def flush(self) -> None:
        """End the round early, if steps were taken since the last outer step.

        A collective call, between steps: after ``fit``, or before replicas are compared or saved.
        """
        self._averager.flush()

    settle = flush

    def compression_state(self) -> dict[str, Any]:
        """Return what this rank keeps; see :meth:`AveragingOptimizer.compression_state`.

        Anchors and outer momentum are the same on all ranks; variables, within a round, and what
        error feedback holds back are each rank's own.
        """
        return {**super().compression_state(), _ALONE: self._averager.alone}

    def portable_compression_state(self) -> dict[str, Any]:
        """Return what any number of ranks can go on from; on all ranks, after ``flush()``.

        Raises:
            CompressionError: a round is under way, so that each rank has its own variables.
        """
        if any(self._averager.alone):
            raise CompressionError(
                "portable_compression_state() while ranks train alone: their variables differ. "
                "Call optimizer.flush() before"
            )
        return {**super().portable_compression_state(), _ALONE: []}

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved; on all ranks, before or during training.

        An empty one begins anew: with variables as they are then, and without momentum. That is
        for variables that were replaced during training; what an outer step finds changed else
        counts as learnt.

        Args:
            state: this rank's own, or the portable one.

        Raises:
            CompressionError: see :meth:`AveragingOptimizer.load_compression_state`.
        """
        nothing = {"step": 0, "parameters": {}}
        given = dict(state) if state else {**super().compression_state(), **nothing}
        alone = given.pop(_ALONE, [])
        super().load_compression_state(given)
        self._averager.alone = alone

    def begin_anew(self) -> None:
        """See :meth:`AveragingOptimizer.begin_anew`."""
        self.load_compression_state({})


class LocalScaler(LocalOptimizer, AveragingScaler):
    """A ``LossScaleOptimizer`` that trains in rounds.

    A rank that finds an overflow does without that update, and counts it as the others do.
    """
