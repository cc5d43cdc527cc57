"""Plan a model for ranks that need not be there: measure it here, cut, schedule, draw."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.ir import Graph
from hvdx.pipeline.options import rows_of
from hvdx.pipeline.partition import size_text
from hvdx.pipeline.plan import Link, Means, Plan, make, stage_times, table
from hvdx.pipeline.simulator import Times, simulate
from hvdx.pipeline.timeline import draw, text
from hvdx.planner.facts import Job, Network, Profile
from hvdx.planner.search import Wanted, candidates, ranked, to_measure
from hvdx.planner.table import advice
from hvdx.planner.table import table as comparison

#: ZeroMQ between two processes of one machine, where the receiver sleeps.
ONE_MACHINE = Link(latency=1e-4, bandwidth=4e9)


class DryRun(NamedTuple):
    """A plan, what it was made of, and how it can be looked at; ``before`` are other plans."""

    plan: Plan
    graph: Graph
    means: Means
    before: str = ""

    def __str__(self) -> str:
        """Return the stages as a table, and the schedule as a drawing."""
        plan, times = self.plan, self._times()
        most = max(plan.memory)
        return (
            f"{self.before}{table(plan, self.graph, self.means)}\n\n"
            f"{plan.schedule}, {plan.micro_batches} micro-batches: {1e3 * plan.step:.2f} ms per "
            f"step, {plan.bubble:.1%} of it idle; at most {size_text(most)} on a rank\n\n"
            f"{text(plan.order(times), times)}"
        )

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: ``.html``, ``.png``, or ``.json`` for Chrome's trace viewer."""
        times = self._times()
        order = self.plan.order(times)
        draw(path, order, {"plan": simulate(order, times).spans})

    def _times(self) -> Times:
        plan = self.plan
        return stage_times(self.graph, self.means, plan.order(), plan.edges(self.graph))


def dry_run(
    module: str,
    model: Any,
    sample: Any,
    ranks: int,
    *,
    micro_batches: int | None = None,
    schedule: str = "auto",
    stages: int | Sequence[str] | Sequence[int] | None = None,
    by: str = "time",
    memory: float | Sequence[float] | None = None,
    link: Link = ONE_MACHINE,
    leaves: Sequence[Any] = (),
    place: str | Sequence[Sequence[int]] = (),
) -> DryRun:
    """Measure and plan; ``module`` profiles models of this framework, the rest as for ``plan``."""
    for name, number in {"ranks": ranks, "micro_batches": micro_batches or 1}.items():
        if not isinstance(number, int) or number < 1:
            raise PlanError(f"{name}={number!r}: give a whole number from 1")
    limits = [memory] * ranks if isinstance(memory, (int, float)) else memory
    measured = functools.partial(importlib.import_module(module).measured, model, sample)
    if isinstance(place, str):
        if place != "auto" or stages is not None:
            raise PlanError(f"place={place!r}, stages={stages!r}: place='auto' chooses stages")
        job = Job(ranks, Network(link), tuple(map(float, limits or ())))
        return _chosen(lambda count: measured(count, leaves), sample, job, micro_batches, schedule)
    count = micro_batches or 8
    means = Means(ranks, link, memory=limits, mesh=place)
    graph = measured(count, leaves)
    plan = make(graph, means, count, schedule=schedule, stages=stages, by=by)
    return DryRun(plan, graph, means)


def _chosen(
    measure: Callable[[int], Graph], sample: Any, job: Job, micro_batches: int | None, schedule: str
) -> DryRun:
    """Compare all meshes and schedules on what is measured here; no optimizer is known."""
    rows = rows_of(list(_shapes(sample)))
    wanted = Wanted.told(micro_batches, schedule, None, bool(job.memory))
    every = list(candidates(job.ranks, rows, wanted))
    lines = tuple((-(-rows // count), measure(count)) for count in to_measure(every, rows))
    found = ranked(every, Profile(rows, lines), job)
    best = found[0]
    graph = Profile(rows, lines).at(best.candidate.micro_batches)
    size = graph.parameter_bytes(0, len(graph.units))
    before = (
        f"{len(found)} plans, * is the quickest\n{comparison(found, best.candidate)}\n"
        f"{advice(found, best.candidate, size)}\n\n"
    )
    means = Means(
        job.ranks,
        job.network.link,
        memory=job.memory or None,
        recompute=best.candidate.checkpoint != "never",
        mesh=best.plan.mesh,
    )
    return DryRun(best.plan, graph, means, before)


def _shapes(sample: Any) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the tensors in a batch."""
    if hasattr(sample, "shape"):
        yield tuple(sample.shape)
    elif isinstance(sample, (Mapping, list, tuple)):
        for each in sample.values() if isinstance(sample, Mapping) else sample:
            yield from _shapes(each)


def load(path: str, names: Sequence[str]) -> list[Any]:
    """Run a script, but not what is under ``if __name__ == "__main__"``; return what it names.

    Args:
        path: of the script; it imports what lies beside it.
        names: of objects, or of functions without arguments that make them.

    Raises:
        PlanError: the script fails, or has no such name.
    """
    before = list(sys.path)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        found = runpy.run_path(path, run_name="hvdx_plan")
        return [_made(found, name, path) for name in names]
    except PlanError:
        raise
    except (Exception, SystemExit) as error:
        raise PlanError(f"{path} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before


def _made(found: Mapping[str, Any], name: str, path: str) -> Any:
    if name not in found:
        raise PlanError(
            f"{path} has no {name!r}: let it name the model and a batch for it, as objects or as "
            "functions without arguments; --model and --sample tell other names"
        )
    value = found[name]
    return value() if inspect.isfunction(value) else value
