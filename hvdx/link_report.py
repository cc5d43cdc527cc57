"""``hvdx bench link``: what the network of a job costs, and what compressing would save."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hvdx import buckets, link, world
from hvdx.compression.auto import BUDGETS, survey
from hvdx.compression.base import Compressor, Spec
from hvdx.compression.methods import candidates
from hvdx.compression.plans import Form, Model, Plan, choose
from hvdx.errors import HvdxError
from hvdx.link import Footprint, Link

_WIDTH = 1024  # rows and columns of a layer of the model for which to choose


class Wanted(NamedTuple):
    """The command's options."""

    framework: str | None
    seconds: float
    megabytes: float
    budget: str
    file: str | None


class Found(NamedTuple):
    """What was measured."""

    network: Link
    methods: dict[str, Footprint]  # on one layer
    plans: list[Plan]
    chosen: Plan
    sent: dict[str, float]  # bytes a step, by plan


def bench_link(wanted: Wanted, ranks: int) -> int:
    """Measure in this job, or start one of ``ranks`` that does; return the exit status."""
    if not in_job(os.environ):
        own = [f"--{name}={value}" for name, value in _options(wanted).items()]
        again = [sys.executable, "-m", "hvdx", "bench", "link", *own]
        job = [sys.executable, "-m", "hvdx", "run", "-np", str(ranks), "--", *again]
        return subprocess.run(job).returncode
    world.init(framework=wanted.framework or _installed())
    found = look(wanted)
    if world.rank() == 0:
        show(wanted, found)
        if wanted.file:
            Path(wanted.file).write_text(json.dumps(as_json(found), indent=1) + "\n")
    world.shutdown()
    return 0


def in_job(environ: Mapping[str, str]) -> bool:
    """Tell whether a launcher has started this process as a rank."""
    from hvdx.launch.launchers import recognise

    given = "HOROVOD_RANK" in environ or "HOROVOD_SIZE" in environ
    return given or recognise(environ, mpi_built=False) is not None


def _options(wanted: Wanted) -> dict[str, Any]:
    told = {name: value for name, value in wanted._asdict().items() if value is not None}
    if "file" in told:
        told["json"] = os.path.abspath(told.pop("file"))
    return told


def _installed() -> str | tuple[str, ...] | None:
    """Return torch where both frameworks are installed: it starts quicker."""
    return "torch" if importlib.util.find_spec("torch") else None


def look(wanted: Wanted) -> Found:
    """Measure; all ranks call it together."""
    adapter = world.core()
    ranks = world.size()
    if ranks == 1:
        raise HvdxError("one rank has no network to measure; start more: hvdx bench link -np 2")
    specs = layers(wanted.megabytes, ranks)
    methods: dict[str, Compressor] = candidates(BUDGETS[wanted.budget])
    network = link.measure(adapter, seconds=wanted.seconds)
    footprints = survey(adapter, methods, specs)
    model = Model(network, specs, footprints, methods, buckets.limit_bytes())
    plans = model.plans()
    large = Form.of(specs[0])
    return Found(
        network,
        {name: made for (name, form), made in footprints.items() if form == large},
        plans,
        choose(plans),
        {plan.name: model.sent(plan.choice) for plan in plans},
    )


def layers(megabytes: float, ranks: int) -> list[Spec]:
    """Return the parameters of dense layers that hold so much."""
    count = max(1, round(megabytes * 1e6 / 4 / (_WIDTH * (_WIDTH + 1))))
    return [
        Spec(f"{layer}.{name}", shape, "float32", ranks)
        for layer in range(count)
        for name, shape in (("weight", (_WIDTH, _WIDTH)), ("bias", (_WIDTH,)))
    ]


def show(wanted: Wanted, found: Found) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(width=100, highlight=False)
    console.print(_network(found.network), _methods(found), _model(wanted, found))
    if found.chosen.choice:
        console.print(f"Compression.auto({wanted.budget!r}) would use {found.chosen.name}.")
    else:
        console.print("Compression.auto would compress nothing here: no method saves enough.")


def _network(network: Link) -> Any:
    table = _table(f"network, {network.ranks} ranks", "collective", "latency ms", "MB/s sent")
    for kind, line in network.lines.items():
        speed = f"{1 / line.beta / 1e6:.4g}" if line.beta else "-"
        table.add_row(kind, f"{line.alpha * 1e3:.2f}", speed)
    return table


def _methods(found: Found) -> Any:
    size = _WIDTH**2
    table = _table(
        f"methods, on {_WIDTH} x {_WIDTH} float32", "method", "ns/element", "bytes sent", "rounds"
    )
    for name, made in found.methods.items():
        sent = sum(found.network.sent(each.kind, each.payload) for each in made.messages)
        rounds = 1 + max(each.round for each in made.messages)
        table.add_row(name, f"{made.seconds / size * 1e9:.2f}", f"{sent:,.0f}", str(rounds))
    return table


def _model(wanted: Wanted, found: Found) -> Any:
    table = _table(
        f"a step's gradients, {wanted.megabytes:g} MB", "method", "ms predicted", "MB sent", ""
    )
    for plan in found.plans:
        mark = "quickest" if plan is found.chosen else ""
        sent = found.sent[plan.name] / 1e6
        table.add_row(plan.name, f"{plan.seconds * 1e3:.1f}", f"{sent:.3g}", mark)
    return table


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def as_json(found: Found) -> dict[str, Any]:
    """Return the numbers: seconds, bytes."""
    elements = math.prod((_WIDTH, _WIDTH))
    return {
        "ranks": found.network.ranks,
        "link": {kind: line._asdict() for kind, line in found.network.lines.items()},
        "methods": {
            name: {
                "seconds_per_element": made.seconds / elements,
                "messages": [each._asdict() for each in made.messages],
            }
            for name, made in found.methods.items()
        },
        "plans": {
            plan.name: {"seconds": plan.seconds, "bytes_sent": found.sent[plan.name]}
            for plan in found.plans
        },
        "chosen": found.chosen.name,
    }
