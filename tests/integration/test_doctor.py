"""``hvdx doctor``: it says the right thing about environments that are really so."""

import json
import shutil

import pytest

TENSORFLOW = ["tensorflow*", "keras*"]


@pytest.fixture
def torch_only(environment, cache):
    """An environment with torch and a Horovod of its own, and the cache it came from."""
    made = environment(without=TENSORFLOW)
    made.environ["XDG_CACHE_HOME"] = str(cache.parent)
    # It was built for TensorFlow, too; hvdx would build another one here.
    own = made.packages / "horovod"
    installed = own.resolve()
    own.unlink()
    shutil.copytree(installed, own)
    return made


def test_healthy(environment, cache):
    code, checks = environment().doctor(XDG_CACHE_HOME=cache.parent, KERAS_BACKEND="torch")
    assert code == 0, checks
    assert checks["allreduce, torch"]["value"] == "2 processes, right sums"
    assert checks["allreduce, tensorflow"]["value"] == "2 processes, right sums"
    assert checks["keras"]["value"].endswith("on torch")
    assert "one for this environment" in checks["wheel cache"]["value"]


def test_text(torch_only):
    done = torch_only.hvdx("doctor", "--no-run")
    assert done.returncode == 0, done.stdout
    assert "-   tensorflow " in done.stdout
    assert "All is well." in done.stdout


def test_without_horovod(environment):
    code, checks = environment(without=["horovod*", *TENSORFLOW]).doctor()
    assert code == 1
    assert checks["horovod"] == {
        "name": "horovod",
        "ok": False,
        "value": "not installed",
        "remedy": "Run: hvdx install",
    }
    assert checks["allreduce, torch"]["ok"] is None


def test_without_a_framework(environment):
    code, checks = environment(without=["horovod*", "torch*", *TENSORFLOW]).doctor()
    assert code == 1
    assert checks["frameworks"]["ok"] is False
    assert "pip install 'hvdx[torch]'" in checks["frameworks"]["remedy"]
    assert checks["torch"]["ok"] is None


def test_framework_that_kills_its_process(torch_only):
    (torch_only.packages / "torch").unlink()
    (torch_only.packages / "torch").mkdir()
    (torch_only.packages / "torch" / "__init__.py").write_text("import os; os.abort()")
    code, checks = torch_only.doctor()
    assert code == 1
    assert "signal SIGABRT" in checks["torch"]["value"]
    assert checks["allreduce, torch"]["ok"] is None


def test_built_for_another_version_and_a_corrupt_cache(torch_only, cache):
    record = torch_only.packages / "horovod" / "metadata.json"
    record.write_text(json.dumps({"pytorch": "2.1.0"}))
    (wheel,) = cache.glob("wheels/*/*.whl")
    wheel.write_bytes(b"no wheel")
    code, checks = torch_only.doctor("--no-run")
    assert code == 1
    assert str(wheel) in checks["wheel cache"]["value"]
    assert "checksum" in checks["wheel cache"]["value"]
    assert "built against torch 2.1.0, but" in checks["horovod.torch"]["value"]
    assert checks["horovod.torch"]["remedy"] == "Run: hvdx install"


def test_extension_missing_and_an_unwritable_cache(torch_only, tmp_path):
    next(torch_only.packages.glob("horovod/torch/mpi_lib*.so")).unlink()
    (tmp_path / "file").touch()
    code, checks = torch_only.doctor(XDG_CACHE_HOME=tmp_path / "file")
    assert code == 1
    assert "cannot write" in checks["wheel cache"]["value"]
    assert "XDG_CACHE_HOME" in checks["wheel cache"]["remedy"]
    assert checks["horovod.torch"]["ok"] is False
    assert "hvdx install --force" in checks["horovod.torch"]["remedy"]
    assert checks["allreduce, torch"]["ok"] is None


def test_job_that_fails(torch_only):
    # Loads, but its sums are wrong.
    functions = torch_only.packages / "horovod" / "torch" / "__init__.py"
    functions.write_text(functions.read_text() + "\nallreduce = lambda tensor, **_: tensor\n")
    code, checks = torch_only.doctor()
    assert code == 1
    assert checks["horovod.torch"]["ok"] is True
    assert checks["allreduce, torch"]["ok"] is False
    assert "AssertionError" in checks["allreduce, torch"]["value"]


def test_keras_backend_without_horovod(environment):
    code, checks = environment(without=["horovod*"]).doctor("--no-run", KERAS_BACKEND="jax")
    assert code == 1
    assert checks["keras"]["ok"] is False
    assert "KERAS_BACKEND=torch" in checks["keras"]["remedy"]
