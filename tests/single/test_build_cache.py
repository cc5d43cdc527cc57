"""hvdx.build.cache: whole entries only, whoever writes at the same time."""

import multiprocessing
import os
import time

import pytest

from hvdx.build import cache
from hvdx.errors import InstallError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def a_wheel(folder, content=b"wheel"):
    folder.mkdir(exist_ok=True)
    wheel = folder / "horovod-0.28.1-py3-none-any.whl"
    wheel.write_bytes(content)
    return wheel


def test_nothing_there():
    assert cache.find("key") is None
    assert cache.entries() == []


def test_stored_is_found(tmp_path):
    stored = cache.store("key", a_wheel(tmp_path), {"compiler": "g++"})
    assert cache.find("key") == cache.Entry(stored, None)
    assert cache.entries() == [cache.Entry(stored, None)]
    assert stored.read_bytes() == b"wheel"
    assert '"compiler": "g++"' in stored.with_name("build.json").read_text()


def test_storing_again_replaces(tmp_path):
    cache.store("key", a_wheel(tmp_path), {})
    stored = cache.store("key", a_wheel(tmp_path, b"newer"), {})
    assert stored.read_bytes() == b"newer"
    assert cache.find("key").fault is None


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda wheel: wheel.write_bytes(b"whee!"), "checksum differs"),
        (lambda wheel: wheel.unlink(), "cannot be read"),
        (lambda wheel: wheel.with_name("build.json").unlink(), "cannot be read"),
        (lambda wheel: wheel.with_name("build.json").write_text("[1]"), "cannot be read"),
    ],
)
def test_faults_are_found(tmp_path, spoil, fault):
    spoil(cache.store("key", a_wheel(tmp_path), {}))
    assert fault in cache.find("key").fault
    assert [entry.fault for entry in cache.entries()] == [cache.find("key").fault]


def test_dropped_is_gone(tmp_path):
    cache.store("key", a_wheel(tmp_path), {})
    cache.drop("key")
    cache.drop("key")
    assert cache.find("key") is None
    assert os.listdir(cache.root() / "wheels") == []


def test_failed_store_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        cache.store("key", tmp_path / "absent.whl", {})
    assert os.listdir(cache.root() / "wheels") == []


def _store_often(folder, rounds):
    for number in range(rounds):
        with cache.locked("key", on_wait="", say=lambda _: None):
            cache.store("key", a_wheel(folder, str(number).encode() * 100_000), {})


def test_readers_never_see_half_an_entry(tmp_path):
    """Two writers replace an entry all the time: a reader finds a whole one or none."""
    writers = [
        multiprocessing.get_context("fork").Process(
            target=_store_often, args=(tmp_path / str(i), 40)
        )
        for i in range(2)
    ]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        with cache.locked("key", on_wait="", say=lambda _: None):
            if entry := cache.find("key"):
                assert entry.fault is None
                seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen
    assert cache.find("key").fault is None


def _hold(ready, seconds):
    with cache.locked("key", on_wait="", say=lambda _: None):
        ready.set()
        time.sleep(seconds)


def test_waits_for_the_lock_and_says_so():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(ready, 0.5))
    holder.start()
    assert ready.wait(10)
    said = []
    with cache.locked("key", on_wait="waiting", say=said.append):
        assert said == ["waiting"]
    holder.join(5)
    assert holder.exitcode == 0


def test_unwritable_folder_names_the_way_out(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InstallError, match=r"cannot write to the cache .*file.*XDG_CACHE_HOME"):
        cache.folder("wheels")
