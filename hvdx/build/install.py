"""``hvdx install``: have the right Horovod in this environment, building it only if needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

from hvdx.build import cache, edits, probe, wheel
from hvdx.build.progress import Progress
from hvdx.build.target import Options, Target, find
from hvdx.errors import InstallError

VERIFY = """
import json, horovod.runner.launch, horovod.{framework} as hvd
print(json.dumps({{"gloo": bool(hvd.gloo_built()), "mpi": bool(hvd.mpi_built()),
                  "nccl": bool(hvd.nccl_built())}}))
"""


def install(
    options: Options,
    *,
    force: bool = False,
    verbose: bool = False,
    wheel_only: Path | None = None,
    jobs: int | None = None,
) -> None:
    """Build Horovod for this environment, or take the cached wheel, and install it.

    Args:
        options: what to build.
        force: build and install even if a wheel is cached or installed.
        verbose: print the build's output.
        wheel_only: copy the wheel to this folder and install nothing.
        jobs: compilers to run at once; None chooses by cores and memory.

    Raises:
        InstallError: it failed; the message holds cause and remedy.
    """
    started = time.monotonic()
    target = find(options)
    key = target.key()
    with Progress(verbose=verbose) as show:
        if not (force or wheel_only) and is_installed(key):
            show.say(f"Horovod {edits.HOROVOD} for {target} is installed already (build {key}).")
            return
        waiting = f"Another hvdx install is building the same wheel ({key}): waiting for it."
        with cache.locked(key, on_wait=waiting, say=show.say):
            built = _from_cache(key, show) if not force else None
            if built is None:
                built = _build(target, key, jobs, show)
            if wheel_only:
                wheel_only.mkdir(parents=True, exist_ok=True)
                shutil.copy(built, wheel_only)
                show.say(f"Wheel: {wheel_only / built.name}")
                return
            show.stage(f"Installing {built.name}")
            _pip_install(built, key, show)
        show.stage("Checking that it loads")
        verify(target, key)
        show.say(
            f"Horovod {edits.HOROVOD} is installed for {target} "
            f"({time.monotonic() - started:.0f} s). Try it: hvdx doctor"
        )


def is_installed(key: str) -> bool:
    """Tell whether this environment has the whole Horovod of build ``key``."""
    try:
        found = metadata.distribution("horovod")
    except metadata.PackageNotFoundError:
        return False
    # A half-deleted installation has its metadata still.
    return found.version == f"{edits.HOROVOD}+hvdx.{key}" and all(
        Path(str(file.locate())).is_file() for file in found.files or () if file.suffix != ".pyc"
    )


def _from_cache(key: str, show: Progress) -> Path | None:
    entry = cache.find(key)
    if entry is None:
        return None
    if entry.fault:
        show.say(f"The cached wheel {entry.wheel} is unusable, {entry.fault}: building it anew.")
        cache.drop(key)
        return None
    return entry.wheel


def _build(target: Target, key: str, jobs: int | None, show: Progress) -> Path:
    with tempfile.TemporaryDirectory(prefix="hvdx-build-") as folder:
        work = Path(folder)
        built = wheel.build(target, key, jobs=jobs, show=show, work=work)
        show.stage("Checking that it loads")
        with zipfile.ZipFile(built) as archive:
            archive.extractall(work / "site")
        verify(target, key, work / "site")  # what does not load never reaches the cache
        return cache.store(key, built, target.parts())


def _pip_install(built: Path, key: str, show: Progress) -> None:
    # What Horovod requires, hvdx requires too: nothing to resolve, so no network is needed.
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall"]
    command += ["--no-index", str(built)]
    log = cache.folder("logs") / f"{key}-pip.log"
    with log.open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as cwd:
        code = wheel.run(command, file, show.line, probe.environment(), Path(cwd))
    if code:
        raise wheel.failure(f"pip could not install {built}", log)


def verify(target: Target, key: str, site: Path | None = None) -> None:
    """Load Horovod for each framework in a process of its own and see what it can do.

    Args:
        target: what Horovod was built for.
        key: names the log.
        site: a folder with an unpacked wheel; None means the installed one.

    Raises:
        InstallError: it does not load, or lacks what was asked for.
    """
    environment = {**probe.environment(), "TF_CPP_MIN_LOG_LEVEL": "2"}
    if site:
        rest = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *([rest] if rest else [])])
    features: dict[str, bool] = {}
    for framework in target.frameworks:
        what = f"import horovod.{framework.name}"
        with tempfile.TemporaryDirectory() as cwd:  # away from folders that shadow packages
            try:
                done = subprocess.run(
                    [sys.executable, "-c", VERIFY.format(framework=framework.name)],
                    capture_output=True,
                    text=True,
                    env=environment,
                    cwd=cwd,
                    timeout=300,
                )
            except subprocess.TimeoutExpired:
                raise InstallError(f"{what} did not end within 300 s: is the disk slow?") from None
        if done.returncode:
            log = cache.folder("logs") / f"{key}-load.log"
            log.write_text(f"{what}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
            raise wheel.failure(f"Horovod was built, but {what} failed", log)
        features = json.loads(done.stdout.splitlines()[-1])
    wanted = {"gloo": True, "mpi": target.mpi is not None, "nccl": target.cuda is not None}
    if lacking := [name for name, want in wanted.items() if want and not features[name]]:
        raise InstallError(
            f"Horovod was built, but without {', '.join(lacking)}. "
            f"Log: {cache.root() / 'logs' / f'{key}.log'}"
        )
