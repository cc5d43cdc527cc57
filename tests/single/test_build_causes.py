"""hvdx.build.causes: lines that compilers, CMake and pip really print."""

import pytest

from hvdx.build.causes import excerpt, explain

LINES = [
    (
        "/usr/bin/ld: final link failed: No space left on device",
        "disk is full",
        "TMPDIR",
    ),
    (
        "c++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.",
        "out of memory",
        "--jobs 1",
    ),
    (
        "WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) "
        "after connection broken by 'NewConnectionError('<pip._vendor.urllib3.connection."
        "HTTPSConnection object at 0x7f>: Failed to establish a new connection: [Errno -3] "
        "Temporary failure in name resolution')': /simple/horovod/\n"
        "ERROR: No matching distribution found for horovod==0.28.1",
        "could not be reached",
        "proxy",
    ),
    (
        "ERROR: Could not find a version that satisfies the requirement horovod==0.28.1 "
        "(from versions: none)\nERROR: No matching distribution found for horovod==0.28.1",
        "no source of Horovod 0.28.1",
        "PIP_INDEX_URL",
    ),
    (
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
        "not what was published",
        "Try again",
    ),
    (
        "ModuleNotFoundError: No module named 'packaging'",
        "package packaging is missing",
        "hvdx[build]",
    ),
    ("/v/bin/python: No module named pip", "package pip is missing", "ensurepip"),
    ("error: invalid command 'bdist_wheel'", "too old to build a wheel", "upgrade setuptools"),
    (
        "CMake Error at CMakeLists.txt:1 (cmake_minimum_required):\n"
        "  CMake 3.13 or higher is required.  You are running version 3.10.2",
        "CMake 3.10.2 is too old: 3.13 is needed",
        "pip install --upgrade cmake",
    ),
    (
        "CMake Error at third_party/gloo/CMakeLists.txt:1 (cmake_minimum_required):\n"
        "  Compatibility with CMake < 3.5 has been removed from CMake.",
        "no longer reads files written for CMake < 3.5",
        "CMAKE_POLICY_VERSION_MINIMUM=3.5",
    ),
    (
        "CMake Error: CMake was unable to find a build program corresponding to "
        '"Unix Makefiles".  CMAKE_MAKE_PROGRAM is not set.',
        "make is missing",
        "apt-get install make",
    ),
    (
        "CMake Error at CMakeLists.txt:16 (project):\n  No CMAKE_CXX_COMPILER could be found.",
        "no working C or C++ compiler",
        "g++",
    ),
    (
        "CMake Error at CMakeTestCXXCompiler.cmake:62 (message):\n  The C++ compiler\n\n    "
        '"/bin/false"\n\n  is not able to compile a simple test program.',
        "no working C or C++ compiler",
        "CXX",
    ),
    (
        "g++: error: unrecognized command line option '-std=c++20'; did you mean '-std=c++2a'?",
        "too old for the C++ standard",
        "GCC 10",
    ),
    (
        "c++: error: unrecognized command-line option \N{LEFT SINGLE QUOTATION MARK}-std=c++20"
        "\N{RIGHT SINGLE QUOTATION MARK}",
        "too old for the C++ standard",
        "GCC 10",
    ),
    (
        "torch/csrc/python_headers.h:12:10: fatal error: Python.h: No such file or directory",
        "Python's headers are missing",
        "python3-dev",
    ),
    (
        "CMake Error at FindPackageHandleStandardArgs.cmake:230 (message):\n"
        "  Could NOT find NCCL (missing: NCCL_LIBRARY)",
        "NCCL was not found",
        "HOROVOD_NCCL_HOME",
    ),
    (
        "CMake Error at horovod/torch/CMakeLists.txt:22 (message):\n  Horovod build with GPU "
        "support was requested but this PyTorch installation does not support CUDA.",
        "torch was built without CUDA",
        "--gpu none",
    ),
    (
        "RuntimeError: The detected CUDA version (12.4) mismatches the version that was used to "
        "compile\nPyTorch (13.0). Please make sure to use the same CUDA versions.",
        "the toolkit is CUDA 12.4, but torch was built for CUDA 13.0",
        "HOROVOD_CUDA_HOME",
    ),
    (
        "RuntimeError: CUDA driver version is insufficient for CUDA runtime version",
        "the driver is older than this CUDA needs",
        "580 for CUDA 13",
    ),
    (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the "
        "device",
        "nothing was compiled for this GPU",
        "--cuda-arch",
    ),
    (
        "ImportError: mpi_lib.so: undefined symbol: _ZN15stream_executor3gpu16AsGpuStreamValueEP",
        "TensorFlow no longer exports",
        "--frameworks torch",
    ),
    (
        "nvcc fatal   : Unsupported gpu architecture 'compute_70'",
        "cannot compile for compute_70",
        "--cuda-arch",
    ),
    (
        "-- Could NOT find CUDAToolkit (missing: CUDAToolkit_INCLUDE_DIR)",
        "CUDA toolkit is missing",
        "HOROVOD_CUDA_HOME",
    ),
    (
        "CMake Error: Could NOT find MPI_CXX (missing: MPI_CXX_WORKS)",
        "MPI was asked for",
        "--mpi off",
    ),
    (
        "CMake Error: Could NOT find Pytorch (missing: Pytorch_VERSION)",
        "Pytorch is installed but cannot be imported",
        "import torch",
    ),
    (
        "c10/util/C++17.h:13:2: error: #error You need C++17 to compile PyTorch",
        "need C++17",
        "never tried",
    ),
    (
        "ImportError: mpi_lib_v2.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c105Error",
        "_ZN3c105Error is missing",
        "hvdx install --force",
    ),
    (
        "error: externally-managed-environment\n\nx This environment is externally managed",
        "belongs to the system",
        "python3 -m venv",
    ),
    (
        "error: could not create 'build': Permission denied",
        "cannot be written",
        "virtual environment",
    ),
]


@pytest.mark.parametrize(("log", "cause", "remedy"), LINES)
def test_known_failures(log, cause, remedy):
    found = explain(f"-- Configuring\n{log}\nmake: *** [all] Error 2\n")
    assert found is not None
    assert cause in found.cause
    assert remedy in found.remedy
    assert "{" not in found.cause + found.remedy


def test_a_full_disk_is_told_before_what_it_drags_along():
    log = "c++: fatal error: Python.h: No such file or directory\nNo space left on device"
    assert "disk" in explain(log).cause


def test_the_log_of_a_successful_build_tells_nothing():
    log = (
        "-- Could not find CCache. Consider installing CCache to speed up compilation.\n"
        "-- Could NOT find NVTX (missing: NVTX_INCLUDE_DIR)\n[ 42%] Building CXX object\n"
    )
    assert explain(log) is None


def test_excerpt_starts_at_the_first_error_not_at_pips_repetition():
    log = "ERROR: Command errored out\n[ 3%] x\na.cc:1: error: first\n" + "more\n" * 20
    lines = excerpt(log).splitlines()
    assert lines[0] == "  | a.cc:1: error: first"
    assert len(lines) == 6


def test_excerpt_of_a_log_without_errors_is_its_end():
    assert excerpt("\n".join(str(i) for i in range(20)), lines=2) == "  | 18\n  | 19"
