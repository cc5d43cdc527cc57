"""What a build is for: everything that shapes the wheel, and the key made of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
from typing import NamedTuple

from hvdx.build import edits, probe
from hvdx.errors import InstallError

# Variables that Horovod's build, CMake or the compiler read. What a user sets shapes the wheel.
SHAPING = (
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "CUDAFLAGS",
    "LDFLAGS",
    "CMAKE_ARGS",
    "NVCC_APPEND_FLAGS",
    "HOROVOD_ALLOW_MIXED_GPU_IMPL",
    "HOROVOD_CPU_OPERATIONS",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_DEBUG",
    "HOROVOD_WITHOUT_NVTX",
    "HOROVOD_WITH_NVTX",
)


class Options(NamedTuple):
    """What the user asked for on the command line."""

    frameworks: tuple[str, ...] = ()  # () means all that are installed
    mpi: str = "auto"  # "auto", "on" or "off"
    gpu: str = "auto"  # "auto", "nccl" or "none"
    cuda_arch: tuple[str, ...] = ()  # () means those of the GPUs present
    untested: bool = False


class Cuda(NamedTuple):
    """The CUDA part of a build."""

    nvcc: probe.Tool
    arch: tuple[str, ...]
    nccl: probe.Nccl


class Target(NamedTuple):
    """Everything that shapes a wheel."""

    frameworks: tuple[probe.Framework, ...]
    standard: int  # of C++
    compiler: probe.Tool
    mpi: probe.Mpi | None
    cuda: Cuda | None
    toolkit: probe.Tool | None  # used without NCCL, too, where torch was built for CUDA
    cpu: str

    @property
    def names(self) -> set[str]:
        """The frameworks' names."""
        return {framework.name for framework in self.frameworks}

    def parts(self) -> dict[str, object]:
        """Return what the key is made of, fit to be printed and saved as JSON."""
        return {
            "horovod": edits.HOROVOD,
            "edits": edits.digest(),
            "frameworks": [f"{f.name} {f.version} {f.build}" for f in self.frameworks],
            "python": f"{platform.python_implementation()} {sysconfig.get_config_var('SOABI')}",
            "platform": sysconfig.get_platform(),
            "libc": " ".join(platform.libc_ver()),
            "compiler": self.compiler.version,
            "standard": self.standard,
            "cpu": self.cpu,
            "mpi": self.mpi and f"{self.mpi.version}: {self.mpi.flags}",
            "nccl": self.cuda and self.cuda.nccl.version,
            "cuda": self.toolkit and self.toolkit.version,
            "cuda_arch": list(self.cuda.arch) if self.cuda else [],
            "environment": {name: os.environ[name] for name in SHAPING if name in os.environ},
        }

    def key(self) -> str:
        """Return the wheel's name in the cache, and in the installed version's local part."""
        return hashlib.sha256(json.dumps(self.parts(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """Say in one line what is built."""
        frameworks = ", ".join(f"{f.name} {f.version}" for f in self.frameworks)
        controllers = "Gloo and MPI" if self.mpi else "Gloo"
        gpu = (
            f", NCCL {self.cuda.nccl.version} for CUDA {self.toolkit.version}"
            if (self.cuda and self.toolkit)
            else ""
        )
        return f"{frameworks} with {controllers}{gpu}"


class Tried(NamedTuple):
    """A combination that was built and run; ``note`` qualifies it."""

    framework: str
    version: str
    cuda: str | None
    note: str = ""


TRIED = (
    Tried("torch", "2.13", None),
    Tried("tensorflow", "2.21", None),
    Tried("torch", "2.11", "13.0", "compiled only, never run on a GPU"),
)


def find(options: Options) -> Target:
    """Look at this environment and return what Horovod is to be built for.

    Raises:
        InstallError: something needed is absent, or this combination was never tried.
    """
    frameworks = _frameworks(options.frameworks)
    compiler = probe.compiler()
    if compiler is None:
        raise InstallError(
            "no C++ compiler found. Install one (Debian, Ubuntu: apt-get install g++) or name "
            "yours in the environment variable CXX."
        )
    torch = next((f for f in frameworks if f.name == "torch"), None)
    toolkit = probe.nvcc() if torch and torch.cuda else None
    target = Target(
        frameworks=frameworks,
        standard=_standard(frameworks),
        compiler=compiler,
        mpi=_mpi(options.mpi),
        cuda=_cuda(options, torch, toolkit),
        toolkit=toolkit,
        cpu=probe.cpu_flags(),
    )
    if not options.untested:
        _check_tried(target)
    return target


def _frameworks(wanted: tuple[str, ...]) -> tuple[probe.Framework, ...]:
    if unknown := set(wanted) - set(probe.DISTRIBUTIONS):
        raise InstallError(
            f"unknown framework {', '.join(sorted(unknown))}: hvdx knows torch and tensorflow."
        )
    asked = [name for name in probe.DISTRIBUTIONS if not wanted or name in wanted]
    found = {name: probe.framework(name) for name in asked}
    if absent := [name for name in wanted if found[name] is None]:
        raise InstallError(
            f"{' and '.join(absent)} is not installed in {sys.prefix}. Install it first, or "
            f"leave it out of --frameworks."
        )
    frameworks = tuple(framework for framework in found.values() if framework)
    if not frameworks:
        raise InstallError(
            f"found neither torch nor TensorFlow in {sys.prefix}. Horovod is compiled against "
            f"them, so install one first: pip install 'hvdx[torch]' or 'hvdx[tensorflow]'."
        )
    return frameworks


def _standard(frameworks: tuple[probe.Framework, ...]) -> int:
    since = {"torch": (2, 11), "tensorflow": (2, 21)}
    return 20 if any(numbers(f.version) >= since[f.name] for f in frameworks) else 17


def _mpi(wanted: str) -> probe.Mpi | None:
    if wanted == "off":
        return None
    found = probe.mpi()
    if wanted == "on" and found is None:
        raise InstallError(
            "--mpi on, but no MPI with headers was found (mpicxx and mpi.h). Install one "
            "(Debian, Ubuntu: apt-get install libopenmpi-dev openmpi-bin) or leave --mpi out."
        )
    return found


def _cuda(
    options: Options, torch: probe.Framework | None, toolkit: probe.Tool | None
) -> Cuda | None:
    if options.gpu == "none":
        return None
    gpus = probe.gpus()
    if options.gpu == "auto" and not (torch and torch.cuda and gpus):
        return None
    way_out = "Or build without: --gpu none."
    if torch is None or torch.cuda is None:
        have = f"torch {torch.version} is a CPU build" if torch else "torch is not installed"
        raise InstallError(
            f"--gpu nccl needs a torch built for CUDA, but {have}. Install one. {way_out}"
        )
    if toolkit is None or toolkit.version is None:
        raise InstallError(
            f"no nvcc found for torch {torch.version}. Install the CUDA {torch.cuda} toolkit, or "
            f"name its folder in HOROVOD_CUDA_HOME. {way_out}"
        )
    if numbers(toolkit.version)[0] != numbers(torch.cuda)[0]:
        raise InstallError(
            f"{toolkit.path} is CUDA {toolkit.version}, but torch {torch.version} was built for "
            f"CUDA {torch.cuda}. Name the folder of a CUDA {torch.cuda} toolkit in "
            f"HOROVOD_CUDA_HOME, or install the torch for CUDA {toolkit.version}. {way_out}"
        )
    nccl = probe.nccl(torch.cuda)
    if nccl is None:
        raise InstallError(
            f"NCCL not found (nccl.h and libnccl.so). Install pip's nvidia-nccl-cu"
            f"{numbers(torch.cuda)[0]}, or name its folder in HOROVOD_NCCL_HOME. {way_out}"
        )
    arch = options.cuda_arch or tuple(sorted({gpu.capability for gpu in gpus}, key=int))
    if not arch:
        raise InstallError(
            "no GPU here to take the compute capability from: give it, as in --cuda-arch 80,90."
        )
    known = probe.architectures(toolkit.path)
    if other := [each for each in arch if known and each not in known]:
        raise InstallError(
            f"CUDA {toolkit.version} ({toolkit.path}) does not compile for compute capability "
            f"{', '.join(other)}, but for {', '.join(sorted(known, key=int))}. Name others with "
            f"--cuda-arch, or another toolkit's folder in HOROVOD_CUDA_HOME. {way_out}"
        )
    return Cuda(toolkit, arch, nccl)


def _check_tried(target: Target) -> None:
    for framework in target.frameworks:
        cuda = target.toolkit.version if target.toolkit else None
        series = ".".join(map(str, numbers(framework.version)[:2]))
        if not any(
            (t.framework, t.version, t.cuda) == (framework.name, series, cuda) for t in TRIED
        ):
            what = f"{framework.name} {framework.version}" + (f" with CUDA {cuda}" if cuda else "")
            raise InstallError(
                f"Horovod {edits.HOROVOD} was not tried with {what}. Tried were: {tried()}. "
                f"Install one of these, or go on with --untested: it may well build, and hvdx "
                f"checks that it loads."
            )


def tried() -> str:
    """Return the tried combinations as text."""
    return "; ".join(
        f"{t.framework} {t.version} {f'CUDA {t.cuda}' if t.cuda else 'CPU'}"
        + (f" ({t.note})" if t.note else "")
        for t in TRIED
    )


def numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers: (2, 13, 0) for "2.13.0+cpu"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else (0,)
