"""Finished wheels, kept per user so that every environment and checkout shares them.

    <cache>/hvdx/wheels/<key>/horovod-0.28.1+hvdx.<key>-....whl
    <cache>/hvdx/wheels/<key>/build.json    the wheel's checksum and what the key is made of
    <cache>/hvdx/wheels/<key>.lock          held while that wheel is built or replaced
    <cache>/hvdx/sdist/                     Horovod's source as downloaded
    <cache>/hvdx/logs/<key>.log             the last build's log

An entry appears by one rename, so that a reader sees all of it or nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hvdx.errors import InstallError


class Entry(NamedTuple):
    """A cached wheel; ``fault`` says why it cannot be used, None if it can."""

    wheel: Path
    fault: str | None


def root() -> Path:
    """Return hvdx's folder below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdx"


def folder(name: str) -> Path:
    """Return the subfolder ``name``, made and writable.

    Raises:
        InstallError: it is not.
    """
    path = root() / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InstallError(
            f"cannot write to the cache {path}: {error.strerror or error}. Mend that, or name "
            f"another folder in the environment variable XDG_CACHE_HOME."
        ) from None
    return path


def find(key: str) -> Entry | None:
    """Return the cached wheel of ``key``, its checksum compared; None if there is none."""
    path = root() / "wheels" / key
    if not path.is_dir():
        return None
    try:
        built = json.loads((path / "build.json").read_text(encoding="utf-8"))
        wheel = path / built["wheel"]
        fault = None if checksum(wheel) == built["sha256"] else "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Entry(path, f"it cannot be read: {error!r}")
    return Entry(wheel, fault)


def entries() -> list[Entry]:
    """Return all cached wheels, each one's checksum compared."""
    try:
        keys = sorted(p.name for p in (root() / "wheels").iterdir() if p.is_dir())
    except OSError:
        return []
    found = [find(key) for key in keys if not key.startswith(".")]
    return [entry for entry in found if entry]


def store(key: str, wheel: Path, parts: dict[str, object]) -> Path:
    """Move ``wheel`` into the cache and return its new path. Call it with the key locked."""
    wheels = folder("wheels")
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=wheels))
    try:
        shutil.move(wheel, fresh / wheel.name)
        note = {"wheel": wheel.name, "sha256": checksum(fresh / wheel.name), **parts}
        (fresh / "build.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        fresh.chmod(0o755)
        drop(key)
        fresh.rename(wheels / key)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return wheels / key / wheel.name


def drop(key: str) -> None:
    """Remove the entry of ``key``: out of sight by one rename, then deleted."""
    path = root() / "wheels" / key
    if path.exists():
        grave = Path(tempfile.mkdtemp(prefix=".old-", dir=path.parent))
        path.rename(grave / key)
        shutil.rmtree(grave, ignore_errors=True)


@contextlib.contextmanager
def locked(key: str, *, on_wait: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of ``key``; print ``on_wait`` with ``say`` if another process has it."""
    # The file stays: removing it would let a third process lock another file of that name.
    with (folder("wheels") / f"{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(on_wait)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def checksum(path: Path) -> str:
    """Return a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
