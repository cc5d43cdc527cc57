"""hvdx.build.probe: real little programs and folders, found or not."""

import os
import stat
import subprocess
import sys

import pytest

from hvdx.build import probe


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Put shell scripts on an otherwise empty PATH: ``programs(nvcc="echo ...")``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(probe.sysconfig, "get_path", lambda _: str(folder))
    for name in ("CXX", "CUDA_HOME", "HOROVOD_CUDA_HOME", "HOROVOD_CMAKE"):
        monkeypatch.delenv(name, raising=False)

    def make(**scripts):
        for name, script in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


def test_nothing_installed(programs):
    assert probe.compiler() is None
    assert probe.cmake() is None
    assert probe.mpi() is None
    assert probe.gpus() == []


def test_compiler_of_the_environment_wins(programs, monkeypatch):
    programs(mine="echo my compiler 1.0", **{"c++": "echo c++ 12.2.0"})
    assert probe.compiler().version == "c++ 12.2.0"
    monkeypatch.setenv("CXX", "mine -O1")
    assert probe.compiler().version == "my compiler 1.0"


def test_compiler_that_fails_has_no_version(programs):
    programs(**{"g++": "exit 1"})
    assert probe.compiler().version is None


def test_cmake(programs):
    programs(cmake="echo cmake version 4.1.0-rc1")
    assert probe.cmake().version == "4.1.0"


def test_nvcc_named_by_its_folder(programs, monkeypatch, tmp_path):
    programs(nvcc="echo Cuda compilation tools, release 13.0, V13.0.88")
    assert probe.nvcc().version == "13.0"
    home = tmp_path / "cuda-12"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho release 12.4, V12.4.1\n")
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("HOROVOD_CUDA_HOME", str(home))
    assert probe.nvcc() == (f"{home}/bin/nvcc", "12.4")


def test_toolkit_folder_behind_a_script(programs, tmp_path):
    """/usr/local/bin/nvcc that calls another: its own place is not the toolkit's."""
    programs(nvcc=f"echo '#$ TOP={tmp_path}/cuda-13.0/bin/..' >&2")
    assert probe.cuda_home(f"{tmp_path}/bin/nvcc") == f"{tmp_path}/cuda-13.0"
    programs(nvcc="exit 1")
    assert probe.cuda_home(f"{tmp_path}/bin/nvcc") == str(tmp_path)


def test_gpus(programs):
    programs(**{"nvidia-smi": "echo NVIDIA H200, 9.0, 580.95.05; echo NVIDIA A100, 8.0, 580.95.05"})
    assert probe.gpus() == [
        ("NVIDIA H200", "90", "580.95.05"),
        ("NVIDIA A100", "80", "580.95.05"),
    ]


def test_driver_without_gpu(programs):
    programs(**{"nvidia-smi": "echo No devices were found; exit 6"})
    assert probe.gpus() == []


def test_mpi_needs_its_header(programs, tmp_path):
    programs(mpicxx=f"echo g++ -I{tmp_path}/include -lmpi", mpirun="echo 'mpirun (Open MPI) 4.1.4'")
    assert probe.mpi() is None
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "mpi.h").touch()
    assert probe.mpi().version == "mpirun (Open MPI) 4.1.4"


def test_nccl_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("HOROVOD_NCCL_HOME", str(tmp_path))
    (tmp_path / "include").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libnccl.so.2").touch()
    assert probe.nccl() is None  # as long as there is no header
    lines = "#define NCCL_MAJOR 2\n#define NCCL_MINOR 28\n#define NCCL_PATCH 9\n"
    (tmp_path / "include" / "nccl.h").write_text(lines)
    found = probe.nccl()
    assert found.library == tmp_path / "lib" / "libnccl.so.2"
    assert found.version == "2.28.9"


@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_frameworks_as_they_name_themselves(name):
    pytest.importorskip(name)
    code = f"import {name}; print({name}.__version__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = probe.framework(name)
    assert found.version == told.stdout.strip()
    assert len(found.build) == 12


def test_torch_version_is_read_not_run(tmp_path):
    path = tmp_path / "version.py"
    path.write_text(
        "from typing import Optional\n__version__ = '2.11.0+cu130'\ndebug = False\n"
        "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\nraise SystemExit\n"
    )
    values = probe._torch_version(path)
    assert values["__version__"] == "2.11.0+cu130"
    assert values["cuda"] == "13.0"
    assert values["hip"] is None
    assert probe._torch_version(tmp_path / "absent") == {}


def test_probing_loads_no_framework():
    code = (
        "import sys; from hvdx.build import probe, target; import hvdx.doctor, hvdx.build.install\n"
        "probe.framework('torch'); probe.framework('tensorflow')\n"
        "print({'torch', 'tensorflow', 'keras', 'horovod'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_processor_flags(monkeypatch):
    monkeypatch.setenv("HOROVOD_BUILD_ARCH_FLAGS", "-march=x86-64-v2")
    assert probe.cpu_flags() == "-march=x86-64-v2"
    monkeypatch.delenv("HOROVOD_BUILD_ARCH_FLAGS")
    assert set(probe.cpu_flags().split()) <= {"-mf16c", "-mavx", "-mfma"}


def test_scripts_of_this_python_come_first():
    first = probe.environment()["PATH"].split(os.pathsep)[0]
    assert first == probe.sysconfig.get_path("scripts")


def test_nccl_of_the_cuda_that_torch_was_built_for(monkeypatch, tmp_path):
    for version, release in (("12", "21"), ("13", "28")):
        root = tmp_path / version / "nvidia" / "nccl"
        (root / "include").mkdir(parents=True)
        (root / "lib").mkdir()
        lines = f"#define NCCL_MAJOR 2\n#define NCCL_MINOR {release}\n#define NCCL_PATCH 1\n"
        (root / "include" / "nccl.h").write_text(lines)
        (root / "lib" / "libnccl.so.2").touch()

    class Distribution:
        def __init__(self, name):
            self.root = tmp_path / name.removeprefix("nvidia-nccl-cu")

        def locate_file(self, path):
            return self.root / path

    monkeypatch.setattr(probe.metadata, "distribution", Distribution)
    for name in ("HOME", "INCLUDE", "LIB"):
        monkeypatch.delenv(f"HOROVOD_NCCL_{name}", raising=False)
    assert probe.nccl("12.8").version == "2.21.1"
    assert probe.nccl("13.0").version == probe.nccl().version == "2.28.1"


def test_architectures(programs):
    programs(nvcc="echo compute_75; echo compute_90; echo compute_120")
    assert probe.architectures("nvcc") == {"75", "90", "120"}
    programs(nvcc="exit 1")
    assert probe.architectures("nvcc") == set()
