"""``hvdx install`` as a user runs it: real environments, a real wheel, real failures."""

import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from hvdx.build import edits
from hvdx.errors import InstallError

ROOT = Path(__file__).parents[2]
VERSION = "from importlib.metadata import version; print(version('horovod'))"
TENSORFLOW = ["tensorflow*", "keras*"]


def wheel_of(cache):
    (wheel,) = cache.glob("wheels/*/*.whl")
    return wheel


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def fresh(environment):
    """An environment with the frameworks and without Horovod."""
    return environment(without=["horovod*"])


def test_takes_the_cached_wheel_then_does_nothing(fresh, cache):
    done = fresh.hvdx("install", XDG_CACHE_HOME=cache.parent)
    assert done.returncode == 0, done.stderr
    assert "Compiling" not in done.stdout
    assert fresh.run(VERSION) == f"0.28.1+hvdx.{wheel_of(cache).parent.name}"
    assert fresh.run("import horovod.torch as hvd; print(hvd.gloo_built())") == "True"
    record = next(fresh.packages.glob("horovod-*.dist-info")) / "RECORD"
    before = record.stat().st_mtime_ns

    started = time.monotonic()
    again = fresh.hvdx("install", XDG_CACHE_HOME=cache.parent)
    assert again.returncode == 0
    assert "installed already" in again.stdout
    assert record.stat().st_mtime_ns == before
    assert time.monotonic() - started < 60  # of 1: nothing is installed

    # Half of it deleted: the metadata still claim that it is there.
    library = next(fresh.packages.glob("horovod/torch/mpi_lib*.so"))
    library.unlink()
    mended = fresh.hvdx("install", XDG_CACHE_HOME=cache.parent)
    assert mended.returncode == 0, mended.stderr
    assert library.is_file()


def test_two_installs_at_once(environment, cache, tmp_path):
    fresh = environment(without=["horovod*"])
    command = [fresh.python, "-m", "hvdx", "install", "--wheel-only"]
    started = [
        subprocess.Popen(
            [*command, str(tmp_path / f"out{i}")],
            env={**fresh.environ, "XDG_CACHE_HOME": str(cache.parent)},
            cwd=fresh.path,
        )
        for i in range(3)
    ]
    assert [process.wait(timeout=180) for process in started] == [0, 0, 0]
    sizes = {next((tmp_path / f"out{i}").iterdir()).stat().st_size for i in range(3)}
    assert sizes == {wheel_of(cache).stat().st_size}


@pytest.mark.parametrize("spoil", ["a bit flipped", "no record"])
def test_spoilt_wheel_is_not_installed(fresh, cache, spoil):
    """tests/single/test_build_cache.py has more ways to spoil it."""
    wheel = wheel_of(cache)
    if spoil == "a bit flipped":
        content = bytearray(wheel.read_bytes())
        content[len(content) // 2] ^= 1
        wheel.write_bytes(content)
    else:
        wheel.with_name("build.json").unlink()
    # A CMake that fails at once stands in for the three minutes of a real build.
    done = fresh.hvdx("install", XDG_CACHE_HOME=cache.parent, HOROVOD_CMAKE="/bin/false")
    assert "unusable" in done.stdout
    assert "building it anew" in done.stdout
    assert done.returncode == 1
    assert "/bin/false" in done.stderr
    assert not wheel.exists()
    assert not list(fresh.packages.glob("horovod*"))


def test_broken_compiler(fresh, cache):
    started = time.monotonic()
    done = fresh.hvdx("install", XDG_CACHE_HOME=cache.parent, CXX="/bin/false")
    assert done.returncode == 1
    assert "no working C or C++ compiler" in done.stderr
    assert "apt-get install" in done.stderr
    log = Path(done.stderr.split("Log: ")[1].splitlines()[0])
    assert "not able to compile a simple test program" in log.read_text()
    assert time.monotonic() - started < 180  # of 5: nothing is compiled
    assert not list(cache.glob("wheels/.new-*")), "the failed build left something behind"


def test_terminated_build_leaves_nothing_running(fresh, cache, tmp_path):
    """A CI job that is cancelled gets SIGTERM, which ends Python without any clean-up."""
    (key,) = cache.glob("wheels/*/")
    shutil.rmtree(key)
    pid_file, temporary = tmp_path / "pid", tmp_path / "temporary"
    temporary.mkdir()
    cmake = tmp_path / "cmake"
    cmake.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo cmake version 3.25.1; exit; fi\n'
        f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 300\n"
    )
    cmake.chmod(0o755)
    install = subprocess.Popen(
        [fresh.python, "-m", "hvdx", "install"],
        cwd=fresh.path,
        env={
            **fresh.environ,
            "XDG_CACHE_HOME": str(cache.parent),
            "HOROVOD_CMAKE": str(cmake),
            "TMPDIR": str(temporary),
        },
    )
    wait_until(pid_file.exists)
    install.terminate()
    assert install.wait(timeout=120) == 143
    compiler = int(pid_file.read_text())
    wait_until(lambda: not psutil.pid_exists(compiler))
    assert list(temporary.glob("hvdx-build-*")) == []


def test_the_edits_fit_the_published_source(warm_cache, tmp_path):
    with tarfile.open(warm_cache / "sdist" / f"horovod-{edits.HOROVOD}.tar.gz") as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safe)
    tree = tmp_path / f"horovod-{edits.HOROVOD}"
    edits.apply(tree, edits.chosen({"torch", "tensorflow"}), standard=20)
    with pytest.raises(InstallError, match="edited already"):
        edits.apply(tree, edits.chosen({"torch"}), standard=20)


def test_no_framework(environment, cache):
    bare = environment(without=["horovod*", "torch*", *TENSORFLOW])
    done = bare.hvdx("install", XDG_CACHE_HOME=cache.parent)
    assert done.returncode == 1
    assert "neither torch nor TensorFlow" in done.stderr
    assert "pip install 'hvdx[torch]'" in done.stderr


def test_unwritable_cache(fresh, tmp_path):
    (tmp_path / "file").touch()
    done = fresh.hvdx("install", XDG_CACHE_HOME=tmp_path / "file")
    assert done.returncode == 1
    assert "cannot write to the cache" in done.stderr
    assert "XDG_CACHE_HOME" in done.stderr


@pytest.mark.parametrize(
    ("environ", "cause"),
    [
        ({"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}, "could not be reached"),
        ({"PIP_NO_INDEX": "1"}, "no source of Horovod"),
    ],
)
def test_source_not_to_be_had(fresh, tmp_path, environ, cause):
    alone = {"PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}
    alone |= {"PIP_EXTRA_INDEX_URL": "", "XDG_CACHE_HOME": tmp_path}
    done = fresh.hvdx("install", **{**alone, **environ})
    assert done.returncode == 1
    assert cause in done.stderr
    assert "Log: " in done.stderr


def test_no_pip(environment, tmp_path):
    done = environment(without=["horovod*", "pip"]).hvdx("install", XDG_CACHE_HOME=tmp_path)
    assert done.returncode == 1
    assert "package pip is not installed" in done.stderr


def test_the_package_is_whole(tmp_path):
    """Every module is packaged: `build` is a name that many tools ignore."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=180)
    packaged = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    ours = {str(path.relative_to(ROOT)) for path in ROOT.glob("hvdx/**/*.py")}
    theirs = {f"hvdx/{path.relative_to(ROOT)}" for path in ROOT.glob("integrations/**/*.py")}
    assert packaged == ours | theirs
    assert (tmp_path / "hvdx/py.typed").is_file()
