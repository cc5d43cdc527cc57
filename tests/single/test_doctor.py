"""hvdx.doctor's judgement of made-up machines; the integration tests examine real ones."""

import json

import pytest

from hvdx import doctor
from hvdx.build.cache import Entry
from hvdx.build.probe import Framework, Gpu, Mpi, Tool
from hvdx.doctor import Facts, Horovod, Run, all_ok, as_json, as_text, judge

TORCH = Framework("torch", "2.13.0+cpu", "abc", None)
CUDA_TORCH = Framework("torch", "2.13.0+cu130", "abc", "13.0")
LOADED = {"version": "2.13.0+cpu", "built": ["gloo"]}
H200 = Gpu("NVIDIA H200", "90", "580.95.05")
NCCL = {"version": "2.13.0+cu130", "built": ["cuda", "gloo", "nccl"]}
ON_GPU = {
    "frameworks": {"torch": CUDA_TORCH},
    "horovod": Horovod("0.28.1+hvdx.key", {"torch": "2.13.0+cu130"}),
    "loaded": {"torch": NCCL},
    "runs": {"torch": Run(""), "nccl": Run("")},
    "gpus": [H200],
}
TOO_OLD = "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)."


def facts(**changes):
    """Return the facts of a machine where all is well, but for ``changes``."""
    healthy = Facts(
        frameworks={"torch": TORCH},
        loaded={"torch": LOADED},
        keras=None,
        horovod=Horovod("0.28.1+hvdx.key", {"torch": "2.13.0+cpu"}),
        runs={"torch": Run("")},
        run_wanted=True,
        gpus=[],
        nvcc=None,
        nccl=None,
        mpi=None,
        mpirun=None,
        compiler=Tool("/usr/bin/c++", "c++ 12"),
        cmake=Tool("/usr/bin/cmake", "3.25.1"),
        interfaces=["eth0 10.0.0.1"],
        cache_problem=None,
        cache_entries=[],
        cached_key="key",
    )
    return healthy._replace(**changes)


def wrong(checks):
    """Return the checks that are not all right, by name."""
    return {check.name: check for check in checks if check.ok is False}


def test_healthy():
    checks = judge(facts())
    assert all_ok(checks)
    assert as_text(checks).endswith("All is well.")


@pytest.mark.parametrize(
    ("changes", "name", "value", "remedy"),
    [
        ({"horovod": None, "runs": {}}, "horovod", "not installed", "hvdx install"),
        (
            {"horovod": Horovod("0.27.0", {"torch": "2.13.0+cpu"})},
            "horovod",
            "0.27.0",
            "Horovod 0.28.1",
        ),
        (
            {"horovod": Horovod("0.28.1", {"torch": "2.12.0+cpu"})},
            "horovod.torch",
            "built against torch 2.12.0+cpu, but 2.13.0+cpu is installed",
            "hvdx install",
        ),
        (
            {"horovod": Horovod("0.28.1", {"tensorflow": "2.21.0"})},
            "horovod.torch",
            "built without torch",
            "hvdx install",
        ),
        (
            {"loaded": {"torch": {"version": "2.13.0+cpu", "horovod_error": "undefined symbol"}}},
            "horovod.torch",
            "undefined symbol",
            "--force",
        ),
        ({"loaded": {"torch": {"error": "signal SIGSEGV"}}}, "torch", "SIGSEGV", "Reinstall"),
        (
            {"runs": {"torch": Run("no result within 120 s")}},
            "allreduce, torch",
            "no result within 120 s",
            "127.0.0.1",
        ),
        (
            {"loaded": {"torch": {**LOADED, "built": []}}},
            "controllers",
            "none",
            "hvdx install",
        ),
        (
            {"loaded": {"torch": {**LOADED, "built": ["gloo", "mpi"]}}},
            "mpirun",
            "not on PATH",
            "--mpi off",
        ),
        (
            {"frameworks": {"torch": CUDA_TORCH}, "gpus": [H200]},
            "nccl operations",
            "reduces on the CPU",
            "--gpu nccl",
        ),
        (
            {**ON_GPU, "loaded": {"torch": {**NCCL, "cuda_error": TOO_OLD}}},
            "torch on the GPU",
            "driver on your system is too old",
            "580 for CUDA 13",
        ),
        (
            {**ON_GPU, "runs": {"torch": Run(""), "nccl": Run("exit status 1\nno NCCL today")}},
            "allreduce, NCCL",
            "hvdx run -np 1: exit status 1",
            "NCCL_DEBUG=INFO",
        ),
        (
            {"loaded": {"torch": {**NCCL, "nccl": ["/a/libnccl.so.2", "/b/libnccl.so.2"]}}},
            "nccl",
            "load different ones:\n/a/libnccl.so.2\n/b/libnccl.so.2",
            "HOROVOD_NCCL_HOME",
        ),
        (
            {"keras": "3.15.1", "loaded": {"torch": LOADED, "keras": {"error": "no jax"}}},
            "keras",
            "no jax",
            "KERAS_BACKEND",
        ),
        (
            {"keras": "3.15.1", "loaded": {"torch": LOADED, "keras": {"backend": "jax"}}},
            "keras",
            "no Horovod",
            "KERAS_BACKEND=torch",
        ),
        (
            {"keras": "2.15.0", "loaded": {"torch": LOADED, "keras": {"backend": "tensorflow"}}},
            "keras",
            "2.15.0",
            "keras>=3",
        ),
        (
            {"cache_problem": "cannot write to the cache /x: Read-only. Name another folder."},
            "wheel cache",
            "cannot write",
            "Name another folder",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(changes, name, value, remedy):
    checks = judge(facts(**changes))
    assert not all_ok(checks)
    found = wrong(checks)[name]
    assert value in found.value
    assert remedy in found.remedy
    assert f"-> {found.remedy}" in as_text(checks)


def test_no_framework():
    found = wrong(judge(facts(frameworks={}, loaded={}, runs={}, horovod=None)))
    assert set(found) == {"frameworks", "horovod"}


def test_only_what_was_built_by_hvdx_goes_without_a_note():
    ours, theirs = (
        next(
            c
            for c in judge(facts(horovod=Horovod(v, {"torch": "2.13.0+cpu"})))
            if c.name == "horovod"
        )
        for v in ("0.28.1+hvdx.key", "0.28.1")
    )
    assert ours.ok and theirs.ok
    assert "not built by hvdx" not in ours.value
    assert "not built by hvdx" in theirs.value


@pytest.mark.parametrize(("horovod", "ok"), [(None, False), (facts().horovod, None)])
def test_a_compiler_is_needed_only_before_the_build(horovod, ok):
    checks = judge(facts(horovod=horovod, compiler=None, cmake=None))
    assert {check.ok for check in checks if check.name in ("compiler", "cmake")} == {ok}


def test_nccl_is_proved_where_there_is_a_gpu_and_told_apart_where_there_is_none():
    checks = {check.name: check for check in judge(facts(**ON_GPU))}
    assert checks["allreduce, NCCL"].ok and checks["torch on the GPU"].ok
    assert checks["gpu operations"].value == "cuda, nccl"
    checks = judge(facts(**{**ON_GPU, "gpus": [], "runs": {"torch": Run("")}}))
    assert all_ok(checks)
    (proof,) = [check for check in checks if check.name == "allreduce, NCCL"]
    assert proof.ok is None and proof.value == "built in, but no GPU is here to try it on"


def test_cpu_torch_beside_a_gpu_is_no_fault():
    assert all_ok(judge(facts(gpus=[H200])))


def test_mpi_in_use_is_no_fault():
    loaded = {"torch": {**LOADED, "built": ["gloo", "mpi"]}}
    mpi = Mpi("/usr/bin/mpicxx", "", "4.1.4")
    assert all_ok(judge(facts(loaded=loaded, mpi=mpi, mpirun="/usr/bin/mpirun")))


def test_left_out_run_is_no_fault():
    checks = judge(facts(runs={}, run_wanted=False))
    assert all_ok(checks)
    assert ("allreduce, torch", None) in [(check.name, check.ok) for check in checks]


def test_spoilt_cache_entry_is_named(tmp_path):
    entries = [Entry(tmp_path / "a.whl", None), Entry(tmp_path / "b.whl", "its checksum differs")]
    found = wrong(judge(facts(cache_entries=entries)))["wheel cache"]
    assert "b.whl: its checksum differs" in found.value
    assert "a.whl" not in found.value


def test_json_says_the_same():
    checks = judge(facts(runs={}, run_wanted=False, horovod=None))
    report = json.loads(as_json(checks))
    assert report["ok"] is False
    assert set(report["checks"][0]) == {"name", "ok", "value", "remedy"}
    assert [check["name"] for check in report["checks"]] == [check.name for check in checks]


def test_names_are_unique_whatever_is_wrong():
    everything = facts(
        frameworks={"torch": CUDA_TORCH},
        gpus=[H200],
        loaded={"torch": {**LOADED, "built": ["mpi"]}},
    )
    names = [check.name for check in judge(everything)]
    assert len(names) == len(set(names))


def test_a_hanging_job_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, "RUN_SECONDS", 3)
    assert doctor._run("import time; time.sleep(60)").problem == "no result within 3 s"
