"""What the planner has found, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvdx.pipeline.partition import size_text
from hvdx.planner.costs import Candidate, Prediction
from hvdx.planner.search import best_of

_COLUMNS = (
    "replicas", "micro-batches", "schedule", "checkpoint", "compression",
    "predicted ms", "measured ms", "idle", "sums ms", "memory",
)  # fmt: skip
_MOST = 12  # lines


def table(
    found: Sequence[Prediction],
    chosen: Candidate,
    measured: Mapping[Candidate, float] | None = None,
    most: int = _MOST,
) -> str:
    """Return a line for the quickest of each mesh, for what was tried, and then as they come.

    Args:
        found: all predictions, the quickest first.
        chosen: is marked.
        measured: seconds of a step, of those that were tried.
        most: lines, unless more were tried.
    """
    measured = measured or {}
    shown = [each for each in found if each.candidate in measured or each.candidate == chosen]
    others = [*best_of(found), *found]
    for each in others:
        if len(shown) < most and each not in shown:
            shown.append(each)
    shown.sort(key=lambda each: each.step)
    lines = [_COLUMNS, *(_line(each, measured) for each in shown)]
    marks = ["", *("*" if each.candidate == chosen else "" for each in shown)]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{mark:1} " + "  ".join(_padded(text, width, column)
                                 for column, (text, width) in enumerate(zip(line, wide)))  # noqa: B905
        for mark, line in zip(marks, lines, strict=True)
    )  # fmt: skip


def _padded(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column in (0, 2, 3, 4) else text.rjust(width)


def _line(each: Prediction, measured: Mapping[Candidate, float]) -> tuple[str, ...]:
    candidate, plan = each.candidate, each.plan
    tried = measured.get(candidate)
    return (
        candidate.shape,
        str(candidate.micro_batches),
        candidate.schedule if len(candidate.mesh) > 1 else "-",
        candidate.checkpoint,
        candidate.compression,
        f"{1e3 * plan.step:.2f}",
        "-" if tried is None else f"{1e3 * tried:.2f}",
        f"{plan.bubble:.1%}",
        f"{1e3 * each.sums:.2f}",
        size_text(max(plan.memory)),
    )


def advice(
    found: Sequence[Prediction],
    chosen: Candidate,
    size: float,
    measured: Mapping[Candidate, float] | None = None,
) -> str:
    """Answer in one line, with numbers: replicas, stages, or both?

    Args:
        found: all predictions.
        chosen: of them.
        size: bytes of the model's parameters.
        measured: seconds of a step, of those that were tried.
    """
    measured = measured or {}
    told: dict[str, Prediction] = {}
    tried = [each for each in found if each.candidate in measured]
    tried.sort(key=lambda each: measured[each.candidate])
    for each in [*tried, *found]:  # the quickest of each kind
        told.setdefault(kind_of(each.candidate), each)
    steps = []
    for kind in ("data parallel", "stages", "hybrid"):
        if kind in told:
            each = told[kind]
            seconds = measured.get(each.candidate, each.step)
            steps.append(f"{kind} ({each.candidate.shape}) {1e3 * seconds:.2f} ms")
        elif len(chosen.mesh) > 1 and kind == "data parallel":
            steps.append("data parallel does not fit")
    best = next(each for each in found if each.candidate == chosen)
    if kind_of(chosen) == "alone":
        return f"one rank, which keeps {size_text(max(best.plan.memory))}"
    why = {
        "data parallel": f"adding up {size_text(size)} of gradients keeps ranks waiting for "
        f"{1e3 * best.sums:.2f} ms of a step",
        "stages": f"each rank keeps {size_text(max(best.plan.memory))}, no gradient travels, and "
        f"ranks idle {best.plan.bubble:.1%} of a step",
        "hybrid": f"replicas wait {1e3 * best.sums:.2f} ms for gradients of a part of "
        f"{size_text(size)}, and ranks idle {best.plan.bubble:.1%} of a step",
    }[kind_of(chosen)]
    return f"{'; '.join(steps)}: take {kind_of(chosen)}, where {why}"


def kind_of(candidate: Candidate) -> str:
    """Name what a mesh does."""
    staged, shared = len(candidate.mesh) > 1, any(len(row) > 1 for row in candidate.mesh)
    if staged:
        return "hybrid" if shared else "stages"
    return "data parallel" if shared else "alone"
