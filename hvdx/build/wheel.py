"""From Horovod's sdist to a wheel: fetch, unpack, edit, compile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO

import psutil

from hvdx.build import cache, causes, edits, probe
from hvdx.build.progress import Progress
from hvdx.build.target import Target, numbers
from hvdx.errors import InstallError

SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
JOB_BYTES = 2 << 30  # what one compiler process may need
DISK_BYTES = 1 << 30  # the build tree with both frameworks takes 0.6 GB


def build(target: Target, key: str, *, jobs: int | None, show: Progress, work: Path) -> Path:
    """Build Horovod for ``target`` in the folder ``work`` and return the wheel's path.

    Raises:
        InstallError: it failed; the message holds cause, remedy and log file.
    """
    _check_tools()
    _check_space(work)
    with log_file(key) as log:
        show.stage(f"Fetching the source of Horovod {edits.HOROVOD}")
        tree = _unpack(_fetch(log, show), work)
        edits.apply(tree, edits.chosen(target.names), standard=target.standard)
        show.stage(f"Compiling Horovod {edits.HOROVOD} for {target}")
        command = ["pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation"]
        command += ["--no-cache-dir", "--wheel-dir", str(work / "wheel"), str(tree)]
        environment = _environment(target, key, jobs or default_jobs(), work)
        code = run([sys.executable, "-m", *command], log, show.line, environment, cwd=work)
        wheels = list((work / "wheel").glob("horovod-*.whl"))
        if code or len(wheels) != 1:
            raise failure("building Horovod failed", Path(log.name))
        return wheels[0]


def default_jobs() -> int:
    """Return how many compilers run at once: one per core, fewer where memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, psutil.virtual_memory().available // JOB_BYTES))


@contextlib.contextmanager
def log_file(key: str) -> Iterator[IO[str]]:
    """Open the log of the build of ``key``; the last build's is overwritten."""
    with (cache.folder("logs") / f"{key}.log").open("w", encoding="utf-8") as log:
        yield log


def run(
    command: list[str],
    log: IO[str],
    on_line: Callable[[str], None],
    environment: dict[str, str],
    cwd: Path,
) -> int:
    """Run ``command``, its output going to ``log`` and line by line to ``on_line``.

    It gets a process group of its own, which dies with this call: an interrupted ``pip`` would
    otherwise leave its compilers running.
    """
    log.write("$ " + " ".join(command) + "\n")
    log.flush()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            on_line(line.rstrip())
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def failure(what: str, log: Path) -> InstallError:
    """Return the error for a step that left its trace in ``log``."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if found := causes.explain(text):
        return InstallError(
            f"{what}: {found.cause}.\n{found.remedy}\n{causes.excerpt(text)}\nLog: {log}"
        )
    return InstallError(
        f"{what}, for a reason that hvdx does not know.\n{causes.excerpt(text)}\n"
        f"Log: {log}. Please report it together with that file."
    )


def _check_tools() -> None:
    for package in ("pip", "setuptools"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise InstallError(
                f"the Python package {package} is not installed in {sys.prefix}. Install it: "
                f"pip install 'hvdx[build]' (pip itself: python -m ensurepip)."
            ) from None
        if package == "setuptools" and numbers(version) < (70, 1):
            try:
                metadata.version("wheel")
            except metadata.PackageNotFoundError:
                raise InstallError(
                    f"setuptools {version} cannot build wheels on its own. Install "
                    f"what it needs: pip install 'hvdx[build]'."
                ) from None
    cmake = probe.cmake()
    if cmake is None or cmake.version is None:
        raise InstallError(
            f"{f'{cmake.path} is no working CMake' if cmake else 'CMake is not installed'}. Get "
            f"it with: pip install 'hvdx[build]' (or Debian, Ubuntu: apt-get install cmake)."
        )
    if probe.which("make") is None:
        raise InstallError("make is not installed (Debian, Ubuntu: apt-get install make).")


def _check_space(work: Path) -> None:
    free = shutil.disk_usage(work).free
    if free < DISK_BYTES:
        raise InstallError(
            f"{free / 1e9:.1f} GB free in {work.parent}, but the build needs "
            f"{DISK_BYTES / 1e9:.1f} GB. Free some, or name another folder in TMPDIR."
        )


def _fetch(log: IO[str], show: Progress) -> Path:
    """Return Horovod's sdist, downloaded with pip unless the cache has it."""
    sdist = cache.folder("sdist") / f"horovod-{edits.HOROVOD}.tar.gz"
    if sdist.is_file() and cache.checksum(sdist) == SHA256:
        return sdist
    with tempfile.TemporaryDirectory(prefix=".new-", dir=sdist.parent) as place:
        wanted = Path(place, "requirements.txt")
        wanted.write_text(f"horovod=={edits.HOROVOD} --hash=sha256:{SHA256}\n", encoding="utf-8")
        command = ["pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        command += ["--dest", place, "--requirement", str(wanted)]
        environment = probe.environment()
        code = run([sys.executable, "-m", *command], log, show.line, environment, Path(place))
        if code:
            raise failure(f"fetching Horovod {edits.HOROVOD} failed", Path(log.name))
        Path(place, sdist.name).replace(sdist)
    return sdist


def _unpack(sdist: Path, work: Path) -> Path:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(work, filter="data")
        else:  # before 3.10.12 and 3.11.4; the checksum says whose archive this is
            archive.extractall(work)
    return work / f"horovod-{edits.HOROVOD}"


def _environment(target: Target, key: str, jobs: int, work: Path) -> dict[str, str]:
    """Return the variables that steer Horovod's build; what shapes it is in the target."""
    environment = probe.environment()
    cmake = probe.cmake()
    includes = [f"-include {header}" for header in edits.INCLUDES]
    settings = {
        "HOROVOD_LOCAL_VERSION": f"hvdx.{key}",
        "HOROVOD_CMAKE": cmake.path if cmake else "cmake",
        "HOROVOD_BUILD_ARCH_FLAGS": target.cpu or " ",  # empty would mean "ask gcc"
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        f"HOROVOD_{'WITH' if target.mpi else 'WITHOUT'}_MPI": "1",
        f"HOROVOD_{'WITH' if 'torch' in target.names else 'WITHOUT'}_PYTORCH": "1",
        f"HOROVOD_{'WITH' if 'tensorflow' in target.names else 'WITHOUT'}_TENSORFLOW": "1",
        "MAKEFLAGS": f"-j{jobs}",
        "CMAKE_GENERATOR": "Unix Makefiles",  # Horovod passes make's arguments
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Gloo's file asks for 2.8.12; CMake 4 refuses
        "CXXFLAGS": " ".join([environment.get("CXXFLAGS", ""), *includes]).strip(),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for name in list(environment):
        if name.startswith(("HOROVOD_WITH", "HOROVOD_GPU", "HOROVOD_NCCL")):
            del environment[name]
    if target.cuda:
        settings |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_INCLUDE": str(target.cuda.nccl.include),
            "HOROVOD_NCCL_LIB": str(_nccl_link(target.cuda.nccl.library, work)),
            "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_BUILD_CUDA_CC_LIST": ",".join(target.cuda.arch),
        }
    if target.toolkit:
        home = probe.cuda_home(target.toolkit.path)
        settings |= {"HOROVOD_CUDA_HOME": home, "CUDA_HOME": home}
    return environment | settings


def _nccl_link(library: Path, work: Path) -> Path:
    """Return a folder with libnccl.so: pip ships libnccl.so.2, which no linker looks for."""
    folder = work / "nccl"
    folder.mkdir()
    (folder / "libnccl.so").symlink_to(library)
    return folder
