"""How far predictions for many ranks are from what few take.

    python benchmarks/scaling.py --json scaling.json --save benchmarks/profiles/mlp.json

Profiles an MLP of 5.8 M parameters (784-2048-2048-10, batch 64, one thread) on one rank: its step,
and what each method computes. What an operation costs between two processes is measured, too
(``hvdx bench link``), and how much longer operations take in training is fitted to the steps of 2
ranks over loopback. From that the steps of 2 and 4 ranks are predicted, over loopback and, with
root, between hosts on slow links (``rig.py``); all of them are measured, too. A row compares:
``value`` is predicted, ``baseline_value`` measured, ``ratio`` the former over the latter.

``--measured FILE ...`` takes steps that ``compression.py --json`` has measured instead, and fits to
those of 2 ranks on the quickest link among them; ``--profile FILE`` what ``--save`` has kept.
``--draw FOLDER`` draws the curves of docs/scaling.md.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import compression
import harness
import rig

from hvdx.link import Line
from hvdx.pipeline.plan import Link as Hop
from hvdx.scaling.cluster import GOODPUT, Cluster, checked
from hvdx.scaling.predict import predict
from hvdx.scaling.profile import Profile
from hvdx.scaling.ways import read_way

HERE = Path(__file__).resolve().parent
NAMES = (
    "none", "fp16", "bf16", "int8", "int4", "onebit", "topk 0.01", "dgc 0.001", "randomk 0.01",
    "powersgd 4", "powersgd 2", "powersgd 1", "diloco 32",
)  # fmt: skip
LATENCY = 30e-6  # of a message between two hosts of the rig; hardly matters

Measured: TypeAlias = dict["Where", dict[str, float]]
"""Seconds of a step, by place and name of a variant as ``compression.py`` has it."""


class Where(NamedTuple):
    """Where steps are measured.

    Attributes:
        ranks: one on each host.
        rate: Mbit/s of a host's link; None: no limit; 0: loopback, not the rig.
    """

    ranks: int
    rate: float | None

    def __str__(self) -> str:
        links = {None: "unlimited", 0: "loopback"}.get(self.rate) or f"{self.rate:g} Mbit/s"
        return f"{self.ranks} ranks, {links}"

    @property
    def cluster(self) -> Cluster:
        """Return what is predicted for it."""
        hop = Hop(LATENCY, self.rate * 125e3) if self.rate else Hop(0.0, math.inf)
        return checked(self.ranks, self.ranks, hop, hop, GOODPUT)

    @property
    def crowd(self) -> float:
        """Return how many ranks share a core of this machine."""
        return max(1.0, self.ranks / (os.cpu_count() or 1))


def way(name: str) -> str:
    """Turn a variant's name into that of a way: ``powersgd 4`` is ``powersgd=4``."""
    return "ring" if name == "none" else name.replace(" ", "=")


def predicted(profile: Profile, where: Where, name: str, crowd: float | None = None) -> float:
    """Return the seconds of a step; ranks that share a core compute as much slower."""
    share = where.crowd if crowd is None else crowd
    return predict(profile.paced(share, share), where.cluster, read_way(way(name))).step


def fitted(
    profile: Profile, where: Where, measured: Mapping[str, float], crowd: float | None = None
) -> Profile:
    """Return the profile with what an operation costs in training, beside the network.

    That is more than one alone takes: threads must wake up, and ranks are not there at the same
    moment. One number, for operations of all kinds: for which predictions are as often too high
    as too low.
    """

    def with_alpha(alpha: float) -> Profile:
        software = profile.software or {"allreduce float32": Line(0.0, 0.0)}
        lines = {kind: Line(alpha, line.beta) for kind, line in software.items()}
        return replace(profile, software=lines)

    def bias(alpha: float) -> float:
        trial = with_alpha(alpha)
        return statistics.median(
            math.log(predicted(trial, where, name, crowd) / seconds)
            for name, seconds in measured.items()
        )

    low, high = 0.0, 1.0
    for _ in range(20):  # halving: the more operations cost, the higher predictions are
        middle = (low + high) / 2
        low, high = (low, middle) if bias(middle) > 0 else (middle, high)
    return with_alpha(round(low, 5))


def rows(
    profile: Profile, measured: Measured, crowd: Callable[[Where], float] | None = None
) -> list[harness.Row]:
    """Compare predicted with measured milliseconds."""
    return [
        harness.Row(str(where), f"{name}, step ms, predicted", 1e3 * told, "measured",
                    1e3 * seconds, told / seconds, 1, 0.0)
        for where, steps in measured.items()
        for name, seconds in steps.items()
        for told in [predicted(profile, where, name, crowd and crowd(where))]
    ]  # fmt: skip


def summary(found: Sequence[harness.Row]) -> str:
    """Say how far off predictions are."""
    off = sorted(abs(row.ratio - 1) for row in found)
    return (
        f"{len(off)} predictions: median error {statistics.median(off):.1%}, largest {off[-1]:.1%}"
    )


def quickest(measured: Measured) -> Where:
    """Return where two ranks have the quickest link: what to fit to."""
    two = [where for where in measured if where.ranks == 2]
    if not two:
        raise SystemExit("nothing was measured on 2 ranks, to which predictions could be fitted")
    return max(two, key=lambda where: math.inf if not where.rate else where.rate)


def read(files: Sequence[str]) -> Measured:
    """Read steps from tables of ``compression.py``."""
    found: Measured = {}
    for file in files:
        for row in json.loads(Path(file).read_text())["rows"]:
            name, _, metric = row["metric"].partition(", ")
            ranks, link = row["case"].split(" hosts, ")
            where = Where(int(ranks), None if link == "unlimited" else float(link.split()[0]))
            if metric == "step ms" and name in NAMES:
                found.setdefault(where, {}).setdefault(name, row["value"] / 1e3)
    return found


# --- measuring


def profiled(runs: int) -> Profile:
    """Profile the MLP in this process, which computes with one thread; take the best of runs."""
    import torch

    from hvdx.integrations.pytorch_profile import described

    torch.set_num_threads(1)
    ways = [read_way(way(name)) for name in NAMES if name != "none"]
    methods = {each.method: each.local or each.compressor for each in ways}
    model, _ = compression.model()
    sample = torch.randn(compression.BATCH, compression.WIDTHS[0])

    def optimizer(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=1e-3)

    tries = [described(model, sample, methods, "MLP", optimizer) for _ in range(runs)]
    best = min(tries, key=lambda each: each.forward + each.backward)
    codecs = {
        name: tuple(
            min(costs) for costs in zip(*(each.codecs[name] for each in tries), strict=True)
        )
        for name in best.codecs
    }
    # Loss, zeroing and update: what a whole step takes beside forward and backward.
    rest = max(0.0, step_alone(20 * runs) - best.forward - best.backward)
    about = f"{best.about}, {harness.machine().get('processor', 'unknown processor')}"
    return replace(best, update=rest, codecs=codecs, about=about)


def step_alone(runs: int) -> float:
    """Return the seconds of a step without other ranks, at best."""
    import torch
    from torch.nn.functional import cross_entropy

    module, optimizer = compression.model()
    inputs = torch.randn(compression.BATCH, compression.WIDTHS[0])
    labels = torch.randint(0, compression.WIDTHS[-1], (compression.BATCH,))
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(module(inputs), labels).backward()
        optimizer.step()
        taken.append(time.perf_counter() - start)
    return min(taken)


def work(file: str, names: Sequence[str], runs: int) -> None:
    """Measure steps, and operations, on one rank of a job; rank 0 leaves them."""
    import torch

    import hvdx as hvd
    from hvdx import link, world

    torch.set_num_threads(1)
    hvd.init(framework="torch")
    torch.manual_seed(hvd.rank())
    software = link.measure(world.core(), seconds=2.0).lines
    runners = {name: compression.Runner(name, quick=True) for name in names}
    samples = harness.interleave(runners, runs)
    if hvd.rank() == 0:
        steps = {name: statistics.median(each) / 1e3 for name, each in samples.items()}
        lines = {kind: line._asdict() for kind, line in software.items()}
        Path(file).write_text(json.dumps({"steps": steps, "software": lines}))
    hvd.shutdown()


def steps_of(where: Where, names: Sequence[str], runs: int) -> tuple[dict[str, float], Any]:
    """Run a job there; return the seconds of steps, and what operations cost."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "steps.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(result),
                   "--methods", ",".join(names), "--runs", str(runs)]  # fmt: skip
        one_thread = {"OMP_NUM_THREADS": "1"}
        if where.rate == 0:
            launch = [sys.executable, "-m", "hvdx", "run", "-np", str(where.ranks), "--"]
            subprocess.run([*launch, *command], check=True, env={**os.environ, **one_thread})
        else:
            with rig.network(where.ranks, where.rate) as made:
                if rig.run(made, command, one_thread):
                    raise SystemExit(f"{where}: a rank failed")
        told = json.loads(result.read_text())
    return told["steps"], {kind: Line(**line) for kind, line in told["software"].items()}


def places(short: bool) -> list[Where]:
    """Return where to measure."""
    if short:
        return [Where(2, 0)]
    found = [Where(2, 0), Where(4, 0)]
    if (reason := rig.missing()) is None:
        found += [Where(ranks, rate) for rate in (1000, 100) for ranks in (2, 4)]
    else:
        print(f"no rig here: {reason}", file=sys.stderr)
    return found


# --- pictures


def draw(profile: Profile, found: Sequence[harness.Row], folder: Path) -> None:
    """Draw predicted against measured steps, by place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    cases = list(dict.fromkeys(row.case for row in found))
    for number, case in enumerate(cases):
        points = [(row.baseline_value, row.value) for row in found if row.case == case]
        axes.scatter(*zip(*points, strict=True), label=case, marker="osD^vP"[number % 6], s=32)
    low = 0.7 * min(min(row.value, row.baseline_value) for row in found)
    high = 1.4 * max(max(row.value, row.baseline_value) for row in found)
    axes.plot([low, high], [low, high], color="black", linewidth=1, label="equal")
    for factor in (0.8, 1.25):
        axes.plot([low, high], [factor * low, factor * high], color="grey", linewidth=0.8,
                  linestyle=":", label="25 % off" if factor > 1 else None)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("measured, ms a step")
    axes.set_ylabel("predicted, ms a step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"{profile.name}: {summary(found)}", loc="left", fontsize=10)
    figure.savefig(folder / "scaling-error.png", dpi=110)


def main() -> int:
    """Print the table."""
    parser = harness.options(__doc__)
    parser.add_argument("--measured", nargs="+", metavar="FILE", help="tables of compression.py")
    parser.add_argument("--profile", metavar="FILE", help="instead of measuring one")
    parser.add_argument("--save", metavar="FILE", help="keep the profile")
    parser.add_argument("--draw", metavar="FOLDER", help="draw scaling-error.png there")
    parser.add_argument("--methods", metavar="NAMES", help=f"by comma, of: {', '.join(NAMES)}")
    parser.add_argument("--runs", type=int, help="turns of each method")
    told = parser.parse_args()
    names = told.methods.split(",") if told.methods else NAMES
    if told.short:
        names = ("none", "int8", "powersgd 4")
    if unknown := set(names) - set(NAMES):
        parser.error(
            f"unknown methods {', '.join(sorted(unknown))}; use some of {', '.join(NAMES)}"
        )
    runs = told.runs or (2 if told.short else 7)
    if told.worker:
        work(told.worker, names, runs)
        return 0
    profile = Profile.load(told.profile) if told.profile else profiled(1 if told.short else 5)
    measured = read(told.measured) if told.measured else {}
    for where in [] if told.measured else places(told.short):
        measured[where], software = steps_of(where, names, runs)
        if where == Where(2, 0):
            profile = replace(profile, software=software)
    base = quickest(measured)
    profile = fitted(profile, base, measured[base])
    alpha = next(iter(profile.software.values())).alpha
    found = rows(profile, measured)
    harness.report(found, told.json)
    print(f"{profile.about}\nfitted to {base}: an operation takes {1e3 * alpha:.1f} ms in training")
    for case in dict.fromkeys(row.case for row in found):
        print(f"{case}: {summary([row for row in found if row.case == case])}")
    held = [row for row in found if row.case != str(base)]
    if held:
        print(f"not fitted to: {summary(held)}")
    if told.save:
        profile.save(told.save)
    if told.draw:
        draw(profile, held or found, Path(told.draw))
    return 0


if __name__ == "__main__":
    sys.exit(main())
