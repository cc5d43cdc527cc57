"""``hvd.Pipeline`` for PyTorch: train a model in stages, on several devices or ranks."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hvdx import watchdog, world
from hvdx.agreement import check_same, next_name
from hvdx.errors import PipelineError, PlanError
from hvdx.integrations.pytorch_graph import mode, result_names, result_of, traced, unflat
from hvdx.integrations.pytorch_profile import profiled
from hvdx.integrations.pytorch_stages import Batch, TorchCodec, TorchStage
from hvdx.pipeline.channel import Failure, Key
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.plan import SCHEDULES, Link, Means, Plan, make, schedule_of, stage_times
from hvdx.pipeline.probe import THREADS, measure_link
from hvdx.pipeline.run import LocalRanks, run
from hvdx.pipeline.schedule import CHECKPOINTS, Schedule, forward_only, recomputed
from hvdx.pipeline.simulator import Times
from hvdx.pipeline.timeline import write as write_timeline
from hvdx.pipeline.zmq_channel import ZmqChannel, own_address
from hvdx.replicas import broadcast_parameters

_FORMAT = 1
_LAST_STEPS = 8  # that a timeline can show
_PROFILING_SECONDS = 600.0  # for which the other ranks wait for rank 0


class Pipeline:
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
        micro_batches: pieces of a batch. Fewer where a batch has fewer rows.
        stages: how many; names of the units, or modules, that all but the first begin with; how
            many units each has; or a :class:`hvdx.pipeline.plan.Plan`. Default: one per rank or
            device, two for ``interleaved`` and ``zbv``.
        by: what cuts even out: ``"params"``, ``"time"`` or ``"memory"``. Default: time under
            ``schedule="auto"``, else params. All but params run micro-batches of ``sample``, on
            rank 0, to measure the units: let it be a whole batch.
        memory: bytes that each rank or device has for parameters, gradients, Adam's moments and
            activations, or a list of them; what does not fit is not chosen. Default: enough.
        place: devices of this process, one per stage or two, such as ``["cpu", "cpu"]``.
            Default: the ranks of the job, if there are several, else this one process.
        schedule: ``gpipe``, ``1f1b``, ``1f1b-slack``, ``interleaved``, ``zb1p``, ``zbv``,
            ``zbv-slack``, or text; ``"auto"``: the quickest by the measured times.
        clip_norm: scales all gradients down to this norm over all stages where theirs is larger,
            as ``torch.nn.utils.clip_grad_norm_`` does.
        checkpoint: ``"always"``: stages keep only the inputs of micro-batches and compute the
            rest again for backward; ``"except_last"``: not of the last one; ``"never"``.
        leaves: classes, or paths, of modules to be kept whole.
        seed: of dropout and the like; default ``torch.initial_seed()`` of rank 0.

    Attributes:
        plan: cuts, places and schedule; ``plan.save(path)`` keeps it.
        units: names of all units, in order.
        optimizers: those of this process, by stage: for learning-rate schedulers.
        gradient_norm: of the last step, before clipping, with ``clip_norm``; else None.

    Raises:
        PlanError: the model cannot be traced, cut or placed as asked.
        MismatchError: ranks differ in model or options; raised on every rank.

    Example:
        >>> pipe = hvd.Pipeline(model, x, loss=nn.functional.cross_entropy,
        ...                     optimizer=lambda params: torch.optim.Adam(params, 1e-3))
        >>> for x, y in batches:
        ...     loss = pipe.step(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Any,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        *,
        micro_batches: int = 8,
        stages: int | Sequence[str] | Sequence[int] | Plan | None = None,
        place: Sequence[str | torch.device] | None = None,
        schedule: str = "1f1b",
        by: str | None = None,
        memory: float | Sequence[float] | None = None,
        clip_norm: float | None = None,
        checkpoint: str = "never",
        leaves: Sequence[Any] = (),
        seed: int | None = None,
    ) -> None:
        self._across = place is None and world.is_initialized("torch") and world.size() > 1
        self._rank = world.rank() if self._across else 0
        self._loss, self._step, self._failed = loss, 0, ""
        self._times: Times | None = None
        self._clip_norm, self._checkpoint = clip_norm, checkpoint
        self.gradient_norm: float | None = None
        self._measured: collections.deque[Any] = collections.deque(maxlen=_LAST_STEPS)
        self._channel: ZmqChannel | None = None
        self._threads: LocalRanks | None = None
        self._orders: dict[tuple[int, bool], Schedule] = {}
        self._seed = torch.initial_seed() if seed is None else seed
        if self._across:
            core = world.core("torch")
            self._seed = core.broadcast_object(self._seed, 0, next_name("pipeline"), None)
        with self._alike():
            _check_arguments(model, loss, optimizer, micro_batches, place)
            if clip_norm is not None and not clip_norm > 0:
                raise PlanError(f"clip_norm={clip_norm!r}: give a number above 0, or None")
            if checkpoint not in CHECKPOINTS:
                raise PlanError(f"checkpoint={checkpoint!r}: use one of {', '.join(CHECKPOINTS)}")
            self._graph = traced(model, sample, leaves)
            self.units = [unit.name for unit in self._graph.units]
            by = by or ("time" if schedule == "auto" else "params")
            link = Link()
            plain = schedule != "auto" and by == "params" and memory is None
            if not (plain or isinstance(stages, Plan)):
                self._graph.line, link = self._profiled(sample, micro_batches)
            self.plan = self._planned(stages, place, schedule, micro_batches, by, memory, link)
            self._stages = self._make_stages(place)
            self._params = self._shares()
            self.optimizers = {
                number: optimizer(list(params.values()))
                for number, params in self._params.items() if params and optimizer
            }  # fmt: skip
        if self._across:
            self._agree()
            self._channel = self._connected(self.plan.place)
            self._finalizer = weakref.finalize(self, self._channel.close)
        else:
            self._threads = LocalRanks(self._stages, max(self.plan.place) + 1, None)
            self._finalizer = weakref.finalize(self, self._threads.close)

    # --- what users call

    def step(self, x: Any, y: Any) -> torch.Tensor:
        """Train on a batch; return its loss, the mean weighted by the micro-batches' sizes.

        Args:
            x: as ``sample`` was; tensors are cut along their first dimension.
            y: what the loss compares with: a tensor, or containers of some, cut likewise.

        Raises:
            PipelineError: something failed, here or on another rank; raised on every rank.
        """
        with self._telling("step"):
            if self._loss is None:
                raise PlanError("step() needs the loss= that the pipeline was made without")
            (total,) = self._run(x, y, train=True)
            self._update()
            self._step += 1
        return total

    def __call__(self, x: Any) -> Any:
        """Compute the model's output for a batch, in inference mode, on every rank."""
        with self._telling("call"), mode(self._graph.model, False):
            tensors = iter(self._run(x, None, train=False))
            names = dict.fromkeys(result_names(self._graph))
            values = {name: unflat(*self._graph.kinds[name], tensors) for name in names}
            self._step += 1
        return result_of(self._graph, values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, optimizers, step and plan to one file; every rank calls it.

        Under ``"model"`` lies a ``state_dict()`` with the model's original names, which the plain
        model loads, too; optimizer states lie under the names of the parameters.
        """
        with self._telling("save"):
            whole = self._gathered(self._own_state())
            problem = ""
            if self._rank == 0:
                try:
                    beside = f"{os.fspath(path)}.partial"
                    torch.save(whole, beside)
                    os.replace(beside, path)
                except (OSError, RuntimeError) as error:
                    problem = str(error)
            problem = self._from_first(problem)
            if problem:
                raise OSError(f"the pipeline cannot be saved to {os.fspath(path)!r}: {problem}")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote with any number of stages, or a plain ``state_dict()``.

        Rank 0 reads; every rank calls it.
        """
        with self._telling("load"):
            told: Any = None
            if self._rank == 0:
                try:
                    told = torch.load(path, map_location="cpu", weights_only=True)
                except Exception as error:
                    told = f"{type(error).__name__}: {error}"
            told = self._from_first(told)
            if isinstance(told, str):
                raise OSError(f"the pipeline cannot be loaded from {os.fspath(path)!r}: {told}")
            if "hvdx_pipeline" not in told:
                told = {"model": told}
            self._graph.model.load_state_dict(told["model"])
            for number, optimizer in self.optimizers.items():
                _restore(optimizer, self._params[number], told.get("optimizer", {}))
            self._step, self._seed = told.get("step", 0), told.get("seed", self._seed)
            for stage in self._stages.values():
                stage.seed = self._seed

    def timeline(self, path: str | os.PathLike[str], steps: int = 3) -> None:
        """Draw the last steps of training below what is predicted, and why ranks wait.

        Rank 0 writes; every rank calls it. The prediction is the plan's where units were measured
        (``by="time"``, ``schedule="auto"``), else made of these steps' own times.

        Args:
            path: ``.json``: a trace for Chrome or Perfetto; ``.png``: a picture, which needs
                matplotlib; else one HTML page.
            steps: how many, of the last 8; of these, those with as many micro-batches as the last.
        """
        if not self._measured:
            raise PlanError("there is no step to draw yet: call step() before timeline()")
        with self._telling("timeline"):
            last = self._measured[-1][1]
            own = {step: spans for step, order, spans in self._measured if order is last}
            own = dict(list(own.items())[-max(1, steps) :])
            everyone = [own]
            if self._across:
                core = world.core("torch")
                everyone = core.allgather_object(own, next_name("pipeline"), None)
            problem = ""
            if self._rank == 0:
                lanes = {step: [row for each in everyone for row in each[step]] for step in own}
                try:
                    write_timeline(path, last, self._times, lanes)
                except (OSError, PlanError) as error:
                    problem = str(error)
            problem = self._from_first(problem)
        if problem:
            raise OSError(f"the timeline cannot be written to {os.fspath(path)!r}: {problem}")

    def close(self) -> None:
        """Give back threads and sockets; the pipeline is of no more use."""
        self._failed = self._failed or "it has been closed"
        self._finalizer()

    # --- making one

    @contextlib.contextmanager
    def _alike(self) -> Iterator[None]:
        """Raise on every rank what one of them raises inside."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            if not self._across:
                raise
            problem = error
        if not self._across:
            return
        core = world.core("torch")
        told = f"{type(problem).__name__}: {problem}" if problem else ""
        everyone = core.allgather_object(told, next_name("pipeline"), None)
        if problem is not None:
            raise problem
        for rank, each in enumerate(everyone):
            if each:
                raise PlanError(f"rank {rank} cannot make the pipeline: {each}")

    def _profiled(self, sample: Any, micro_batches: int) -> tuple[Graph, Link]:
        """Return what rank 0 measures, on every rank: the units and a hop."""
        told: Any = None
        if self._rank == 0:
            with watchdog.patience(_PROFILING_SECONDS):
                try:
                    told = profiled(self._graph, sample, micro_batches)
                except Exception as error:
                    told = f"the model cannot be profiled: {type(error).__name__}: {error}"
        if self._across:
            told = world.core("torch").broadcast_object(told, 0, next_name("pipeline"), None)
        if isinstance(told, str):
            raise PlanError(told)
        if not self._across:
            return told, THREADS
        with contextlib.closing(self._connected(range(world.size()))) as channel:
            link = measure_link(channel, self._rank, lambda n: torch.empty(n, dtype=torch.uint8))
            link = world.core("torch").broadcast_object(link, 0, next_name("pipeline"), None)
        return told, link

    def _planned(
        self, stages: Any, place: Sequence[Any] | None, schedule: str, micro_batches: int, by: str,
        memory: float | Sequence[float] | None, link: Link,
    ) -> Plan:  # fmt: skip
        line = self._graph.line
        ranks = world.size() if self._across else place and len(place)
        if isinstance(stages, Plan):
            needed = max(stages.place) + 1
            if ranks and needed != ranks:
                what = "ranks" if self._across else "devices"
                raise PlanError(f"the plan is for {needed} {what}, but there are {ranks}")
            stages.edges(line)
            return stages
        if not ranks:
            count = 1 if stages is None else stages if isinstance(stages, int) else (
                len(stages) + isinstance(next(iter(stages), ""), str))  # fmt: skip
            ranks = max(1, count // SCHEDULES.get(schedule, 1))
        limits = [memory] * ranks if isinstance(memory, (int, float)) else memory
        recompute = self._checkpoint != "never"
        means = Means(ranks, link, memory=limits, recompute=recompute)
        plan = make(line, means, micro_batches, schedule=schedule, stages=stages, by=by)
        if plan.step:
            self._times = stage_times(line, means, plan.order(), plan.edges(line))
        return plan

    def _make_stages(self, place: Sequence[Any] | None) -> dict[int, TorchStage]:
        graph = self._graph
        split = self.plan.order().splits
        home = next((p.device for p in graph.model.parameters()), torch.device("cpu"))
        devices = [_device(each) for each in place] if place is not None else []
        stages: dict[int, TorchStage] = {}
        at: dict[int, torch.device] = {}  # parameter: where it is needed
        for number, (first, stop) in enumerate(self.plan.edges(graph.line)):
            rank = self.plan.place[number]
            if self._across and rank != self._rank:
                continue
            device = devices[rank] if devices else home
            for unit in graph.units[first:stop]:
                for name, p in unit.params.items():
                    if at.setdefault(id(p), device) != device:
                        raise PlanError(
                            f"parameter {name!r} is used on {at[id(p)]} and, by unit "
                            f"{unit.name!r}, on {device}: cut so that one device has both, or use "
                            "zbv, whose first and last stage share a device"
                        )
                if device != home:
                    graph.move(unit, device)
            stages[number] = TorchStage(
                graph, first, stop, loss=self._loss, device=device, seed=self._seed, split=split
            )
        return stages

    def _shares(self) -> dict[int, dict[str, nn.Parameter]]:
        """Return by stage of this process the parameters it updates; a tied one's first does."""
        shares: dict[int, dict[str, nn.Parameter]] = {}
        taken: set[str] = set()
        edges = self.plan.edges(self._graph.line)
        for number in self._stages:
            units = self._graph.units[slice(*edges[number])]
            held = {name: p for unit in units for name, p in unit.params.items()}
            shares[number] = {name: p for name, p in held.items() if name not in taken}
            taken.update(held)
        return shares

    def _agree(self) -> None:
        """Compare the ranks' pipelines, and begin with rank 0's parameters."""
        model = self._graph.model
        entries = {unit.name: str({name: tuple(p.shape) for name, p in unit.params.items()})
                   for unit in self._graph.units}  # fmt: skip
        for name in ("cuts", "place", "schedule", "micro_batches"):
            entries[name] = f"= {getattr(self.plan, name)}"
        entries["clip_norm"] = f"= {self._clip_norm}"
        entries["checkpoint"] = f"= {self._checkpoint}"
        core = world.core("torch")
        check_same(core, "pipeline", entries, next_name("pipeline"))
        if model.state_dict():
            broadcast_parameters(model)

    def _connected(self, place: Sequence[int]) -> ZmqChannel:
        core = world.core("torch")
        return ZmqChannel(
            place,
            self._rank,
            lambda each: core.allgather_object(each, next_name("pipeline"), None),
            TorchCodec(),
            address=own_address(one_machine=core.horovod.local_size() == core.horovod.size()),
            seconds=watchdog.timeout_seconds(),
        )

    # --- a step

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Tell the other ranks what fails here outside of stages."""
        if self._failed:
            raise PipelineError(f"this pipeline is of no more use, since {self._failed}")
        if self._channel is None:
            yield
            return
        try:
            yield
        except PipelineError as error:
            self._failed = str(error).partition("\n")[0]
            raise
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
            where = f"{what} {self._step}"
            failure = Failure(self._rank, told, where, "", traceback.format_exc())
            self._channel.fail(failure)
            self._failed = told
            if not isinstance(error, Exception):
                raise
            raise failure.exception() from error

    def _run(self, x: Any, y: Any, train: bool) -> list[torch.Tensor]:
        """Run the schedule; return the loss, or the tensors of the output, on every rank."""
        inputs = self._graph.bind(x)
        rows = _rows(inputs, y)
        order = self._order(rows, train)
        count = order.micro_batches
        sizes = [rows // count + (k < rows % count) for k in range(count)]
        batch = Batch(
            self._step,
            _pieces(inputs, sizes),
            _pieces(y, sizes),
            [size / rows for size in sizes],
            train,
            _autocast(),
        )
        again = recomputed(order, self._checkpoint)
        for number, stage in self._stages.items():
            stage.begin(batch, again[number])
        if self._channel is None:
            assert self._threads is not None
            spans = self._threads.run(order, self._step)
        else:
            verb = "step" if train else "call"
            self._channel.note = f"{verb} {self._step} with {rows} rows in {count} micro-batches"
            spans = [run(order, self._rank, self._stages, self._channel, self._step)]
        if train:
            self._measured.append((self._step, order, spans))
        return self._spread(order.place[-1], train)

    def _order(self, rows: int, train: bool) -> Schedule:
        """Return the schedule for a batch: of as many micro-batches as it has rows for."""
        most = min(rows, self.plan.micro_batches)
        if (most, train) not in self._orders:
            place = self.plan.place
            self._orders[most, train] = (
                _largest(self.plan, most, self._times) if train else forward_only(place, most)
            )
        return self._orders[most, train]

    def _spread(self, owner: int, train: bool) -> list[torch.Tensor]:
        """Return what the last stage found on every rank."""
        last = self._stages.get(len(self.plan.place) - 1)
        found: list[Any] = []
        if last is not None:
            found = [last.total] if train else _joined(last.outputs)
        if self._channel is None:
            return found
        key = Key("L", self._step, 0, 0)
        if last is None:
            return list(self._channel.receive(owner, key))
        for rank in set(self.plan.place) - {self._rank}:
            self._channel.send(rank, key, found)
        return found

    def _update(self) -> None:
        """Add up the uses of each parameter in the order of units, and step the optimizers."""
        found = {key: g for stage in self._stages.values() for key, g in stage.gradients.items()}
        if self._channel is not None:
            self._exchange(self._channel, found)
        totals: dict[str, torch.Tensor] = {}
        for (_, name), gradient in sorted(found.items(), key=lambda entry: entry[0][0]):
            totals[name] = totals[name] + gradient if name in totals else gradient
        if self._clip_norm is not None:
            self._clip(totals, self._clip_norm)
        for number, params in self._params.items():
            for name, p in params.items():
                p.grad = totals.get(name)
            if number in self.optimizers:
                self.optimizers[number].step()
            for p in params.values():
                p.grad = None

    def _clip(self, totals: dict[str, torch.Tensor], limit: float) -> None:
        """Scale gradients by their norm over all stages: summed in the order of the model."""
        order = {name: i for i, (name, _) in enumerate(self._graph.model.named_parameters())}
        norms = [torch.linalg.vector_norm(totals[name]).double().cpu() for name in totals]
        own = [torch.tensor([order[name] for name in totals], dtype=torch.int64),
               torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)]  # fmt: skip
        parts = [own]
        if self._channel is not None:
            key = Key("N", self._step, 0, 0)
            others = set(self.plan.place) - {self._rank}
            for rank in others:
                self._channel.send(rank, key, own)
            parts += [list(self._channel.receive(rank, key)) for rank in others]
        every = {i: norm for part in parts for i, norm in zip(*(x.tolist() for x in part),
                                                              strict=True)}  # fmt: skip
        self.gradient_norm = math.sqrt(sum(every[i] * every[i] for i in sorted(every)))
        scale = limit / (self.gradient_norm + 1e-6)
        if not scale >= 1.0:
            totals.update({name: gradient * scale for name, gradient in totals.items()})

    def _exchange(self, channel: ZmqChannel, found: dict[tuple[int, str], torch.Tensor]) -> None:
        """Give and get the gradients of parameters that several ranks have."""
        ranks = [self.plan.place[number] for number in self._stage_of()]
        shared = []
        for index, (name, units) in enumerate(sorted(self._graph.line.tied().items())):
            owners: dict[int, list[int]] = {}
            for unit in units:
                owners.setdefault(ranks[unit], []).append(unit)
            if self._rank in owners and len(owners) > 1:
                shared.append((name, owners, Key("T", self._step, index, 0)))
        for name, owners, key in shared:
            mine = [found.get((unit, name)) for unit in owners[self._rank]]
            for rank in set(owners) - {self._rank}:
                channel.send(rank, key, mine)
        for name, owners, key in shared:
            for rank in set(owners) - {self._rank}:
                theirs = channel.receive(rank, key)
                for unit, gradient in zip(owners[rank], theirs, strict=True):
                    if gradient is not None:
                        device = self._graph.units[unit].params[name].device
                        found[unit, name] = gradient.to(device)

    # --- checkpoints

    def _own_state(self) -> dict[str, Any]:
        """Return the part of a checkpoint that this process has."""
        ranks = [self.plan.place[number] for number in self._stage_of()]
        model = {
            name: value
            for name, value in self._graph.model.state_dict().items()
            if not self._across or ranks[self._graph.owner(name)] == self._rank
        }
        states: dict[str, Any] = {}
        for number, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                options = {key: value for key, value in group.items() if key != "params"}
                names = {id(p): name for name, p in self._params[number].items()}
                for p in group["params"]:
                    state = dict(optimizer.state.get(p, {}))
                    states[names[id(p)]] = {"state": state, "options": options}
        return {"model": model, "optimizer": states}

    def _gathered(self, own: dict[str, Any]) -> dict[str, Any]:
        """Collect all ranks' parts on rank 0."""
        told: dict[str, Any] = {
            "hvdx_pipeline": _FORMAT,
            "model": {},
            "optimizer": {},
            "step": self._step,
            "seed": self._seed,
            "plan": self.plan.to_json(),
        }
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
            if self._rank:
                self._channel.send(0, key, tensors)
            for rank in sorted(set(self.plan.place) - {0}) if self._rank == 0 else ():
                arrived = self._channel.receive(rank, key)
                parts.append(_filled(outlines[rank], arrived))
        for part in parts:
            for kind in ("model", "optimizer"):
                told[kind].update({k: v for k, v in part[kind].items() if k not in told[kind]})
        return told

    def _stage_of(self) -> list[int]:
        """Return by unit its stage."""
        edges = self.plan.edges(self._graph.line)
        return [number for number, (first, stop) in enumerate(edges) for _ in range(first, stop)]

    def _from_first(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""
        if self._channel is None:
            return value
        return world.core("torch").broadcast_object(value, 0, next_name("pipeline"), None)


def _filled(outline: Any, tensors: Sequence[Any]) -> Any:
    return pytree.tree_map_only(_Slot, lambda slot: tensors[slot.index], outline)


class _Slot:
    """Stands for a tensor in an outline of a checkpoint."""

    def __init__(self, index: int) -> None:
        self.index = index


def _check_arguments(model: Any, loss: Any, optimizer: Any, count: Any, place: Any) -> None:
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
    if not isinstance(count, int) or count < 1:
        raise PlanError(f"micro_batches={count!r}: give a whole number from 1")
    if place is not None and (isinstance(place, str) or not len(place)):
        raise PlanError(f"place={place!r}: give a list of devices, such as ['cpu', 'cpu']")


def _device(told: Any) -> torch.device:
    """Return a device that exists.

    Raises:
        PlanError: it does not.
    """
    try:
        device = torch.device(told)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"place has {told!r}, which cannot be used: {reason}") from None
    return device


def _rows(*batches: Any) -> int:
    """Count the rows of a batch.

    Raises:
        ValueError: its tensors differ in that, or there is none.
    """
    tensors = [each for each in pytree.tree_leaves(batches) if isinstance(each, torch.Tensor)]
    counts = {len(each) for each in tensors if each.dim()}
    if len(counts) != 1 or counts == {0}:
        told = ", ".join(str(tuple(each.shape)) for each in tensors)
        raise ValueError(
            f"the batch has tensors of shapes {told or 'none'}: all need the same first dimension, "
            "of at least 1, along which micro-batches are cut"
        )
    return counts.pop()


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


def _largest(plan: Plan, most: int, times: Times | None) -> Schedule:
    """Return the schedule with the most micro-batches, up to ``most``, that there is."""
    ranks, stages = max(plan.place) + 1, len(plan.place)
    problem: PlanError | None = None
    for count in range(most, 0, -1):
        try:
            return schedule_of(plan.schedule, ranks, count, stages, times)
        except PlanError as error:
            problem = problem or error
    assert problem is not None
    raise PlanError(f"a batch of {most} rows: {problem}")


def _joined(outputs: dict[int, list[torch.Tensor]]) -> list[torch.Tensor]:
    """Put the micro-batches' outputs together again."""
    return [
        torch.cat(pieces) if pieces[0].dim() else torch.stack(pieces)
        for pieces in zip(*(outputs[k] for k in sorted(outputs)), strict=True)
    ]


def _autocast() -> tuple[str, torch.dtype] | None:
    for kind in ("cuda", "cpu"):
        if torch.is_autocast_enabled(kind):
            return kind, torch.get_autocast_dtype(kind)
    return None


def _restore(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], saved: dict[str, Any]
) -> None:
    """Give an optimizer the states and options that lie under its parameters' names."""
    names = {id(p): name for name, p in params.items()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            entry = saved.get(names[id(p)])
            if entry is None:
                continue
            group.update(entry["options"])
            optimizer.state[p] = {
                key: value.to(p.device if value.dim() else value.device, copy=True)
                if isinstance(value, torch.Tensor) else value
                for key, value in entry["state"].items()
            }  # fmt: skip
