"""``hvdx plan --ranks 1024 --hosts 128 --link 25gbit,5us``: what many ranks would do."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hvdx.errors import PlanError
from hvdx.pipeline.dry_run import load
from hvdx.pipeline.partition import size_text
from hvdx.pipeline.plan import Link as Hop
from hvdx.scaling.cluster import GOODPUT, INNER, Cluster, checked
from hvdx.scaling.predict import Prediction, predict
from hvdx.scaling.profile import Profile
from hvdx.scaling.ways import USUAL, Way, read_way


class Wanted(NamedTuple):
    """The command's options."""

    script: str | None
    ranks: int
    hosts: int
    link: str | None
    inner: str | None = None
    profile: str | None = None
    ways: str | None = None
    speed: float = 1.0
    goodput: float = GOODPUT
    model: str = "model"
    sample: str = "sample"
    output: str | None = None
    save: str | None = None
    json: str | None = None


class Curves(NamedTuple):
    """What was predicted: by way, for growing numbers of ranks; None where it cannot be done."""

    profile: Profile
    cluster: Cluster
    found: dict[str, list[Prediction | None]]
    refused: dict[str, str]  # why, for all ranks


def scale(wanted: Wanted) -> Curves:
    """Measure or load a profile, predict, print, and write what is wanted.

    Raises:
        PlanError: an option cannot be read, or does not go with the others.
    """
    if (wanted.script is None) == (wanted.profile is None):
        raise PlanError(
            "give a script that has the model, or --profile FILE that was saved from one"
            if wanted.script is None
            else "give a script to measure or --profile FILE, not both"
        )
    if wanted.output and not wanted.output.endswith(".png"):
        raise PlanError(f"--output {wanted.output!r}: curves are drawn as .png")
    if wanted.link is None and wanted.hosts > 1:
        raise PlanError(f"--hosts {wanted.hosts} needs --link: what is between them, as 25gbit,5us")
    outer = Hop.parse(wanted.link) if wanted.link else INNER
    inner = Hop.parse(wanted.inner) if wanted.inner else INNER
    cluster = checked(wanted.ranks, wanted.hosts, outer, inner, wanted.goodput)
    ways = [read_way(text.strip()) for text in (wanted.ways or ",".join(USUAL)).split(",")]
    whole = Profile.load(wanted.profile) if wanted.profile else measured(wanted, ways)
    if wanted.save:
        whole.save(wanted.save)
    profile = whole.paced(1 / wanted.speed)
    made = curves(profile, cluster, ways, strict=wanted.ways is not None)
    show(made, wanted.speed)
    if wanted.json:
        Path(wanted.json).write_text(json.dumps(as_json(made), indent=1) + "\n")
    if wanted.output:
        from hvdx.scaling.draw import draw

        draw(made, wanted.output)
    return made


def measured(wanted: Wanted, ways: Sequence[Way]) -> Profile:
    """Measure the model that a script names, and what the ways' methods compute.

    Raises:
        PlanError: the script fails, or its model is of another framework than PyTorch.
    """
    from hvdx.frameworks import kind_of

    assert wanted.script is not None
    model, sample = load(wanted.script, [wanted.model, wanted.sample])
    if kind_of(type(model)) != "torch":
        raise PlanError(
            f"{wanted.script}: {wanted.model!r} is no torch.nn.Module; measure such a model in a "
            "job of its own and give --profile FILE (docs/scaling.md tells the keys)"
        )
    methods = {way.method: way.local or way.compressor for way in ways if way.method != "none"}
    module = importlib.import_module("hvdx.integrations.pytorch_profile")
    return module.described(model, sample, methods, Path(wanted.script).stem)  # type: ignore[no-any-return]


def curves(profile: Profile, cluster: Cluster, ways: Sequence[Way], strict: bool = True) -> Curves:
    """Predict each way for growing numbers of ranks.

    Args:
        profile: of the model.
        cluster: the largest.
        ways: to look at.
        strict: raise where a way cannot be done with all ranks, instead of leaving it out.
    """
    found: dict[str, list[Prediction | None]] = {}
    refused: dict[str, str] = {}
    for way in ways:
        try:
            last = predict(profile, cluster, way)
        except PlanError as error:
            if strict:
                raise
            refused[way.text] = str(error)
            continue
        smaller = [_tried(profile, cluster.of(ranks), way) for ranks in cluster.sizes()[:-1]]
        found[way.text] = [*smaller, last]
    if not found:
        raise PlanError(next(iter(refused.values())))
    return Curves(profile, cluster, found, refused)


def _tried(profile: Profile, cluster: Cluster, way: Way) -> Prediction | None:
    try:
        return predict(profile, cluster, way)
    except PlanError:
        return None  # fewer ranks than stages, say


def show(made: Curves, speed: float = 1.0) -> None:
    """Print tables: all ranks, and efficiency as they grow."""
    from rich.console import Console

    profile, cluster = made.profile, made.cluster
    console = Console(width=100, highlight=False)
    faster = f", computing {speed:g} times as fast as measured" if speed != 1 else ""
    console.print(
        f"{profile.name}: {size_text(profile.bytes)} of parameters, {profile.batch} samples a rank "
        f"in {1e3 * profile.alone:.4g} ms{faster}\n"
        f"{cluster.ranks} ranks on {cluster.hosts} hosts; {_told(cluster.outer)} between hosts, "
        f"{_told(cluster.inner)} within"
    )
    console.print(_table(made), _growing(made))
    for row in made.found.values():
        if row[-1] and row[-1].note:
            console.print(f"{row[-1].way}: {row[-1].note}")
    for way, why in made.refused.items():
        console.print(f"left out: {way}: {why.removeprefix(f'way {way!r}: ')}")
    for line in remarks(made):
        console.print(line)


def _told(hop: Any) -> str:
    return f"{hop.bandwidth / 1e9:.3g} GB/s and {1e6 * hop.latency:.3g} us"


def _table(made: Curves) -> Any:
    from rich.table import Table

    table = Table(title=f"{made.cluster.ranks} ranks, predicted", title_justify="left")
    columns = "way", "ms a step", "efficiency", "samples/s", "MB sent", "memory"
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    last = [row[-1] for row in made.found.values()]
    for each in sorted((each for each in last if each), key=lambda each: each.step):
        table.add_row(
            each.way, f"{1e3 * each.step:.4g}", f"{each.efficiency:.1%}", f"{each.samples:.4g}",
            f"{each.sent / 1e6:.4g}", size_text(each.memory),
        )  # fmt: skip
    return table


def _growing(made: Curves) -> Any:
    from rich.table import Table

    sizes = made.cluster.sizes()
    chosen = sizes if len(sizes) <= 8 else [*sizes[1:-1:2], sizes[-1]]
    table = Table(title="efficiency, by ranks", title_justify="left")
    table.add_column("way")
    for size in chosen:
        table.add_column(str(size), justify="right")
    for way, row in made.found.items():
        cells = [row[sizes.index(size)] for size in chosen]
        table.add_row(way, *(f"{each.efficiency:.0%}" if each else "-" for each in cells))
    return table


def remarks(made: Curves) -> list[str]:
    """Say from how many ranks a method is no quicker than averaging without one."""
    ring = made.found.get("ring")
    lines = []
    for way, row in made.found.items() if ring else ():
        pairs = [(a, b) for a, b in zip(row, ring or (), strict=True) if a and b and a.ranks > 1]
        slower = [a.ranks for a, b in pairs if a.step >= b.step * 0.999]
        if way == "ring" or not slower:
            continue
        if len(slower) == len(pairs):
            lines.append(f"{way} is never quicker than ring here")
        elif slower[-1] == pairs[-1][0].ranks:
            start = next(ranks for ranks in slower if all(a.ranks in slower for a, _ in pairs
                                                          if a.ranks >= ranks))  # fmt: skip
            lines.append(f"{way} is no quicker than ring from {start} ranks on")
    return lines


def as_json(made: Curves) -> dict[str, Any]:
    """Return the numbers: seconds, bytes."""
    return {
        "profile": made.profile.name,
        "cluster": {
            "ranks": made.cluster.ranks, "hosts": made.cluster.hosts,
            "outer": made.cluster.outer._asdict(), "inner": made.cluster.inner._asdict(),
        },
        "predictions": [
            {**each._asdict(), "efficiency": each.efficiency}
            for row in made.found.values() for each in row if each
        ],
        "refused": made.refused,
    }  # fmt: skip
