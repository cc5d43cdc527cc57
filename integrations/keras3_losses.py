"""The loss of a pipeline of Keras layers: what micro-batches add up to is what Keras computes.

Keras divides the sum of the losses of a batch by its rows; where the output has a mask, by the
entries that the mask leaves; under ``mean_with_sample_weight``, by the sum of the weights. Within a
micro-batch the loss does that by itself, so the micro-batch counts by its share in the divisor of
the whole batch. All divisors are known before anything is computed: masks follow from the inputs,
by what layers tell of theirs, without the layers' own work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras.src.backend import set_keras_mask

from hvdx.errors import PlanError
from hvdx.integrations.keras3_graph import Graph
from hvdx.integrations.keras3_masks import MASK

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class _Term(NamedTuple):
    """The loss of one output."""

    loss: Any
    factor: float


class Objective:
    """The sum of the losses of a model's outputs and of those that its layers add.

    Args:
        loss: as for ``compile``: one for all outputs, a list of one each, or a dictionary by the
            names of outputs; None: only what layers add.
        factors: ``loss_weights``, likewise.
        graph: of the model.

    Raises:
        PlanError: they do not fit the outputs, or one cannot be had from micro-batches.
    """

    def __init__(self, loss: Any, factors: Any, graph: Graph) -> None:
        self._graph, count = graph, len(graph.outputs)
        names = graph.result if isinstance(graph.result, Mapping) else None
        order = keras.tree.flatten({name: name for name in names}) if names else list(
            getattr(graph.model, "output_names", None) or graph.outputs)  # fmt: skip
        self._order: list[str] = order if len(set(order)) == count else []
        losses = self._by_output(loss, "loss")
        weights = self._by_output(factors, "loss_weights")
        self._terms = [
            None if one is None else _Term(_loss(one), 1.0 if by is None else float(by))
            for one, by in zip(losses, weights, strict=True)
        ]

    def __bool__(self) -> bool:
        """Tell whether there is anything to train by."""
        return any(self._terms) or self._graph.losses is not None

    def targets(self, y: Any) -> list[Any]:
        """Return by output what its loss compares with; None where it has no loss.

        Raises:
            ValueError: ``y`` has more or fewer parts than there are losses or outputs.
        """
        told = self._by_output(y, "y", every=False)
        return [keras.ops.convert_to_tensor(each) if term else None
                for term, each in zip(self._terms, told, strict=True)]  # fmt: skip

    def weights(self, told: Any) -> list[Any]:
        """Return by output the sample weights, or None; one array is for all outputs."""
        each = self._by_output(told, "sample_weight")
        return [None if w is None else keras.ops.convert_to_tensor(w, keras.config.floatx())
                for w in each]  # fmt: skip

    def shares(
        self,
        targets: Sequence[Any],
        weights: Sequence[Any],
        masks: Mapping[str, Any],
        sizes: Sequence[int],
    ) -> np.ndarray:
        """Return what micro-batches count: (micro-batches, outputs + 1), the rows' share last.

        Args:
            targets: of the batch, by output.
            weights: of its samples, by output.
            masks: of outputs, by name.
            sizes: rows of the micro-batches.
        """
        rows = np.asarray(sizes, np.float64)
        starts = np.cumsum([0, *sizes[:-1]])
        columns = []
        for term, target, weight, name in zip(
            self._terms, targets, weights, self._graph.outputs, strict=True
        ):
            each = _divisor(term, target, weight, masks.get(name + MASK)) if term else None
            sums = rows if each is None else np.add.reduceat(each, starts)
            total = sums.sum()
            summed = term is not None and term.loss.reduction not in _MEANS
            columns.append(np.ones_like(rows) if summed else sums / total if total else sums)
        return np.stack([*columns, rows / rows.sum()], axis=1)

    def __call__(
        self, targets: Sequence[Any], weights: Sequence[Any], shares: Any, ends: Mapping[str, Any]
    ) -> Any:
        """Return what a micro-batch adds to the loss of the batch, a scalar.

        Args:
            targets: by output.
            weights: of samples, by output.
            shares: (outputs + 1,), of this micro-batch.
            ends: values that the last stage has; see :attr:`Graph.ends`.

        Raises:
            ValueError: a loss is no scalar.
        """
        total: Any = None
        for index, (term, name) in enumerate(zip(self._terms, self._graph.outputs, strict=True)):
            if term is None:
                continue
            if name + MASK in ends:
                set_keras_mask(ends[name], ends[name + MASK])
            loss = term.loss(targets[index], ends[name], weights[index])
            if len(loss.shape):
                raise ValueError(
                    f"loss {term.loss.name!r} of y_true and y_pred returns shape "
                    f"{tuple(loss.shape)}, no scalar: take the mean over the micro-batch"
                )
            part = loss * keras.ops.cast(shares[index] * term.factor, loss.dtype)
            total = part if total is None else total + part
        if self._graph.losses is not None:
            means, sums = keras.ops.unstack(ends[self._graph.losses])
            added = means * keras.ops.cast(shares[-1], means.dtype) + sums
            total = added if total is None else total + keras.ops.cast(added, total.dtype)
        return total

    def _by_output(self, told: Any, what: str, every: bool = True) -> list[Any]:
        """Return one of ``told`` for each output, in the order of outputs.

        Args:
            told: a dictionary by name, a list of one each, or one; None: None for each.
            what: it is, for messages.
            every: whether one is for all outputs.
        """
        count = len(self._graph.outputs)
        problem = ValueError if what in ("y", "sample_weight") else PlanError
        if told is None:
            return [None] * count
        if isinstance(told, Mapping):
            unknown = sorted(set(told) - set(self._order))
            if unknown:
                raise problem(f"{what} names {unknown}, the model's outputs are {self._order}")
            return [told.get(name) for name in self._order]
        flat = list(told) if isinstance(told, (list, tuple)) else [told]
        if len(flat) == 1 and every:
            flat *= count
        wanted = [index for index, term in enumerate(getattr(self, "_terms", ())) if term]
        if len(flat) == len(wanted) < count and not every:
            found = dict(zip(wanted, flat, strict=True))
            return [found.get(index) for index in range(count)]
        if len(flat) != count:
            raise problem(f"{what} has {len(flat)} parts, the model {count} outputs")
        return flat


class _Mean(keras.losses.Loss):
    """The mean of what a function gives by sample."""

    def __init__(self, function: Any) -> None:
        super().__init__(name=getattr(function, "__name__", "loss"))
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred)


def _loss(told: Any) -> Any:
    loss = keras.losses.get(told)
    if not callable(loss):
        raise PlanError(f"loss={told!r}: give a name, a keras.losses.Loss or a function")
    if not isinstance(loss, keras.losses.Loss):
        return _Mean(loss)
    if loss.reduction not in (*_MEANS, "sum"):
        raise PlanError(
            f"loss {loss.name!r} has reduction={loss.reduction!r}, no scalar: use "
            "'sum_over_batch_size'"
        )
    return loss


def _divisor(term: _Term, target: Any, weight: Any, mask: Any) -> np.ndarray | None:
    """Return by row what it adds to the divisor of a loss; None: each row alike."""
    counted = None if mask is None else _numpy(mask)
    ignored = getattr(term.loss, "ignore_class", None)
    if ignored is not None:
        valid = _numpy(target) != ignored
        counted = valid if counted is None else _like(valid, counted) * counted
    if term.loss.reduction == "mean_with_sample_weight" and weight is not None:
        by_sample = _numpy(weight)
        if counted is None:
            counted = by_sample
        else:
            counted, by_sample = _like(counted, by_sample), _like(by_sample, counted)
            counted = counted * by_sample
    return None if counted is None else counted.reshape(len(counted), -1).sum(1)


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def _like(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Give one of two arrays the other's rank, where it has less or a last dimension of 1 more."""
    if one.ndim == other.ndim + 1 and one.shape[-1] == 1:
        return one[..., 0]
    return one.reshape(*one.shape, *[1] * (other.ndim - one.ndim))
