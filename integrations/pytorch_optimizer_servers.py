"""Parameter servers under PyTorch: each rank steps the optimizer on what it owns (ZeRO)."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hvdx import world
from hvdx.comm import Allreduce, Work, together
from hvdx.compression import Compressor, Reduced, none
from hvdx.integrations.pytorch import dtype_name
from hvdx.integrations.pytorch_engine import Flight
from hvdx.integrations.pytorch_optimizer_buckets import AnyBucket, Bucket
from hvdx.integrations.pytorch_optimizer_reducer import METHODS as REDUCER_METHODS
from hvdx.integrations.pytorch_optimizer_reducer import Reducer
from hvdx.integrations.pytorch_optimizer_wrapper import Options
from hvdx.ops import ops_for
from hvdx.reduce_op import ReduceOp
from hvdx.servers import Cut, Member, cut, for_owners, pieces, pull, pull_changes, push

METHODS = (*REDUCER_METHODS, "portable_state_dict")
_OPS = ops_for(torch.Tensor)
_OWN = "parameter_server"  # in a state dictionary: whose it is, and what its owner owes
_NUMBERS = frozenset({"step", "eta", "mu", "mu_product"})  # state that is no tensor of elements
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
)


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that may look at more than one element at a time.

    Raises:
        ValueError: it is not known to treat each element alone.
    """
    known = {inspect.unwrap(kind.step) for kind in _ELEMENTWISE}  # type: ignore[arg-type]
    if inspect.unwrap(type(optimizer).step) in known or getattr(optimizer, "elementwise", False):
        return
    raise ValueError(
        f"sync='parameter_server' cuts parameters into parts, each with an optimizer of its own: "
        f"{type(optimizer).__name__} is not known to treat every element alone, as "
        f"{', '.join(kind.__name__ for kind in _ELEMENTWISE)} do. Use sync='allreduce', or, if it "
        "does, say so: optimizer.elementwise = True"
    )


class ServedBucket(Bucket):
    """A bucket of which each server owns a part, and alone has the mean there.

    After a reduction the rest of a gradient is zeros but for one number, which makes its norm
    that of the whole mean: ``torch.nn.utils.clip_grad_norm_`` clips as in a single process, and
    infinities are seen by all ranks' ``GradScaler``.

    Args:
        servers: places of the ranks that own parts.
        place: this rank's.
        average: the reduction gives means; else sums.
        members: see :class:`Bucket`.
    """

    def __init__(self, *members: Any, servers: Sequence[int], place: int, average: bool) -> None:
        _, self.member_names, parameters, ranks = members
        for name, parameter in zip(self.member_names, parameters, strict=True):
            if not _gapless(parameter):
                raise ValueError(
                    f"parameter {name!r} lies in memory with gaps (strides {parameter.stride()}), "
                    "so that no rank can own a part of it: make it a contiguous one, or use "
                    "sync='allreduce'"
                )
        ends = list(itertools.accumulate(parameter.numel() for parameter in parameters))
        self.offsets, self.total = [0, *ends[:-1]], ends[-1]
        self.cut = cut(self.total, ranks, servers)
        self.start, self.stop = self.cut.spans[place]
        self.parts = [
            (min(max(self.start - a, 0), b - a), min(max(self.stop - a, 0), b - a))
            for a, b in zip(self.offsets, ends, strict=True)
        ]
        self._average = average
        super().__init__(*members)
        # Where this rank does not own a gradient to its last element: an element that it can use.
        spare = [
            (index, a if low > 0 or low == high else a + high)
            for index, (a, b, (low, high)) in enumerate(
                zip(self.offsets, ends, self.parts, strict=True)
            )
            if high - low < b - a
        ]
        device = parameters[0].device
        self._spare = torch.tensor(spare, dtype=torch.int64, device=device).reshape(-1, 2).t()

    def living(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the parameters that are still there, with their places."""
        for index, reference in enumerate(self._parameters):
            if (parameter := reference()) is not None:
                yield index, parameter

    def tensors(self) -> list[torch.Tensor]:
        """See :meth:`Bucket.tensors`; in the order in which elements are owned."""
        return [
            self.flat[offset : offset + view.numel()].view(view.shape)
            for offset, view in zip(self.offsets, self.views, strict=True)
        ]

    def part(self, index: int) -> torch.Tensor:
        """Return what this rank owns of a gradient; shape (own,)."""
        low, high = self.parts[index]
        return self.flat[self.offsets[index] + low : self.offsets[index] + high]

    def cut_of(self, index: int) -> Cut:
        """Return who owns which part of a parameter."""
        start = self.offsets[index]
        return self.cut.within(start, start + self.views[index].numel())

    def clear_rest(self) -> None:
        """Put zeros where other ranks own the gradients."""
        self.flat[: self.start].zero_()
        self.flat[self.stop : self.total].zero_()

    @torch.no_grad()
    def share(self, index: int) -> None:
        """Make what the owner has alone count in full once it is summed again."""
        if index not in self.summed:
            return
        self.summed.discard(index)
        parameter, view = self._parameters[index](), self.views[index]
        if parameter is None or parameter.grad is None:
            return
        if parameter.grad.data_ptr() != view.data_ptr():
            return
        offset, (low, high) = self.offsets[index], self.parts[index]
        self.flat[offset : offset + low].zero_()
        self.flat[offset + high : offset + view.numel()].zero_()
        if self._average:
            self.part(index).mul_(self._ranks)

    def deliver(self, op: ReduceOp) -> None:
        """Hand out gradients that some rank has had; sparse ones stay dense."""
        if self._absent:
            present = self.presence.tolist()
            for index in self._absent:
                parameter = self._parameters[index]()
                if present[index] and parameter is not None:
                    parameter.grad = self.views[index]
        self.summed.update(range(len(self.views)))
        self.flight = None
        self.begin()

    def squares(self) -> torch.Tensor:
        """Return the sums of squares of what this rank owns, by gradient; float64."""
        found = torch.zeros(len(self.views), dtype=torch.float64, device=self.flat.device)
        owned = [index for index, (low, high) in enumerate(self.parts) if low < high]
        if owned:
            own = [self.part(index) for index in owned]
            wide = [part.float() if part.element_size() == 2 else part for part in own]
            norms = torch.stack(torch._foreach_norm(wide)).double()
            found[owned] = norms * norms
        return found

    def complete(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Have each gradient's norm be that of the mean, of which there are sums of squares."""
        indices, places = self._spare
        rest = (whole - own).clamp_(min=0).sqrt_()[indices]  # NaN stay what they are
        largest = torch.finfo(self.flat.dtype).max
        rest = torch.where(rest.isinf(), rest, rest.clamp(max=largest))
        self.flat[places] = rest.to(self.flat.dtype)


class _Swapped(NamedTuple):
    """A parameter that is its owner's part for as long as the optimizer steps."""

    parameter: torch.Tensor
    whole: torch.Tensor
    grad: torch.Tensor


class ServedReducer(Reducer):
    """Sums gradients at their owners, and brings back what these have made of the parameters.

    In ``step()`` each parameter is the flat part of itself that this rank owns, in the same
    memory, and so is its gradient: whatever state the optimizer makes is as long as that. Where a
    rank owns nothing of a parameter there is no gradient, hence no state.

    Args:
        optimizer: the user's.
        options: what the user asked for.
        passes_per_step: see :class:`Reducer`.
        servers: places of the servers among the ranks that train.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        options: Options,
        passes_per_step: int,
        servers: tuple[int, ...],
    ) -> None:
        self.servers = servers
        self.strategy = f", sync=parameter_server, servers={list(servers)}"
        self._swapped: list[_Swapped] = []
        self._before: dict[str, torch.Tensor] = {}  # own parts before a step, as others have them
        self._owed: dict[str, torch.Tensor] = {}  # what others' copies of own parts lack
        self._factors: dict[str, Any] = {}  # messengers' states
        self._loaded_parts: Mapping[str, Sequence[int]] | None = None
        self._loaded_owed: Mapping[str, torch.Tensor] = {}
        self._savings = 0
        super().__init__(optimizer, options, passes_per_step)

    def attach(self, methods: Sequence[str]) -> None:
        """See :meth:`Wrapper.attach`."""
        super().attach(methods)
        optimizer: Any = self.optimizer
        optimizer.register_state_dict_post_hook(self._spelt)
        optimizer.register_load_state_dict_pre_hook(self._before_loading)

    @property
    def sharded(self) -> bool:
        """Whether this rank's state is no other rank's."""
        return self.active and bool(self.buckets)

    @property
    def adds_up(self) -> bool:
        """See :meth:`Reducer.adds_up`."""
        return True

    # -- buckets

    def check_sparse(self, names: list[str]) -> None:
        """See :meth:`Reducer.check_sparse`."""
        if names:
            raise ValueError(
                f"rank {world.rank()}: parameter {names[0]!r} has sparse gradients, of which "
                "sync='parameter_server' has no parts; give DistributedOptimizer "
                "sparse_as_dense=True, or use sync='allreduce'"
            )

    def bucket(self, *members: Any) -> Bucket:
        """See :meth:`Reducer.bucket`."""
        return ServedBucket(
            *members,
            servers=self.servers,
            place=self.adapter.place(self.options.process_set),
            average=self.options.op == ReduceOp.Average,
        )

    def settle(self) -> list[AnyBucket]:
        """See :meth:`Reducer.settle`; what the optimizer has of other ranks' parts goes."""
        made = super().settle()
        self._cut_states(made)
        return made

    def _served(self, buckets: Sequence[AnyBucket]) -> list[ServedBucket]:
        return [bucket for bucket in buckets if isinstance(bucket, ServedBucket)]

    # -- push

    def reduction(self, bucket: Bucket) -> Work[None]:
        """See :meth:`Reducer.reduction`; means are then where they are owned, and zeros beside."""
        assert isinstance(bucket, ServedBucket)
        gradients = bucket.flat[: bucket.total]
        presence = Allreduce(bucket.presence, "presence", op=ReduceOp.Sum, in_place=True)
        ops = _OPS.beside(gradients)
        if bucket.compressor is none:
            part, _ = yield from together([push(ops, gradients, bucket.cut), _asked(presence)])
            bucket.flat[bucket.start : bucket.stop] = part
        elif bucket.compressor is not None:
            compressor = bucket.compressor.at(self.kept.steps)
            work = for_owners(ops, compressor, gradients, None, bucket.cut)
            works: list[Work[Any]] = [work, _asked(presence)]
            reduced, _ = yield from together(works)
            gradients.copy_(reduced.mean)
        else:
            yield from self.each(ops, bucket)
        bucket.clear_rest()
        if self.options.op == ReduceOp.Sum and bucket.compressor is not none:
            gradients.mul_(self.ranks)

    def start(
        self, bucket: Bucket, index: int, grad: torch.Tensor, method: Compressor
    ) -> Work[Reduced]:
        """See :meth:`Reducer.start`."""
        assert isinstance(bucket, ServedBucket)
        state = self.kept.states[bucket.names[index]]
        ops, method = _OPS.beside(grad), method.at(self.kept.steps)
        return for_owners(ops, method, grad, state, bucket.cut_of(index))

    def arrived(self, landed: Sequence[AnyBucket]) -> None:
        """See :meth:`Reducer.arrived`: tell all ranks how long each mean is."""
        served = self._served(landed)
        if self.ranks == 1 or not served:
            return
        own = [bucket.squares() for bucket in served]
        again = max(bucket.rounds for bucket in served)
        name = f"{self.name}.norms" + (f".again{again}" if again > 1 else "")
        device = own[0].device
        request = Allreduce(torch.cat([each.to(device) for each in own]), op=ReduceOp.Sum)
        whole = Flight(self.adapter, _asked(request), name, self.options.process_set).finish()
        sizes = [len(each) for each in own]
        for bucket, mine, all_ in zip(served, own, whole.split(sizes), strict=True):
            bucket.complete(all_.to(mine.device), mine)

    # -- update

    @torch.no_grad()
    def enter_step(self) -> None:
        """See :meth:`Reducer.enter_step`: put this rank's parts in the parameters' places."""
        self._leave_step()  # one that has failed
        if not self.active:
            return
        for bucket in self._served(self.buckets):
            for index, parameter in bucket.living():
                self._owe(bucket, index, parameter)
                if parameter.grad is not None:
                    self._enter(bucket, index, parameter, parameter.grad)

    def _enter(
        self, bucket: ServedBucket, index: int, parameter: torch.Tensor, grad: torch.Tensor
    ) -> None:
        if grad.data_ptr() != bucket.views[index].data_ptr():  # somebody has put another there
            bucket.views[index].copy_(grad)
        self._swapped.append(_Swapped(parameter, parameter.data, grad))
        parameter.grad = None
        low, high = bucket.parts[index]
        if low < high:
            parameter.data = _flat(parameter.data)[low:high]
            parameter.grad = bucket.part(index)

    def _owe(self, bucket: ServedBucket, index: int, parameter: torch.Tensor) -> None:
        """Step from what the owner has, where others have something less exact."""
        name, (low, high) = bucket.names[index], bucket.parts[index]
        if low < high and (name in self._owed or self.kept.messenger(name) is not None):
            part = _flat(parameter.data)[low:high]
            self._before[name] = part.clone()
            if name in self._owed:
                part.add_(self._owed[name])

    def _leave_step(self) -> None:
        for parameter, whole, grad in self._swapped:
            parameter.grad = None
            parameter.data = whole
            parameter.grad = grad
        self._swapped = []

    # -- pull

    @torch.no_grad()
    def after_step(self, optimizer: Any, args: Any, options: Any) -> None:
        """Bring all ranks what the owners have made of their parts."""
        self._leave_step()
        if self.sharded and self.ranks > 1:
            flights = [
                Flight(self.adapter, self._pulled(bucket), f"{self.name}.{bucket.index}.pull",
                       self.options.process_set)
                for bucket in self._served(self.buckets)
            ]  # fmt: skip
            start = time.perf_counter()
            for flight in flights:
                flight.finish()
            optimizer.communication_seconds += time.perf_counter() - start
        self._before = {}
        super().after_step(optimizer, args, options)

    def _pulled(self, bucket: ServedBucket) -> Work[None]:
        living = dict(bucket.living())
        members = self._members(bucket)
        own = {
            index: _flat(living[index].data)[low:high]
            if index in living
            else bucket.flat.new_zeros(high - low)
            for index, (low, high) in enumerate(bucket.parts)
            if low < high
        }
        if all(member.messenger is None for member in members):
            part = torch.cat([*own.values()]) if own else bucket.flat.new_empty(0)
            whole = yield from pull(_OPS, part)
            sizes = [view.numel() for view in bucket.views]
            into = [_flat(parameter.data) for parameter in living.values()]
            given = whole.split(sizes)
            torch._foreach_copy_(into, [given[index] for index in living])
            for name in bucket.names:
                self._owed.pop(name, None)
            return
        yield from self._pulled_changes(bucket, members, living, own)

    def _members(self, bucket: ServedBucket) -> list[Member]:
        found = []
        for offset, name, view in zip(bucket.offsets, bucket.names, bucket.views, strict=True):
            spec = self._spec(name, view)
            found.append(Member(spec, offset, self.kept.messenger(name)))
        return found

    def _pulled_changes(
        self,
        bucket: ServedBucket,
        members: list[Member],
        living: dict[int, torch.Tensor],
        own: dict[int, torch.Tensor],
    ) -> Work[None]:
        place = self.adapter.place(self.options.process_set)
        coded = {
            index: bucket.names[index]
            for index, low, high in pieces(members, bucket.cut, place)
            if members[index].size(low, high) is not None
        }
        parts, states = dict(own), {}
        for index, name in coded.items():
            parts[index] = (own[index] - self._before[name]).float()
            states[index] = self._factor(name, members[index])
        ops = _OPS.beside(bucket.flat)
        found, kept = yield from pull_changes(ops, members, bucket.cut, parts, states)
        for index, name in coded.items():
            exact = own[index].clone()
            own[index].copy_(self._before[name])
            self._before[name] = exact
            self._factors[name] = kept[index]
        for index, start, stop, values, change in found:
            if index in living:
                target = _flat(living[index].data)[start:stop]
                if change is None:
                    target.copy_(values)
                else:
                    target.add_(change.to(target.dtype))
        for index in own:
            name = bucket.names[index]
            last = self._owed.pop(name, None)
            if index in coded:
                owed = self._before[name] - own[index]
                known = last if last is not None else torch.zeros_like(owed)
                self._owed[name] = _OPS.finite_or(owed, known)

    def _factor(self, name: str, member: Member) -> Any:
        if name not in self._factors:
            assert member.messenger is not None
            with self._device_of(name):
                self._factors[name] = member.messenger.first(_OPS, member.spec)
        return self._factors[name]

    def _device_of(self, name: str) -> torch.device:
        return next(
            bucket.flat.device for bucket in self._served(self.buckets) if name in bucket.names
        )

    # -- saved and loaded

    def _states(
        self, buckets: Sequence[AnyBucket]
    ) -> Iterator[tuple[ServedBucket, int, torch.Tensor, dict[str, Any]]]:
        """Yield what the optimizer keeps for each parameter of ``buckets``."""
        optimizer = self.optimizer
        for bucket in self._served(buckets):
            for index, parameter in bucket.living():
                if optimizer is not None:
                    yield bucket, index, parameter, optimizer.state.get(parameter, {})

    def _cut_states(self, buckets: Sequence[AnyBucket]) -> None:
        """Leave of the optimizer's state what this rank owns.

        Raises:
            ValueError: it is neither whole nor this rank's part.
        """
        for bucket, index, parameter, state in self._states(buckets):
            name, (low, high) = bucket.names[index], bucket.parts[index]
            if name in self._loaded_owed and low < high:
                owed = self._loaded_owed[name].to(parameter.device, parameter.dtype)
                whole = owed.shape == parameter.shape and self._loaded_parts is None
                self._owed[name] = _taken(owed, parameter, low, high) if whole else owed.clone()
            for key, value in list(state.items()):
                if _is_number(key, value):
                    continue
                if value.shape == parameter.shape:
                    state[key] = _taken(value, parameter, low, high)
                elif not self._fits(name, value, low, high):
                    raise ValueError(
                        f"rank {world.rank()}: the optimizer's {key!r} of parameter {name!r} has "
                        f"shape {tuple(value.shape)}: that is neither the parameter's, "
                        f"{tuple(parameter.shape)}, nor of this rank's part, elements {low} to "
                        f"{high}. {_REMEDY}"
                    )
            if low == high and state:
                assert self.optimizer is not None
                del self.optimizer.state[parameter]

    def _fits(self, name: str, value: torch.Tensor, low: int, high: int) -> bool:
        told = None if self._loaded_parts is None else self._loaded_parts.get(name)
        return value.shape == (high - low,) and (told is None or list(told) == [low, high])

    def _spelt(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        """Say in a state dictionary whose it is."""
        parts = {
            bucket.names[index]: list(bucket.parts[index])
            for bucket, index, _, state in self._states(self.buckets)
            if state or bucket.names[index] in self._owed
        }
        if self.sharded and parts:
            state_dict[_OWN] = {
                "rank": self.adapter.place(self.options.process_set),
                "ranks": self.ranks,
                "servers": list(self.servers),
                "parts": parts,
                "owed": {name: tensor.clone() for name, tensor in self._owed.items()},
                "factors": {name: _copy(factor) for name, factor in self._factors.items()},
            }

    def _before_loading(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        """Refuse what belongs to another rank.

        Raises:
            ValueError: it does; the message names both.
        """
        own = state_dict.pop(_OWN, None)
        self._owed, self._factors = {}, {}
        self._loaded_parts, self._loaded_owed = None, {} if own is None else own["owed"]
        if own is None or "rank" not in own:
            return
        place = self.adapter.place(self.options.process_set) if self.active else 0
        here = {"rank": place, "ranks": self.ranks, "servers": list(self.servers)}
        if not self.active or any(own[key] != here[key] for key in here):
            raise ValueError(
                f"this state_dict() is of rank {own['rank']} of {own['ranks']}, with servers="
                f"{own['servers']}, and this is rank {place} of {self.ranks}, with servers="
                f"{list(self.servers)}. {_REMEDY}"
            )
        self._loaded_parts = own["parts"]
        self._factors = {name: _copy(factor) for name, factor in own["factors"].items()}

    def _loaded(self, optimizer: Any) -> None:
        super()._loaded(optimizer)
        self._cut_states(self.buckets)

    def portable_state_dict(self, root_rank: int | None = None) -> dict[str, Any] | None:
        """Return the state that a plain optimizer would have; a collective call.

        It loads at any number of ranks, with any ``sync`` and ``servers``, and into the optimizer
        without hvdx. Its tensors are on the CPU.

        Args:
            root_rank: the global rank that needs it; by default all do. Others get None, and
                hold no more than a bucket's state at a time.
        """
        self.require_place()
        optimizer = self.optimizer
        assert optimizer is not None
        wanted = root_rank is None or root_rank == world.rank()
        plain = optimizer.state_dict()
        plain.pop(_OWN, None)
        if self.sharded:
            self._savings += 1
            name = f"{self.name}.portable{self._savings}"
            states, owed = self._gathered(name, wanted)
            plain["state"] = {**plain["state"], **states}
            if owed:
                plain[_OWN] = {"owed": owed}
        return plain if wanted else None

    def _gathered(self, name: str, wanted: bool) -> tuple[dict[int, Any], dict[str, torch.Tensor]]:
        """Return states by number of the parameter, and what is owed by name."""
        assert self.optimizer is not None
        numbers: dict[int, int] = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                numbers.setdefault(id(parameter), len(numbers))
        told = {
            (bucket.index, index): {
                key: value if _is_number(key, value) else dtype_name(value.dtype)
                for key, value in self._with_owed(bucket.names[index], state).items()
            }
            for bucket, index, _, state in self._states(self.buckets)
        }
        everyone = self.adapter.allgather_object(told, name, self.options.process_set)
        states: dict[int, Any] = {}
        owed: dict[str, torch.Tensor] = {}
        for bucket in self._served(self.buckets):
            living = dict(bucket.living())
            keys = {
                index: _united(own.get((bucket.index, index), {}) for own in everyone)
                for index in living
            }
            flights = {
                (index, key): self._whole(bucket, index, key, kind, f"{name}.{bucket.index}")
                for index in living
                for key, kind in keys[index].items()
                if isinstance(kind, str)
            }
            for index, parameter in living.items():
                found: dict[str, Any] = {}
                for key, kind in keys[index].items():
                    found[key] = kind
                    if (index, key) in flights:
                        flat = flights[index, key].finish()
                        if wanted:
                            found[key] = torch.empty_like(parameter, dtype=flat.dtype, device="cpu")
                            _flat(found[key].detach()).copy_(flat)
                            found[key] = found[key].detach()
                if _OWED in found:
                    owed[bucket.names[index]] = found.pop(_OWED)
                if found:
                    states[numbers[id(parameter)]] = found
        return states, owed

    def _with_owed(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, _OWED: self._owed[name]} if name in self._owed else state

    def _whole(self, bucket: ServedBucket, index: int, key: str, dtype: str, name: str) -> Flight:
        """Start to gather the parts of one tensor."""
        parameter = bucket._parameters[index]()
        assert parameter is not None and self.optimizer is not None
        state = self._with_owed(bucket.names[index], self.optimizer.state.get(parameter, {}))
        part = state.get(key)
        if part is None:
            low, high = bucket.parts[index]
            part = torch.zeros(high - low, dtype=getattr(torch, dtype), device=bucket.flat.device)
        work = pull(_OPS, part.contiguous())
        return Flight(self.adapter, work, f"{name}.{index}.{key}", self.options.process_set)


_OWED = "owed by its owner"  # beside an optimizer's own names
_REMEDY = (
    "For another number of ranks, other servers or other buckets save what "
    "optimizer.portable_state_dict() returns"
)


def _asked(request: Allreduce) -> Work[torch.Tensor]:
    return (yield request)  # type: ignore[no-any-return]


def _united(told: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Merge what ranks tell of one parameter: the first to know counts."""
    found: dict[str, Any] = {}
    for own in told:
        for key, value in own.items():
            found.setdefault(key, value)
    return found


def _is_number(key: str, value: Any) -> bool:
    return key in _NUMBERS or not isinstance(value, torch.Tensor)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without gaps as it lies in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _gapless(tensor: torch.Tensor) -> bool:
    like = torch.empty_like(tensor, device="meta")
    told = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    return all(own == wanted for size, own, wanted in told if size > 1)


def _taken(value: torch.Tensor, like: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Return elements ``low`` to ``high`` of ``value``, in the order of ``like`` in memory."""
    ordered = torch.empty_like(like, dtype=value.dtype, device=value.device).detach()
    return _flat(ordered.copy_(value))[low:high].clone()


def _copy(state: Any) -> Any:
    return state.clone() if isinstance(state, torch.Tensor) else state
