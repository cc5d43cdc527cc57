"""``place="auto"``: measure in the running job, predict, try the best few, agree.

All ranks measure at the same time, as they will compute, and one of each host once more alone: so
it shows how far ranks of a host slow each other down. All plan from the same numbers, and rank 0's
ranking is everyone's. A few steps of plain plans of each kind correct the predictions; then what
may be quicker than the quickest so far is tried, and corrects them again, and so on. Plans whose
steps come out close are run once more, before the quickest is taken. Trials are pipelines made the
ordinary way, of the same model: what they change of it is put back to the bit, and their
optimizers are thrown away.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hvdx import link, watchdog
from hvdx.comm import sent_share
from hvdx.compression import CompressionError, Compressor, Spec, as_compressor, none
from hvdx.compression.auto import BUDGETS
from hvdx.compression.methods import candidates as methods_named
from hvdx.compression.plans import Form
from hvdx.errors import MismatchError, PipelineError, PlanError
from hvdx.link import Line
from hvdx.ops import ops_for
from hvdx.pipeline.channel import Key
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.probe import THREADS, measure_link
from hvdx.pipeline.replicas import Row
from hvdx.planner.costs import Candidate, Prediction
from hvdx.planner.facts import Codec, Job, Network, Profile, faster, seconds_of
from hvdx.planner.search import Wanted, candidates, corrected, ranked, to_measure, to_try
from hvdx.planner.table import advice, table
from hvdx.planner.trim import Trial, calibrated

if TYPE_CHECKING:
    from hvdx.pipeline.base import BasePipeline

_WHOLE = "gpipe", "1f1b", "1f1b-slack", "interleaved"  # schedules that teach about whole backwards
_LOOKS = 3  # at what may be quicker, of two plans at most
_FINAL, _NEAR = 3, 1.15  # plans that are run once more, if their steps are so near to the quickest
_WARM, _STEPS, _LEAST = 2, 7, 3  # steps of a trial, the least where they take long
_LONG = 0.5  # seconds of a step
_RUNS = 3  # of which units' times are the median
_SIZES = 1 << 12, 1 << 23  # bytes of gradients for which sums are measured
_ROUNDS = 6  # of which the first does not count
_CROWDED = 1.05  # ranks of a host slow each other down by more than chance
_ALIKE = 1.25  # a rank this much slower than others may be so by chance


class Asked(NamedTuple):
    """What the user gave; None leaves the choice to the planner, but for ``target``.

    Attributes:
        sample: a batch.
        target: what the loss compares with; None: the model's own outputs.
        micro_batches: pieces of a batch.
        schedule: by name.
        checkpoint: which micro-batches are computed again.
        memory: bytes that each rank has, or a list of them.
        compression: as the pipeline takes it; ``Compression.auto`` gives candidates.
    """

    sample: Any
    target: Any = None
    micro_batches: int | None = None
    schedule: str | None = None
    checkpoint: str | None = None
    memory: float | Sequence[float] | None = None
    compression: Any = None


class Compared(NamedTuple):
    """A plan that the planner has looked at.

    Attributes:
        prediction: of it.
        measured: seconds of a step, which have helped to correct predictions; None: not tried.
    """

    prediction: Prediction
    measured: float | None


class Choice(NamedTuple):
    """What has been chosen.

    Attributes:
        prediction: of the plan.
        line: the model's units with what its micro-batches take.
        compression: for the pipeline.
        compared: all plans, the one predicted to be quickest first.
    """

    prediction: Prediction
    line: Graph
    compression: Any
    compared: list[Compared]


class _Ranking(NamedTuple):
    """What rank 0 tells the others."""

    found: list[Prediction]
    problem: str = ""


def choose(pipe: BasePipeline, asked: Asked) -> Choice:
    """Measure, predict, try and choose; all ranks call it, and get the same.

    Raises:
        PlanError: nothing can be done, or fits; raised on every rank.
    """
    begun = time.perf_counter()
    ranks = pipe._peers.size
    methods = _methods(asked.compression)
    with watchdog.patience(_PATIENCE), _unchanged(pipe):
        rows = pipe._rows(asked.sample)
        told = [f"rank {rank}: {count}" for rank, count in enumerate(pipe._peers.gathered(rows))]
        if len({each.partition(": ")[2] for each in told}) > 1:
            raise MismatchError(
                f"samples of place='auto' have different numbers of rows ({', '.join(told)}): "
                "all ranks must give the same batch"
            )
        wanted = _wanted(asked, methods)
        every = list(candidates(ranks, rows, wanted))
        profile, job = _measured(pipe, asked, every, rows, methods)
        first = _agreed(pipe, lambda: ranked(every, profile, job))
        trials: list[Trial] = []
        taken: dict[Candidate, list[float]] = {}

        def tried(several: Sequence[Prediction]) -> list[Prediction]:
            """Try some plans; return all there are, as corrected by that."""
            for each in several:
                trials.append(_tried(pipe, each, asked, methods))
                taken.setdefault(each.candidate, []).extend(trials[-1].steps)
            return _agreed(
                pipe, lambda: corrected(first, profile, calibrated(trials, profile, job))
            )

        found = tried(_plain(first))
        for _ in range(_LOOKS):
            more = to_try(found, _medians(taken))
            if not more:
                break
            found = tried(more)
        if near := _near(found, _medians(taken)):
            found = tried(near)
        measured = _medians(taken)
    chosen = min(measured, key=lambda each: measured[each])
    made = next(each for each in found if each.candidate == chosen)
    if pipe._rank == 0:
        size = profile.lines[0][1].parameter_bytes(0, len(profile.units))
        print(
            f"hvdx: {len(found)} plans for {ranks} ranks, from {time.perf_counter() - begun:.1f} s "
            f"of measuring; * is taken\n{table(found, chosen, measured)}\n"
            f"{advice(found, chosen, size, measured)}",
            file=sys.stderr,
        )
    line = profile.at(chosen.micro_batches)
    compared = [Compared(each, measured.get(each.candidate)) for each in found]
    return Choice(made, line, methods.get(chosen.compression, none), compared)


_PATIENCE = 1800.0


# --- what is looked at


def _methods(told: Any) -> Mapping[str, Compressor]:
    """Return the compressors that may be chosen, by name; the user has allowed them."""
    compressor = as_compressor(told)
    if compressor is none:
        return {}
    if compressor.prepare is None:
        known = {methods_named([name])[name].name: name for name in BUDGETS["bold"]}
        return {known.get(compressor.name, compressor.name): compressor}
    methods = getattr(compressor.prepare, "methods", None)
    if methods is None:
        raise CompressionError(
            f"compression={compressor} cannot be planned with: name a method, such as "
            "hvd.Compression.int8, or let the planner choose from hvd.Compression.auto('safe')"
        )
    return dict(methods)


def compressor_named(name: str) -> Compressor:
    """Return the compressor that a plan names.

    Raises:
        PlanError: hvdx has none of that name.
    """
    if name == "none":
        return none
    try:
        return methods_named([name])[name]
    except (CompressionError, KeyError):
        raise PlanError(
            f"the plan compresses gradients by {name}, which has options or is your own: give "
            "compression= to the pipeline"
        ) from None


def _wanted(asked: Asked, methods: Mapping[str, Compressor]) -> Wanted:
    """Return what candidates there shall be."""
    found = Wanted.told(
        asked.micro_batches, asked.schedule, asked.checkpoint, asked.memory is not None
    )
    compressor = as_compressor(asked.compression)
    raw = ("none",) if compressor is none or compressor.prepare is not None else ()
    return found._replace(compressions=(*raw, *methods))


def _agreed(pipe: BasePipeline, ranking: Callable[[], list[Prediction]]) -> list[Prediction]:
    """Return rank 0's ranking on every rank, or raise its error there; the others make none."""
    own = _Ranking([])
    if pipe._rank == 0:
        try:
            own = _Ranking(ranking())
        except PlanError as error:
            own = _Ranking([], str(error))
    told: _Ranking = pipe._peers.of_first(own)
    if told.problem:
        raise PlanError(told.problem)
    return told.found


def _plain(found: Sequence[Prediction]) -> list[Prediction]:
    """Return plans that teach most: of one row, of many, of both, of other micro-batches."""
    plain = [each for each in found if each.candidate.schedule in _WHOLE
             and each.candidate.checkpoint == "never"
             and each.candidate.compression == "none"]  # fmt: skip
    if not plain:
        return []
    by_rows: dict[int, list[Prediction]] = {}
    for each in plain:
        by_rows.setdefault(len(each.candidate.mesh), []).append(each)
    few, most = min(by_rows), max(by_rows)
    long = by_rows[most][0]
    other = max(by_rows[most], key=lambda each: abs(each.candidate.micro_batches
                                                    - long.candidate.micro_batches))  # fmt: skip
    both = [each for each in plain if few < len(each.candidate.mesh) < most]
    chosen = (by_rows[few][0], long, other, *both[:1])
    return list({each.candidate: each for each in chosen}.values())


def _medians(taken: Mapping[Candidate, Sequence[float]]) -> dict[Candidate, float]:
    """Return what a step takes."""
    return {candidate: statistics.median(steps) for candidate, steps in taken.items()}


def _near(found: Sequence[Prediction], measured: Mapping[Candidate, float]) -> list[Prediction]:
    """Return those that chance may have ordered, the slowest first; nothing if one is ahead."""
    tried = [each for each in found if each.candidate in measured]
    order = sorted(tried, key=lambda each: measured[each.candidate])[:_FINAL]
    most = _NEAR * measured[order[0].candidate]
    near = [each for each in order if measured[each.candidate] <= most]
    return near[::-1] if len(near) > 1 else []


# --- measuring


def _measured(
    pipe: BasePipeline,
    asked: Asked,
    every: Sequence[Candidate],
    rows: int,
    methods: Mapping[str, Compressor],
) -> tuple[Profile, Job]:
    """Return what all ranks have measured, on all of them."""
    memory = _limits(asked.memory, pipe._peers.size)
    numbers = to_measure(every, rows)
    names = pipe._peers.gathered(socket.gethostname())
    hosts = tuple(names.index(name) for name in names)
    seen = pipe._peers.gathered(_looked(pipe, asked.sample, numbers, hosts))
    most = max(map(hosts.count, hosts))
    crowd = max([1.0, *(each.crowded / each.alone for each in seen if each.alone)])
    crowd = min(crowd, float(most))  # more than taking turns is the work of others
    lanes = most / crowd
    if crowd <= _CROWDED:
        crowd, lanes = 1.0, math.inf
    free = [[faster(line, crowd) for line in each.lines] for each in seen]
    sizes = [-(-rows // count) for count in numbers]
    lines = tuple(zip(sizes, map(_median, zip(*free, strict=True)), strict=True))
    update, slots = map(statistics.median, zip(*(each.update for each in seen), strict=True))
    network = _network(pipe, sorted({len(row) for each in every for row in each.mesh} - {1}))
    codecs = {name: _codec(pipe, method) for name, method in methods.items()}
    job = Job(pipe._peers.size, network, memory, _speeds(free), lanes, hosts)
    return Profile(rows, lines, update / crowd, slots, codecs), job


def _limits(memory: float | Sequence[float] | None, ranks: int) -> tuple[float, ...]:
    """Return by rank the bytes it has; nothing: enough."""
    limits = (memory,) * ranks if isinstance(memory, (int, float)) else tuple(memory or ())
    if limits and len(limits) != ranks:
        raise PlanError(f"memory has {len(limits)} entries for {ranks} ranks")
    if not all(limit > 0 for limit in limits):
        raise PlanError(f"memory={list(limits)}: give numbers above 0")
    return tuple(map(float, limits))


class _Seen(NamedTuple):
    """What a rank has measured while all others of its host did the same.

    Attributes:
        lines: of each number of micro-batches.
        update: of the optimizer.
        crowded: seconds of a micro-batch.
        alone: the same while no other rank computed; 0: this rank did not measure that.
    """

    lines: list[Graph]
    update: tuple[float, float]
    crowded: float
    alone: float


def _looked(pipe: BasePipeline, sample: Any, numbers: Sequence[int], hosts: Sequence[int]) -> _Seen:
    """Measure together with the other ranks, then, on the first of each host, alone."""
    lines = []
    for count in numbers:
        pipe._peers.gathered(None)  # begin together
        lines.append(pipe._profile(sample, count, _RUNS, statistics.median))
    pipe._peers.gathered(None)
    update = pipe._measured_update()
    pipe._peers.gathered(None)
    middle, alone = len(numbers) // 2, 0.0
    own = hosts[pipe._rank]
    if hosts.count(own) > 1 and hosts.index(own) == pipe._rank:
        alone = seconds_of(pipe._profile(sample, numbers[middle], _RUNS, statistics.median))
    pipe._peers.gathered(None)
    return _Seen(lines, update, seconds_of(lines[middle]), alone)


def _median(lines: Sequence[Graph]) -> Graph:
    """Return the units with the median of what ranks have measured."""

    def middle(of: str, number: int) -> float:
        return float(statistics.median(getattr(line.units[number], of) for line in lines))

    units = tuple(
        replace(
            unit,
            forward=middle("forward", number),
            inputs=middle("inputs", number),
            weights=middle("weights", number),
            apart=middle("apart", number),
            adding=middle("adding", number),
        )
        for number, unit in enumerate(lines[0].units)
    )
    return replace(lines[0], units=units)


def _speeds(lines: Sequence[Sequence[Graph]]) -> tuple[float, ...]:
    """Return how fast the ranks are by their times, relative; nothing where they are alike."""
    totals = [sum(map(seconds_of, each)) for each in lines]
    middle = statistics.median(totals)
    if max(totals) <= _ALIKE * min(totals):
        return ()
    return tuple(middle / max(total, 1e-12) for total in totals)


def _network(pipe: BasePipeline, lengths: Sequence[int]) -> Network:
    """Measure a hop, and sums of as many replicas as rows may have."""
    if not pipe._across:
        return Network(THREADS)
    channel = pipe._connected(range(pipe._peers.size))
    ops = ops_for(type(pipe._tensor([0.0])))
    sums: dict[int, list[float]] = {}
    with contextlib.closing(channel), channel.session():
        told = measure_link(channel, pipe._rank, lambda size: pipe._tensor([0.0] * (size // 8)))
        for length in lengths:
            first = pipe._rank // length * length
            if first + length <= pipe._peers.size:
                row = Row(range(first, first + length), pipe._rank, channel, ops)
                sums[length] = [_sum_seconds(pipe, row, size) for size in _SIZES]
    hop = pipe._peers.of_first(told)
    everyone = pipe._peers.gathered(sums)
    lines = {}
    for length in lengths:
        short, long = (max(each) for each in zip(
            *(own[length] for own in everyone if length in own), strict=True))  # fmt: skip
        few, many = (sent_share("allreduce", length) * size for size in _SIZES)
        beta = max(0.0, (long - short) / (many - few))
        lines[length] = Line(max(0.0, short - beta * few), beta)
    return Network(hop, lines)


def _sum_seconds(pipe: BasePipeline, row: Row, size: int) -> float:
    """Return the median seconds in which replicas add up two gradients of together ``size``."""
    tensor, taken = pipe._tensor([0.0] * (size // 16)), []
    for k in range(_ROUNDS):
        start = time.perf_counter()
        row.sum([tensor, tensor], Key(f"Q{len(row.ranks)}", size, k, 0))
        taken.append(time.perf_counter() - start)
    return float(statistics.median(taken[1:]))


def _codec(pipe: BasePipeline, compressor: Compressor) -> Codec:
    """Watch a compressor on each form of gradient that the model has."""
    if not pipe._across:  # it has nobody to send to, and little choice
        nothing = (0.0,) * len(pipe._line.units)
        return Codec(nothing, nothing, nothing, 1, nothing)
    units = [[Spec(name, shape, dtype, max(2, pipe._peers.size))
              for name, (shape, dtype) in pipe._shapes(number).items()]
             for number in range(len(pipe._line.units))]  # fmt: skip
    forms = {Form.of(spec): spec for own in units for spec in own}
    core = pipe._peers.core
    seen = {form: link.watch(core, compressor.of(spec), spec) for form, spec in forms.items()}
    everyone = pipe._peers.gathered([each.seconds for each in seen.values()])
    seconds = dict(zip(seen, map(max, zip(*everyone, strict=True)), strict=True))

    def total(own: Sequence[Spec], gathered: bool) -> float:
        return sum(
            message.payload
            for spec in own
            for message in seen[Form.of(spec)].messages
            if message.kind.startswith("allreduce") != gathered
        )

    rounds = [message.round for each in seen.values() for message in each.messages]
    return Codec(
        tuple(sum(seconds[Form.of(spec)] for spec in own) for own in units),
        tuple(total(own, False) for own in units),
        tuple(total(own, True) for own in units),
        1 + max(rounds, default=0),
        tuple(sum(Form.of(spec).bytes * compressor.of(spec).stateful for spec in own)
              for own in units),
    )  # fmt: skip


# --- trying


def _tried(
    pipe: BasePipeline, found: Prediction, asked: Asked, methods: Mapping[str, Compressor]
) -> Trial:
    """Take a few steps of a plan; return what the slowest rank took of each, the same on all.

    Raises:
        PlanError: the loss does not take the model's outputs for a target.
    """
    twin = pipe._twin(found.plan, methods.get(found.candidate.compression, none))
    twin._times = found.times
    taken: list[float] = []
    with contextlib.closing(twin):
        target = asked.target if asked.target is not None else twin(asked.sample)
        count = _WARM + _STEPS
        while len(taken) < count:
            if max(pipe._peers.gathered(max(taken[1:], default=0.0))) > _LONG:
                count = _WARM + _LEAST
            start = time.perf_counter()
            try:
                twin.step(asked.sample, target)
            except PipelineError as error:
                if asked.target is not None:
                    raise
                raise PlanError(
                    "place='auto' tries steps, but without target= it has nothing for the loss to "
                    "compare the model's outputs with but themselves, and that fails: give "
                    f"target=, a batch of what step() gets as y. {error}"
                ) from error
            taken.append(time.perf_counter() - start)
        spans = [row for _, _, rows in list(twin._measured)[_WARM - count :] for row in rows]
    own: dict[tuple[str, int], list[float]] = {}
    for action, start, end in (span for row in spans for span in row):
        own.setdefault((action.kind, action.stage), []).append(end - start)
    everyone = pipe._peers.gathered((taken[_WARM:], own))
    steps = [max(each) for each in zip(*(seconds for seconds, _ in everyone), strict=True)]
    actions: dict[tuple[str, int], list[float]] = {}
    for _, theirs in everyone:
        for key, seconds in theirs.items():
            actions.setdefault(key, []).extend(seconds)
    medians = {key: statistics.median(seconds) for key, seconds in actions.items()}
    return Trial(found, steps, medians)


@contextlib.contextmanager
def _unchanged(pipe: BasePipeline) -> Iterator[None]:
    """Put back what trials change: the model, and all generators of random numbers."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    other = numpy.random.get_state() if numpy else None
    try:
        with pipe._preserved():
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(other)
