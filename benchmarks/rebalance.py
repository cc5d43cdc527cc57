"""What it brings that units move while training: steps before and after, against the optimum.

    python benchmarks/rebalance.py --json rebalance.json
    python benchmarks/rebalance.py --part slow --part freeze

Each part is a job of its own, of about a minute. Layers only sleep, 2 ms for each of F, I and W, so
that cores do not matter; "compute" is of matrix products and needs as many idle cores as ranks.

    noise      4 ranks, 200 steps in which each rank's times differ by up to 10 %: no move
    slow       4 ranks, of which one takes 3 times as long from step 50 on: 80 % of the new optimum,
               10 steps after the look that found it
    freeze     2 ranks, the lower half of the layers is frozen at step 30: steps 1.3 times quicker
    compute    the same with an MLP of 16 layers of 512, on a thread each

The optimum is simulated: of the best cuts for the ranks' true speeds and the layers' times.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import harness

LAYERS, MICRO_BATCHES, WIDTH = 16, 8, 8
RANKS = {"noise": 4, "slow": 4, "freeze": 2, "compute": 2}
#: What all layers of this process take now, in relation to their own time.
SPEED = {"factor": 1.0, "noise": 0.0}
Rows = list[harness.Row]


def against_bar(case: str, metric: str, value: float, bar: float, steps: int) -> harness.Row:
    """Return a row that says whether ``value`` reaches ``bar``."""
    return harness.Row(case, metric, value, "bar", bar, value / bar, steps, 0.0)


def told(case: str, metric: str, samples: Sequence[float]) -> harness.Row:
    """Return a row that is compared with nothing."""
    value = statistics.median(samples)
    return harness.Row(
        case, metric, value, "", value, 1.0, len(samples), harness.spread([*samples])
    )


def sleepers(seconds: float) -> Any:
    """Return layers whose F, I and W sleep; I and W only where they are needed."""
    import torch
    from torch import nn

    def sleep(share: float) -> None:
        wait = seconds * share * SPEED["factor"]
        time.sleep(wait * random.uniform(1 - SPEED["noise"], 1 + SPEED["noise"]))

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, ahead: float) -> Any:
            sleep(ahead)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            sleep(1.0)
            return gradient, None

    class Sleeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Any) -> Any:
            return Sleep.apply(x, 1.0) + Sleep.apply(self.weight, 0.0)

    return nn.Sequential(*(Sleeper() for _ in range(LAYERS)))


class Run:
    """A pipeline that is trained step by step, and timed.

    Args:
        model: of :data:`LAYERS` units.
        x: a batch.
        every: steps between two looks.
    """

    def __init__(self, model: Any, x: Any, every: int) -> None:
        import torch

        import hvdx as hvd

        self.model, self._x = model, x
        self.pipe = hvd.Pipeline(
            model,
            x,
            loss=lambda output, target: output.mean(),
            optimizer=lambda params: torch.optim.SGD(params, 1e-3),
            micro_batches=MICRO_BATCHES,
            leaves=[type(model[0])],
            by="time",
            rebalance=hvd.Rebalance(every=every),
        )
        self.milliseconds: list[float] = []
        self.moved: list[int] = []  # after which steps

    def steps(self, count: int) -> list[float]:
        """Train; return milliseconds on the slowest rank."""
        import torch

        import hvdx as hvd

        for _ in range(count):
            moves = self.pipe.moves
            start = time.perf_counter()
            self.pipe.step(self._x, self._x)
            taken = torch.tensor((time.perf_counter() - start) * 1e3)
            self.milliseconds.append(float(hvd.allreduce(taken, op=hvd.Max, name="slowest")))
            if self.pipe.moves > moves:
                self.moved.append(len(self.milliseconds))
        return self.milliseconds[-count:]

    def optimum(self, speeds: Sequence[float]) -> float:
        """Return the milliseconds of a step with the best cuts for ranks of these speeds."""
        from hvdx.pipeline.balance import partly, propose, whole

        pipe = self.pipe
        line = partly(whole(pipe._line, pipe._measured_with), pipe._trained())
        return propose(line, replace(pipe._means, speeds=speeds), pipe.plan).then * 1e3


def noise(short: bool) -> Rows:
    """Count the moves in steps whose times differ by chance."""
    import torch

    run = Run(sleepers(1e-4 if short else 2e-3), torch.zeros(MICRO_BATCHES, WIDTH), 10)
    SPEED["noise"] = 0.1
    taken = run.steps(20 if short else 200)
    SPEED["noise"] = 0.0
    moves = harness.Row("noise of 10 %", "moves", float(run.pipe.moves), "bar", 0.0,
                        1.0 if not run.pipe.moves else 0.0, len(taken), 0.0)  # fmt: skip
    return [moves, told("noise of 10 %", "step ms", taken)]


def slow(short: bool) -> Rows:
    """Slow one rank down, and watch what becomes of the steps."""
    import torch

    import hvdx as hvd

    before, every = (6, 2) if short else (50, 10)
    run = Run(sleepers(1e-3 if short else 2e-3), torch.zeros(MICRO_BATCHES, WIDTH), every)
    case = "one of 4 ranks 3 times slower"
    rows = [told(case, "step ms before", run.steps(before))]
    SPEED["factor"] = 3.0 if hvd.rank() == 1 else 1.0
    seen = run.pipe.moves
    optimum = run.optimum([1.0, 1 / 3, 1.0, 1.0])
    worse: list[float] = []
    while run.pipe.moves == seen and len(worse) < 10 * every:
        worse += run.steps(1)
    after = run.steps(10)
    return [
        *rows,
        told(case, "step ms, slowed down", worse),
        told(case, "steps until units move", [float(len(worse))]),
        told(case, "step ms after the move", after),
        told(case, "step ms at the optimum, simulated", [optimum]),
        against_bar(case, "share of the optimum", optimum / statistics.median(after), 0.8, 10),
    ]


def frozen(run: Run, case: str, short: bool) -> Rows:
    """Freeze the lower half while training."""
    before = run.steps(6 if short else 30)
    for layer in run.model[: LAYERS // 2]:
        layer.requires_grad_(False)
    still: list[float] = []
    seen = run.pipe.moves
    while run.pipe.moves == seen and len(still) < 60:
        still += run.steps(1)
    after = run.steps(5 if short else 20)
    gain = statistics.median(before) / statistics.median(after)
    return [
        told(case, "step ms before", before),
        told(case, "step ms, frozen, with the old cuts", still),
        told(case, "step ms after the move", after),
        told(case, "step ms at the optimum, simulated", [run.optimum([1.0, 1.0])]),
        against_bar(case, "times quicker than before", gain, 1.3, len(after)),
    ]


def freeze(short: bool) -> Rows:
    """Freeze half of the layers that sleep."""
    import torch

    x = torch.zeros(MICRO_BATCHES, WIDTH, requires_grad=False)
    run = Run(sleepers(1e-3 if short else 2e-3), x, 2 if short else 10)
    return frozen(run, "half of the layers frozen", short)


def compute(short: bool) -> Rows:
    """Freeze half of the layers of an MLP."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    size = 64 if short else 512
    layers = [nn.Sequential(nn.Linear(size, size), nn.ReLU()) for _ in range(LAYERS)]
    x = torch.randn(32 * MICRO_BATCHES, size)
    run = Run(nn.Sequential(*layers), x, 2 if short else 10)
    return frozen(run, f"half of an MLP {LAYERS}x{size} frozen", short)


PARTS: dict[str, Callable[[bool], Rows]] = {
    "noise": noise,
    "slow": slow,
    "freeze": freeze,
    "compute": compute,
}


def work(part: str, short: bool, file: str) -> None:
    """Measure on one rank; rank 0 leaves the rows."""
    import hvdx as hvd

    hvd.init(framework="torch")
    random.seed(hvd.rank())
    rows = PARTS[part](short)
    if hvd.rank() == 0:
        harness.leave(rows, file)


def main() -> None:
    """Print the table."""
    parser = harness.options(__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; repeatable")
    options = parser.parse_args()
    if options.worker:
        work(options.part[0], options.short, options.worker)
        return
    rows: Rows = []
    for part in options.part or PARTS:
        arguments = ["--part", part, *["--short"] * options.short]
        rows += harness.launch(__file__, RANKS[part], arguments)
    harness.report(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
