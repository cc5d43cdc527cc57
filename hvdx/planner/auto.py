"""``place="auto"``: measure in the running job, predict, try the best few, agree.

All ranks measure at the same time, as they will compute, and one of each host once more alone: so
it shows how far ranks of a host slow each other down. All plan from the same numbers, and rank 0's
ranking is everyone's. A few steps of plain plans trim the predictions;
then the best are tried. Trials are pipelines made the ordinary way, of the same model: what they
change of it is put back to the bit, and their optimizers are thrown away.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hvdx import link, watchdog
from hvdx.comm import sent_share
from hvdx.compression import CompressionError, Compressor, Spec, as_compressor, none
from hvdx.compression.methods import candidates as methods_named
from hvdx.compression.plans import Form
from hvdx.errors import MismatchError, PipelineError, PlanError
from hvdx.link import Line
from hvdx.ops import ops_for
from hvdx.pipeline.channel import Key
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.plan import Plan
from hvdx.pipeline.probe import THREADS, measure_link
from hvdx.pipeline.replicas import Row
from hvdx.pipeline.simulator import Times
from hvdx.planner.costs import Candidate, Prediction
from hvdx.planner.facts import Codec, Job, Network, Profile, faster, seconds_of
from hvdx.planner.search import Wanted, candidates, ranked, to_measure
from hvdx.planner.table import advice, table
from hvdx.planner.trim import Trial, trimmed

if TYPE_CHECKING:
    from hvdx.pipeline.base import BasePipeline

_WHOLE = "gpipe", "1f1b", "1f1b-slack", "interleaved"  # schedules that teach about whole backwards
_TRIED = 3  # of the best
_WARM, _STEPS = 2, 5  # of a trial
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


class Choice(NamedTuple):
    """What has been chosen.

    Attributes:
        plan: the quickest.
        times: of its stages.
        line: the model's units with what its micro-batches take.
        compression: for the pipeline.
    """

    plan: Plan
    times: Times
    line: Graph
    compression: Any


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
    ranks = pipe._size
    methods = _methods(asked.compression)
    with watchdog.patience(_PATIENCE), _unchanged(pipe):
        rows = pipe._rows(asked.sample)
        told = [f"rank {rank}: {count}" for rank, count in enumerate(pipe._everyones(rows))]
        if len({each.partition(": ")[2] for each in told}) > 1:
            raise MismatchError(
                f"samples of place='auto' have different numbers of rows ({', '.join(told)}): "
                "all ranks must give the same batch"
            )
        wanted = _wanted(asked, methods)
        every = list(candidates(ranks, rows, wanted))
        profile, job = _measured(pipe, asked, every, rows, methods)
        first = _agreed(pipe, every, profile, job)
        trials = [_tried(pipe, each, asked, methods) for each in _plain(first)]
        job = job._replace(trim=trimmed(trials, profile, job))
        found = _agreed(pipe, every, profile, job)
        measured = {trial.prediction.candidate: trial.seconds for trial in trials}
        for each in _best(found):
            if each.candidate not in measured:
                measured[each.candidate] = _tried(pipe, each, asked, methods).seconds
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
    return Choice(made.plan, made.times, line, methods.get(chosen.compression, none))


_PATIENCE = 1800.0


# --- what is looked at


def _methods(told: Any) -> Mapping[str, Compressor]:
    """Return the compressors that may be chosen, by name; the user has allowed them."""
    compressor = as_compressor(told)
    if compressor is none:
        return {}
    if compressor.prepare is None:
        return {compressor.name: compressor}
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


def _agreed(
    pipe: BasePipeline, every: Sequence[Candidate], profile: Profile, job: Job
) -> list[Prediction]:
    """Return rank 0's ranking on every rank, or raise its error there."""
    own = _Ranking([])
    if pipe._rank == 0:
        try:
            own = _Ranking(ranked(every, profile, job))
        except PlanError as error:
            own = _Ranking([], str(error))
    told: _Ranking = pipe._from_first(own)
    if told.problem:
        raise PlanError(told.problem)
    return told.found


def _plain(found: Sequence[Prediction]) -> list[Prediction]:
    """Return three plans that teach most: of few rows, of many, of other micro-batches."""
    plain = [each for each in found if each.candidate.schedule in _WHOLE
             and each.candidate.checkpoint == "never"
             and each.candidate.compression == "none"]  # fmt: skip
    if not plain:
        return []
    few, many = (choice(len(each.candidate.mesh) for each in plain) for choice in (min, max))
    short = next(each for each in plain if len(each.candidate.mesh) == few)
    long = next(each for each in plain if len(each.candidate.mesh) == many)
    other = max(
        (each for each in plain if len(each.candidate.mesh) == many),
        key=lambda each: abs(each.candidate.micro_batches - long.candidate.micro_batches),
    )
    return list({each.candidate: each for each in (short, long, other)}.values())


def _best(found: Sequence[Prediction]) -> list[Prediction]:
    """Return the quickest, and the quickest of another mesh: errors of one may be alike."""
    first = found[: _TRIED - 1]
    meshes = {each.candidate.mesh for each in first}
    other = next((each for each in found if each.candidate.mesh not in meshes), None)
    return [*first, other] if other is not None else list(found[:_TRIED])


# --- measuring


def _measured(
    pipe: BasePipeline,
    asked: Asked,
    every: Sequence[Candidate],
    rows: int,
    methods: Mapping[str, Compressor],
) -> tuple[Profile, Job]:
    """Return what all ranks have measured, on all of them."""
    memory = _limits(asked.memory, pipe._size)
    numbers = to_measure(every, rows)
    names = pipe._everyones(socket.gethostname())
    hosts = tuple(names.index(name) for name in names)
    seen = pipe._everyones(_looked(pipe, asked.sample, numbers, hosts))
    crowd = max([1.0, *(each.crowded / each.alone for each in seen if each.alone)])
    if crowd <= _CROWDED:
        crowd, lanes = 1.0, math.inf
    else:
        lanes = max(map(hosts.count, hosts)) / crowd
    free = [[faster(line, crowd) for line in each.lines] for each in seen]
    sizes = [-(-rows // count) for count in numbers]
    lines = tuple(zip(sizes, map(_median, zip(*free, strict=True)), strict=True))
    update, slots = map(statistics.median, zip(*(each.update for each in seen), strict=True))
    network = _network(pipe, sorted({len(row) for each in every for row in each.mesh} - {1}))
    codecs = {name: _codec(pipe, method) for name, method in methods.items()}
    job = Job(pipe._size, network, memory, _speeds(free), lanes, hosts)
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
        pipe._everyones(None)  # begin together
        lines.append(pipe._profile(sample, count, of=statistics.median))
    pipe._everyones(None)
    update = pipe._measured_update()
    pipe._everyones(None)
    middle, alone = len(numbers) // 2, 0.0
    own = hosts[pipe._rank]
    if hosts.count(own) > 1 and hosts.index(own) == pipe._rank:
        alone = seconds_of(pipe._profile(sample, numbers[middle], of=statistics.median))
    pipe._everyones(None)
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
    channel = pipe._connected(range(pipe._size))
    ops = ops_for(type(pipe._tensor([0.0])))
    sums: dict[int, list[float]] = {}
    with contextlib.closing(channel), channel.session():
        told = measure_link(channel, pipe._rank, lambda size: pipe._tensor([0.0] * (size // 8)))
        for length in lengths:
            first = pipe._rank // length * length
            if first + length <= pipe._size:
                row = Row(range(first, first + length), pipe._rank, channel, ops)
                sums[length] = [_sum_seconds(pipe, row, size) for size in _SIZES]
    hop = pipe._from_first(told)
    everyone = pipe._everyones(sums)
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
    units = [[Spec(name, shape, dtype, max(2, pipe._size))
              for name, (shape, dtype) in pipe._shapes(number).items()]
             for number in range(len(pipe._line.units))]  # fmt: skip
    forms = {Form.of(spec): spec for own in units for spec in own}
    core = pipe._core
    seen = {form: link.watch(core, compressor.of(spec), spec) for form, spec in forms.items()}
    everyone = pipe._everyones([each.seconds for each in seen.values()])
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
    """Take a few steps of a plan; return what the slowest rank took, the same on all.

    Raises:
        PlanError: the loss does not take the model's outputs for a target.
    """
    twin = pipe._twin(found.plan, methods.get(found.candidate.compression, none))
    twin._times = found.times
    taken: list[float] = []
    with contextlib.closing(twin):
        target = asked.target if asked.target is not None else twin(asked.sample)
        for _ in range(_WARM + _STEPS):
            pipe._everyones(None)
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
        spans = [row for _, _, rows in list(twin._measured)[-_STEPS:] for row in rows]
    own: dict[tuple[str, int], list[float]] = {}
    for action, start, end in (span for row in spans for span in row):
        own.setdefault((action.kind, action.stage), []).append(end - start)
    everyone = pipe._everyones((taken[_WARM:], own))
    steps = [max(each) for each in zip(*(seconds for seconds, _ in everyone), strict=True)]
    actions: dict[tuple[str, int], list[float]] = {}
    for _, theirs in everyone:
        for key, seconds in theirs.items():
            actions.setdefault(key, []).extend(seconds)
    medians = {key: statistics.median(seconds) for key, seconds in actions.items()}
    return Trial(found, statistics.median(steps), medians)


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
