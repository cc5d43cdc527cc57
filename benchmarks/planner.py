"""How well the planner predicts: steps and memory of many plans, and the plan that it takes.

    python benchmarks/planner.py --json planner.json
    python benchmarks/planner.py --ranks 2 --model wide

On 2 and on 4 ranks, for a model of many parameters and for a deep one of few, ``place="auto"``
measures, predicts and chooses. Then a dozen of the plans that it has predicted but not tried, the
quickest ones and some of each mesh, are run for real, in turns, and so are the plan that it has
chosen and the next best that it has tried. A turn is a few steps of a plan on end, as in training,
each begun by all ranks together; its first step finds caches cold and is not counted. Memory is
what tensors hold at the worst moment of a step, counted as they are made and set free, with
parameters and the optimizer's state.

    % of error      |predicted / measured - 1| of a step that was not tried: 5 % in the median, 15 %
                    at most
    chosen          its step over that of the quickest measured: 1.05 at most
    memory          |predicted / counted - 1| on the fullest rank: 10 % at most
    % of change     |when tried / measured - 1| of the same plans: what the machine does from one
                    minute to the next, and no prediction can know; errors are told without it, too

Bars are for a machine on which nothing else runs; four ranks on fewer cores are predicted to share
them, and graded alike.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import sys
import time
import weakref
from typing import Any

import harness

MODELS = "wide", "deep"
PLANS = 12  # to run, of each model and number of ranks
BATCH = 64
TRIED = 3  # of those that the planner has tried, and chosen from
STEPS = 3  # of a turn, the first of which does not count
Rows = list[harness.Row]


def wide() -> Any:
    """Return a model that is heavy in parameters: 34 MB."""
    from torch import nn

    widths = [512, 2048, 2048, 1024, 1024, 512]
    return nn.Sequential(*(nn.Sequential(nn.Linear(*pair), nn.ReLU())
                           for pair in itertools.pairwise(widths)))  # fmt: skip


def deep() -> Any:
    """Return blocks as of a GPT of 2 MB, over 32 positions of 128 numbers."""
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

        def forward(self, x: Any) -> Any:
            q, k, v = (each.unflatten(-1, (4, 32)).transpose(1, 2)
                       for each in self.mixed(x).chunk(3, -1))  # fmt: skip
            found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(found.transpose(1, 2).flatten(2))

    class Beside(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(128), inner

        def forward(self, x: Any) -> Any:
            return x + self.inner(self.norm(x))

    def block() -> list[Any]:
        dense = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
        return [Beside(Attention()), Beside(dense)]

    return nn.Sequential(*(part for _ in range(4) for part in block()))


SHAPES = {"wide": (512,), "deep": (32, 128)}


def build(name: str) -> Any:
    """Return the model; the same on every rank."""
    import torch

    torch.manual_seed(0)
    return {"wide": wide, "deep": deep}[name]()


def adam(params: Any) -> Any:
    """Return the optimizer of all plans."""
    import torch

    return torch.optim.Adam(params, 1e-4)


def turn(step: Any) -> float:
    """Return milliseconds of a step on the slowest rank: the median of those after the first."""
    return statistics.median([harness.slowest(step) for _ in range(STEPS)][1:])


def to_run(compared: list[Any], chosen: Any) -> list[Any]:
    """Return the chosen plan, the next best tried, the quickest others, and some of each mesh."""
    tried = [each for each in compared if each.measured is not None]
    tried.sort(key=lambda each: (each.prediction.candidate != chosen, each.measured))
    found = [each for each in compared if each.measured is None]
    by_mesh: dict[Any, list[Any]] = {}
    for each in found:
        by_mesh.setdefault(each.prediction.candidate.mesh, []).append(each)
    run = found[:3]
    for part in range(PLANS):
        for several in by_mesh.values():
            each = several[len(several) * part // PLANS]
            if each not in run and len(run) < PLANS:
                run.append(each)
    return [*tried[:TRIED], *run]


def live_bytes() -> Any:
    """Return a mode in which all memory of tensors is counted as it comes and goes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        """Counts storages that are met for the first time; those ``known`` do not count."""

        def __init__(self, known: list[Any]) -> None:
            super().__init__()
            self.now = self.peak = 0
            self._met = {each.untyped_storage()._cdata for each in known}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = func(*args, **(kwargs or {}))
            for each in tree_leaves((args, kwargs, made)):
                if isinstance(each, torch.Tensor):
                    self._note(each.untyped_storage())
            return made

        def _note(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key not in self._met:
                self._met.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size).atexit = False

        def _gone(self, key: int, size: int) -> None:
            self._met.discard(key)
            self.now -= size

    return Live


def counted(pipe: Any, x: Any, y: Any) -> float:
    """Return the bytes that this rank's stages hold in a step, at most."""
    import torch
    from torch.utils._pytree import tree_leaves

    own = {id(p): p for params in pipe._params.values() for p in params.values()}
    states = [tree_leaves(dict(each.state)) for each in pipe.optimizers.values()]
    states = [each for leaves in states for each in leaves if isinstance(each, torch.Tensor)]
    known = [*own.values(), *states]
    model = pipe._graph.model
    others = [*model.parameters(), *model.buffers(), x, y]
    with live_bytes()([*known, *others]) as live:
        pipe.step(x, y)
    return live.peak + sum(each.numel() * each.element_size() for each in known)


def grade(name: str, runs: int) -> Rows:
    """Predict, choose, measure and compare; all ranks call it."""
    import torch

    import hvdx as hvd

    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(BATCH, *SHAPES[name], generator=draw) for _ in range(2))
    loss = torch.nn.functional.mse_loss
    make = functools.partial(hvd.Pipeline, build(name), x, loss, adam, seed=0)
    begun = time.perf_counter()
    auto = make(place="auto", target=y)
    planned = time.perf_counter() - begun
    chosen = next(each.prediction.candidate for each in auto.compared
                  if each.prediction.plan == auto.plan)  # fmt: skip
    auto.close()
    run = to_run(list(auto.compared), chosen)
    steps, predicted, memory = {}, {}, {}
    for each in run:
        candidate = each.prediction.candidate
        told = f"{candidate.shape}, {candidate.micro_batches} x {candidate.schedule}"
        pipe = make(stages=each.prediction.plan)
        pipe._times = each.prediction.times
        for _ in range(2):
            pipe.step(x, y)
        held = hvd.allgather_object(counted(pipe, x, y))
        memory[told] = max(held), max(each.prediction.plan.memory)
        steps[told], predicted[told] = functools.partial(pipe.step, x, y), each.prediction.step
    variants = {told: functools.partial(turn, step) for told, step in steps.items()}
    harness.interleave(variants, 1)
    samples = harness.interleave(variants, runs)
    tried = {told: each.measured for told, each in zip(steps, run, strict=True)}
    return table(f"{name}, {hvd.size()} ranks", samples, predicted, memory, tried, planned)


def table(
    case: str,
    samples: dict[str, list[float]],
    predicted: dict[str, float],
    memory: dict[str, tuple[float, float]],
    tried: dict[str, float | None],
    planned: float,
) -> Rows:
    """Return a row for each plan, for its memory, and for each bar; the chosen plan is first."""
    rows, ratios, paces = [], [], []
    for told, taken in samples.items():
        value, expected, known = statistics.median(taken), predicted[told] * 1e3, tried[told]
        if known is None:
            ratios.append(expected / value)
        else:
            paces.append(value / (known * 1e3))
        rows.append(harness.Row(case, f"{told}, step ms", value, "predicted", expected,
                                expected / value, len(taken), harness.spread(taken)))  # fmt: skip
    errors = [abs(ratio - 1) * 100 for ratio in ratios]
    excess = []
    for told, (held, expected) in memory.items():
        excess.append(abs(expected / held - 1) * 100)
        rows.append(harness.Row(case, f"{told}, MB", held / 1e6, "predicted", expected / 1e6,
                                expected / held, 1, 0.0))  # fmt: skip
    first = next(iter(samples))
    best = min(samples, key=lambda told: statistics.median(samples[told]))
    over = [c / b for c, b in zip(samples[first], samples[best], strict=True)]
    bars = {
        "% of error of a step, median": (statistics.median(errors), 5.0),
        "% of error of a step, largest": (max(errors), 15.0),
        f"chosen ({first}) over the quickest ({best})": (statistics.median(over), 1.05),
        "% of error of memory, largest": (max(excess), 10.0),
    }
    rows += [
        harness.Row(case, what, value, "bar", bar, harness.within(bar, value), 1, 0.0)
        for what, (value, bar) in bars.items()
    ]
    pace = statistics.median(paces)
    others = {
        "% of change since plans were tried, median": abs(1 / pace - 1) * 100,
        "% of error of a step, median, without that": statistics.median(
            abs(ratio * pace - 1) * 100 for ratio in ratios
        ),
        "s of planning": planned,
    }
    return [*rows, *(harness.Row(case, what, value, "", value, 1.0, 1, 0.0)
                     for what, value in others.items())]  # fmt: skip


def work(file: str, name: str, runs: int) -> None:
    """Grade on one rank; rank 0 leaves the rows."""
    import hvdx as hvd

    with harness.torch_job():
        rows = grade(name, runs)
        if hvd.rank() == 0:
            harness.leave(rows, file)


def main() -> int:
    """Print the table."""
    parser = harness.options(__doc__)
    parser.add_argument("--ranks", type=int, action="append", help="only so many; repeat it")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this; repeat it")
    parser.add_argument("--runs", type=int, help="turns of each plan")
    told = parser.parse_args()
    runs = told.runs or (2 if told.short else 7)
    if told.worker:
        work(told.worker, told.model[0], runs)
        return 0
    # Before any framework counts the cores: each rank computes with one thread.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    rows: Rows = []
    numbers = told.ranks or ([2] if told.short else [2, 4])
    for ranks, model in itertools.product(numbers, told.model or MODELS[: 1 + (not told.short)]):
        start, before = time.monotonic(), os.getloadavg()[0]
        rows += harness.launch(__file__, ranks, ["--model", model, "--runs", str(runs)])
        print(f"{model}, {ranks} ranks: {time.monotonic() - start:.0f} s; load {before:.1f} before",
              flush=True)  # fmt: skip
        harness.report(rows, told.json)
    harness.verdict(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
