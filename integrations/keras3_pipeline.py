"""``hvd.Pipeline`` for Keras 3: train a model in stages, on several ranks or here."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np
from keras.src.backend import set_keras_mask

from hvdx.agreement import next_name
from hvdx.checkpoints import tree
from hvdx.checkpoints.files import read_tree, write_tree
from hvdx.checkpoints.parts import differences
from hvdx.checkpoints.tree import mapped, merged
from hvdx.errors import PlanError
from hvdx.integrations import keras3_moves as moves
from hvdx.integrations.keras3_checkpoint import SEED, array, assign, slots
from hvdx.integrations.keras3_checkpoint import told as described
from hvdx.integrations.keras3_fit import Trainer, batches, parts
from hvdx.integrations.keras3_graph import Batch, Graph
from hvdx.integrations.keras3_losses import Objective
from hvdx.integrations.keras3_masks import MASK
from hvdx.integrations.keras3_pipeline_optimizer import anew, built, measured, pass_by, summary
from hvdx.integrations.keras3_trace import traced
from hvdx.integrations.keras_loss_scale import LossScale
from hvdx.integrations.keras_sync_batch_norm import SyncBatchNormalization
from hvdx.pipeline import ir
from hvdx.pipeline.channel import Key
from hvdx.pipeline.moves import MovingPipeline
from hvdx.pipeline.options import Told, check_options, rows_of, settled
from hvdx.pipeline.plan import Plan
from hvdx.pipeline.rebalance import Rebalance
from hvdx.replicas import broadcast_parameters

_BACKENDS = {  # of Keras: who computes stages, and who measures units
    "tensorflow": ("hvdx.integrations.keras3_stages", "hvdx.integrations.keras3_profile"),
    "torch": ("hvdx.integrations.keras3_stages_torch", "hvdx.integrations.keras3_stages_torch"),
}
_Place: TypeAlias = tuple[str, ...]  # of a tensor in a checkpoint


class Pipeline(MovingPipeline):
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
            running ones move once per batch, by all of it; ``"micro"``: with each micro-batch;
            ``"sync"``: as deferred, but the micro-batches that replicas of a stage compute side
            by side are normalized together.
        channel: how tensors travel between ranks: ``"zmq"``; ``"horovod"``, slower, needs nothing
            else.
        seed: of dropout and the like; default: drawn by Python's ``random`` on rank 0.
        rebalance: ``"auto"``, or a :class:`hvdx.Rebalance`: units move to other stages while
            training where that makes steps quicker; see :meth:`rebalance`, which does it at once.
            Default: never by themselves.

    Attributes:
        plan: cuts, places and schedule; ``plan.save(path)`` keeps it.
        units: names of all units, in order.
        steps: batches that the model has been trained on, before a :meth:`load`, too.
        optimizer: of this process' stages.
        moves: how often units have moved to other stages.
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
        rebalance: Rebalance | str | None = None,
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
            rebalance=rebalance,
        )
        with self._alike():
            check_options(told.micro_batches, place, clip_norm, told.checkpoint, batchnorm, channel)
            _refuse(by, others)
            self._graph = traced(model, sample, deferred=batchnorm != "micro")
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
            self._params = self._own_params()
            self.optimizer, self._scale = built(
                optimizer, self._graph.model.dtype_policy.name, self._params, self._across
            )
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
            validation_data = batches(parts(validation_data), batch_size, None)
        data = batches((x, y, sample_weight), batch_size, self._seed if shuffle else None)
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
        data = batches((x, y, sample_weight), batch_size, None)
        return self._trainer(metrics, weighted_metrics).evaluate(data, **options)

    def predict(self, x: Any, batch_size: int = 32, **options: Any) -> Any:
        """Compute the outputs as Keras' ``predict``: arrays, on every rank."""
        data = batches((x, None, None), batch_size, None)
        return self._trainer(None, None).predict(data, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, optimizer, step and plan to one ``safetensors`` file; every rank calls it.

        Arrays lie under the paths of the model's variables: ``hvd.load_state(path)["model"]``.
        Afterwards the model of rank 0 is up to date, too, and can be saved as Keras does.
        :class:`hvd.Checkpoints` keeps several, and has each rank write its own share.

        Raises:
            OSError: rank 0 cannot write it. An older file is as it was.
        """
        with self._telling("save"):
            whole = self._gathered()
            self._told_by_first("saved to", path, lambda: write_tree(Path(path), whole))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote with any number of stages; rank 0 reads, all call it.

        Raises:
            OSError: it cannot be read, is damaged, or is of another model; all that differs is
                listed, and nothing has changed.
        """
        with self._telling("load"):
            told = self._told_by_first("loaded from", path, lambda: _read(Path(path)))
            self._take_fitting(path, told)

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

    # --- making one

    def _profile(
        self,
        sample: Any,
        micro_batches: int,
        runs: int = 5,
        of: Callable[[Iterable[float]], float] = min,
    ) -> ir.Graph:
        line = self._profile_of.profiled(self._graph, sample, micro_batches, runs, of)
        return line  # type: ignore[no-any-return]  # of a module that is loaded by name

    def _trains_with(self) -> bool:
        return bool(self._loss) and self._given is not None

    def _rows(self, batch: Any) -> int:
        return rows_of([tuple(each.shape) for each in self._graph.tensors(batch).values()])

    def _measured_update(self) -> tuple[float, float]:
        variables = self._graph.model.trainable_variables
        return measured(self._given, variables, self._stages_of.apply)

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
        optimizer = anew(self._given)
        made: Pipeline = self._again(optimizer=optimizer, stages=plan, compression=compression)
        return made

    def _check_cut(self, plan: Plan) -> None:
        """Refuse what training changes in two stages, or together with ranks of other stages."""
        owner: dict[str, int] = {}
        for number, (first, stop) in enumerate(plan.edges(self._line)):
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
                    "but those of other stages do not have it: use BatchNormalization, with "
                    "batchnorm='sync' if the replicas of its stage shall normalize together"
                )
            if self._syncs(plan.rows) and any(getattr(p, "renorm", 0) for p in unit.parts):
                raise PlanError(
                    f"layer {unit.name!r} has renorm=True, which normalizes by running statistics: "
                    "batchnorm='sync' cannot; use batchnorm='deferred', or leave renorm= out"
                )

    def _make_stages(self) -> dict[int, Any]:
        self._check_cut(self.plan)
        stages: dict[int, Any] = {}
        split = self.plan.order().splits
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

    def _own_params(self) -> dict[str, Any]:
        """Return by name the variables that this process trains."""
        units = [unit for _, first, stop in self._own_stages()
                 for unit in self._graph.units[first:stop]]  # fmt: skip
        return {name: variable for unit in units for name, variable in unit.owned.items()}

    def _weights(self, unit: int) -> Mapping[str, Any]:
        return self._graph.units[unit].owned

    # --- moving units

    def _trained(self, anew: bool = False) -> tuple[float, ...]:
        if anew:
            self._graph.refresh()
        return moves.trained(self._graph)

    def _about(self, unit: int) -> None:
        return None

    def _prepared(self, plan: Plan, about: Mapping[int, Any]) -> None:
        self._check_cut(plan)

    @property
    def _inner(self) -> Any:
        """Return the optimizer without a loss scale around it."""
        return self._scale.inner if self._scale else self.optimizer

    def _packed(self, unit: int, known: Sequence[int]) -> dict[str, Any]:
        return moves.packed(self._graph, unit, known, self._inner)

    def _rebuild(self, prepared: None, arrived: Mapping[int, dict[str, Any]]) -> None:
        variables, optimizer = self._all_variables(), self._inner
        self._stages.update(self._make_stages())
        for parcel in arrived.values():
            moves.assign(variables, parcel["model"])
        before, self._params = self._params, self._own_params()
        if optimizer is None or self._params.keys() == before.keys():
            return
        states = moves.slots_of(optimizer, before) if before else {}
        for parcel in arrived.values():
            states.update(parcel["optimizer"])
        moves.rebuild(optimizer, self._params, states)
        for parcel in arrived.values():
            moves.single(optimizer, parcel["single"])

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
        self._check_optimizers(summary(self.optimizer))
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
        self._step_done()
        return found

    def _apply(self, totals: dict[str, Any]) -> None:
        """Step the optimizer with the gradients there are."""
        optimizer = self._inner
        names = [name for name in self._params if name in totals]
        if names:
            variables = [self._params[name] for name in names]
            self._stages_of.apply(optimizer, [totals[name] for name in names], variables)
        elif self._params:  # all are frozen now
            pass_by(optimizer)

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
        return self._stages_of.arrived(gradient, self._weights(unit)[name])  # frozen ones, too

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

    def share_of_state(self) -> dict[str, Any]:
        """Return what this rank has to save; every rank calls it.

        Together they are what :meth:`save` writes: dictionaries whose entries are merged.
        """
        with self._telling("save"):
            return merged([self._common_state(), _as_tree(self._own_state())])  # type: ignore[no-any-return]

    def misfits(self, told: dict[str, Any]) -> list[str]:
        """Say what of a checkpoint does not fit this pipeline; nothing is changed."""
        here = {n: v for n, v in self._all_variables().items() if SEED not in n}
        there = {name: each for name, each in told["model"].items() if SEED not in name}
        found = differences(there, here, described)
        if self.optimizer is not None and "optimizer" in told:
            found += [
                f"the optimizer's {name!r} is not in the checkpoint"
                for name in slots(self.optimizer)
                if name not in told["optimizer"]
            ]
        return [*found, *self._compression_misfits(told)]

    def take_state(self, told: dict[str, Any]) -> None:
        """Go on from what all ranks' :meth:`share_of_state` were together."""
        _assign(self._all_variables(), told["model"])
        if self.optimizer is not None and "optimizer" in told:
            _assign(slots(self.optimizer), told["optimizer"])
        kept = mapped(told.get("compression"), tree.array)
        self._load_compression(kept and {**kept, "parameters": _tensors(kept["parameters"])})
        self._go_on(told)

    def _gathered(self) -> dict[str, Any]:
        """Bring rank 0's model up to date; return there what a checkpoint holds."""
        own = self._own_state()
        parts = [self._common_state(), _as_tree(own)]
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
                parts.append(_as_tree(dict(zip(names[rank], arrived, strict=True))))
        whole: dict[str, Any] = merged(parts)
        _assign(self._all_variables(), whole["model"])
        return whole

    def _own_state(self) -> dict[_Place, Any]:
        """Return the tensors of a checkpoint that this process has.

        Replicas leave them to the first.
        """
        kept = self._compression_state()
        if self._rank not in self._leads:
            return {}
        own: dict[_Place, Any] = {}
        for _, first, stop in self._own_stages():
            for name, variable in self._graph.variables(self._graph.units[first:stop]).items():
                own["model", name] = keras.ops.stop_gradient(variable.value)
        if self.optimizer is not None and self._params:
            for name, variable in slots(self.optimizer).items():
                own["optimizer", name] = keras.ops.stop_gradient(variable.value)
        for name, tensors in kept.items():
            own.update({("compression", "parameters", name, p): t for p, t in tensors.items()})
        return own


def _as_tree(tensors: dict[_Place, Any]) -> dict[str, Any]:
    """Return nested dictionaries of arrays."""
    whole: dict[str, Any] = {}
    for place, tensor in tensors.items():
        inner = whole
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = array(tensor)
    return whole


def _read(path: Path) -> dict[str, Any]:
    ours, found = read_tree(path)
    whole: dict[str, Any] = mapped(found, tree.array)
    return whole if ours else {"model": whole}


def _tensors(kept: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {path: keras.ops.convert_to_tensor(each) for path, each in own.items()}
        for name, own in kept.items()
    }


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


def _assign(variables: dict[str, Any], told: dict[str, Any]) -> None:
    """Give variables what lies under their names; random states may be missing."""
    for name, variable in variables.items():
        if name in told:
            assign(variable, mapped(told[name], tree.array))
