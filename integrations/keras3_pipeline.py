"""``hvd.Pipeline`` for Keras 3: train a model in stages, on several ranks or here."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import operator
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.backend import set_keras_mask

from hvdx.agreement import next_name
from hvdx.buckets import width
from hvdx.compression import none
from hvdx.errors import PlanError
from hvdx.integrations.keras3_fit import Shuffled, Trainer
from hvdx.integrations.keras3_graph import Batch, Graph
from hvdx.integrations.keras3_losses import Objective
from hvdx.integrations.keras3_masks import MASK
from hvdx.integrations.keras3_trace import traced
from hvdx.integrations.keras_loss_scale import LossScale
from hvdx.integrations.keras_sync_batch_norm import SyncBatchNormalization
from hvdx.pipeline import ir
from hvdx.pipeline.base import BasePipeline, Told, check_options, rows_of, settled
from hvdx.pipeline.channel import Key
from hvdx.pipeline.plan import Plan
from hvdx.replicas import broadcast_parameters

_BACKENDS = {  # of Keras: who computes stages, and who measures units
    "tensorflow": ("hvdx.integrations.keras3_stages", "hvdx.integrations.keras3_profile"),
    "torch": ("hvdx.integrations.keras3_stages_torch", "hvdx.integrations.keras3_stages_torch"),
}
_FORMAT = 1
_ABOUT = "hvdx_pipeline"
_MEASURED = 1 << 26  # bytes of variables on which the optimizer is measured, and the one more
_UPDATES = 5  # of an optimizer, to measure it; the first makes its functions


class Pipeline(BasePipeline):
    """A model whose layers are spread over devices of this process, or over the ranks of the job.

    Every rank calls the same lines with the same batch: the first stage reads ``x``, the last
    one ``y``, and the loss returns everywhere. Parameters begin as rank 0 has them. Schedule,
    cuts and placement change no bit of what is learnt; more micro-batches change rounding.

    Each rank keeps the whole model, but trains only its stages' part: see :meth:`save`. Layers may
    be frozen, on every rank, between steps; what was frozen when the pipeline was made stays so.

    Args:
        model: a Sequential or functional model. Each call of a layer is a unit; a model in it is
            one layer.
        sample: a batch, or a part of one: an array, a list of them, or a dictionary by the
            names of the inputs. It is run once.
        loss: as for ``compile``: a name, ``keras.losses.Loss``, or function of ``y_true`` and
            ``y_pred``; one for all outputs, a list of one each, or a dictionary by the outputs'
            names. Losses that layers add, and regularizers', count as well: as Keras counts them.
        optimizer: a Keras optimizer, new, or its name. It is this rank's alone. A model whose
            dtype policy is ``mixed_float16`` gets a ``LossScaleOptimizer`` around it, as
            ``compile`` does; where a rank's gradients are not finite, all ranks skip the step.
        loss_weights: factors of the outputs' losses, given as those are.
        micro_batches: pieces of a batch; default 8. Fewer where a batch has fewer rows.
        stages: how many; names of the units that all but the first begin with; how many units
            each has; or a :class:`hvdx.pipeline.plan.Plan`. Default: one per rank or device, two
            for ``interleaved`` and ``zbv``.
        place: devices of this process, one per stage or two, such as ``["cpu", "cpu"]`` or
            TensorFlow's ``["CPU:0", "CPU:1"]``, PyTorch's ``["cuda:0", "cuda:1"]``. Or rows of
            ranks that are replicas of each other: ``[[0, 2], [1, 3]]`` trains two stages, each on
            two ranks that share its micro-batches. Or ``"auto"``: what is quickest, with all that
            is left out here: rows, cuts, ``micro_batches`` and ``schedule``. All is measured on
            ``sample``, a whole batch, and a few plans are tried; variables and random numbers stay
            as they were. Default: the ranks of the job, if there are several, one per stage or
            two; else this one process.
        schedule: ``gpipe``, ``1f1b`` (the default), ``1f1b-slack``, ``interleaved``, ``zb1p``,
            ``zbv``, ``zbv-slack``, or text; ``"auto"``: the quickest by the measured times.
            TensorFlow finds both halves of a backward at once: ``zb1p`` and ``zbv`` gain less
            there.
        by: what cuts even out: ``"params"`` or ``"time"``. Default: time under
            ``schedule="auto"``, else params. Time runs micro-batches of ``sample``, on rank 0, to
            measure the units: let it be a whole batch.
        target: with ``place="auto"`` what ``step`` gets as ``y`` for ``sample``. Default: the
            model's own outputs, which not every loss can take.
        clip_norm: scales all gradients down to this norm over all stages where theirs is larger,
            in the place of the optimizer's ``global_clipnorm``.
        checkpoint: ``"always"``: stages keep only the inputs of micro-batches and compute the
            rest again for backward; ``"except_last"``: not of the last one; ``"never"``, the
            default.
        compression: of the gradients that replicas add up, ``hvd.Compression.int8`` for instance.
            With ``place="auto"`` also ``hvd.Compression.auto("safe")``: if and how is planned, too.
        batchnorm: micro-batches are normalized by their own statistics; ``"deferred"``: the
            running ones move once per batch, by all of it; ``"micro"``: with each micro-batch.
        channel: how tensors travel between ranks: ``"zmq"``; ``"horovod"``, slower, needs nothing
            else.
        seed: of dropout and the like; default: drawn by Python's ``random`` on rank 0.

    Attributes:
        plan: cuts, places and schedule; ``plan.save(path)`` keeps it.
        units: names of all units, in order.
        steps: batches that the model has been trained on, before a :meth:`load`, too.
        optimizer: of this process' stages.
        gradient_norm: of the last step, before clipping, with ``clip_norm``; else None.
        skipped: whether the last step changed no variable, since a gradient under loss scaling
            was not finite.

    Raises:
        PlanError: the model cannot be cut or placed as asked.
        MismatchError: ranks differ in model or options; raised on every rank.

    Example:
        >>> pipe = hvd.Pipeline(model, x, loss="mse", optimizer=keras.optimizers.Adam(1e-3))
        >>> for x, y in batches:
        ...     loss = pipe.step(x, y)
    """

    _graph: Graph
    _given: Any = None  # the optimizer, for the planner
    _scale: LossScale | None = None

    def __init__(
        self,
        model: Any,
        sample: Any,
        loss: Any = None,
        optimizer: Any = None,
        *,
        loss_weights: Any = None,
        micro_batches: int | None = None,
        stages: int | Sequence[str] | Sequence[int] | Plan | None = None,
        place: str | Sequence[str] | Sequence[Sequence[int]] | None = None,
        schedule: str | None = None,
        by: str | None = None,
        target: Any = None,
        clip_norm: float | None = None,
        checkpoint: str | None = None,
        compression: Any = None,
        batchnorm: str = "deferred",
        channel: str = "zmq",
        seed: int | None = None,
        **others: Any,
    ) -> None:
        self._stages_of, self._profile_of = _backend()
        told = settled(Told(micro_batches, schedule, checkpoint), place, stages)
        super().__init__(
            self._stages_of.FRAMEWORK,
            self._stages_of.Codec(),
            place,
            random.getrandbits(31) if seed is None else seed,
            clip_norm=clip_norm,
            checkpoint=told.checkpoint,
            compression=compression,
            batchnorm=batchnorm,
            channel=channel,
        )
        with self._alike():
            check_options(told.micro_batches, place, clip_norm, told.checkpoint, batchnorm, channel)
            _refuse(by, others)
            self._graph = traced(model, sample, deferred=batchnorm == "deferred")
            self.units = [unit.name for unit in self._graph.units]
            self._loss = Objective(loss, loss_weights, self._graph)
        asked = {"micro_batches": told.micro_batches, "schedule": told.schedule}
        self._agree_on(stages=stages, by=by, **asked)
        with self._alike():
            if self._auto:
                self._given = optimizer
                self._again = functools.partial(
                    Pipeline, model, sample, loss, loss_weights=loss_weights, clip_norm=clip_norm,
                    batchnorm=batchnorm, channel=channel, seed=self._seed,
                )  # fmt: skip
            self.plan = self._planned(sample, stages, told, by, None, target)
            self._stages = self._make_stages()
            self._params = {
                name: variable
                for _, first, stop in self._own_stages()
                for unit in self._graph.units[first:stop]
                for name, variable in unit.params.items()
            }
            self.optimizer = self._checked(optimizer)
            self._compressor = self._checked_compression(
                {self.optimizer.name: self.optimizer.get_config()} if self.optimizer else {}
            )
        if self._across:
            self._agree()
        self._connect()

    # --- what users call

    def step(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Train on a batch; return its loss, as Keras has it for the whole batch.

        Args:
            x: as ``sample`` was; arrays are cut along their first dimension.
            y: what the loss compares with: an array, or one for each output, as a list or by name.
            sample_weight: by row, or by what else Keras' losses take; one for all outputs or one
                for each.

        Raises:
            PipelineError: something failed, here or on another rank; raised on every rank.
        """
        return self._train(x, y, sample_weight)[0]

    def __call__(self, x: Any) -> Any:
        """Compute the model's output for a batch, in inference mode, on every rank."""
        with self._telling("call"):
            tensors = self._run(x, outputs=True)
            self._step += 1
        return self._as_result(tensors)

    def fit(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        epochs: int = 1,
        *,
        sample_weight: Any = None,
        shuffle: bool = True,
        metrics: Any = None,
        weighted_metrics: Any = None,
        validation_data: Any = None,
        **options: Any,
    ) -> Any:
        """Train as Keras' ``fit``; every rank calls it with the same data, and trains all of it.

        Args:
            x: arrays, or a dataset that gives every rank the same batches.
            y: arrays; None with a dataset.
            batch_size: of arrays.
            epochs: through the data.
            sample_weight: arrays; a dataset gives them as third of its batches.
            shuffle: arrays, in an order of the pipeline's seed.
            metrics: as for ``compile``.
            weighted_metrics: as for ``compile``.
            validation_data: ``(x, y)``, ``(x, y, sample_weight)`` or a dataset.
            **options: others of Keras' ``fit``: ``callbacks`` and ``class_weight`` among them. The
                callbacks' ``model`` saves the whole model by ``save`` and ``save_weights``, called
                on every rank.

        Returns:
            Keras' history.
        """
        trainer = self._trainer(metrics, weighted_metrics)
        if validation_data is not None:
            validation_data = self._dataset(_parts(validation_data), batch_size, False)
        data = self._dataset((x, y, sample_weight), batch_size, shuffle)
        # Keras would shuffle the batches once more, on each rank in its own way.
        options["shuffle"] = False
        return trainer.fit(data, epochs=epochs, validation_data=validation_data, **options)

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        *,
        sample_weight: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **options: Any,
    ) -> Any:
        """Compute loss and metrics as Keras' ``evaluate``, on every rank."""
        data = self._dataset((x, y, sample_weight), batch_size, False)
        return self._trainer(metrics, weighted_metrics).evaluate(data, **options)

    def predict(self, x: Any, batch_size: int = 32, **options: Any) -> Any:
        """Compute the outputs as Keras' ``predict``: arrays, on every rank."""
        data = self._dataset((x, None, None), batch_size, False)
        return self._trainer(None, None).predict(data, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, optimizer, step and plan to one ``.npz`` file; every rank calls it.

        Arrays lie under the paths of the model's variables, after ``model/``. Afterwards the
        model of rank 0 is up to date, too, and can be saved as Keras does.
        """
        with self._telling("save"):
            arrays = self._gathered()
            problem = ""
            if self._rank == 0:
                try:
                    beside = f"{os.fspath(path)}.partial"
                    with open(beside, "wb") as file:
                        np.savez(file, **arrays)  # type: ignore[arg-type]  # names are arrays'
                    os.replace(beside, path)
                except OSError as error:
                    problem = str(error)
            problem = self._from_first(problem)
            if problem:
                raise OSError(f"the pipeline cannot be saved to {os.fspath(path)!r}: {problem}")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote with any number of stages; rank 0 reads, all call it."""
        with self._telling("load"):
            told: Any = None
            if self._rank == 0:
                try:
                    with np.load(path, allow_pickle=False) as file:
                        told = {name: file[name] for name in file.files}
                    json.loads(str(told[_ABOUT]))
                except (OSError, KeyError, ValueError, EOFError) as error:
                    told = f"{type(error).__name__}: {error}"
            told = self._from_first(told)
            if isinstance(told, str):
                raise OSError(f"the pipeline cannot be loaded from {os.fspath(path)!r}: {told}")
            about = json.loads(str(told[_ABOUT]))
            _assign(self._all_variables(), told, "model")
            if self.optimizer is not None:
                _assign(_slots(self.optimizer), told, "optimizer")
            self._load_kept(about, told)
            self.steps, self._seed = about["step"], about["seed"]
            for stage in self._stages.values():
                stage.seed = self._seed

    # --- fit

    def _trainer(self, metrics: Any, weighted_metrics: Any) -> Trainer:
        def train(x: Any, y: Any, weight: Any, outputs: bool) -> tuple[Any, Any]:
            loss, *tensors = self._train(x, y, weight, outputs)
            return loss, self._as_result(tensors) if outputs else None

        def test(x: Any, y: Any, weight: Any, outputs: bool) -> tuple[Any, Any]:
            with self._telling("call"):
                compared = bool(self._loss)
                tensors = self._run(x, y, weight, compared=compared, outputs=outputs)
                self._step += 1
            loss = tensors.pop(0) if compared else None
            return loss, self._as_result(tensors) if outputs else None

        def collect() -> bool:
            with self._telling("save"):
                self._gathered()
            return self._rank == 0

        def settle(problem: str) -> None:
            told = self._from_first(problem)
            if told:
                raise OSError(f"the model cannot be saved: {told}")

        trainer = Trainer(self._graph.model, train, test, self, collect, settle)
        trainer.prepare(self.optimizer, metrics, weighted_metrics)
        return trainer

    def _dataset(self, data: tuple[Any, ...], size: int, shuffle: bool) -> Any:
        """Make batches of arrays, ``x``, ``y`` and weights; leave datasets as they are."""
        while len(data) > 1 and data[-1] is None:
            data = data[:-1]
        arrays = [each for each in keras.tree.flatten(data) if each is not None]
        if not all(hasattr(each, "shape") for each in arrays):
            return data[0]
        data = tuple(tuple(each) if isinstance(each, list) else each for each in data)
        data = keras.tree.map_structure(lambda x: None if x is None else np.asarray(x), data)
        rows = rows_of([np.shape(each) for each in arrays])
        return Shuffled(data, rows, size, self._seed if shuffle else None)

    # --- making one

    def _profile(
        self, sample: Any, micro_batches: int, of: Callable[[Iterable[float]], float] = min
    ) -> ir.Graph:
        line = self._profile_of.profiled(self._graph, sample, micro_batches, of=of)
        return line  # type: ignore[no-any-return]  # of a module that is loaded by name

    def _trains_with(self) -> bool:
        return bool(self._loss) and self._given is not None

    def _rows(self, batch: Any) -> int:
        return rows_of([tuple(each.shape) for each in self._graph.tensors(batch).values()])

    def _measured_update(self) -> tuple[float, float]:
        variables: list[Any] = []
        most = _MEASURED
        for variable in self._graph.model.trainable_variables:
            if not variables or most > 0:
                variables.append(variable)
                most -= _bytes(variable)
        if not variables:
            return 0.0, 0.0
        optimizer = keras.optimizers.get(_anew(self._given))
        optimizer.build(variables)
        gradients = [keras.ops.full_like(each, 1e-3) for each in variables]
        taken = []
        for _ in range(_UPDATES):
            start = time.perf_counter()
            self._stages_of.apply(optimizer, gradients, variables)
            keras.ops.convert_to_numpy(keras.ops.reshape(variables[-1], (-1,))[:1])  # it is done
            taken.append(time.perf_counter() - start)
        size = sum(map(_bytes, variables))
        state = sum(_bytes(each) for each in optimizer.variables if each.shape)
        return statistics.median(taken[1:]) / size, state / size

    @contextlib.contextmanager
    def _preserved(self) -> Iterator[None]:
        variables = self._graph.model.variables
        saved = [np.array(keras.ops.convert_to_numpy(each)) for each in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, saved, strict=True):
                variable.assign(value)

    def _twin(self, plan: Plan, compression: Any) -> Pipeline:
        optimizer = _anew(self._given)
        made: Pipeline = self._again(optimizer=optimizer, stages=plan, compression=compression)
        return made

    def _make_stages(self) -> dict[int, Any]:
        stages: dict[int, Any] = {}
        split = self.plan.order().splits
        edges = self.plan.edges(self._line)
        owner: dict[str, int] = {}
        for number, (first, stop) in enumerate(edges):
            for name in self._graph.untrained(self._graph.units[first:stop]):
                if owner.setdefault(name, number) != number:
                    raise PlanError(
                        f"variable {name!r}, which training changes without gradients, is used in "
                        f"stages {owner[name]} and {number}: cut so that one stage has both uses"
                    )
        for unit in self._graph.units if self._across else ():
            if any(isinstance(part, SyncBatchNormalization) for part in unit.parts):
                raise PlanError(
                    f"layer {unit.name!r} is a SyncBatchNormalization, which waits for all ranks, "
                    "but those of other stages do not have it: use keras.layers.BatchNormalization"
                )
        devices = [self._stages_of.device(each) for each in self._devices or ()]
        for number, first, stop in self._own_stages():
            stages[number] = self._stages_of.KerasStage(
                self._graph,
                first,
                stop,
                loss=self._loss,
                device=devices[self.plan.place[number]] if devices else None,
                seed=self._seed,
                split=split,
            )
        return stages

    def _checked(self, told: Any) -> Any:
        """Return the optimizer, built for this process' variables."""
        if told is None:
            return None
        optimizer = keras.optimizers.get(told)
        scaling = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if self._graph.model.dtype_policy.name == "mixed_float16" and not scaling:
            optimizer, scaling = keras.optimizers.LossScaleOptimizer(optimizer), True
        limit = getattr(optimizer, "inner_optimizer", optimizer).global_clipnorm
        if self._across and limit:
            raise PlanError(
                f"global_clipnorm={limit} needs the norm over all ranks, which an optimizer does "
                f"not know: give it to the pipeline, as clip_norm={limit}"
            )
        if optimizer.built:
            raise PlanError(
                f"optimizer {optimizer.name!r} is built for other variables already; give a new one"
            )
        if self._params or scaling:  # all ranks follow the scale
            optimizer.build(list(self._params.values()))
        if scaling:
            self._scale = LossScale(optimizer)
        return optimizer

    def _agree(self) -> None:
        """Compare the ranks' pipelines, and begin with rank 0's parameters."""
        model = self._graph.model
        entries = {
            unit.name: str({name: tuple(v.shape) for name, v in unit.params.items()})
            + f" in {getattr(unit.layer, 'compute_dtype', 'any type')}"
            for unit in self._graph.units
        }
        entries["the loss scale"] = f"= {self._scale and self._scale.settings()}"
        self._check_agreed(entries)
        self._check_optimizers(_described(self.optimizer))
        if model.variables:
            broadcast_parameters(model.variables)

    # --- a step

    def _train(self, x: Any, y: Any, sample_weight: Any = None, outputs: bool = False) -> list[Any]:
        """Train on a batch; return its loss and, if asked for, the outputs."""
        with self._telling("step"):
            if not self._loss or self.optimizer is None:
                raise PlanError("step() needs the loss= and optimizer= that it was made without")
            scale = self._scale.value() if self._scale else None
            found = self._run(
                x, y, sample_weight, train=True, compared=True, outputs=outputs, scale=scale
            )
            totals = self._totals(scale)
            for stage in self._stages.values():
                stage.commit()
            if not self.skipped:
                self._apply(totals)
            if self._scale:
                self._scale.update(self.skipped)
            self._step += 1
            self.steps += 1
        return found

    def _apply(self, totals: dict[str, Any]) -> None:
        """Step the optimizer with the gradients there are."""
        optimizer = self._scale.inner if self._scale else self.optimizer
        names = [name for name in self._params if name in totals]
        if names:
            variables = [self._params[name] for name in names]
            self._stages_of.apply(optimizer, [totals[name] for name in names], variables)
        elif self._params:  # all are frozen now; schedules go on
            optimizer.iterations.assign_add(1)

    def _run(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        train: bool = False,
        compared: bool = False,
        outputs: bool = False,
        scale: float | None = None,
    ) -> list[Any]:
        """Run the schedule; return the loss, where ``compared``, then ``outputs``, everywhere."""
        graph = self._graph
        frozen = graph.refresh() if train else 0
        inputs = graph.tensors(x)
        targets = self._loss.targets(y) if compared else []
        weights = self._loss.weights(sample_weight) if compared else []
        every = [each for each in [*inputs.values(), *targets, *weights] if each is not None]
        rows = rows_of([tuple(tensor.shape) for tensor in every])
        sizes = self._sizes(rows, train)
        shares: Any = []
        if compared:
            shares = self._loss.shares(targets, weights, graph.masks_ahead(inputs), sizes)
        last = len(self.plan.place) - 1 in self._stages
        batch = Batch(
            self.steps if train else self._step,
            _pieces(inputs, sizes) if 0 in self._stages else [],
            _pieces((targets, weights), sizes) if compared and last else [],
            [keras.ops.convert_to_tensor(each) for each in shares] if last else [],
            train,
            outputs,
            scale,
        )
        return self._perform(
            batch, rows, train, f", {frozen} variables frozen" if frozen else "", compared
        )

    def _tensor(self, numbers: Sequence[float]) -> Any:
        return self._stages_of.numbers(numbers)

    def _norms(self, gradients: Sequence[Any]) -> list[float]:
        return self._stages_of.norms(gradients)  # type: ignore[no-any-return]  # loaded by name

    def _finite(self, gradients: Sequence[Any]) -> bool:
        return self._stages_of.finite(gradients)  # type: ignore[no-any-return]  # loaded by name

    def _arrived(self, gradient: Any, unit: int, name: str) -> Any:
        return self._stages_of.arrived(gradient, self._graph.units[unit].params[name])

    def _joined(self, pieces: Sequence[Sequence[Any]], compared: bool) -> list[Any]:
        outputs = [
            keras.ops.concatenate(each) if len(each[0].shape) else keras.ops.stack(each)
            for each in zip(*(piece[1:] if compared else piece for piece in pieces), strict=True)
        ]
        if not compared:
            return outputs
        return [functools.reduce(operator.add, (piece[0] for piece in pieces)), *outputs]

    def _beside(self, tensor: Any, like: Any) -> Any:
        return tensor.to(like.device) if self._stages_of.FRAMEWORK == "torch" else tensor

    def _as_result(self, tensors: Sequence[Any]) -> Any:
        """Give the outputs their masks, which come after them, and their structure."""
        graph, count = self._graph, len(self._graph.outputs)
        masks = dict(zip(graph.masks, tensors[count:], strict=True))
        for name, output in zip(graph.outputs, tensors, strict=False):
            if name + MASK in masks:
                set_keras_mask(output, masks[name + MASK])
        return keras.tree.pack_sequence_as(graph.result, list(tensors[:count]))

    # --- checkpoints

    def _all_variables(self) -> dict[str, Any]:
        return {self._graph.names[id(v)]: v for v in self._graph.model.variables}

    def _gathered(self) -> dict[str, np.ndarray]:
        """Bring rank 0's model up to date; return the arrays of a checkpoint there."""
        own = self._own_state()
        arrays = {name: _array(tensor) for name, tensor in own.items()}
        if self._channel is not None:
            names = self._core.allgather_object(list(own), next_name("pipeline"), None)
            key = Key("S", self._step, 0, 0)
            self._channel.note = f"save at {self._step}"
            if self._rank:
                if own:
                    self._channel.send(0, key, list(own.values()))
                return {}
            for rank in (rank for rank in range(1, len(names)) if names[rank]):
                arrived = self._channel.receive(rank, key)
                for name, tensor in zip(names[rank], arrived, strict=True):
                    arrays.setdefault(name, _array(tensor))
        _assign(self._all_variables(), arrays, "model")
        about = {"format": _FORMAT, "step": self.steps, "seed": self._seed}
        about["plan"] = self.plan.to_json()
        if self._sums is not None and self._compressor is not none:
            about["compression"] = self._compressor.name
            about["compression_steps"] = self._sums.steps
        return {**arrays, _ABOUT: np.array(json.dumps(about))}

    def _own_state(self) -> dict[str, Any]:
        """Return the part of a checkpoint that this process has; replicas leave it to the first."""
        kept = self._compression_state()
        if self._rank not in self._leads:
            return {}
        own: dict[str, Any] = {}
        for _, first, stop in self._own_stages():
            for name, variable in self._graph.variables(self._graph.units[first:stop]).items():
                own[f"model/{name}"] = keras.ops.stop_gradient(variable.value)
        if self.optimizer is not None and self._params:
            for name, variable in _slots(self.optimizer).items():
                own[f"optimizer/{name}"] = keras.ops.stop_gradient(variable.value)
        for name, tensors in kept.items():
            own.update({f"compression/{name}@{path}": each for path, each in tensors.items()})
        return own

    def _load_kept(self, about: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Give compressors their part of a checkpoint, if there is one."""
        if "compression" not in about:
            self._load_compression(None)
            return
        kept: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            if kind == "compression":
                parameter, _, path = rest.rpartition("@")
                kept.setdefault(parameter, {})[path] = keras.ops.convert_to_tensor(array)
        told = {"compressor": about["compression"], "steps": about["compression_steps"]}
        self._load_compression({**told, "parameters": kept})


def _parts(data: Any) -> tuple[Any, ...]:
    """Take apart ``(x, y)`` or ``(x, y, weights)``; a dataset is one part."""
    return tuple(data) if isinstance(data, (tuple, list)) and len(data) in (2, 3) else (data,)


def _refuse(by: str | None, others: dict[str, Any]) -> None:
    """Refuse what only pipelines of PyTorch models have.

    Raises:
        PlanError: it is one of these.
        TypeError: there is no such option.
    """
    told = {
        "memory": "what TensorFlow keeps for backward cannot be measured: choose stages= by hand",
        "leaves": "each layer that the model calls is one unit already",
    }
    if by == "memory":
        raise PlanError(f"by='memory' is for PyTorch models only: {told['memory']}")
    for name, value in others.items():
        if name not in told:
            raise TypeError(f"Pipeline() got an unexpected keyword argument {name!r}")
        raise PlanError(f"{name}={value!r} is for PyTorch models only: {told[name]}")


def _backend() -> tuple[Any, Any]:
    """Return the modules for Keras' backend.

    Raises:
        TypeError: there are none.
    """
    name = keras.backend.backend()
    if name not in _BACKENDS:
        raise TypeError(
            f"Keras runs on the {name!r} backend; pipelines of Keras models need KERAS_BACKEND="
            "tensorflow or torch"
        )
    stages, profile = map(importlib.import_module, _BACKENDS[name])
    return stages, profile


def _pieces(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut all tensors of ``batch`` into runs of rows; scalars are in each piece."""
    pieces, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        pieces.append(
            keras.tree.map_structure(
                lambda x, rows=rows: x[rows] if x is not None and len(x.shape) else x, batch
            )
        )
        start += size
    return pieces


def _anew(optimizer: Any) -> Any:
    """Return an equal optimizer that has no variables yet."""
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return type(optimizer).from_config(optimizer.get_config())
    return optimizer


def _bytes(variable: Any) -> int:
    return math.prod(variable.shape) * width(str(variable.dtype))


def _described(optimizer: Any) -> str:
    """Tell an optimizer's class and options, for other ranks to compare with."""
    if optimizer is None:
        return "none"
    options = {k: v for k, v in optimizer.get_config().items() if k != "name"}
    return f"{type(optimizer).__qualname__} {options}"


def _slots(optimizer: Any) -> dict[str, Any]:
    """Name an optimizer's variables without its own name, which may be numbered."""
    return {v.path.partition("/")[2] or v.path: v for v in optimizer.variables}


def _array(variable: Any) -> np.ndarray:
    """Copy to NumPy, in types that its files know."""
    array = np.array(keras.ops.convert_to_numpy(variable))
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _assign(variables: dict[str, Any], told: dict[str, Any], kind: str) -> None:
    """Give variables what lies under their names.

    Raises:
        ValueError: something is missing, or has another shape; nothing has been changed then.
    """
    for name, variable in variables.items():
        found = told.get(f"{kind}/{name}")
        if found is None or tuple(found.shape) != tuple(variable.shape):
            shape = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(
                f"the checkpoint has {shape} for {kind} variable {name!r} of shape "
                f"{tuple(variable.shape)}"
            )
    for name, variable in variables.items():
        variable.assign(told[f"{kind}/{name}"])
