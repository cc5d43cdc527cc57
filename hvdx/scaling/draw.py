"""Curves of what was predicted, as PNG."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdx.errors import PlanError
from hvdx.scaling.command import Curves
from hvdx.scaling.predict import Prediction

_MARKERS = "osD^vP*X<>hdp8"


def draw(made: Curves, path: str) -> None:
    """Draw efficiency, step time, bytes and memory over the number of ranks.

    Args:
        made: the predictions.
        path: of a PNG.

    Raises:
        PlanError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError("drawing needs matplotlib: pip install 'hvdx[examples]'") from None
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[tuple[str, str, Callable[[Prediction], float]]] = [
        ("scaling efficiency", "%", lambda each: 100 * each.efficiency),
        ("step time", "ms", lambda each: 1e3 * each.step),
        ("sent by a rank in a step", "MB", lambda each: each.sent / 1e6),
        ("memory of a rank", "MiB", lambda each: each.memory / 2**20),
    ]
    for axes, (title, unit, value) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _panel(axes, made, value, log=unit in ("ms", "MB"))
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel(unit)
        axes.set_xlabel("ranks")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=10)
    figure.suptitle(_title(made), x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)


def _title(made: Curves) -> str:
    cluster, profile = made.cluster, made.profile
    gbit = cluster.outer.bandwidth / 125e6
    return (
        f"{profile.name}: {profile.bytes / 1e6:.4g} MB of parameters, "
        f"{1e3 * profile.alone:.4g} ms a step alone; {cluster.per_host} ranks a host, "
        f"{gbit:.3g} Gbit/s and {1e6 * cluster.outer.latency:.3g} us between hosts"
    )


def _panel(axes: Any, made: Curves, value: Callable[[Prediction], float], log: bool) -> None:
    sizes = made.cluster.sizes()
    for number, (way, row) in enumerate(made.found.items()):
        points = [(each.ranks, value(each)) for each in row if each and (value(each) or not log)]
        axes.plot(
            *zip(*points, strict=True), label=way, marker=_MARKERS[number % len(_MARKERS)],
            markersize=4, linewidth=1.4, color=f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
