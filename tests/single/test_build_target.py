"""hvdx.build.target: what shapes the key, and which combinations are refused."""

import pytest

from hvdx.build import probe, target
from hvdx.build.probe import Framework, Gpu, Mpi, Nccl, Tool
from hvdx.build.target import Cuda, Options, Target, find, numbers
from hvdx.errors import InstallError

TORCH = Framework("torch", "2.13.0+cpu", "abc", None)
TORCH_CUDA = Framework("torch", "2.11.0+cu130", "def", "13.0")
TF = Framework("tensorflow", "2.21.0", "123", None)
GCC = Tool("/usr/bin/c++", "c++ 12.2.0")
NVCC = Tool("/cuda/bin/nvcc", "13.0")
OPEN_MPI = Mpi("/usr/bin/mpicxx", "g++ -I/usr/include/mpi", "mpirun 4.1.4")


def a_target(**changes):
    base = Target((TORCH, TF), 20, GCC, None, None, None, "-mavx")
    return base._replace(**changes)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set what the probes find: a plain machine, changed by keyword."""
    monkeypatch.setattr(target, "probe", probe)
    for name in ("CXX", "HOROVOD_CUDA_HOME", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)

    def use(frameworks=(TORCH, TF), compiler=GCC, mpi=None, gpus=(), nvcc=None, nccl=None):
        installed = {framework.name: framework for framework in frameworks}
        monkeypatch.setattr(probe, "framework", installed.get)
        monkeypatch.setattr(probe, "compiler", lambda: compiler)
        monkeypatch.setattr(probe, "mpi", lambda: mpi)
        monkeypatch.setattr(probe, "gpus", lambda: list(gpus))
        monkeypatch.setattr(probe, "nvcc", lambda: nvcc)
        monkeypatch.setattr(probe, "nccl", lambda cuda: nccl)
        monkeypatch.setattr(probe, "architectures", lambda path: {"80", "90"})

    return use


@pytest.mark.parametrize(
    "changes",
    [
        {"frameworks": (TORCH,)},
        {"frameworks": (TORCH._replace(version="2.13.1+cpu"), TF)},
        {"frameworks": (TORCH._replace(build="other ABI"), TF)},
        {"standard": 17},
        {"compiler": Tool("/usr/bin/c++", "c++ 13.1.0")},
        {"mpi": OPEN_MPI},
        {"cpu": "-mavx -mfma"},
        {"toolkit": NVCC},
    ],
)
def test_whatever_shapes_the_wheel_changes_the_key(changes):
    assert a_target(**changes).key() != a_target().key()


def test_cuda_architectures_and_nccl_change_the_key(tmp_path):
    nccl = Nccl(tmp_path, tmp_path / "libnccl.so.2", "2.28.9")
    keys = {
        a_target(cuda=Cuda(NVCC, arch, library)).key()
        for arch in [("80",), ("80", "90")]
        for library in [nccl, nccl._replace(version="2.27.0")]
    }
    assert len(keys) == 4


@pytest.mark.parametrize("name", ["CXXFLAGS", "HOROVOD_CPU_OPERATIONS"])
def test_variables_that_the_build_reads_change_the_key(monkeypatch, name):
    before = a_target().key()
    monkeypatch.setenv(name, "x")
    assert a_target().key() != before


def test_where_things_lie_does_not_change_the_key(monkeypatch, tmp_path):
    before = a_target().key()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOROVOD_RANK", "1")
    assert a_target(compiler=Tool("/opt/bin/c++", GCC.version)).key() == before


def test_key_is_a_valid_local_version():
    assert a_target().key().isalnum()


def test_takes_what_is_installed(machine):
    machine(frameworks=[TF])
    assert find(Options()).names == {"tensorflow"}


def test_takes_only_what_was_asked_for(machine):
    machine()
    assert find(Options(frameworks=("torch",))).names == {"torch"}


def test_no_framework(machine):
    machine(frameworks=[])
    with pytest.raises(InstallError, match="neither torch nor TensorFlow"):
        find(Options())


def test_asked_for_but_absent(machine):
    machine(frameworks=[TORCH])
    with pytest.raises(InstallError, match="tensorflow is not installed"):
        find(Options(frameworks=("torch", "tensorflow")))


def test_misspelt_framework(machine):
    machine()
    with pytest.raises(InstallError, match="unknown framework pytorch"):
        find(Options(frameworks=("pytorch",)))


def test_no_compiler(machine):
    machine(compiler=None)
    with pytest.raises(InstallError, match=r"no C\+\+ compiler.*CXX"):
        find(Options())


@pytest.mark.parametrize(
    ("version", "standard"), [("2.13.0+cpu", 20), ("2.11.0", 20), ("2.10.1", 17), ("2.3.0", 17)]
)
def test_standard_follows_torch(machine, version, standard):
    machine(frameworks=[TORCH._replace(version=version)])
    assert find(Options(untested=True)).standard == standard


@pytest.mark.parametrize(
    "framework", [TORCH._replace(version="2.12.0"), TF._replace(version="2.20.1"), TORCH_CUDA]
)
def test_untried_versions_are_refused_unless_allowed(machine, framework):
    machine(frameworks=[framework])
    message = f"not tried with {framework.name} {framework.version}".replace("+", r"\+")
    with pytest.raises(InstallError, match=f"{message}.*torch 2.13 CPU.*--untested"):
        find(Options())
    assert find(Options(untested=True)).names == {framework.name}


def test_mpi(machine):
    machine(mpi=OPEN_MPI)
    assert find(Options()).mpi == OPEN_MPI
    assert find(Options(mpi="off")).mpi is None
    machine(mpi=None)
    assert find(Options()).mpi is None
    with pytest.raises(InstallError, match=r"--mpi on.*libopenmpi-dev"):
        find(Options(mpi="on"))


class TestGpu:
    h200 = Gpu("NVIDIA H200", "90", "580.1")

    @pytest.fixture
    def nccl(self, tmp_path):
        return Nccl(tmp_path, tmp_path / "libnccl.so.2", "2.28.9")

    def test_auto_is_none_for_cpu_torch_even_with_a_gpu(self, machine, nccl):
        machine(gpus=[self.h200], nvcc=NVCC, nccl=nccl)
        assert find(Options()).cuda is None

    def test_auto_is_nccl_for_cuda_torch_with_a_gpu(self, machine, nccl):
        machine([TORCH_CUDA], gpus=[self.h200, self.h200], nvcc=NVCC, nccl=nccl)
        assert find(Options()).cuda == Cuda(NVCC, ("90",), nccl)

    def test_architectures_asked_for_win(self, machine, nccl):
        machine([TORCH_CUDA], gpus=[self.h200], nvcc=NVCC, nccl=nccl)
        assert find(Options(cuda_arch=("80", "90"))).cuda.arch == ("80", "90")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"frameworks": [TORCH]}, "torch 2.13.0.cpu is a CPU build"),
            ({"frameworks": [TF]}, "torch is not installed"),
            ({"nvcc": None}, "no nvcc.*CUDA 13.0 toolkit"),
            ({"nvcc": Tool("/n", "12.4")}, "/n is CUDA 12.4, but torch .* for CUDA 13.0"),
            ({"nccl": None}, "NCCL not found.*nvidia-nccl-cu13"),
            ({"gpus": []}, "--cuda-arch"),
            (
                {"gpus": [Gpu("Tesla V100", "70", "580.95.05")]},
                "does not compile for compute capability 70, but for 80, 90.*--cuda-arch",
            ),
        ],
    )
    def test_what_is_missing_is_named(self, machine, nccl, changes, message):
        found = {"frameworks": [TORCH_CUDA], "gpus": [self.h200], "nvcc": NVCC, "nccl": nccl}
        machine(**{**found, **changes})
        with pytest.raises(InstallError, match=message):
            find(Options(gpu="nccl"))


@pytest.mark.parametrize(
    ("version", "parsed"), [("2.13.0+cpu", (2, 13, 0)), ("2.9a1", (2, 9)), ("git", (0,))]
)
def test_numbers(version, parsed):
    assert numbers(version) == parsed
