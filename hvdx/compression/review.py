"""When ``Compression.auto`` measures again, and what it makes of it.

Two things are looked at. The network, every so many steps: each bucket then gets the plan that is
predicted to be quickest on the network as it is now. And whole steps, some with compression and
some without, in turns: what a prediction leaves out (what travels while backward goes on, ranks
that compute side by side) is in them. Where steps are not quicker with it, gradients travel raw
until the next look.

Looking is paid for by a share of the time that has passed since the last look, so that it never
slows training down by more than that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from hvdx import link
from hvdx.compression.base import Spec
from hvdx.compression.plans import Form, Model, Plan
from hvdx.compression.turns import DELIVER, Clock
from hvdx.frameworks import Adapter
from hvdx.link import Link

EVERY = 500  # steps between looks at the network, unless one says otherwise
RAW = DELIVER + 1  # the turn of the first plan, which is none
_SETTLED = 5  # steps until all is in place: names negotiated, graphs traced, caches warm
_SHARE = 0.01  # of the time, for measuring the network
_EXTRA = 0.01  # of the time, for steps without compression where they are slower
_TRIES = 3  # steps with compression, and as many without
_PAYS = 0.95  # of the time of a raw step: what one with compression may take
_BETTER = 0.9  # of the predicted time: what another plan may take to replace the one in use
_LEAST = 0.1  # seconds that a measurement takes, until one was made
_NEVER = 2**60  # steps


class Pace(NamedTuple):
    """How often to look, and at what price."""

    every: int  # steps; 0: after the first look never again
    seconds: float  # that the first look may take
    verbose: bool


class Review(Clock):
    """Whose turn it is under ``Compression.auto``: that of a plan for each bucket.

    Args:
        adapter: the running core.
        process_set: the ranks that take part.
        name: of its operations, equal on all ranks.
        model: predicts.
        plans: those there are; the first is none. Turns are their places plus one.
        pace: how often to look.
        raw: begin without compression, whatever is predicted.
        stateful: whether any method may owe something.
    """

    def __init__(
        self,
        adapter: Adapter,
        process_set: Any,
        name: str,
        model: Model,
        plans: Sequence[Plan],
        pace: Pace,
        *,
        raw: bool = False,
        stateful: bool = True,
    ) -> None:
        super().__init__()
        self._adapter, self._process_set, self._name = adapter, process_set, name
        self._model, self._plans, self._pace = model, plans, pace
        self._raw, self._stateful = raw, stateful
        self._delivering = False
        self._chosen: dict[tuple[Form, ...], int] = {}  # the place of a bucket's plan
        for bucket in model.buckets:
            self._plan_of(bucket)
        self._cost = _LEAST
        self._life = self._live()
        self.wait = next(self._life)

    def turn(self, specs: Sequence[Spec]) -> int:
        """See :meth:`Clock.turn`."""
        if self._delivering:
            return DELIVER
        return RAW if self._raw else RAW + self._plan_of(tuple(map(Form.of, specs)))

    def review(self, delivered: bool) -> int:
        """See :meth:`Clock.review`."""
        with self._adapter.at_once():
            self.wait = self._life.send(delivered)
        return self.wait

    def _plan_of(self, bucket: tuple[Form, ...]) -> int:
        if bucket not in self._chosen:
            self._chosen[bucket] = self._model.best(self._plans, bucket)
        return self._chosen[bucket]

    # -- what happens when; each ``yield n`` lets n steps go by

    def _live(self) -> Generator[int, bool, None]:
        yield _SETTLED
        yield from self._try(self._pace.seconds)
        last = time.perf_counter()
        while self._pace.every:
            yield self._pace.every
            passed = self._slowest(time.perf_counter() - last)
            if _SHARE * passed >= self._cost:
                yield from self._measure(_SHARE * passed)
                yield from self._try(_EXTRA * passed)
                last = time.perf_counter()
        while True:
            yield _NEVER

    def _measure(self, budget: float) -> Generator[int, bool, None]:
        """Give each bucket the plan that suits the network as it is now."""
        start = time.perf_counter()
        seconds = min(budget, self._pace.seconds)
        network = link.measure(self._adapter, self._process_set, seconds, f"{self._name}.link")
        self._cost = self._slowest(time.perf_counter() - start)
        self._model, before = self._model.on(network), self.named()
        better = {bucket: self._better(bucket) for bucket in self._chosen}
        if better == self._chosen:
            return
        if not self._raw and any(self._chosen.values()):
            yield from self._deliver()
        self._chosen = better
        self._tell(
            f"{spoken(network)} by now: {self.named()} instead of {before}, predicted to take "
            f"{self.predicted() * 1e3:.1f} ms where raw gradients take "
            f"{self._model.predict({}) * 1e3:.1f} ms"
        )

    def _better(self, bucket: tuple[Form, ...]) -> int:
        """Return the place of the plan for a bucket: another only if it is clearly better."""
        now, then = self._chosen[bucket], self._model.best(self._plans, bucket)
        took, takes = (self._model.seconds(bucket, self._plans[n].choice) for n in (now, then))
        return then if takes < _BETTER * took else now

    def _try(self, allowance: float) -> Generator[int, bool, None]:
        """Take some steps with compression and some without, and go on as is quicker.

        Not if raw steps would cost more than is allowed: then compression surely pays. (Should
        that be wrong, steps take at least as long, and 500 of them allow for three raw ones.)
        """
        saved = self._model.predict({}) - self.predicted()
        if not any(self._chosen.values()):
            self._raw = False
            return
        if not self._raw and _TRIES * saved > allowance:
            return
        taken: dict[bool, list[float]] = {False: [], True: []}
        for raw in (False, True) * _TRIES:
            self._raw, start = raw, time.perf_counter()
            yield 1
            taken[raw].append(time.perf_counter() - start)
        compressed, plain = (self._slowest(min(taken[raw])) for raw in (False, True))
        self._raw = False
        pays = compressed < _PAYS * plain
        self._tell(
            f"a step takes {compressed * 1e3:.1f} ms with {self.named()} and {plain * 1e3:.1f} ms "
            f"raw; it was predicted to save {saved * 1e3:.1f} ms"
            + ("" if pays else ": gradients travel raw from here")
        )
        if not pays:
            yield from self._deliver()
            self._raw = True

    def _deliver(self) -> Generator[int, bool, None]:
        """Send all that is owed, in steps whose means were finite only."""
        self._delivering = self._stateful
        while self._delivering:
            self._delivering = not (yield 1)

    # -- in words and numbers

    def named(self) -> str:
        """Name the plans in use."""
        if self._raw:
            return "none"
        places = dict.fromkeys(self._plan_of(bucket) for bucket in self._model.buckets)
        return " and ".join(dict.fromkeys(self._plans[place].name for place in places))

    def leading(self) -> Plan:
        """Return the first bucket's plan."""
        return self._plans[0 if self._raw else self._plan_of(self._model.buckets[0])]

    def compressed(self) -> int:
        """Return how many of the parameters do not travel raw."""
        if self._raw:
            return 0
        return sum(
            form in self._plans[self._plan_of(bucket)].choice
            for bucket in self._model.buckets
            for form in bucket
        )

    def predicted(self) -> float:
        """Return the seconds of a step's exchange with the plans in use."""
        return sum(
            self._model.seconds(bucket, self._plans[self._plan_of(bucket)].choice)
            for bucket in self._model.buckets
        )

    def _slowest(self, seconds: float) -> float:
        name = f"{self._name}.agree"
        return float(max(self._adapter.allgather_object(seconds, name, self._process_set)))

    def _tell(self, line: str) -> None:
        if self._pace.verbose and self._adapter.place(self._process_set) == 0:
            print(f"hvdx: Compression.auto: {line}", file=sys.stderr)


def spoken(network: Link) -> str:
    """Return what an allreduce takes, in words."""
    line = network.lines["allreduce float32"]
    speed = f"{1 / line.beta / 1e6:.4g} MB/s" if line.beta else "no measurable cost by size"
    return f"allreduce takes {line.alpha * 1e3:.2g} ms and {speed} on {network.ranks} ranks"
