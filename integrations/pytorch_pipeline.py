"""``hvd.Pipeline`` for PyTorch: train a model in stages, on several devices or ranks."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from hvdx import world
from hvdx.agreement import next_name
from hvdx.checkpoints.files import read_tree, write_tree
from hvdx.checkpoints.tree import mapped, merged
from hvdx.errors import PlanError
from hvdx.integrations import pytorch_moves as moves
from hvdx.integrations.pytorch import on_host
from hvdx.integrations.pytorch_channel import (
    BACKENDS,
    DistributedChannel,
    TorchCodec,
    check_gpus,
)
from hvdx.integrations.pytorch_checkpoint import misfits
from hvdx.integrations.pytorch_graph import (
    Graph,
    batch_norms,
    mode,
    result_names,
    result_of,
    traced,
    unflat,
)
from hvdx.integrations.pytorch_precision import Casts, set_aside, uncached
from hvdx.integrations.pytorch_profile import profiled, update_seconds
from hvdx.integrations.pytorch_stages import Batch, TorchStage, usable_device
from hvdx.integrations.pytorch_sync_batch_norm import SyncBatchNorm
from hvdx.pipeline import ir
from hvdx.pipeline.channel import Key
from hvdx.pipeline.connect import over_zmq
from hvdx.pipeline.moves import MovingPipeline
from hvdx.pipeline.options import Told, check_options, rows_of, settled
from hvdx.pipeline.plan import Plan
from hvdx.pipeline.post import PostChannel
from hvdx.pipeline.rebalance import Rebalance
from hvdx.replicas import broadcast_parameters

_MEASURED = 1 << 26  # bytes of parameters on which the optimizer is measured, and the one more


class Pipeline(MovingPipeline):
    """A model whose layers are spread over devices of this process, or over the ranks of the job.

    Every rank calls the same lines with the same batch: the first stage reads ``x``, the last
    one ``y``, and the loss returns everywhere. Parameters begin as rank 0 has them. Schedule,
    cuts and placement change no bit of what is learnt; more micro-batches change rounding.

    Each rank keeps the whole model, but trains only its stages' part: see :meth:`save`. In one
    process, stages on devices other than the model's move their part there.

    Args:
        model: any module that ``torch.fx`` can trace.
        sample: a batch, or a part of one: a tensor, a tuple of forward's arguments, or a
            dictionary of them by name. It is run once.
        loss: ``loss(output, y)``, the mean over a micro-batch, a scalar. Without it the
            pipeline only computes outputs.
        optimizer: makes an optimizer of a list of parameters; called once per stage. It should
            treat each parameter for itself, as all but LBFGS do.
        micro_batches: pieces of a batch; default 8. Fewer where a batch has fewer rows.
        stages: how many; names of the units, or modules, that all but the first begin with; how
            many units each has; or a :class:`hvdx.pipeline.plan.Plan`. Default: one per rank or
            device, two for ``interleaved`` and ``zbv``.
        by: what cuts even out: ``"params"``, ``"time"`` or ``"memory"``. Default: time under
            ``schedule="auto"``, else params. All but params run micro-batches of ``sample``, on
            rank 0, to measure the units: let it be a whole batch.
        memory: bytes that each rank or device has for parameters, gradients, Adam's moments and
            activations, or a list of them; what does not fit is not chosen. Default: enough.
        place: devices of this process, one per stage or two, such as ``["cpu", "cpu"]``. Or rows
            of ranks that are replicas of each other: ``[[0, 2], [1, 3]]`` trains two stages, each
            on two ranks that share its micro-batches. Or ``"auto"``: what is quickest, with all
            that is left out here: rows, cuts, ``micro_batches``, ``schedule``, and with ``memory``
            also ``checkpoint``. All is measured on ``sample``, a whole batch, and a few plans are
            tried; the model and random numbers stay as they were. Default: the ranks of the job,
            if there are several, one per stage or two; else this one process.
        schedule: ``gpipe``, ``1f1b`` (the default), ``1f1b-slack``, ``interleaved``, ``zb1p``,
            ``zbv``, ``zbv-slack``, or text; ``"auto"``: the quickest by the measured times.
        target: with ``place="auto"`` what ``step`` gets as ``y`` for ``sample``. Default: the
            model's own outputs, which not every loss can take.
        clip_norm: scales all gradients down to this norm over all stages where theirs is larger,
            as ``torch.nn.utils.clip_grad_norm_`` does.
        checkpoint: ``"always"``: stages keep only the inputs of micro-batches and compute the
            rest again for backward; ``"except_last"``: not of the last one; ``"never"``, the
            default.
        compression: of the gradients that replicas add up, ``hvd.Compression.int8`` for instance.
            With ``place="auto"`` also ``hvd.Compression.auto("safe")``: if and how is planned, too.
        batchnorm: micro-batches are normalized by their own statistics; ``"deferred"``: the
            running ones move once per batch, by all of it; ``"micro"``: with each micro-batch;
            ``"sync"``: as deferred, but the micro-batches that replicas of a stage compute side
            by side are normalized together.
        scaler: a ``torch.amp.GradScaler``, for float16: every rank gives an equal one. The
            pipeline does what is done with it: scale, unscale, skip and update.
        channel: how tensors travel between ranks: ``"zmq"``; ``"horovod"``, slower, needs nothing
            else; ``"nccl"``, from GPU to GPU by ``torch.distributed``, or its ``"gloo"``.
        leaves: classes, or paths, of modules to be kept whole.
        seed: of dropout and the like; default ``torch.initial_seed()`` of rank 0.
        rebalance: ``"auto"``, or a :class:`hvdx.Rebalance`: units move to other stages while
            training where that makes steps quicker; see :meth:`rebalance`, which does it at once.
            Default: never by themselves.

    Attributes:
        plan: cuts, places and schedule; ``plan.save(path)`` keeps it.
        units: names of all units, in order.
        steps: batches that the model has been trained on, before a :meth:`load`, too.
        optimizers: those of this process, by stage: for learning-rate schedulers.
        moves: how often units have moved to other stages.
        gradient_norm: of the last step, before clipping, with ``clip_norm``; else None.
        skipped: whether the last step changed no parameter, since a gradient under ``scaler``
            was not finite.

    Raises:
        PlanError: the model cannot be traced, cut or placed as asked.
        MismatchError: ranks differ in model or options; raised on every rank.

    Example:
        >>> pipe = hvd.Pipeline(model, x, loss=nn.functional.cross_entropy,
        ...                     optimizer=lambda params: torch.optim.Adam(params, 1e-3))
        >>> for x, y in batches:
        ...     loss = pipe.step(x, y)
    """

    channels = (*MovingPipeline.channels, *BACKENDS)
    _graph: Graph

    def __init__(
        self,
        model: nn.Module,
        sample: Any,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        *,
        micro_batches: int | None = None,
        stages: int | Sequence[str] | Sequence[int] | Plan | None = None,
        place: str | Sequence[str | torch.device] | Sequence[Sequence[int]] | None = None,
        schedule: str | None = None,
        by: str | None = None,
        memory: float | Sequence[float] | None = None,
        target: Any = None,
        clip_norm: float | None = None,
        checkpoint: str | None = None,
        compression: Any = None,
        batchnorm: str = "deferred",
        scaler: Any = None,
        channel: str = "zmq",
        leaves: Sequence[Any] = (),
        seed: int | None = None,
        rebalance: Rebalance | str | None = None,
    ) -> None:
        told = settled(Told(micro_batches, schedule, checkpoint), place, stages)
        super().__init__(
            "torch",
            TorchCodec(),
            place,
            torch.initial_seed() if seed is None else seed,
            clip_norm=clip_norm,
            checkpoint=told.checkpoint,
            compression=compression,
            batchnorm=batchnorm,
            channel=channel,
            rebalance=rebalance,
        )
        self._loss, self._optimizer = loss, optimizer
        with self._alike(), uncached():
            _check_arguments(model, loss, optimizer, scaler)
            self._scaler = _Scaler(scaler) if scaler is not None and scaler.is_enabled() else None
            check_options(
                told.micro_batches, place, clip_norm, told.checkpoint, batchnorm, channel,
                self.channels,
            )  # fmt: skip
            self._graph = traced(model, sample, leaves)
            self.units = [unit.name for unit in self._graph.units]
        asked = {"micro_batches": told.micro_batches, "schedule": told.schedule}
        self._agree_on(stages=stages, by=by, memory=memory, **asked)
        with self._alike():
            if self._auto:
                self._again = functools.partial(
                    Pipeline, model, sample, loss, optimizer, clip_norm=clip_norm,
                    batchnorm=batchnorm, channel=channel, leaves=leaves, seed=self._seed,
                )  # fmt: skip
                self._scaler_given = scaler
            self.plan = self._planned(sample, stages, told, by, memory, target)
            self._stages = self._make_stages()
            self._params = self._shares(self.plan)
            self.optimizers = self._first_optimizers()
            self._compressor = self._checked_compression(
                {type(each).__name__: each.defaults for each in self.optimizers.values()}
            )
        if self._across:
            self._agree()
        self._connect()

    # --- what users call

    def step(self, x: Any, y: Any) -> torch.Tensor:
        """Train on a batch; return its loss, the mean weighted by the micro-batches' sizes.

        Under ``torch.autocast`` all stages, and the loss, compute as it says.

        Args:
            x: as ``sample`` was; tensors are cut along their first dimension.
            y: what the loss compares with: a tensor, or containers of some, cut likewise.

        Raises:
            PipelineError: something failed, here or on another rank; raised on every rank.
        """
        with self._telling("step"), set_aside() as casts:
            if self._loss is None:
                raise PlanError("step() needs the loss= that the pipeline was made without")
            scale = self._scaler.scale() if self._scaler else None
            (total,) = self._run(x, y, True, casts, scale)
            self._update(scale)
            self._step += 1
            self.steps += 1
        self._step_done()
        return total

    def __call__(self, x: Any) -> Any:
        """Compute the model's output for a batch, in inference mode, on every rank."""
        with self._telling("call"), mode(self._graph.model, False), set_aside() as casts:
            tensors = iter(self._run(x, None, False, casts))
            names = dict.fromkeys(result_names(self._graph))
            values = {name: unflat(*self._graph.kinds[name], tensors) for name in names}
            self._step += 1
        return result_of(self._graph, values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, optimizers, step and plan to one ``safetensors`` file; every rank calls it.

        Rank 0 writes. Under ``"model"`` lies a ``state_dict()`` with the model's original names:
        ``hvd.load_state(path)["model"]``, which the plain model loads, too; optimizer states lie
        under the names of the parameters. :class:`hvd.Checkpoints` keeps several, and has each
        rank write its own share.

        Raises:
            OSError: rank 0 cannot write it. An older file is as it was.
        """
        with self._telling("save"):
            whole = self._gathered(self._share())
            self._told_by_first("saved to", path, lambda: write_tree(Path(path), whole))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote with any number of stages, or a model's tensors alone.

        Rank 0 reads; every rank calls it. The latter is what ``safetensors.torch.save_file`` makes
        of a plain ``state_dict()``.

        Raises:
            OSError: it cannot be read, is damaged, or is of another model; all that differs is
                listed, and nothing has changed.
        """
        with self._telling("load"):
            told = self._told_by_first("loaded from", path, lambda: _read(Path(path)))
            self._take_fitting(path, told)

    # --- making one

    def _profile(
        self,
        sample: Any,
        micro_batches: int,
        runs: int = 5,
        of: Callable[[Iterable[float]], float] = min,
    ) -> ir.Graph:
        return profiled(self._graph, sample, micro_batches, runs, of)

    def _trains_with(self) -> bool:
        return self._loss is not None and self._optimizer is not None

    def _rows(self, batch: Any) -> int:
        return rows_of([each.shape for each in _tensors(self._graph.bind(batch))])

    def _measured_update(self) -> tuple[float, float]:
        params: list[nn.Parameter] = []
        most = _MEASURED
        for p in self._graph.model.parameters():
            if p.requires_grad and (not params or most > 0):
                params.append(p)
                most -= p.numel() * p.element_size()
        return update_seconds(self._optimizer, params) if params and self._optimizer else (0.0, 0.0)

    @contextlib.contextmanager
    def _preserved(self) -> Iterator[None]:
        model = self._graph.model
        before = [(p, p.grad) for p in model.parameters()]
        saved = {name: tensor.detach().clone() for name, tensor in _named_tensors(model)}
        try:
            with torch.random.fork_rng():
                yield
        finally:
            with torch.no_grad():
                for name, tensor in _named_tensors(model):
                    tensor.copy_(saved[name])
            for p, gradient in before:
                p.grad = gradient

    def _twin(self, plan: Plan, compression: Any) -> Pipeline:
        scaler = copy.deepcopy(self._scaler_given)
        made: Pipeline = self._again(stages=plan, compression=compression, scaler=scaler)
        return made

    def _connected(self, place: Sequence[int | Sequence[int]]) -> PostChannel:
        if self._carrier not in BACKENDS:
            return super()._connected(place)
        if self._carrier == "nccl":
            check_gpus(self._home, self._core, next_name("pipeline"))
        options = {"backend": self._carrier, "device": self._home}
        return over_zmq(DistributedChannel, self._core, self._codec, self._rank, place, **options)

    @property
    def _home(self) -> torch.device:
        """Return the device that the model lies on."""
        return next((p.device for p in self._graph.model.parameters()), torch.device("cpu"))

    def _make_stages(self) -> dict[int, TorchStage]:
        self._check_cut(self.plan)
        devices = self._stage_devices()
        stages: dict[int, TorchStage] = {}
        split = self.plan.order().splits
        for number, first, stop in self._own_stages():
            for unit in self._graph.units[first:stop] if devices else ():
                self._graph.move(unit, devices[number])
            stages[number] = TorchStage(
                self._graph,
                first,
                stop,
                loss=self._loss,
                device=devices.get(number, self._home),
                seed=self._seed,
                split=split,
                deferred=self._batchnorm != "micro",
            )
        return stages

    def _stage_devices(self) -> dict[int, torch.device]:
        """Return by stage the device that ``place`` names; across ranks none."""
        devices = [*map(usable_device, self._devices or [])]
        return {stage: devices[row] for stage, row in enumerate(self.plan.place) if devices}

    def _check_cut(self, plan: Plan) -> None:
        """Refuse what forward changes in two stages, or together with ranks of other stages.

        And weights that two devices would need.
        """
        graph = self._graph
        owner: dict[str, int] = {}
        edges = plan.edges(self._line)
        for number, (first, stop) in enumerate(edges):
            for name in graph.written(graph.units[first:stop]):
                if owner.setdefault(name, number) != number:
                    raise PlanError(
                        f"buffer {name!r}, which forward changes, is used in stages {owner[name]} "
                        f"and {number}: cut so that one stage has both uses"
                    )
        for name, module in batch_norms(graph, graph.units).items() if self._across else ():
            if isinstance(module, (nn.SyncBatchNorm, SyncBatchNorm)):
                raise PlanError(
                    f"layer {name!r} is a SyncBatchNorm, which waits for all ranks, but those of "
                    "other stages do not have it: use nn.BatchNorm, with batchnorm='sync' if the "
                    "replicas of its stage shall normalize together"
                )
            if self._syncs(plan.rows) and type(module).forward is not _BatchNorm.forward:
                raise PlanError(
                    f"layer {name!r} is a {type(module).__name__} with a forward of its own, which "
                    "batchnorm='sync' cannot compute for all replicas: use nn.BatchNorm, or "
                    "batchnorm='deferred'"
                )
        at: dict[int, torch.device] = {}  # parameter: where it is needed
        for number, device in self._stage_devices().items():
            for unit in graph.units[slice(*edges[number])]:
                for name, p in unit.params.items():
                    if at.setdefault(id(p), device) != device:
                        raise PlanError(
                            f"parameter {name!r} is used on {at[id(p)]} and, by unit "
                            f"{unit.name!r}, on {device}: cut so that one device has both, or use "
                            "zbv, whose first and last stage share a device"
                        )

    def _shares(self, plan: Plan) -> dict[int, dict[str, nn.Parameter]]:
        """Return by stage of this process the parameters it updates; a tied one's first does."""
        shares: dict[int, dict[str, nn.Parameter]] = {}
        taken: set[str] = set()
        for number, first, stop in self._own_stages(plan):
            units = self._graph.units[first:stop]
            held = {name: p for unit in units for name, p in unit.params.items()}
            shares[number] = {name: p for name, p in held.items() if name not in taken}
            taken.update(held)
        return shares

    def _made_optimizers(
        self, shares: dict[int, dict[str, nn.Parameter]]
    ) -> dict[int, torch.optim.Optimizer]:
        """Make an optimizer for each stage of this process that has parameters."""
        return {
            number: self._optimizer(list(params.values()))
            for number, params in shares.items() if params and self._optimizer
        }  # fmt: skip

    def _first_optimizers(self) -> dict[int, torch.optim.Optimizer]:
        """Make all stages' optimizers; units that move may bring parameters to any stage.

        Where there are none yet, schedulers of learning rates get an optimizer with empty groups.
        """
        every = list(self._graph.model.parameters())
        made = self._made_optimizers(self._params)
        if every and self._optimizer is not None:
            for number in self._params.keys() - made.keys():
                made[number] = self._optimizer(every)
                for group in made[number].param_groups:
                    group["params"] = []
        return dict(sorted(made.items()))

    # --- moving units

    def _trained(self, anew: bool = False) -> tuple[float, ...]:
        return moves.trained(self._graph)

    def _about(self, unit: int) -> dict[str, Any]:
        return moves.options_of(self._graph.units[unit], self._optimizer_states())

    def _prepared(self, plan: Plan, about: Mapping[int, Any]) -> dict[int, torch.optim.Optimizer]:
        self._check_cut(plan)
        shares = self._shares(plan)
        made = self._made_optimizers(shares)
        told = {name: entry["options"] for name, entry in self._optimizer_states().items()}
        told.update({name: each for unit in about.values() for name, each in unit.items()})
        moves.check_groups(self.optimizers, made, shares, told)
        return made

    def _packed(self, unit: int, known: Sequence[int]) -> dict[str, Any]:
        return moves.packed(self._graph, unit, known, self._optimizer_states())

    def _rebuild(
        self,
        prepared: dict[int, torch.optim.Optimizer],
        arrived: Mapping[int, dict[str, Any]],
    ) -> None:
        states = self._optimizer_states()
        self._stages.update(self._make_stages())
        came: dict[str, Any] = {}
        for parcel in arrived.values():
            came.update(parcel["model"])
            states.update(moves.copied(parcel["optimizer"]))
        self._graph.load(came)
        self._params = self._shares(self.plan)
        moves.rehome(self.optimizers, prepared, self._params, states)

    def _agree(self) -> None:
        """Compare the ranks' pipelines, and begin with rank 0's parameters."""
        model = self._graph.model
        entries = {unit.name: str({name: tuple(p.shape) for name, p in unit.params.items()})
                   for unit in self._graph.units}  # fmt: skip
        entries["the GradScaler"] = f"= {self._scaler.state() if self._scaler else None}"
        self._check_agreed(entries)
        made = {f"{type(each).__qualname__} {each.defaults}" for each in self.optimizers.values()}
        self._check_optimizers("none" if self._optimizer is None else ", ".join(sorted(made)))
        if model.state_dict():
            broadcast_parameters(model)

    # --- a step

    def _run(
        self, x: Any, y: Any, train: bool, casts: Casts, scale: float | None = None
    ) -> list[torch.Tensor]:
        """Run the schedule; return the loss, or the tensors of the output, on every rank."""
        inputs = self._graph.bind(x)
        rows = rows_of([tensor.shape for tensor in _tensors((inputs, y))])
        sizes = self._sizes(rows, train)
        batch = Batch(
            self.steps if train else self._step,
            _pieces(inputs, sizes),
            _pieces(y, sizes),
            [size / rows for size in sizes],
            train,
            casts,
            1.0 if scale is None else scale,
        )
        frozen = sum(not p.requires_grad for p in self._graph.model.parameters()) if train else 0
        under = [f"autocast of {kind} to {dtype}" for kind, dtype in casts.items()]
        under += [f"{frozen} parameters frozen"] if frozen else []
        return self._perform(batch, rows, train, "".join(f", {each}" for each in under))

    def _update(self, scale: float | None) -> None:
        """Step the optimizers with the sums of the gradients, and commit running statistics."""
        totals = self._totals(scale)
        for stage in self._stages.values():
            stage.commit()
        for number, params in self._params.items():
            for name, p in params.items():
                p.grad = totals.get(name)
            if number in self.optimizers and not self.skipped:
                self.optimizers[number].step()
            for p in params.values():
                p.grad = None
        if self._scaler:
            self._scaler.update(self.skipped)

    def _tensor(self, numbers: Sequence[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    def _norms(self, gradients: Sequence[torch.Tensor]) -> list[float]:
        return on_host([torch.linalg.vector_norm(each).double() for each in gradients])

    def _joined(
        self, pieces: Sequence[Sequence[torch.Tensor]], compared: bool
    ) -> list[torch.Tensor]:
        if compared:
            return [functools.reduce(torch.add, (loss for (loss,) in pieces))]
        return [
            torch.cat(each) if each[0].dim() else torch.stack(each)
            for each in zip(*pieces, strict=True)
        ]

    def _beside(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return tensor.to(like.device)

    def _finite(self, gradients: Sequence[torch.Tensor]) -> bool:
        if any(each.dtype == torch.float16 for each in gradients):
            raise ValueError(
                "a GradScaler is for parameters in float32 under torch.autocast, but some here are "
                "in float16: their gradients would be lost where they are divided by the scale"
            )
        return all(on_host([each.isfinite().all() for each in gradients]))

    def _arrived(self, gradient: torch.Tensor, unit: int, name: str) -> torch.Tensor:
        return gradient.to(self._graph.units[unit].params[name].device)

    # --- checkpoints

    def share_of_state(self) -> dict[str, Any]:
        """Return what this rank has to save; every rank calls it.

        Together they are what :meth:`save` writes: dictionaries whose entries are merged.
        """
        with self._telling("save"):
            return self._share()

    def misfits(self, told: dict[str, Any]) -> list[str]:
        """Say what of a checkpoint does not fit this pipeline; nothing is changed."""
        return [*misfits(self._graph.model, told["model"]), *self._compression_misfits(told)]

    def take_state(self, told: dict[str, Any]) -> None:
        """Go on from what all ranks' :meth:`share_of_state` were together."""
        self._graph.model.load_state_dict(mapped(told["model"]))
        for number, optimizer in self.optimizers.items():
            _restore(optimizer, self._params[number], told.get("optimizer", {}))
        if self._scaler and "scaler" in told:
            self._scaler.load(told["scaler"])
        self._load_compression(mapped(told.get("compression")))
        self._go_on(told)

    def _share(self) -> dict[str, Any]:
        """Return the part of a checkpoint that this process has; replicas leave it to the first."""
        kept, common = self._compression_state(), self._common_state()
        if self._scaler and common:
            common["scaler"] = self._scaler.state()
        if self._rank not in self._leads:
            return common
        stages = self._stage_of()
        model = {
            name: value
            for name, value in self._graph.model.state_dict().items()
            if stages[self._graph.owner(name)] in self._stages
        }
        states = self._optimizer_states()
        own = {"model": model, "optimizer": states, "compression": {"parameters": kept}}
        return merged([common, own if kept else {**own, "compression": {}}])  # type: ignore[no-any-return]

    def _optimizer_states(self) -> dict[str, dict[str, Any]]:
        """Return by parameter of this process what its optimizer keeps, and its options."""
        states: dict[str, dict[str, Any]] = {}
        for number, optimizer in self.optimizers.items():
            names = {id(p): name for name, p in self._params[number].items()}
            for group in optimizer.param_groups:
                options = {key: value for key, value in group.items() if key != "params"}
                for p in group["params"]:
                    state = dict(optimizer.state.get(p, {}))
                    states[names[id(p)]] = {"state": state, "options": options}
        return states

    def _gathered(self, own: dict[str, Any]) -> dict[str, Any]:
        """Collect all ranks' parts on rank 0."""
        parts = [own]
        if self._channel is not None:
            tensors: list[torch.Tensor] = []

            def leave(tensor: torch.Tensor) -> _Slot:
                tensors.append(tensor.detach())
                return _Slot(len(tensors) - 1)

            outline = pytree.tree_map_only(torch.Tensor, leave, own)
            name = next_name("pipeline")
            outlines = world.core("torch").allgather_object(outline, name, None)
            key = Key("S", self._step, 0, 0)
            self._channel.note = f"save at {self._step}"
            if self._rank and self._rank in self._leads:
                self._channel.send(0, key, tensors)
            for rank in sorted({*self._leads} - {0}) if self._rank == 0 else ():
                arrived = self._channel.receive(rank, key)
                parts.append(_filled(outlines[rank], arrived))
        return merged(parts)  # type: ignore[no-any-return]


def _read(path: Path) -> dict[str, Any]:
    ours, tree = read_tree(path)
    whole: dict[str, Any] = mapped(tree)
    return whole if ours else {"model": whole}


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers, those too that a ``state_dict`` leaves out."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _filled(outline: Any, tensors: Sequence[Any]) -> Any:
    return pytree.tree_map_only(_Slot, lambda slot: tensors[slot.index], outline)


class _Slot:
    """Stands for a tensor in an outline of a checkpoint."""

    def __init__(self, index: int) -> None:
        self.index = index


def _check_arguments(model: Any, loss: Any, optimizer: Any, scaler: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if isinstance(optimizer, torch.optim.Optimizer) or not (
        optimizer is None or callable(optimizer)
    ):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; give a function that makes one of a list "
            "of parameters: lambda params: torch.optim.Adam(params, 1e-3)"
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}; give a function of output and target")
    if scaler is not None and not hasattr(scaler, "unscale_"):
        raise TypeError(f"scaler is a {type(scaler).__name__}; give a torch.amp.GradScaler")


def _pieces(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut all tensors of ``batch`` into runs of rows; what has no rows is in each piece."""
    pieces, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        cut = functools.partial(_cut, rows)
        pieces.append(pytree.tree_map_only(torch.Tensor, cut, batch))
        start += size
    return pieces


def _cut(rows: slice, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[rows] if tensor.dim() else tensor


class _Scaler:
    """A ``GradScaler`` that is told, rather than sees, whether gradients overflow.

    For those of other ranks it cannot see. It steps an optimizer of one number, whose gradient is
    infinite if it shall believe so; it decides all else itself, on every rank alike.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self._probe = nn.Parameter(torch.zeros(()))
        self._optimizer = torch.optim.SGD([self._probe], lr=0.0)

    def scale(self) -> float:
        """Return what gradients are to be multiplied by."""
        return float(self._scaler.scale(torch.ones(())))

    def update(self, overflowed: bool) -> None:
        """Lower the scale, or raise it once it has held for long."""
        self._probe.grad = torch.tensor(math.inf if overflowed else 0.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: numbers."""
        return dict(self._scaler.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._scaler.load_state_dict(state)


def _restore(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], saved: dict[str, Any]
) -> None:
    """Give an optimizer the states and options that lie under its parameters' names."""
    names = {id(p): name for name, p in params.items()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            entry = mapped(saved.get(names[id(p)]))
            if entry is None:
                continue
            group.update(entry["options"])
            optimizer.state[p] = {
                key: value.to(p.device if value.dim() else value.device, copy=True)
                if isinstance(value, torch.Tensor) else value
                for key, value in entry["state"].items()
            }  # fmt: skip
