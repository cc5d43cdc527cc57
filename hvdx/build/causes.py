"""Reads a failed build's log and says what happened and what to do.

One table, first match wins: what stops everything (a full disk, no memory) comes before what it
may drag along.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hvdx.build import edits


class Cause(NamedTuple):
    """A way for a build to fail, recognised by ``pattern``; groups of it may fill the texts."""

    pattern: str
    cause: str
    remedy: str


APT = "Debian, Ubuntu: apt-get install"

CAUSES = (
    Cause(
        r"No space left on device",
        "the disk is full",
        "Free about 1 GB in the temporary folder (TMPDIR names another) and in the cache.",
    ),
    Cause(
        r"Killed signal terminated program (?:cc1plus|ptxas|cicc)|virtual memory exhausted"
        r"|std::bad_alloc|cannot allocate memory",
        "the compiler ran out of memory",
        "Compile fewer files at once: hvdx install --jobs 1. Each job needs up to 2 GB.",
    ),
    Cause(
        r"Temporary failure in name resolution|Failed to establish a new connection"
        r"|Name or service not known|Network is unreachable|Connection refused"
        r"|ConnectTimeoutError|Read timed out|ProxyError",
        "the package index could not be reached",
        "Check the network, a proxy (HTTPS_PROXY) or pip's index settings; or put "
        f"horovod-{edits.HOROVOD}.tar.gz in the cache's sdist folder yourself.",
    ),
    Cause(
        r"No matching distribution found for horovod"
        r"|Could not find a version that satisfies the requirement horovod",
        f"the package index has no source of Horovod {edits.HOROVOD}, or did not answer",
        "Check the network, or use an index that carries it (PIP_INDEX_URL); or put "
        f"horovod-{edits.HOROVOD}.tar.gz in the cache's sdist folder yourself.",
    ),
    Cause(
        r"THESE PACKAGES DO NOT MATCH THE HASHES",
        "the downloaded source is not what was published",
        "Try again; if it stays, ask who runs your package index.",
    ),
    Cause(
        r"No module named '?(setuptools|wheel|packaging|pip)'?|No module named (pip)\b",
        "the Python package {0} is missing",
        "Install it: pip install 'hvdx[build]' (without pip: python -m ensurepip).",
    ),
    Cause(
        r"invalid command 'bdist_wheel'",
        "setuptools is too old to build a wheel",
        "Run: pip install --upgrade setuptools wheel.",
    ),
    Cause(
        r"CMake (\S+) or higher is required\.\s+You are running version (\S+)",
        "CMake {1} is too old: {0} is needed",
        "Run: pip install --upgrade cmake.",
    ),
    Cause(
        r"Compatibility with CMake < (\S+) has been removed",
        "this CMake no longer reads files written for CMake < {0}, and Gloo's are",
        "Set CMAKE_POLICY_VERSION_MINIMUM=3.5, or run: pip install 'cmake<4'.",
    ),
    Cause(
        r"unable to find a build program corresponding to|CMAKE_MAKE_PROGRAM is not set",
        "make is missing",
        f"Install it ({APT} make).",
    ),
    Cause(
        r"No CMAKE_(?:C|CXX|CUDA)_COMPILER could be found"
        r"|is not a full path to an existing compiler tool"
        r"|is not able to compile a simple test program"
        r"|No such file or directory: '(?:gcc|g\+\+|c\+\+|cc)'"
        r"|command '(?:gcc|g\+\+|c\+\+|cc)' failed: No such file",
        "there is no working C or C++ compiler",
        f"Install one ({APT} gcc g++), or correct the environment variables CC and CXX.",
    ),
    Cause(
        r"unrecognized command[- ]line option \W?(-std=[\w+]+)"
        r"|invalid value '(c\+\+\d+)' in '-std"
        r"|CMake\s+does not know the compile flags to use to enable it",
        "the compiler is too old for the C++ standard of these frameworks",
        "GCC 10 or Clang 12 is the least; name a newer one in CXX.",
    ),
    Cause(
        r"Python\.h: No such file or directory|'Python\.h' file not found",
        "Python's headers are missing",
        f"Install them ({APT} python3-dev), or use a Python that ships them.",
    ),
    Cause(
        r"Could NOT find NCCL",
        "NCCL was not found",
        "Install pip's nvidia-nccl-cu12 or -cu13, or name its folder in HOROVOD_NCCL_HOME.",
    ),
    Cause(
        r"GPU support was requested but this PyTorch installation does not support CUDA",
        "torch was built without CUDA, or torch finds no CUDA toolkit",
        "Install a torch for CUDA, name the toolkit in CUDA_HOME, or use --gpu none.",
    ),
    Cause(
        r"detected CUDA version \(([\d.]+)\) mismatches the version that was used to compile"
        r"\s+PyTorch \(([\d.]+)\)",
        "the toolkit is CUDA {0}, but torch was built for CUDA {1}",
        "Name a matching toolkit in HOROVOD_CUDA_HOME and CUDA_HOME, or change torch.",
    ),
    Cause(
        r"(CUDA driver version is insufficient for CUDA runtime version)"
        r"|The (NVIDIA driver on your system is too old)",
        "the driver is older than this CUDA needs ({0})",
        "Update NVIDIA's driver (580 for CUDA 13, 525 for CUDA 12), or install a torch for an "
        "older CUDA.",
    ),
    Cause(
        r"no kernel image is available for execution on the device",
        "nothing was compiled for this GPU's compute capability",
        "Of torch: install a release for this GPU. Of Horovod: hvdx install --force --cuda-arch "
        "with it (nvidia-smi --query-gpu=compute_cap --format=csv).",
    ),
    Cause(
        r"Unsupported gpu architecture '?(\w+)'?",
        "this CUDA toolkit cannot compile for {0}",
        "Give what it can with --cuda-arch (nvcc --list-gpu-arch), or change the toolkit.",
    ),
    Cause(
        r"Could NOT find CUDAToolkit|nvcc: (?:command )?not found|Cannot find `nvcc`"
        r"|cuda_runtime\.h: No such file",
        "the CUDA toolkit is missing or incomplete",
        "Install it, name its folder in HOROVOD_CUDA_HOME, or use --gpu none.",
    ),
    Cause(
        r"Could NOT find MPI(?:_CXX)?",
        "MPI was asked for, but its compiler wrapper or headers do not work",
        f"Install it ({APT} libopenmpi-dev openmpi-bin), or use --mpi off.",
    ),
    Cause(
        r"Could NOT find (Pytorch|Tensorflow)",
        "{0} is installed but cannot be imported",
        "Try it: python -c 'import torch' or 'import tensorflow'; mend or reinstall it.",
    ),
    Cause(
        r"[Yy]ou need C\+\+(\d+) to compile|C\+\+(\d+) or later compatible compiler is required",
        "the framework's headers need C++{0}",
        "This version was never tried with hvdx; install one that was (see docs/install.md).",
    ),
    Cause(
        r"undefined symbol: \S*AsGpuStreamValue",
        "TensorFlow no longer exports what Horovod's GPU operations call (AsGpuStreamValue)",
        "Build for torch alone, --frameworks torch, or for both without NCCL, --gpu none.",
    ),
    Cause(
        r"undefined symbol: (\S+)",
        "Horovod was built against another framework or compiler: the symbol {0} is missing",
        "Build again with the frameworks now installed: hvdx install --force.",
    ),
    Cause(
        r"externally-managed-environment",
        "this Python belongs to the system, which lets pip install nothing into it",
        "Use a virtual environment: python3 -m venv .venv.",
    ),
    Cause(
        r"Read-only file system|Permission denied",
        "a folder cannot be written",
        "The log names it. Use a virtual environment of your own, or set TMPDIR.",
    ),
)


def explain(log: str) -> Cause | None:
    """Return what the log tells, its texts filled in; None if nothing in it is known."""
    for cause in CAUSES:
        if found := re.search(cause.pattern, log):
            words = [group for group in found.groups() if group]
            return cause._replace(
                cause=cause.cause.format(*words)
                if words or "{" not in cause.cause
                else re.sub(r"\{\d\}", "(unknown)", cause.cause)
            )
    return None


def excerpt(log: str, lines: int = 6) -> str:
    """Return the lines that matter most: the first errors, else the end."""
    all_lines = [line.strip() for line in log.splitlines() if line.strip()]
    # "error:" of compilers, "CMake Error", "ERROR:" of pip, which repeats what came before.
    errors = [
        i
        for i, line in enumerate(all_lines)
        if re.search(r"\berror:|CMake Error|undefined reference", line)
        and not line.startswith("ERROR:")
    ]
    start = errors[0] if errors else max(0, len(all_lines) - lines)
    return "\n".join(f"  | {line[:200]}" for line in all_lines[start : start + lines])
