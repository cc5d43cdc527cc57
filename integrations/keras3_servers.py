"""Parameter servers under Keras: each rank steps the optimizer on what it owns (ZeRO).

The user's optimizer is built on *parts*: for each variable of the model one of one dimension, as
long as what this rank owns of it, which may be nothing. So what it makes of them, whatever its
class, is as long; and it has as many variables as without hvdx, on every rank.
"""

from __future__ import annotations

import abc
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from hvdx import world
from hvdx.collectives import perform
from hvdx.comm import Allreduce, Work, drive, together
from hvdx.compression import Compressor, Spec, none
from hvdx.errors import HvdxError
from hvdx.frameworks import Adapter
from hvdx.integrations.keras3 import AveragingOptimizer, _check_caller
from hvdx.integrations.keras3_averager import Averager, Bucket, Layout, Options
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp
from hvdx.servers import Cut, Member, cut, for_owners, pull, pull_changes, push

_ELEMENTWISE = (
    "SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion",
)  # fmt: skip


def check_served(optimizer: Any) -> None:
    """Refuse optimizers, and options of theirs, that need whole variables.

    Raises:
        ValueError: there is such a one; the message says what to do instead.
    """
    known = [getattr(keras.optimizers, name) for name in _ELEMENTWISE]
    steps = {kind.update_step for kind in known}
    if type(optimizer).update_step not in steps and not getattr(optimizer, "elementwise", False):
        raise ValueError(
            f"sync='parameter_server' cuts variables into parts, each with an optimizer of its "
            f"own: {type(optimizer).__name__} is not known to treat every element alone, as "
            f"{', '.join(_ELEMENTWISE)} do. Use sync='allreduce', or, if it does, say so: "
            "optimizer.elementwise = True"
        )
    if optimizer.use_ema:
        raise ValueError(
            "sync='parameter_server' with use_ema=True: no rank has the whole moving averages "
            "that fit() puts into the model at its end; leave one of them out"
        )
    if optimizer.built:
        raise ValueError(
            f"sync='parameter_server': {optimizer.name!r} is built already, for whole variables; "
            "wrap it before, and load its state after"
        )


class Sent(NamedTuple):
    """What an owner keeps of a part whose changes it sends."""

    owed: Any  # what others' copies lack, (own,)
    factor: Any  # the messenger's


class Served(Averager):
    """Sums gradients at their owners and brings back what these have made of the variables.

    Attributes:
        servers: their places among the ranks that train.
        wholes: the model's variables, once the optimizer is built.
        parts: of each of them, what this rank owns: variables too.
        slots: by identity of an optimizer's variable, the place of the variable that it is for.
    """

    def __init__(self, adapter: Adapter, options: Options, servers: tuple[int, ...]) -> None:
        self.servers = servers
        self.wholes: list[Any] = []
        self.parts: list[Any] = []
        self.slots: dict[int, int] = {}
        self._spans: list[tuple[int, int]] = []
        self._cuts: list[Cut] = []
        self._left = False  # the job for which variables were cut
        self._whole_state: tuple[int, list[np.ndarray]] | None = None
        self._loaded: list[np.ndarray] | None = None
        self._calls = 0
        super().__init__(adapter, options._replace(sparse_as_dense=True))
        self.sent = self.make_states()

    def forget(self) -> None:
        """See :meth:`Averager.forget`."""
        super().forget()
        self._left = bool(self.wholes)

    def configuration(self, optimizer: Any) -> str:
        """See :meth:`Averager.configuration`."""
        told = f"sync=parameter_server, servers={list(self.servers)}"
        return f"{super().configuration(optimizer)}, {told}"

    # -- who owns what

    def cut(self, variables: list[Any]) -> list[Any]:
        """Cut the model's variables; return this rank's parts, in their order."""
        for variable in variables:
            if getattr(variable, "overwrite_with_gradient", False):
                raise ValueError(
                    f"variable {variable.path!r} takes its gradient's place, as those of float8 "
                    "layers do: use sync='allreduce'"
                )
        specs = {place: self.spec(variable) for place, variable in enumerate(variables)}
        self._cuts = [Cut(())] * len(variables)
        for places in self.grouped(specs, variables):
            sizes = [int(np.prod(specs[place].shape)) for place in places]
            whole, start = cut(sum(sizes), self.ranks(), self.servers), 0
            for place, size in zip(places, sizes, strict=True):
                self._cuts[place] = whole.within(start, start + size)
                start += size
        self._spans = [each.spans[self.origin[0]] for each in self._cuts]
        self.wholes = list(variables)
        self.parts = [
            self.make_part(variable, stop - start)
            for variable, (start, stop) in zip(variables, self._spans, strict=True)
        ]
        return self.parts

    def _buckets(
        self, prefix: str, specs: dict[int, Spec], variables: list[Any], origins: list[Any]
    ) -> list[Bucket]:
        made = super()._buckets(prefix, specs, variables, origins)
        for bucket in made:
            bucket.cut = cut(sum(bucket.sizes), self.ranks(), self.servers)
            for member, place in zip(self._members(bucket), bucket.members, strict=True):
                start, stop = self._spans[place]
                if stop > start and member.size(start, stop) is not None:
                    keeper = Compressor(member.spec.name, _sender(member, stop - start), _nothing)
                    self.sent.meet(member.spec, keeper, self.device(variables[place]))
        return made

    def _members(self, bucket: Bucket) -> list[Member]:
        starts = np.cumsum([0, *bucket.sizes]).tolist()
        return [
            Member(spec, start, compressor.at(bucket.starts[-1]).updates)
            for spec, start, compressor in zip(
                bucket.specs, starts, bucket.compressors, strict=False
            )
        ]

    # -- a step

    def step(
        self, optimizer: Any, grads: list[Any], variables: list[Any], update: Callable[..., None]
    ) -> None:
        """Push, have ``update`` step on the parts, and pull."""
        if self._left:
            raise HvdxError(
                "ranks have changed, and with them who owns what: sync='parameter_server' does "
                "not go on in the same process. Start again from a checkpoint"
            )
        if [*map(id, variables)] != [*map(id, self.wholes)]:
            raise ValueError(
                f"sync='parameter_server' steps the {len(self.wholes)} variables for which the "
                f"optimizer was built, and {len(variables)} were given, or others: freeze layers "
                "before training, and make a new optimizer afterwards"
            )
        layout = self._layout(optimizer, grads, variables)
        means = self.reduce(layout, grads)
        for place in self._unused(layout, grads):
            means[place] = None
        before = self.enter(layout)
        update(means, self.parts)
        self.leave(layout, before)
        for variable in variables:  # which may look at all elements
            if getattr(variable, "constraint", None) is not None:
                variable.assign(variable.constraint(variable.value))

    def _unused(self, layout: Layout, grads: list[Any]) -> list[int]:
        """Return the places of variables that no rank used at first, and none does now."""
        places = sorted(layout.idle)
        own = [grads[place] is None for place in places]
        if places and not self.is_tracing():
            all_ = self.everywhere(keras.ops.convert_to_tensor(own), "unused")
            own = keras.ops.convert_to_numpy(all_).tolist()
        return [place for place, unused in zip(places, own, strict=True) if unused]

    def remembered(self, bucket: Bucket) -> list[int]:
        """Return the indices of members of whose parts changes are sent, not values."""
        return [i for i, spec in enumerate(bucket.specs) if self.sent.knows(spec.name)]

    def work(
        self, bucket: Bucket, grads: list[Any], start: int
    ) -> Work[tuple[list[Any], dict[str, Any]]]:
        """See :meth:`Averager.work`; of each mean only this rank's part, of one dimension."""
        assert bucket.cut is not None
        ops, op, predivide, ranks = self.ops, self.options.op, self.options.predivide, self.ranks()
        compressors = [each.at(start) for each in bucket.compressors]
        chosen = compressors[0]
        alike = all(each is chosen for each in compressors)
        plain = alike and chosen is none
        factor = ranks if op is ReduceOp.Sum and not plain else predivide
        factor *= self.options.times
        if predivide != 1.0:
            grads = [ops.scale(grad, 1.0 / predivide) for grad in grads]
        if alike and chosen.elementwise:
            flat, _ = self.pack(bucket, grads)
            low, high = bucket.cut.spans[self.origin[0]]
            if plain:
                if op is ReduceOp.Average and ops.dtype(flat) == "float16":
                    flat, factor = ops.scale(flat, 1.0 / ranks), factor * ranks
                part = yield from push(ops, flat, bucket.cut)
                factor = factor / ranks if op is ReduceOp.Average else factor
            else:
                reduced = yield from for_owners(ops.beside(flat), chosen, flat, None, bucket.cut)
                part = ops.reshape(reduced.mean, (-1,))[low:high]
            part = ops.scale(part, factor) if factor != 1.0 else part
            return self._apart(bucket, part), {}
        names = [spec.name for spec in bucket.specs]
        works = [
            for_owners(ops.beside(grad), compressor, grad, self.states[name], self._cuts[place])
            for compressor, grad, name, place in zip(
                compressors, grads, names, bucket.members, strict=True
            )
        ]
        results = yield from together(works, ops)
        parts = []
        for result, place in zip(results, bucket.members, strict=True):
            low, high = self._spans[place]
            part = ops.reshape(result.mean, (-1,))[low:high]
            parts.append(ops.scale(part, factor) if factor != 1.0 else part)
        return parts, {name: each.state for name, each in zip(names, results, strict=True)}

    def _apart(self, bucket: Bucket, part: Any) -> list[Any]:
        """Cut what this rank owns of a bucket into parts of its members."""
        parts, start = [], 0
        for place in bucket.members:
            low, high = self._spans[place]
            parts.append(part[start : start + high - low])
            start += high - low
        return parts

    def all_finite(self, layout: Layout, means: list[Any], grads: list[Any]) -> Any:
        """See :meth:`Averager.all_finite`; each rank sees its own parts."""
        return self.everywhere(self.finite([m for m in means if m is not None]), "applied")

    def pulled(
        self, bucket: Bucket, exact: list[Any], wholes: list[Any]
    ) -> Work[tuple[list[Any], dict[str, Sent]]]:
        """Tell all ranks what this one has made of its parts of a bucket.

        Args:
            bucket: of the layout.
            exact: what has become of the parts of its members, (own,).
            wholes: the members as all ranks have them until now, flat.

        Returns:
            The members as all ranks have them from now on, flat; and what is kept of them.
        """
        assert bucket.cut is not None
        ops, coded = self.ops, self.remembered(bucket)
        members = self._members(bucket)
        if all(member.messenger is None for member in members):
            flat = yield from pull(ops, ops.concat(exact))
            starts = [member.start for member in members]
            sizes = zip(starts, bucket.sizes, strict=True)
            return [flat[start : start + size] for start, size in sizes], {}
        spans = [self._spans[place] for place in bucket.members]
        old = {i: wholes[i][spans[i][0] : spans[i][1]] for i in coded}
        parts = {i: part for i, part in enumerate(exact) if spans[i][1] > spans[i][0]}
        parts |= {i: ops.cast(exact[i] - old[i], "float32") for i in coded}
        kept = {i: self.sent[bucket.specs[i].name] for i in coded}
        factors = {i: kept[i].factor for i in coded}
        ops = ops.beside(wholes[0])
        found, factors = yield from pull_changes(ops, members, bucket.cut, parts, factors)
        chunks: list[list[Any]] = [[] for _ in members]
        for i, start, stop, values, change in found:
            if values is None:
                values = wholes[i][start:stop] + ops.cast(change, members[i].spec.dtype)
            chunks[i].append(values)
        new = [ops.concat(own) if own else wholes[i] for i, own in enumerate(chunks)]
        states = {}
        for i in coded:
            owed = exact[i] - new[i][spans[i][0] : spans[i][1]]
            states[bucket.specs[i].name] = Sent(ops.finite_or(owed, kept[i].owed), factors[i])
        return new, states

    def brought(self, bucket: Bucket, parts: list[Any]) -> list[Any]:
        """Return a bucket's members, flat, as their owners have them."""
        self._calls += 1
        work = pull(self.ops, self.ops.concat(parts))
        flat = drive(work, self.answer(f"{self.options.name}.flush{self._calls}"))
        starts = np.cumsum([0, *bucket.sizes]).tolist()
        return [flat[a:b] for a, b in itertools.pairwise(starts)]

    def answer(self, name: str) -> Callable[[Any], Any]:
        """Return what carries out requests under names that begin so."""
        return functools.partial(
            perform, self.adapter, name=name, process_set=self.options.process_set
        )

    def total(self, squares: Any, purpose: str) -> Any:
        """Return the sum over the ranks of a tensor of numbers."""
        if self.ranks() == 1:
            return squares
        work = _asked(Allreduce(squares, purpose, ReduceOp.Sum))
        return drive(work, self.answer(self.options.name))

    # -- states

    def saved_state(self) -> dict[str, Any]:
        """See :meth:`Averager.saved_state`."""
        return {**super().saved_state(), "sent": self.sent.saved(self.origin)}

    def load_state(self, saved: Any) -> None:
        """See :meth:`Averager.load_state`."""
        given = dict(saved) if isinstance(saved, dict) else saved
        sent = given.pop("sent", None) if isinstance(given, dict) else None
        super().load_state(given)
        if sent is not None:
            self.sent.load(sent, self.origin)

    def settle(self, sums: list[Any]) -> None:
        """Give all ranks exactly what owners have, so that nothing is owed; a collective call."""
        for layout in self._layouts.values():
            self.flush(layout)

    def portable_state(self) -> dict[str, Any]:
        """See :meth:`Averager.portable_state`."""
        self.settle([])
        return super().portable_state()

    def gather(self, optimizer: Any) -> None:
        """Bring the optimizer's whole state to the first rank, to be saved; a collective call."""
        self._calls += 1
        variables = list(optimizer.variables)
        own = [variable for variable in variables if id(variable) in self.slots]
        works = [pull(self.ops, self.tensor(variable)) for variable in own]
        found = drive(together(works), self.answer(f"{self.options.name}.whole{self._calls}"))
        arrays = {}
        for variable, flat in zip(own, found, strict=True):
            if self.origin[0] == 0:
                shape = tuple(self.wholes[self.slots[id(variable)]].shape)
                arrays[id(variable)] = np.array(keras.ops.convert_to_numpy(flat)).reshape(shape)
        if self.origin[0] == 0:
            whole = [
                arrays.get(id(variable), np.array(keras.ops.convert_to_numpy(variable)))
                for variable in variables
            ]
            self._whole_state = int(optimizer._iterations), whole

    def whole_state(self, optimizer: Any) -> list[np.ndarray]:
        """Return what :meth:`gather` has brought here.

        Raises:
            ValueError: nothing, or there were steps since.
        """
        iterations = int(optimizer._iterations)
        if self._whole_state is None or self._whole_state[0] != iterations:
            raise ValueError(
                "with sync='parameter_server' no rank has the optimizer's whole state to save: "
                "call optimizer.settle() on all ranks before rank 0 saves the model, or save "
                "without the optimizer (include_optimizer=False, or save_weights)"
            )
        return self._whole_state[1]

    def put(self, optimizer: Any, arrays: Sequence[np.ndarray]) -> None:
        """Take this rank's parts of a whole state, or a state of parts."""
        self._loaded = list(arrays)
        for variable, array in zip(optimizer.variables, arrays, strict=True):
            place = self.slots.get(id(variable))
            if place is not None and tuple(array.shape) == tuple(self.wholes[place].shape):
                start, stop = self._spans[place]
                array = np.reshape(array, -1)[start:stop]
            elif tuple(array.shape) != tuple(variable.shape):
                raise ValueError(
                    f"rank {world.rank()}: {variable.path!r} was saved in the shape "
                    f"{tuple(array.shape)}, which is neither the whole one nor this rank's part, "
                    f"{tuple(variable.shape)}"
                )
            variable.assign(array)

    def hand_out(self, optimizer: Any) -> None:
        """Give all ranks their parts of the state that the first has loaded; a collective call."""
        told = self._loaded if self.origin[0] == 0 else None
        process_set = self.options.process_set
        root = 0 if process_set is None else process_set.ranks[0]
        self._calls += 1
        arrays = self.adapter.broadcast_object(
            told, root, f"{self.options.name}.loaded{self._calls}", process_set
        )
        if arrays is not None:
            self.put(optimizer, arrays)

    # -- how a backend does it

    @abc.abstractmethod
    def make_part(self, variable: Any, size: int) -> Any:
        """Return a Keras variable of ``size`` elements, called as ``variable`` is."""

    @abc.abstractmethod
    def enter(self, layout: Layout) -> Any:
        """Give the parts the values that their owner has; return what :meth:`leave` needs."""

    @abc.abstractmethod
    def leave(self, layout: Layout, before: Any) -> None:
        """Carry :meth:`pulled` out for all buckets, and assign what it returns."""

    @abc.abstractmethod
    def flush(self, layout: Layout) -> None:
        """Give all ranks what the owners have, exactly; nothing is owed afterwards."""

    @abc.abstractmethod
    def tensor(self, variable: Any) -> Any:
        """Return a variable's value, of which a step changes nothing."""


class ServedOptimizer(AveragingOptimizer):
    """What ``DistributedOptimizer`` puts before the user's class for parameter servers."""

    _averager: Served
    has_parts = True

    def build(self, variables: Any) -> None:
        """Make the optimizer's variables for this rank's parts."""
        self._meet_scaler(sys._getframe(1).f_locals.get("self"))
        parts = self._averager.cut(list(variables))
        super(AveragingOptimizer, self).build(parts)  # type: ignore[misc]

    def add_variable_from_reference(
        self, reference_variable: Any, *args: Any, **options: Any
    ) -> Any:
        """Note which variable of the model one of the optimizer is for."""
        made = super().add_variable_from_reference(reference_variable, *args, **options)  # type: ignore[misc]
        for place, part in enumerate(self._averager.parts):
            if part is reference_variable or getattr(part, "value", part) is reference_variable:
                self._averager.slots[id(made)] = place
        return made

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Push ``grads``, update this rank's parts as the user's class does, and pull."""
        grads, averager = list(grads), self._averager
        variables = list(averager.wholes if trainable_variables is None else trainable_variables)
        update = super(AveragingOptimizer, self).apply  # type: ignore[misc]
        if not averager.started and averager.ranks() > 1:
            _check_caller(self)
        if not grads or len(grads) != len(variables):  # Keras says what is wrong
            update(grads, variables)
            return
        if not self.built:  # type: ignore[has-type]
            self.build(variables)
            self.built = True
        averager.step(self, grads, variables, update)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        """Clip by norms of whole gradients, of which each rank has parts."""
        one: Any = self
        each, all_ = one.clipnorm, one.global_clipnorm
        if not each and not all_:
            return super()._clip_gradients(grads)  # type: ignore[misc,no-any-return]
        ops = keras.ops
        squares = ops.stack([ops.sum(ops.square(ops.cast(g, "float64"))) for g in grads])
        norms = ops.sqrt(self._averager.total(squares, "norms"))
        if each:
            factors = each / ops.maximum(norms, each)
        else:
            norm = ops.sqrt(ops.sum(ops.square(norms)))
            factors = ops.ones_like(norms) * (all_ / ops.maximum(norm, all_)) + (norm - norm)
        return [g * ops.cast(factors[i], g.dtype) for i, g in enumerate(grads)]

    def register_local_var(self, var: Any) -> None:
        """Refuse: gradients that stay on a rank have no owner.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"register_local_var({getattr(var, 'name', var)!r}) with sync='parameter_server': a "
            "variable has one owner, and all ranks get what it has made of it"
        )

    def settle(self) -> None:
        """Give all ranks exactly what owners have, and rank 0 the optimizer's whole state.

        A collective call, between steps: before rank 0 saves the model.
        """
        self._averager.settle([])
        if self.built:  # type: ignore[has-type]
            self._averager.gather(self)

    def save_own_variables(self, store: Any) -> None:
        """Save the whole state, as without hvdx; after :meth:`settle`."""
        for place, array in enumerate(self._averager.whole_state(self)):
            store[str(place)] = array

    def load_own_variables(self, store: Any) -> None:
        """Take this rank's parts of what was saved, with or without hvdx."""
        if len(store.keys()) != len(self.variables):
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}: it has "  # type: ignore[attr-defined]
                f"{len(self.variables)} variables, the saved one {len(store.keys())}",
                stacklevel=2,
            )
            return
        self._averager.put(self, [np.array(store[str(i)]) for i in range(len(self.variables))])

    def hand_out_parts(self) -> None:
        """See :meth:`AveragingOptimizer.hand_out_parts`."""
        self._averager.hand_out(self)

    def without_parts(self, variables: Iterable[Any]) -> list[Any]:
        """See :meth:`AveragingOptimizer.without_parts`: counters and rates."""
        return [variable for variable in variables if id(variable) not in self._averager.slots]


def _sender(member: Member, size: int) -> Callable[[Ops, Spec], Sent]:
    def init(ops: Ops, spec: Spec) -> Sent:
        assert member.messenger is not None
        return Sent(ops.zeros((size,), member.spec.dtype), member.messenger.first(ops, spec))

    return init


def _nothing(ops: Ops, grad: Any, state: Any) -> Work[Any]:
    raise NotImplementedError
    yield


def _asked(request: Allreduce) -> Work[Any]:
    return (yield request)
