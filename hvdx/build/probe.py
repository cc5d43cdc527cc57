"""Finds what this machine and this environment have, without importing any framework.

Every probe answers ``None`` or nothing where something is absent; what that means is for the
caller to say.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-rocm"),
}


class Framework(NamedTuple):
    """An installed framework."""

    name: str  # "torch" or "tensorflow"
    version: str  # with its build, as in "2.13.0+cpu"
    build: str  # hash of its shared libraries: equal versions may differ in their ABI
    cuda: str | None  # the CUDA version that torch was built for


class Tool(NamedTuple):
    """A program and the version it reports; ``None`` if it does not run."""

    path: str
    version: str | None


class Mpi(NamedTuple):
    """An MPI with headers: its compiler wrapper, what the wrapper calls, and its version."""

    wrapper: str
    flags: str
    version: str


class Gpu(NamedTuple):
    """A GPU as the driver reports it."""

    name: str
    capability: str  # "90" for compute capability 9.0
    driver: str


class Nccl(NamedTuple):
    """Where NCCL's header and library are."""

    include: Path
    library: Path  # the file; pip ships libnccl.so.2 only
    version: str


def output(*command: str, stderr: bool = False) -> str | None:
    """Return what ``command`` prints, or None if it is absent, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, env=environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stderr if stderr else done.stdout) if done.returncode == 0 else None


def environment() -> dict[str, str]:
    """Return ``os.environ`` with this Python's scripts first on PATH.

    ``.venv/bin/hvdx`` must find ``.venv/bin/cmake`` although nobody activated the environment.
    """
    scripts = sysconfig.get_path("scripts")
    return {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])}


def which(name: str) -> str | None:
    """Return the path of program ``name``, this environment's scripts first."""
    return shutil.which(name, path=environment()["PATH"])


def framework(name: str) -> Framework | None:
    """Return the installed framework called ``name``, or None."""
    for distribution in DISTRIBUTIONS[name]:
        try:
            found = metadata.distribution(distribution)
        except metadata.PackageNotFoundError:
            continue
        version, cuda = found.version, None
        if name == "torch":
            values = _torch_version(Path(str(found.locate_file("torch/version.py"))))
            version, cuda = values.get("__version__") or version, values.get("cuda")
        return Framework(name, version, _libraries(found), cuda)
    return None


def _torch_version(path: Path) -> dict[str, str | None]:
    """Read torch/version.py without running it: its metadata lacks CUDA, and often "+cpu"."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    values: dict[str, str | None] = {}
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value))
            ) if isinstance(value, str | None):
                values[name] = value
    return values


def _libraries(distribution: metadata.Distribution) -> str:
    """Hash the recorded checksums of a package's shared libraries; "" if it has no record."""
    lines = sorted(
        f"{file} {file.hash.value}"
        for file in distribution.files or ()
        if file.hash and re.search(r"\.so(\.|$)|\.dylib$", file.name)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12] if lines else ""


def compiler() -> Tool | None:
    """Return the C++ compiler that CMake would take, or None."""
    for name in [os.environ.get("CXX", "").split(" ")[0] or None, "c++", "g++", "clang++"]:
        if name and (path := which(name)):
            text = output(path, "--version")
            return Tool(path, text.splitlines()[0] if text else None)
    return None


def cmake() -> Tool | None:
    """Return CMake (``HOROVOD_CMAKE`` if set), or None."""
    path = which(os.environ.get("HOROVOD_CMAKE", "cmake"))
    return Tool(path, _search(r"version\s+([\d.]+)", output(path, "--version"))) if path else None


def nvcc() -> Tool | None:
    """Return CUDA's compiler, or None; looked for where Horovod and torch look."""
    homes = [os.environ.get("HOROVOD_CUDA_HOME"), os.environ.get("CUDA_HOME")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home]
    for name in [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if path := which(name):
            return Tool(path, _search(r"release ([\d.]+)", output(path, "--version")))
    return None


def cuda_home(nvcc: str) -> str:
    """Return the toolkit's folder. nvcc itself says where: on PATH it is often a small script."""
    told = _search(r"^#\$ TOP=(.+)$", output(nvcc, "--dryrun", "-x", "cu", os.devnull, stderr=True))
    return str(Path(told or Path(nvcc).resolve().parent.parent).resolve())


def architectures(nvcc: str) -> set[str]:
    """Return the compute capabilities that this nvcc compiles for, as "90"; empty if unknown."""
    return set(re.findall(r"compute_(\d+)\b", output(nvcc, "--list-gpu-arch") or ""))


def gpus() -> list[Gpu]:
    """Return the GPUs that NVIDIA's driver reports."""
    query = "--query-gpu=name,compute_cap,driver_version"
    lines = (output("nvidia-smi", query, "--format=csv,noheader") or "").splitlines()
    found = []
    for line in lines:
        name, capability, driver = (part.strip() for part in line.split(","))
        found.append(Gpu(name, capability.replace(".", ""), driver))
    return found


def mpi() -> Mpi | None:
    """Return the MPI whose headers are installed, or None. ``mpirun`` alone is not enough."""
    for name in ("mpicxx", "mpicc"):
        if wrapper := which(name):
            flags = output(wrapper, "-show") or ""
            folders = [*re.findall(r"-I\s*(\S+)", flags), "/usr/include"]
            if any(Path(folder, "mpi.h").exists() for folder in folders):
                version = (output("mpirun", "--version") or "").strip().splitlines()
                return Mpi(wrapper, flags.strip(), version[0] if version else "unknown version")
    return None


def nccl(cuda: str | None = None) -> Nccl | None:
    """Return NCCL: the folders that Horovod's variables name, pip's package, or the system's.

    Args:
        cuda: the version that torch was built for: pip has a package for each. None: any.
    """
    home = os.environ.get("HOROVOD_NCCL_HOME")
    include = os.environ.get("HOROVOD_NCCL_INCLUDE") or (f"{home}/include" if home else None)
    library = os.environ.get("HOROVOD_NCCL_LIB") or (f"{home}/lib" if home else None)
    places = [(Path(include), Path(library))] if include and library else []
    versions = [cuda.split(".")[0]] if cuda else ["13", "12"]
    for name in [f"nvidia-nccl-cu{version}" for version in versions]:
        try:
            root = Path(str(metadata.distribution(name).locate_file("nvidia/nccl")))
        except metadata.PackageNotFoundError:
            continue
        places.append((root / "include", root / "lib"))
    system = [f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/local/cuda/lib64"]
    places += [(Path("/usr/include"), Path(folder)) for folder in system]
    places.append((Path("/usr/local/cuda/include"), Path("/usr/local/cuda/lib64")))
    for headers, folder in places:
        libraries = [path for path in sorted(folder.glob("libnccl.so*")) if path.exists()]
        if libraries and (header := headers / "nccl.h").is_file():
            return Nccl(headers, libraries[0], _nccl_version(header.read_text(errors="replace")))
    return None


def _nccl_version(header: str) -> str:
    parts = [_search(rf"define\s+NCCL_{part}\s+(\d+)", header) for part in _NCCL_PARTS]
    return ".".join(part or "?" for part in parts)


_NCCL_PARTS = ("MAJOR", "MINOR", "PATCH")


def cpu_flags() -> str:
    """Return the compiler flags for what this processor can do, of those Horovod asks about.

    They are part of a wheel: one built with ``-mavx`` dies on a processor without it.
    """
    if (given := os.environ.get("HOROVOD_BUILD_ARCH_FLAGS")) is not None:
        return given
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    known = (_search(r"^flags\s*:(.*)$", text) or "").split()
    return " ".join(f"-m{flag}" for flag in ("f16c", "avx", "fma") if flag in known)


def _search(pattern: str, text: str | None) -> str | None:
    found = re.search(pattern, text or "", re.MULTILINE)
    return found.group(1) if found else None
