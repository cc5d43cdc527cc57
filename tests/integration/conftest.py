"""Throw-away Python environments: made in a second, holding all packages but those named."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

#: Files whose tests share what a fixture starts, or measure the machine.
WHOLE = {"test_faults.py", "test_hosts.py", "test_rig.py", "test_watchdog.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Share out these files whole and all else by test: some files take longer than many others."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if Path(file).name in WHOLE else nodeid

    return Scheduling(config, log)


class Environment:
    """A virtual environment whose packages are links to those of the running one.

    ``without`` leaves packages out: their folders and metadata are not linked, so that for
    every program in there they are not installed.
    """

    def __init__(self, path, without=()):
        self.path = path
        self.python = path / "bin" / "python"
        command = [sys.executable, "-m", "venv", "--without-pip", str(path)]
        subprocess.run(command, check=True, timeout=180)
        self.packages = next((path / "lib").glob("python*")) / "site-packages"
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            name = entry.name.lower().split("-")[0]
            if not any(fnmatch.fnmatch(name, pattern) for pattern in without):
                (self.packages / entry.name).symlink_to(entry)
        # What this environment has in bin/ (CMake, perhaps) stays within reach.
        scripts = [path / "bin", sysconfig.get_path("scripts"), os.environ["PATH"]]
        self.environ = {**os.environ, "PATH": os.pathsep.join(map(str, scripts))}

    def hvdx(self, *arguments, timeout=240, **environ):
        """Run ``hvdx`` in there, away from the source tree."""
        return subprocess.run(
            [self.python, "-m", "hvdx", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.path,
            env={**self.environ, **{k: str(v) for k, v in environ.items()}},
        )

    def run(self, code, timeout=180):
        """Run Python code in there and return what it prints."""
        command = [self.python, "-c", code]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.path,
            env=self.environ,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def doctor(self, *arguments, **environ):
        """Run ``hvdx doctor --json``; return its exit status and its checks by name."""
        done = self.hvdx("doctor", "--json", *arguments, **environ)
        report = json.loads(done.stdout)
        checks = {check["name"]: check for check in report["checks"]}
        assert len(checks) == len(report["checks"]), "two checks share a name"
        assert report["ok"] == all(check["ok"] is not False for check in checks.values())
        assert done.returncode == (0 if report["ok"] else 1)
        return done.returncode, checks


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory):
    """A cache of our own with this environment's wheel and Horovod's source.

    `make` has filled the user's cache; if not, this builds the wheel and takes minutes.
    """
    wheels = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "hvdx", "install", "--wheel-only", str(wheels)]
    subprocess.run(command, check=True, timeout=1200)
    (wheel,) = wheels.iterdir()
    key = wheel.name.split("hvdx.")[1].split("-")[0]
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdx"
    ours = tmp_path_factory.mktemp("cache") / "hvdx"
    shutil.copytree(users / "wheels" / key, ours / "wheels" / key)
    shutil.copytree(users / "sdist", ours / "sdist")
    return ours


@pytest.fixture
def cache(warm_cache, tmp_path):
    """A copy of the warm cache, to be spoilt; XDG_CACHE_HOME is its parent."""
    return Path(shutil.copytree(warm_cache, tmp_path / "cache" / "hvdx"))


@pytest.fixture
def environment(tmp_path):
    """Make an environment: ``environment(without=["horovod", "torch*"])``."""
    return lambda without=(): Environment(tmp_path / "venv", without)
