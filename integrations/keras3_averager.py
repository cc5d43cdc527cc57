"""What averages Keras gradients, whatever the backend: plans, agreements, the work of a bucket."""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
import json
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from hvdx import buckets, collectives, world
from hvdx.agreement import check_same
from hvdx.collectives import perform
from hvdx.comm import Allreduce, Work, together
from hvdx.compression import FORMAT, CompressionError, Compressor, Spec, none
from hvdx.compression.codecs import Codec
from hvdx.compression.portable import Origin, in_order, warn_of_lost
from hvdx.compression.rows import row_codec
from hvdx.compression.turns import Clock
from hvdx.frameworks import Adapter
from hvdx.integrations.keras3_state import States
from hvdx.ops import Ops
from hvdx.reduce_op import ReduceOp
from hvdx.servers import Cut


class Options(NamedTuple):
    """What the user chose, but for the optimizer."""

    name: str
    compressor: Compressor
    op: ReduceOp
    predivide: float
    process_set: Any
    sparse_as_dense: bool
    times: int  # what Keras' mean over accumulated steps is multiplied by
    scale_local: bool


class Bucket:
    """Gradients of one dtype and device that travel side by side.

    Attributes:
        members: places among the variables.
        specs: of the members.
        shapes: of the members.
        sizes: of the members, in elements.
        compressors: of the members.
        clock: says whose turn it is, if the compressors' phases are turns.
        starts: steps, 0 first, from which on one of them works in another way; or turns.
        flat: what the engine keeps from step to step.
        cut: who owns which part, with parameter servers.
    """

    def __init__(
        self, name: str, members: list[int], specs: list[Spec], compressors: list[Compressor]
    ) -> None:
        self._name = name
        self.members = members
        self.specs = specs
        self.shapes = [spec.shape for spec in specs]
        self.sizes = [_elements(spec.shape) for spec in specs]
        self.compressors = compressors
        self.clock: Clock | None = next((each.clock for each in compressors if each.clock), None)
        moments = {start for each in compressors for start, _ in each.phases}
        self._alike: dict[int, int] = {}  # by turn, the first in which all works as in it
        if self.clock is None:
            self.starts = sorted({0, *moments})
        else:
            ways: dict[tuple[int, ...], int] = {}
            for turn in sorted(moments):
                way = tuple(id(each.at(turn)) for each in compressors)
                self._alike[turn] = ways.setdefault(way, turn)
            self.starts = list(ways.values())
        self.flat: Any = None
        self.cut: Cut | None = None

    def start(self, step: int) -> int:
        """Return that of :attr:`starts` by which gradients travel in ``step``, or by now."""
        if self.clock is not None:
            return self._alike[self.clock.turn(self.specs)]
        return max(start for start in self.starts if start <= step)

    def name(self, start: int) -> str:
        """Name the operations of the steps from ``start`` on, equally on all ranks."""
        if self.clock is not None:
            return f"{self._name}.turn{start}"
        return f"{self._name}.from{start}" if start else self._name

    @property
    def remembers(self) -> bool:
        """Whether anything is kept from step to step."""
        return any(map(_remembers, self.compressors))


class Rows(NamedTuple):
    """How the rows of a sparse gradient travel."""

    name: str  # of the operations that gather them
    codec: Codec | None  # what writes them; None if they travel raw


class Layout(NamedTuple):
    """How the gradients of one list of variables travel; places count from 0 in that list."""

    variables: list[Any]  # kept alive, since layouts are found by their identity
    buckets: list[Bucket]
    sparse: dict[int, Rows]  # by place
    local: frozenset[int]  # places whose gradients stay here
    idle: frozenset[int]  # places for which no rank had a gradient in the first step
    remembers: bool  # whether compressors keep anything from step to step
    clocks: list[Clock]  # to be asked after steps of this layout

    @property
    def turns(self) -> bool:
        """Whether methods take turns, so that states may rest."""
        return any(bucket.clock is not None for bucket in self.buckets)


_averagers: weakref.WeakSet[Averager] = weakref.WeakSet()


def _forget() -> None:
    if not world.running():
        for averager in _averagers:
            averager.forget()


world.on_change(_forget)


class Averager(abc.ABC):
    """Averages lists of gradients; a subclass per backend says how tensors are handled.

    Attributes:
        local: variables, and layers, whose gradients stay on this rank.
        broadcast_follows: ranks are made equal after the first step, so that they may differ now.
    """

    ops: Ops
    seconds: float

    def __init__(self, adapter: Adapter, options: Options) -> None:
        self.adapter = adapter
        self.options = options
        self.local: list[Any] = []
        self.broadcast_follows = False
        self.states = self.make_states()
        self._compressor: Compressor | None = None  # once it is prepared
        self._names: dict[int, str] = {}  # of variables, by identity
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._clocks: dict[Clock, int] = {}  # steps until the next review of each
        self._unseen: set[tuple[int, ...]] = set()  # layouts whose replicas are yet to compare
        _averagers.add(self)

    def forget(self) -> None:
        """Have the ranks agree again at the next step: others may have joined since."""
        self._layouts.clear()
        self._clocks.clear()
        self._unseen.clear()
        self._names.clear()
        self._compressor = None
        self.states.leave()

    @property
    def started(self) -> bool:
        """Whether ranks have agreed about what travels."""
        return bool(self._layouts)

    def average(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> list[Any]:
        """Return the means of ``grads`` over the ranks, None where no rank has a gradient."""
        if self.ranks() == 1 and self.options.compressor is none:
            return [self._scaled(grad, self.options.times) for grad in grads]
        layout = self._layout(optimizer, grads, variables)
        if optimizer.gradient_accumulation_steps:
            means = self._accumulated(optimizer, layout, grads)
        else:
            means = self.reduce(layout, grads)
        factor = self.options.times / (self.ranks() if self.options.scale_local else 1)
        for place in layout.local:
            means[place] = self._scaled(grads[place], factor)
        for place in layout.idle:
            if grads[place] is None and self.is_zero(means[place]):
                means[place] = None
        return means

    def _layout(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> Layout:
        key = tuple(map(id, variables))
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._agree(optimizer, grads, variables)
            self._unseen.add(key)
            if not self.is_tracing():  # a graph is traced once, and has no second step
                return layout
        if key in self._unseen:  # scripts may broadcast after the first step, as Horovod's do
            self._unseen.discard(key)
            self._compare(layout)
        return layout

    def _accumulated(self, optimizer: Any, layout: Layout, grads: list[Any]) -> list[Any]:
        """Average what this and earlier steps have gathered, in the step that updates only.

        Keras divides by the number of steps, and adds what is in its accumulators: nothing then.
        """
        if not optimizer.built:
            optimizer.build(layout.variables)
        shared = [place for place in range(len(grads)) if place not in layout.local]
        sums = [
            optimizer._accumulated_gradients[optimizer._get_variable_index(layout.variables[place])]
            for place in shared
        ]
        whole = self.dense(layout, grads)
        own = [whole[place] for place in shared]

        def update() -> list[Any]:
            for place, total in zip(shared, sums, strict=True):
                whole[place] = whole[place] + total.value
            means = self.reduce(layout, whole)
            for total in sums:
                total.assign(keras.ops.zeros_like(total))
            return [means[place] for place in shared]

        steps = optimizer.gradient_accumulation_steps
        due = (optimizer._iterations + 1) % steps == 0
        results = keras.ops.cond(due, update, lambda: own)
        means: list[Any] = [None] * len(grads)
        for place, result in zip(shared, results, strict=True):
            means[place] = result
        return means

    def settle(self, sums: list[Any]) -> None:
        """Replace the values of variables by their means over the ranks."""
        means = collectives.grouped_allreduce(
            sums, name=f"{self.options.name}.settle", process_set=self.options.process_set
        )
        for total, mean in zip(sums, means, strict=True):
            total.assign(mean)

    @property
    def remembers(self) -> bool:
        """Whether compressors keep anything from step to step."""
        return _remembers(self.options.compressor)

    @property
    def origin(self) -> Origin:
        """This rank's place among those that take part, and how many they are."""
        return self.adapter.place(self.options.process_set), self.ranks()

    def portable_state(self) -> dict[str, Any]:
        """Return what compressors of any number of ranks can go on from; a collective call."""
        name, process_set = f"{self.options.name}.portable", self.options.process_set
        return self.states.portable(
            functools.partial(perform, self.adapter, name=name, process_set=process_set)
        )

    def saved_state(self) -> dict[str, Any]:
        """Return what compressors keep on this rank."""
        return self.states.saved(self.origin)

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved, on this rank or for any number of them.

        Raises:
            CompressionError: it does not fit; the message names the rank.
        """
        try:
            self.states.load(saved, self.origin)
        except CompressionError as error:
            raise CompressionError(f"rank {world.rank()}: {error}") from None

    def everywhere(self, condition: Any, purpose: str = "finite") -> Any:
        """Tell whether ``condition``, a boolean tensor, holds on every rank.

        ``purpose`` names the operation: two of one name may not be under way.
        """
        if self.ranks() == 1:
            return condition
        flag = keras.ops.cast(condition, "float32")
        least = self.adapter.allreduce(
            flag,
            op=ReduceOp.Min,
            name=f"{self.options.name}.{purpose}",
            prescale_factor=1.0,
            postscale_factor=1.0,
            process_set=self.options.process_set,
        )
        return least > 0.5

    @staticmethod
    def _scaled(grad: Any, factor: float) -> Any:
        return grad if grad is None or factor == 1 else keras.ops.multiply(grad, factor)

    def ranks(self) -> int:
        """Return how many ranks take part."""
        return self.adapter.ranks(self.options.process_set)

    @abc.abstractmethod
    def reduce(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """Carry out the :meth:`work` of all buckets, side by side; None in local places."""

    @abc.abstractmethod
    def dense(self, layout: Layout, grads: list[Any]) -> list[Any]:
        """Return dense tensors of the variables' types, zeros where there is no gradient."""

    @abc.abstractmethod
    def make_states(self) -> States:
        """Return where compressors' states are kept; none yet."""

    @abc.abstractmethod
    def finite(self, tensors: list[Any]) -> Any:
        """Tell whether all elements of all tensors are finite, as cheaply as can be."""

    @abc.abstractmethod
    def is_tracing(self) -> bool:
        """Tell whether a graph is being made."""

    @abc.abstractmethod
    def is_zero(self, mean: Any) -> bool:
        """Tell whether a mean is all zeros, as far as it is known yet."""

    @abc.abstractmethod
    def pack(self, bucket: Bucket, grads: list[Any]) -> tuple[Any, bool]:
        """Return gradients as one flat tensor, and whether it may be overwritten."""

    @abc.abstractmethod
    def unpack(self, bucket: Bucket, flat: Any) -> list[Any]:
        """Cut a flat tensor into gradients."""

    @abc.abstractmethod
    def device(self, variable: Any) -> str:
        """Name the device of ``variable``, as far as it is known."""

    def work(
        self, bucket: Bucket, grads: list[Any], start: int
    ) -> Work[tuple[list[Any], dict[str, Any]]]:
        """Average one bucket's gradients as its compressors do in the steps from ``start`` on.

        Returns:
            The means, and what the compressors then keep, by parameter.
        """
        op, predivide = self.options.op, self.options.predivide
        compressors = [each.at(start) for each in bucket.compressors]
        chosen = compressors[0]
        alike = all(each is chosen for each in compressors)
        plain = alike and chosen is none
        factor = self.ranks() if op is ReduceOp.Sum and not plain else predivide
        factor *= self.options.times
        if alike and chosen.elementwise:
            flat, in_place = self.pack(bucket, grads)
            if predivide != 1.0:
                flat = self.ops.scale(flat, 1.0 / predivide)
            if plain:
                mean = yield Allreduce(flat, op=op, in_place=in_place)
            else:
                mean = (yield from chosen.reduce(self.ops.beside(flat), flat, None)).mean
            return self.unpack(bucket, self.ops.scale(mean, factor) if factor != 1.0 else mean), {}
        if predivide != 1.0:
            grads = [self.ops.scale(grad, 1.0 / predivide) for grad in grads]
        names = [spec.name for spec in bucket.specs]
        given = [self.states[name] for name in names]
        results = yield from together(
            [
                compressor.reduce(self.ops.beside(grad), grad, state)
                for compressor, grad, state in zip(compressors, grads, given, strict=True)
            ],
            self.ops,
        )
        means = [result.mean for result in results]
        if factor != 1.0:
            means = [self.ops.scale(mean, factor) for mean in means]
        told = zip(names, results, given, strict=True)
        return means, {name: each.state for name, each, state in told if each.state is not state}

    def review(self, layout: Layout, delivered: bool, steps: int = 1) -> int:
        """Count steps, and have clocks think turns over when it is time; a collective call.

        Args:
            layout: that of the steps.
            delivered: whether the last one's means were finite.
            steps: how many there were since the last call.

        Returns:
            After how many to call again at the latest.
        """
        for clock in layout.clocks:
            self._clocks[clock] -= steps
            if self._clocks[clock] <= 0:
                self._clocks[clock] = clock.review(delivered)
        return self.wait(layout)

    def wait(self, layout: Layout) -> int:
        """Return after how many steps a clock is to be asked."""
        return min(self._clocks[clock] for clock in layout.clocks)

    def all_finite(self, layout: Layout, means: list[Any], grads: list[Any]) -> Any:
        """Tell whether means, and any gradients that stay on a rank, are finite on all ranks."""
        dense = [mean for mean in means if mean is not None]
        if not layout.local:
            return self.finite(dense)
        own = self.dense(layout, grads)
        finite = self.finite([*dense, *(own[place] for place in layout.local)])
        return self.everywhere(finite, "applied")

    def _agree(self, optimizer: Any, grads: list[Any], variables: list[Any]) -> Layout:
        """Plan what travels how, after all ranks have said that they plan the same."""
        name, process_set = "hvdx.keras.agreement", self.options.process_set
        local = self._local_places(variables)
        specs = {
            place: self.spec(variable)
            for place, variable in enumerate(variables)
            if place not in local
        }
        as_dense = self.options.sparse_as_dense
        if optimizer.gradient_accumulation_steps:
            as_dense = True
            if any(getattr(variable, "overwrite_with_gradient", False) for variable in variables):
                raise ValueError(
                    "gradient_accumulation_steps with variables that take their gradient's place, "
                    "as those of float8 layers do: leave accumulation or float8 out"
                )
        limit = buckets.limit_bytes()
        each = {f"{i} {s.name}": f"{s.dtype} {s.shape}" for i, s in enumerate(specs.values())}
        entries = {
            "operations": self.options.name,
            "optimizer": f"{type(optimizer).__name__} {self.configuration(optimizer)}",
            "options": f"op={self.options.op.name}, compression={self.options.compressor} "
            f"(wire format {FORMAT}), "
            f"gradient_predivide_factor={self.options.predivide}, buckets of {limit} bytes, "
            f"sparse_as_dense={self.options.sparse_as_dense}, gradients times {self.options.times}",
            **each,
        }
        subject = "variables, optimizer or options of DistributedOptimizer"
        check_same(self.adapter, subject, entries, name, process_set)
        own = ["dense" if as_dense and grads[i] is not None else self.kind(grads[i]) for i in specs]
        step = int(self.states.step)  # of those that go on with others than before
        everyone = self.adapter.allgather_object(
            (step, own, self.states.left), f"{name}.kinds", process_set
        )
        self.states.count_from(max(step for step, _, _ in everyone))
        kinds = {place: {own[i] for _, own, _ in everyone} for i, place in enumerate(specs)}
        prefix = f"{self.options.name}.{len(self._layouts)}"
        names = {
            p: f"{prefix}.rows.{i}" for i, p in enumerate(specs) if kinds[p] - {None} == {"sparse"}
        }
        dense = {place: spec for place, spec in specs.items() if place not in names}
        made = self._buckets(prefix, dense, variables, [left for _, _, left in everyone])
        sparse = {place: specs[place] for place in names}
        chosen = self._compressors(sparse, variables)
        known = dict.fromkeys(bucket.clock for bucket in made if bucket.clock is not None)
        fresh = [clock for clock in known if clock not in self._clocks]  # one layout's steps count
        self._clocks.update((clock, clock.wait) for clock in fresh)
        return Layout(
            variables,
            made,
            {
                place: self._rows(name, chosen[place], sparse[place])
                for place, name in names.items()
            },
            local,
            frozenset(place for place, found in kinds.items() if found == {None}),
            any(bucket.remembers for bucket in made),
            fresh,
        )

    def spec(self, variable: Any) -> Spec:
        """Describe a variable."""
        dtype = keras.backend.standardize_dtype(variable.dtype)
        return Spec(self._name(variable), tuple(variable.shape), dtype, self.ranks())

    def _name(self, variable: Any) -> str:
        """Return the path of a variable, numbered where it is another's already."""
        if id(variable) not in self._names:
            path = name = getattr(variable, "path", variable.name)
            taken = set(self._names.values())
            numbers = itertools.count(2)
            while name in taken:
                name = f"{path}#{next(numbers)}"
            self._names[id(variable)] = name
        return self._names[id(variable)]

    def _compressors(self, specs: dict[int, Spec], variables: list[Any]) -> dict[int, Compressor]:
        """Choose each parameter's compressor; a collective call where one measures before."""
        if self._compressor is None:
            given, ask = self.options.compressor, self.options.compressor.prepare
            everything = list(specs.values())
            self._compressor = (
                given if ask is None else ask(self.adapter, everything, self.options.process_set)
            )
        return {
            # Where a gradient is a value to take over, as in float8 layers, nothing may be owed.
            place: none
            if getattr(variables[place], "overwrite_with_gradient", False)
            else self._compressor.of(spec)
            for place, spec in specs.items()
        }

    def _rows(self, name: str, compressor: Compressor, spec: Spec) -> Rows:
        alone = spec.ranks == 1  # nothing is sent, and nothing need be lost
        return Rows(name, None if alone else row_codec(compressor, spec.shape, spec.dtype))

    def kind(self, grad: Any) -> str | None:
        """Say how a gradient would travel: ``dense``, ``sparse``, or None if there is none."""
        return None if grad is None else "dense"

    def _local_places(self, variables: list[Any]) -> frozenset[int]:
        own = [
            variable
            for owner in self.local
            for variable in (owner.trainable_weights if isinstance(owner, keras.Layer) else [owner])
        ]
        known = {id(tensor) for v in own for tensor in (v, getattr(v, "value", v))}
        return frozenset(
            place
            for place, v in enumerate(variables)
            if id(v) in known or id(getattr(v, "value", v)) in known
        )

    def _compare(self, layout: Layout) -> None:
        """Warn where replicas differ: averaged gradients do not make them equal again."""
        own = []
        for place, variable in enumerate(layout.variables):
            if place not in layout.local:
                value = self.adapter.to_numpy(getattr(variable, "value", variable))
                name = getattr(variable, "path", variable.name)
                own.append((name, hashlib.sha256(value.tobytes()).hexdigest()[:8]))
        name = "hvdx.keras.replicas"
        everyone = self.adapter.allgather_object(own, name, self.options.process_set)
        differing = [names[0][0] for names in zip(*everyone, strict=True) if len(set(names)) > 1]
        if differing and not self.broadcast_follows:
            warnings.warn(
                f"ranks train {len(differing)} of {len(own)} variables from different values, the "
                f"first being {differing[0]!r}, and will stay different: use "
                "hvd.callbacks.BroadcastGlobalVariablesCallback(0), or "
                "hvd.broadcast_parameters(model) before training",
                stacklevel=2,
            )

    def _meet(
        self,
        prefix: str,
        parameters: list[tuple[Spec, Compressor, str]],
        origins: list[Origin | None],
    ) -> None:
        """Make the states of parameters, of what waits for them on any rank."""
        place, ranks = self.origin
        self.states.origin = place, ranks
        carries = not in_order(origins)
        if any(compressor.sharers > 1 for _, compressor, _ in parameters):
            fits = self.states.fits(parameters)
            found = self.adapter.allgather_object(fits, f"{prefix}.hosts", self.options.process_set)
            carries |= not all(found)
        if carries:
            if place == 0:
                warn_of_lost(origins)
            answer = functools.partial(
                perform,
                self.adapter,
                name=f"{prefix}.carried",
                process_set=self.options.process_set,
            )
            self.states.carry(parameters, origins, place, answer)
        for parameter in parameters:
            self.states.meet(*parameter)

    def _buckets(
        self,
        prefix: str,
        specs: dict[int, Spec],
        variables: list[Any],
        origins: list[Origin | None],
    ) -> list[Bucket]:
        compressors = self._compressors(specs, variables)
        parameters = [(specs[p], c, self.device(variables[p])) for p, c in compressors.items()]
        self._meet(prefix, parameters, origins)
        made = []
        for number, places in enumerate(self.grouped(specs, variables)):
            own = [specs[place] for place in places]
            chosen = [compressors[place] for place in places]
            made.append(Bucket(f"{prefix}.{number}", places, own, chosen))
        return made

    def grouped(self, specs: dict[int, Spec], variables: list[Any]) -> list[list[int]]:
        """Return the places among ``variables`` whose gradients travel together.

        Backward meets the last layers first, so that their bucket shall fill first.
        """
        order = list(specs)[::-1]
        compressors = self._compressors(specs, variables)
        clocks = list(dict.fromkeys(compressors[place].clock for place in order))
        plan = buckets.plan(
            [
                buckets.Entry(
                    specs[place].name,
                    _elements(specs[place].shape),
                    specs[place].dtype,
                    f"{self.device(variables[place])} {clocks.index(compressors[place].clock)}",
                )
                for place in order
            ],
            buckets.limit_bytes(),
        )
        return [[order[index] for index in members] for members in plan]

    def configuration(self, optimizer: Any) -> str:
        """Describe the optimizer's options, equal on ranks that train alike."""
        return json.dumps(_nameless(optimizer.get_config()), sort_keys=True, default=str)


def _remembers(compressor: Compressor) -> bool:
    choosing = compressor.policy is not None or compressor.prepare is not None
    stepping = bool(compressor.phases) and compressor.clock is None
    return compressor.stateful or stepping or choosing


def _nameless(tree: Any) -> Any:
    """Drop names, which Keras counts up with every optimizer made before."""
    if isinstance(tree, dict):
        return {key: _nameless(value) for key, value in tree.items() if key != "name"}
    return tree


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
