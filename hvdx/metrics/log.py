"""The files of :class:`hvdx.metrics.Metrics`: JSON lines, their readers, and TensorBoard.

Each line is an object with a ``kind``:

    header      once per run: versions, ranks, hosts, options
    interval    step, seconds, wall, steps, samples, samples_per_second, values, and by measure the
                first rank's value and the ranks' least, mean and greatest
    evaluation  step, seconds, wall, values
    target      step, seconds and wall when the target was reached

``seconds`` are those of training since the run began, ``wall`` all of them. A value that is not
finite is null. Several runs may follow each other in a file; one that was killed may leave half of
a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
KINDS = ("header", "interval", "evaluation", "target")


def header(hosts: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return what the first line of a run says.

    Args:
        hosts: by rank.
        **more: what else to tell.
    """
    import datetime  # here and below, what would make `import hvdx` slower
    import platform

    versions = {"hvdx": _version("hvdx"), "horovod": _version("horovod")}
    for name in ("torch", "tensorflow", "keras"):
        if name in sys.modules:
            versions[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return {
        "format": FORMAT,
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "ranks": len(hosts),
        "hosts": dict(Counter(hosts)),
        "python": platform.python_version(),
        "versions": versions,
        **more,
    }


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


class Log:
    """Where the first rank tells what all ranks have measured.

    Args:
        path: of the file of JSON lines, or None.
        tensorboard: folder, or None.
        unit: of samples.
        quiet: print nothing.

    Raises:
        OSError: one of them cannot be written.
        ValueError: the file has something else in it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        tensorboard: str | os.PathLike[str] | None,
        unit: str,
        quiet: bool,
    ) -> None:
        self._unit, self._quiet, self._ranks = unit, quiet, 1
        self._file = _opened(path) if path is not None else None
        self._board = _board(tensorboard) if tensorboard is not None else None

    def write(self, kind: str, told: dict[str, Any]) -> None:
        """Print and write a line. What cannot be written is told once: training goes on."""
        self._ranks = told.get("ranks", self._ranks)
        if not self._quiet and kind != "header":
            print(line(kind, told, self._unit, self._ranks), flush=True)
        try:
            if self._file is not None:
                text = json.dumps({"kind": kind, **told}, default=str)
                self._file.write(f"{text}\n".encode())
                self._file.flush()
            if self._board is not None:
                for name, value in scalars(kind, told).items():
                    self._board.add_scalar(name, value, told["step"])
        except OSError as error:
            warnings.warn(f"no more metrics are written: {error}", stacklevel=4)
            self.close()

    def close(self) -> None:
        """Close the files; may be called twice."""
        for each in (self._file, self._board):
            if each is not None:
                with contextlib.suppress(OSError):  # what is lost then was told when it was written
                    each.close()
        self._file = self._board = None


def _opened(path: str | os.PathLike[str]) -> Any:
    """Open a file of metrics, to go on with it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"metrics cannot be written to {os.fspath(path)!r}: {error}") from None
    file.seek(0)
    begin = file.read(len(_BEGIN))
    if not _BEGIN.startswith(begin):
        file.close()
        raise ValueError(f"{os.fspath(path)!r} is no file of metrics: give another path")
    if begin:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":  # a run was killed here
            file.write(b"\n")
    return file


_BEGIN = b'{"kind": "header"'


def _board(folder: str | os.PathLike[str]) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise OSError(
            "tensorboard= needs the package tensorboardX: pip install 'hvdx[metrics]'"
        ) from None
    try:
        return SummaryWriter(os.fspath(folder))
    except OSError as error:
        told = f"TensorBoard's files cannot be written to {os.fspath(folder)!r}: {error}"
        raise OSError(told) from None


def scalars(kind: str, told: dict[str, Any]) -> dict[str, float]:
    """Return what TensorBoard shows of a line: values, and the means of measures, by name."""
    if kind not in ("interval", "evaluation"):
        return {}
    group = "evaluation" if kind == "evaluation" else "train"
    found = {f"{group}/{name}": value for name, value in told["values"].items()}
    for name, value in told.items():
        if isinstance(value, dict) and "mean" in value:
            found[f"job/{name}"] = value["mean"]
    if "samples_per_second" in told:
        found["job/samples_per_second"] = told["samples_per_second"]
    return {name: value for name, value in found.items() if value is not None}


def line(kind: str, told: dict[str, Any], unit: str = "samples", ranks: int = 1) -> str:
    """Return a line for people."""
    parts = [f"step {told['step']}"]
    if kind == "target":
        return f"{parts[0]}  {told['target']} reached after {told['seconds']:.1f} s of training"
    for name, value in told["values"].items():
        parts.append(f"{name} {'not finite' if value is None else format(value, '.4f')}")
    if kind == "evaluation":
        return "  ".join([parts[0], "evaluation:", *parts[1:]])
    parts.append(f"{told['samples_per_second']:,.0f} {unit}/s on {ranks} rank{'s' * (ranks != 1)}")
    for name in ("communication", "bubble"):
        if name in told:
            parts.append(f"{name} {told[name]['mean']:.1%}")
    if "megabytes_per_step" in told:
        parts.append(f"sent {told['megabytes_per_step']['mean']:.3g} MB/step")
    parts.append(f"{told['cpu']['mean']:.2f} cores")
    if "gpu" in told:
        parts.append(f"GPU {told['gpu']['mean']:.0%}")
    parts.append(f"{told['memory_mb']['max']:,.0f} MB")
    return "  ".join(parts)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a file.

    Half a line is skipped where a run was killed: at the end of the file, or before the header of
    the next run.

    Raises:
        OSError: the file cannot be read.
        ValueError: another line is none of metrics; the message has its number.
    """
    found: list[dict[str, Any]] = []
    torn = ""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                told = _checked(text)
            except ValueError as error:
                if torn:
                    raise ValueError(torn) from None
                torn = f"{os.fspath(path)!r}, line {number}: {error}"
                continue
            if torn and told["kind"] != "header":
                raise ValueError(torn)
            torn = ""
            found.append(told)
    if torn and text.endswith("\n"):  # whole, and yet no line of metrics
        raise ValueError(torn)
    if not found or found[0]["kind"] != "header":
        raise ValueError(f"{os.fspath(path)!r} does not begin with the header of a run")
    return found


def _checked(text: str) -> dict[str, Any]:
    """Return a line's object.

    Raises:
        ValueError: it is none, or lacks what lines of its kind have.
    """
    try:
        told = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(told, dict) or told.get("kind") not in KINDS:
        raise ValueError(f"no object whose kind is one of {', '.join(KINDS)}")
    if told["kind"] == "header":
        if told.get("format") != FORMAT:
            raise ValueError(f"format {told.get('format')!r}, but this hvdx reads {FORMAT}")
        wanted: dict[str, Any] = {"ranks": int}
    else:
        wanted = {"step": int, "seconds": (int, float)}
    if told["kind"] in ("interval", "evaluation"):
        wanted["values"] = dict
    for name, kind in wanted.items():
        if not isinstance(told.get(name), kind):
            raise ValueError(f"a {told['kind']} without {name}")
    return told
