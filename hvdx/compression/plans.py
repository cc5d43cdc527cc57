"""What ``Compression.auto`` may do with a model's gradients, and how long each way would take.

The time in which a step's gradients are exchanged is predicted as

    alpha * operations + beta * bytes sent + seconds of computing

where alpha and beta are measured for each kind of collective, and bytes and seconds by running
each method on gradients of the model's own shapes (:mod:`hvdx.link`). An operation serves a whole
bucket, so that alpha counts once for each round of each bucket, however many parameters it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hvdx import buckets
from hvdx.compression.base import Compressor, Spec
from hvdx.link import Footprint, Link, Message

SAVES = 0.2  # the share of the time that compressing must save
_ALIKE = 1.03  # within this factor of the best, the method that errs less is taken
_SMALL = 4096  # parameters of fewer elements travel raw, and so do vectors
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_PACES = (1.0, 10.0, 0.1, 100.0, 0.01)  # times as long per byte, for links that may come
_MOST = 4  # plans to be ready for, beside none


class Form(NamedTuple):
    """What decides about a parameter: those of equal form are treated alike."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, spec: Spec) -> Form:
        """Return the form of a parameter."""
        return cls(tuple(spec.shape), spec.dtype)

    @property
    def compressible(self) -> bool:
        """Tell whether it is a matrix, large enough, of floats."""
        large = len(self.shape) > 1 and math.prod(self.shape) >= _SMALL
        return large and self.dtype in _FLOATS

    @property
    def bytes(self) -> int:
        """Return the bytes of a gradient."""
        return math.prod(self.shape) * buckets.width(self.dtype)


Choice = Mapping[Form, str]  # method by form; what is not in it travels raw


class Plan(NamedTuple):
    """A choice, and the seconds that a step's exchange takes with it, as predicted."""

    name: str
    choice: Choice
    seconds: float


class Model:
    """Predicts how long the exchange of all gradients takes.

    Args:
        link: the network.
        specs: the parameters, in the order in which gradients become ready.
        footprints: what a method takes for a form, by both.
        methods: those allowed, by name; the first errs least.
        limit: bytes of a bucket.
    """

    def __init__(
        self,
        link: Link,
        specs: Sequence[Spec],
        footprints: Mapping[tuple[str, Form], Footprint],
        methods: Mapping[str, Compressor],
        limit: int,
    ) -> None:
        self._link, self._specs, self._limit = link, specs, limit
        self._footprints = dict(footprints)
        self._methods = methods
        self.buckets = [tuple(map(Form.of, bucket)) for bucket in laid_out(specs, limit)]
        self._forms = list(dict.fromkeys(form for bucket in self.buckets for form in bucket))

    def on(self, link: Link) -> Model:
        """Return the same on another network."""
        return Model(link, self._specs, self._footprints, self._methods, self._limit)

    def plans(self) -> list[Plan]:
        """Return the plans worth thinking of; no compression first, then as methods err."""
        made = [self._plan("none", {})]
        for name, method in self._methods.items():
            if method.elementwise:  # takes buckets as a whole
                made.append(self._plan(name, dict.fromkeys(self._forms, name)))
            else:
                best = {form: name for form in self._compressible() if self._gains(name, form)}
                if best:
                    made.append(self._plan(name, best))
        mixed = {form: self._quickest(form) for form in self._compressible()}
        mixed = {form: name for form, name in mixed.items() if name != "none"}
        if len(set(mixed.values())) > 1:
            made.append(self._plan("mixed", mixed))
        return made

    def predict(self, choice: Choice) -> float:
        """Return the seconds of a step's exchange."""
        return sum(self.seconds(bucket, choice) for bucket in self.buckets)

    def seconds(self, bucket: Sequence[Form], choice: Choice) -> float:
        """Return the seconds in which parameters of these forms are exchanged side by side."""
        operations = set()
        if not self._whole(bucket, choice):
            # Beside the gradients, ranks tell each other which they have.
            operations.add(_raw(bucket[0]).messages[0]._replace(payload=0))
        taken = 0.0
        for form in bucket:
            footprint = self._footprint(choice.get(form, "none"), form)
            taken += self._alone(footprint)
            operations.update(each._replace(payload=0) for each in footprint.messages)
        return taken + sum(self._link.alpha(each.kind) for each in operations)

    def best(self, plans: Sequence[Plan], bucket: Sequence[Form]) -> int:
        """Return the place of the plan to follow with a bucket; the first plan is none."""
        timed = [plan._replace(seconds=self.seconds(bucket, plan.choice)) for plan in plans]
        return timed.index(choose(timed))

    def alternatives(self) -> list[Plan]:
        """Return plans to be ready for: none, then what is best here and on other networks.

        These are up to a hundred times as quick or as slow.
        """
        first, *_ = self.plans()
        found: list[Choice] = []
        names: dict[int, str] = {}
        for pace in _PACES:
            other = self.on(self._link.paced(pace))
            plans = other.plans()
            for bucket in self.buckets:
                plan = plans[other.best(plans, bucket)]
                if plan.choice and plan.choice not in found:
                    names[len(found)] = plan.name
                    found.append(plan.choice)
        ready = enumerate(found[:_MOST])
        return [first, *(self._plan(names[place], choice) for place, choice in ready)]

    def sent(self, choice: Choice) -> float:
        """Return the bytes that a rank sends in a step."""
        return sum(
            self._link.sent(message.kind, message.payload)
            for bucket in self.buckets
            for form in bucket
            for message in self._footprint(choice.get(form, "none"), form).messages
        )

    def _plan(self, name: str, choice: Choice) -> Plan:
        return Plan(name, choice, self.predict(choice))

    def _whole(self, bucket: Sequence[Form], choice: Choice) -> bool:
        """Tell whether a bucket travels as one flat tensor."""
        name, *others = {choice.get(form, "none") for form in bucket}
        return not others and (name == "none" or self._methods[name].elementwise)

    def _compressible(self) -> list[Form]:
        return [form for form in self._forms if form.compressible]

    def _footprint(self, name: str, form: Form) -> Footprint:
        if name == "none":
            return _raw(form)
        known = self._footprints.get((name, form))
        if known is not None:
            return known
        # An elementwise method is measured on large forms only; small ones are like them.
        self._footprints[name, form] = scaled = self._scaled(name, form)
        return scaled

    def _scaled(self, name: str, form: Form) -> Footprint:
        alike = [(f, made) for (n, f), made in self._footprints.items() if n == name]
        other, made = next((each for each in alike if each[0].dtype == form.dtype), (form, None))
        if made is None:
            return _raw(form)
        share = math.prod(form.shape) / math.prod(other.shape)
        messages = [each._replace(payload=int(each.payload * share)) for each in made.messages]
        return Footprint(made.seconds * share, tuple(messages))

    def _alone(self, footprint: Footprint) -> float:
        """Return the seconds of computing and sending, without what a whole bucket shares."""
        return footprint.seconds + sum(
            self._link.beta(message.kind) * self._link.sent(message.kind, message.payload)
            for message in footprint.messages
        )

    def _gains(self, name: str, form: Form) -> bool:
        return self._alone(self._footprint(name, form)) < self._alone(_raw(form))

    def _quickest(self, form: Form) -> str:
        names = ["none", *(n for n, method in self._methods.items() if not method.elementwise)]
        return min(names, key=lambda name: self._alone(self._footprint(name, form)))


def _raw(form: Form) -> Footprint:
    size, dtype = form.bytes, form.dtype
    if dtype == "bfloat16":
        size, dtype = 2 * size, "float32"
    return Footprint(0.0, (Message(0, f"allreduce {dtype}", "Average", size),))


def choose(plans: Sequence[Plan]) -> Plan:
    """Return the plan to follow: the first is none, the others come as they err."""
    raw = plans[0]
    best = min(plan.seconds for plan in plans)
    if best > (1 - SAVES) * raw.seconds:
        return raw
    return next(plan for plan in plans if plan.seconds <= _ALIKE * best)


def laid_out(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    """Return the parameters by bucket, as engines lay them out."""
    entries = [buckets.Entry(spec.name, math.prod(spec.shape), spec.dtype, "") for spec in specs]
    return [[specs[place] for place in members] for members in buckets.plan(entries, limit)]
