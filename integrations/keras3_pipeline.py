"""``hvd.Pipeline`` for Keras 3 on TensorFlow: train a model in stages, on several ranks or here."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdx.agreement import next_name
from hvdx.compression import none
from hvdx.errors import PlanError
from hvdx.integrations.keras3_fit import Shuffled, Trainer
from hvdx.integrations.keras3_profile import profiled
from hvdx.integrations.keras3_stages import Batch, KerasStage, TensorFlowCodec, traced
from hvdx.pipeline import ir
from hvdx.pipeline.base import BasePipeline, check_options, rows_of
from hvdx.pipeline.channel import Key
from hvdx.pipeline.plan import Plan
from hvdx.replicas import broadcast_parameters

_FORMAT = 1
_ABOUT = "hvdx_pipeline"


class Pipeline(BasePipeline):
    """A model whose layers are spread over devices of this process, or over the ranks of the job.

    Every rank calls the same lines with the same batch: the first stage reads ``x``, the last
    one ``y``, and the loss returns everywhere. Parameters begin as rank 0 has them. Schedule,
    cuts and placement change no bit of what is learnt; more micro-batches change rounding.

    Each rank keeps the whole model, but trains only its stages' part: see :meth:`save`. What is
    trainable is settled when the pipeline is made.

    Args:
        model: a Sequential or functional model. Each call of a layer is a unit; a model in it is
            one layer.
        sample: a batch, or a part of one: an array, a list of them, or a dictionary by the
            names of the inputs. It is run once.
        loss: as for ``compile``: a name, ``keras.losses.Loss``, or function of ``y_true`` and
            ``y_pred``; one for all outputs, or a list of one each. It means over samples.
        optimizer: a Keras optimizer, new, or its name. It is this rank's alone.
        micro_batches: pieces of a batch. Fewer where a batch has fewer rows.
        stages: how many; names of the units that all but the first begin with; how many units
            each has; or a :class:`hvdx.pipeline.plan.Plan`. Default: one per rank or device, two
            for ``interleaved`` and ``zbv``.
        place: devices of this process, one per stage or two, such as ``["cpu", "cpu"]`` or
            TensorFlow's ``["CPU:0", "CPU:1"]``. Or rows of ranks that are replicas of each other:
            ``[[0, 2], [1, 3]]`` trains two stages, each on two ranks that share its micro-batches.
            Default: the ranks of the job, if there are several, one per stage or two; else this
            one process.
        schedule: ``gpipe``, ``1f1b``, ``1f1b-slack``, ``interleaved``, ``zb1p``, ``zbv``,
            ``zbv-slack``, or text; ``"auto"``: the quickest by the measured times. TensorFlow
            finds both halves of a backward at once: ``zb1p`` and ``zbv`` gain less.
        by: what cuts even out: ``"params"`` or ``"time"``. Default: time under
            ``schedule="auto"``, else params. Time runs micro-batches of ``sample``, on rank 0, to
            measure the units: let it be a whole batch.
        clip_norm: scales all gradients down to this norm over all stages where theirs is larger,
            in the place of the optimizer's ``global_clipnorm``.
        checkpoint: ``"always"``: stages keep only the inputs of micro-batches and compute the
            rest again for backward; ``"except_last"``: not of the last one; ``"never"``.
        compression: of the gradients that replicas add up, ``hvd.Compression.int8`` for instance.
        seed: of dropout and the like; default: drawn by Python's ``random`` on rank 0.

    Attributes:
        plan: cuts, places and schedule; ``plan.save(path)`` keeps it.
        units: names of all units, in order.
        optimizer: of this process' stages.
        gradient_norm: of the last step, before clipping, with ``clip_norm``; else None.

    Raises:
        PlanError: the model cannot be cut or placed as asked.
        MismatchError: ranks differ in model or options; raised on every rank.

    Example:
        >>> pipe = hvd.Pipeline(model, x, loss="mse", optimizer=keras.optimizers.Adam(1e-3))
        >>> for x, y in batches:
        ...     loss = pipe.step(x, y)
    """

    def __init__(
        self,
        model: Any,
        sample: Any,
        loss: Any = None,
        optimizer: Any = None,
        *,
        micro_batches: int = 8,
        stages: int | Sequence[str] | Sequence[int] | Plan | None = None,
        place: Sequence[str] | Sequence[Sequence[int]] | None = None,
        schedule: str = "1f1b",
        by: str | None = None,
        clip_norm: float | None = None,
        checkpoint: str = "never",
        compression: Any = None,
        seed: int | None = None,
        **others: Any,
    ) -> None:
        _check_backend()
        super().__init__(
            "tensorflow",
            TensorFlowCodec(),
            place,
            random.getrandbits(31) if seed is None else seed,
            clip_norm=clip_norm,
            checkpoint=checkpoint,
            compression=compression,
        )
        with self._alike():
            check_options(micro_batches, place, clip_norm, checkpoint)
            _refuse(by, others)
            self._graph = traced(model, sample)
            self.units = [unit.name for unit in self._graph.units]
            self._loss = None if loss is None else _Losses(loss, len(self._graph.outputs))
            self.plan = self._planned(sample, stages, schedule, micro_batches, by, None)
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

    def step(self, x: Any, y: Any) -> Any:
        """Train on a batch; return its loss, the mean weighted by the micro-batches' sizes.

        Args:
            x: as ``sample`` was; arrays are cut along their first dimension.
            y: what the loss compares with: an array, or one for each output.

        Raises:
            PipelineError: something failed, here or on another rank; raised on every rank.
        """
        return self._train(x, y)[0]

    def __call__(self, x: Any) -> Any:
        """Compute the model's output for a batch, in inference mode, on every rank."""
        with self._telling("call"):
            tensors = self._run(x, None, train=False)
            self._step += 1
        return self._as_result(tensors)

    def fit(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        epochs: int = 1,
        *,
        shuffle: bool = True,
        metrics: Sequence[Any] | None = None,
        validation_data: Any = None,
        **options: Any,
    ) -> Any:
        """Train as Keras' ``fit``; every rank calls it with the same data, and trains all of it.

        Args:
            x: arrays, or a dataset that gives every rank the same batches.
            y: arrays; None with a dataset.
            batch_size: of arrays.
            epochs: through the data.
            shuffle: arrays, in an order of the pipeline's seed.
            metrics: as for ``compile``.
            validation_data: ``(x, y)`` or a dataset.
            **options: others of Keras' ``fit``: ``callbacks`` among them. Their ``model`` saves
                the whole model by ``save`` and ``save_weights``, called on every rank.

        Returns:
            Keras' history.
        """
        trainer = self._trainer(metrics)
        if validation_data is not None:
            validation_data = self._dataset(*_pair(validation_data), batch_size, False)
        data = self._dataset(x, y, batch_size, shuffle)
        # Keras would shuffle the batches once more, on each rank in its own way.
        options["shuffle"] = False
        return trainer.fit(data, epochs=epochs, validation_data=validation_data, **options)

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        *,
        metrics: Sequence[Any] | None = None,
        **options: Any,
    ) -> Any:
        """Compute loss and metrics as Keras' ``evaluate``, on every rank."""
        data = self._dataset(x, y, batch_size, False)
        return self._trainer(metrics).evaluate(data, **options)

    def predict(self, x: Any, batch_size: int = 32, **options: Any) -> Any:
        """Compute the outputs as Keras' ``predict``: arrays, on every rank."""
        return self._trainer(None).predict(self._dataset(x, None, batch_size, False), **options)

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
            self._step, self._seed = about["step"], about["seed"]
            for stage in self._stages.values():
                stage.seed = self._seed

    # --- fit

    def _trainer(self, metrics: Sequence[Any] | None) -> Trainer:
        def train(x: Any, y: Any, outputs: bool) -> tuple[Any, Any]:
            loss, *tensors = self._train(x, y, outputs)
            return loss, self._as_result(tensors) if outputs else None

        def collect() -> bool:
            with self._telling("save"):
                self._gathered()
            return self._rank == 0

        def settle(problem: str) -> None:
            told = self._from_first(problem)
            if told:
                raise OSError(f"the model cannot be saved: {told}")

        def compare(y: Any, outputs: Any) -> Any:
            assert self._loss is not None
            return self._loss(keras.tree.flatten(y), keras.tree.flatten(outputs))

        trainer = Trainer(self._graph.model, train, self, self._loss and compare, collect, settle)
        trainer.prepare(self.optimizer, metrics)
        return trainer

    def _dataset(self, x: Any, y: Any, size: int, shuffle: bool) -> Any:
        """Make batches of arrays; leave datasets as they are."""
        arrays = keras.tree.flatten(x if y is None else (x, y))
        if not all(hasattr(each, "shape") for each in arrays):
            return x
        data = (x,) if y is None else (x, y)
        data = keras.tree.map_structure(np.asarray, data)
        rows = rows_of([each.shape for each in keras.tree.flatten(data)])
        return Shuffled(data, rows, size, self._seed if shuffle else None)

    # --- making one

    def _profile(self, sample: Any, micro_batches: int) -> ir.Graph:
        return profiled(self._graph, sample, micro_batches)

    def _make_stages(self) -> dict[int, KerasStage]:
        stages: dict[int, KerasStage] = {}
        edges = self.plan.edges(self._line)
        owner: dict[str, int] = {}
        for number, (first, stop) in enumerate(edges):
            for variable in self._graph.untrained(first, stop):
                name = self._graph.names[id(variable)]
                if owner.setdefault(name, number) != number:
                    raise PlanError(
                        f"variable {name!r}, which training changes without gradients, is used in "
                        f"stages {owner[name]} and {number}: cut so that one stage has both uses"
                    )
        devices = [*map(_device, self._devices or [])]
        for number, first, stop in self._own_stages():
            stages[number] = KerasStage(
                self._graph,
                first,
                stop,
                loss=self._loss,
                device=devices[self.plan.place[number]] if devices else None,
                seed=self._seed,
            )
        return stages

    def _checked(self, told: Any) -> Any:
        """Return the optimizer, built for this process' variables."""
        if told is None:
            return None
        optimizer = keras.optimizers.get(told)
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise PlanError("a LossScaleOptimizer scales no loss here: use bfloat16 or float32")
        if self._across and optimizer.global_clipnorm:
            raise PlanError(
                f"global_clipnorm={optimizer.global_clipnorm} needs the norm over all ranks, which "
                "an optimizer does not know: give it to the pipeline, as "
                f"clip_norm={optimizer.global_clipnorm}"
            )
        if optimizer.built:
            raise PlanError(
                f"optimizer {optimizer.name!r} is built for other variables already; give a new one"
            )
        if self._params:
            optimizer.build(list(self._params.values()))
        return optimizer

    def _agree(self) -> None:
        """Compare the ranks' pipelines, and begin with rank 0's parameters."""
        model = self._graph.model
        entries = {
            unit.name: str({name: tuple(v.shape) for name, v in unit.params.items()})
            for unit in self._graph.units
        }
        self._check_agreed(entries)
        if model.variables:
            broadcast_parameters(model.variables)

    # --- a step

    def _train(self, x: Any, y: Any, outputs: bool = False) -> list[Any]:
        """Train on a batch; return its loss and, if asked for, the outputs."""
        with self._telling("step"):
            if self._loss is None or self.optimizer is None:
                raise PlanError("step() needs the loss= and optimizer= that it was made without")
            found = self._run(x, y, train=True, outputs=outputs)
            totals = self._totals()
            if self._params:
                gradients = [totals.get(name) for name in self._params]
                self.optimizer.apply(gradients, list(self._params.values()))
            self._step += 1
        return found

    def _run(self, x: Any, y: Any, train: bool, outputs: bool = False) -> list[Any]:
        """Run the schedule; return the loss, or the outputs, on every rank."""
        inputs = {name: tf.convert_to_tensor(each) for name, each in self._graph.bind(x).items()}
        targets = keras.tree.map_structure(tf.convert_to_tensor, y) if train else None
        tensors = [*inputs.values(), *keras.tree.flatten(targets if train else [])]
        rows = rows_of([tuple(tensor.shape) for tensor in tensors])
        sizes = self._sizes(rows, train)
        batch = Batch(
            self._step,
            _pieces(inputs, sizes),
            _pieces(targets, sizes) if train else [],
            [size / rows for size in sizes],
            train,
            outputs,
        )
        return self._perform(batch, rows, train)

    def _tensor(self, numbers: Sequence[float]) -> Any:
        return tf.constant(numbers, tf.float64)

    def _norms(self, gradients: Sequence[Any]) -> list[float]:
        wide = [tf.cast(each, tf.float32) if each.dtype.size < 4 else each for each in gradients]
        return [float(tf.norm(each)) for each in wide]

    def _joined(self, pieces: Sequence[Sequence[Any]], train: bool) -> list[Any]:
        outputs = [
            tf.concat(each, 0) if each[0].shape.rank else tf.stack(each)
            for each in zip(*(piece[1:] if train else piece for piece in pieces), strict=True)
        ]
        if not train:
            return outputs
        return [functools.reduce(tf.add, (piece[0] for piece in pieces)), *outputs]

    def _as_result(self, tensors: Sequence[Any]) -> Any:
        return keras.tree.pack_sequence_as(self._graph.result, list(tensors))

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
            for rank in sorted({*self._leads} - {0}):
                arrived = self._channel.receive(rank, key)
                for name, tensor in zip(names[rank], arrived, strict=True):
                    arrays.setdefault(name, _array(tensor))
        _assign(self._all_variables(), arrays, "model")
        about = {"format": _FORMAT, "step": self._step, "seed": self._seed}
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
            for name, variable in self._graph.variables(first, stop).items():
                own[f"model/{name}"] = tf.convert_to_tensor(variable.value)
        if self.optimizer is not None:
            for name, variable in _slots(self.optimizer).items():
                own[f"optimizer/{name}"] = tf.convert_to_tensor(variable.value)
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
                kept.setdefault(parameter, {})[path] = tf.constant(array)
        told = {"compressor": about["compression"], "steps": about["compression_steps"]}
        self._load_compression({**told, "parameters": kept})


def _pair(data: Any) -> tuple[Any, Any]:
    return tuple(data) if isinstance(data, (tuple, list)) and len(data) == 2 else (data, None)


class _Losses:
    """The sum of the losses of a model's outputs, as ``compile`` understands them.

    Raises:
        PlanError: one of them is not a mean over samples.
    """

    def __init__(self, told: Any, outputs: int) -> None:
        flat = keras.tree.flatten(told) if isinstance(told, (list, tuple, dict)) else None
        if flat is not None and len(flat) != outputs:
            raise PlanError(f"{len(flat)} losses are given for {outputs} outputs")
        self._each = [_loss(one) for one in flat or [told] * outputs]

    def __call__(self, targets: Sequence[Any], outputs: Sequence[Any]) -> Any:
        if len(targets) != len(outputs):
            raise ValueError(f"y has {len(targets)} parts, the model {len(outputs)} outputs")
        total: Any = None
        for loss, target, output in zip(self._each, targets, outputs, strict=True):
            part = loss(target, output)
            total = part if total is None else total + part
        return total


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
    if loss.reduction not in ("sum_over_batch_size", "mean", "mean_with_sample_weight"):
        raise PlanError(
            f"loss {loss.name!r} has reduction={loss.reduction!r}, which micro-batches would "
            "change: use 'sum_over_batch_size'"
        )
    return loss


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


def _check_backend() -> None:
    if keras.backend.backend() != "tensorflow":
        raise TypeError(
            f"Keras runs on the {keras.backend.backend()!r} backend; pipelines of Keras models "
            "need KERAS_BACKEND=tensorflow (or write the model in PyTorch)"
        )


def _device(told: str) -> str:
    """Return a device that exists.

    Raises:
        PlanError: it does not.
    """
    names = {d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()}
    plain = str(told).upper().removeprefix("/").removeprefix("DEVICE:")
    name = plain if ":" in plain else f"{plain}:0"
    if name not in names:
        raise PlanError(f"place has {told!r}, but TensorFlow has {', '.join(sorted(names))}")
    return f"/device:{name}"


def _pieces(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut all tensors of ``batch`` into runs of rows; scalars are in each piece."""
    pieces, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        pieces.append(
            keras.tree.map_structure(lambda x, rows=rows: x[rows] if x.shape.rank else x, batch)
        )
        start += size
    return pieces


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
