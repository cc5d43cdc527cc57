"""Files and folders of checkpoints: what is written, what is refused, what is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import hvdx as hvd
from hvdx.checkpoints import files, tree
from hvdx.checkpoints.files import Damaged, File, read_tree, write_tree
from hvdx.checkpoints.folder import MANIFEST, Folder, Manifest, damage
from hvdx.errors import CheckpointError

TREE = {
    "model": {"a/b": np.arange(6.0).reshape(2, 3), "a": {"b": np.ones((), np.float16)}},
    "optimizer": {7: (np.zeros((0, 3), np.int8), None, True, 2**70, 0.1, float("inf"), "s", [[]])},
    "flags": np.array([True, False]),
}


def same(one, other):
    """Compare nested dictionaries with arrays in them, types too."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    return type(one) is type(other) and one == other


class Part:
    """Anything with a state."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def saved(folder, *steps, **options):
    """Save a part at each step; return the checkpoints."""
    checkpoints = hvd.Checkpoints(folder, random=False, **options)
    for step in steps:
        checkpoints.save(step, part=Part(step=step, values=np.full(1000, step)))
    checkpoints.wait()
    return checkpoints


# --- one file


def test_trees_survive_and_safetensors_reads_them(tmp_path):
    path = tmp_path / "state.safetensors"
    write_tree(path, TREE)
    assert same(hvd.load_state(path), TREE)
    plain = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(plain["model/a/b"], TREE["model"]["a/b"])
    assert plain["model/a/b#1"].shape == ()
    safetensors.numpy.save_file({"x": np.ones(3)}, path)
    assert same(hvd.load_state(path), {"x": np.ones(3)}) or "torch" in sys.modules
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_no_state_is_refused_by_its_place(tmp_path):
    for told, value in (
        ("part/a/1 is a function: checkpoints hold numbers", {"a": [0, same]}),
        (r"part has the key \(1, 2\): only strings", {(1, 2): 3}),
        ("part/x: an array of object cannot be saved", {"x": np.array([None])}),
    ):
        with pytest.raises(TypeError, match=told):
            write_tree(tmp_path / "state", {"part": value})
    assert not list(tmp_path.iterdir())


def test_pickles_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "state"
    np.savez(path.open("wb"), x=np.ones(3))
    with pytest.raises(CheckpointError, match=r"zip archive, as torch\.save and numpy\.savez"):
        hvd.load_state(path)
    for content in (b"", b"{}", b"\x80\x04K\x01.", bytes(8), b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot be read: .*state: it "):
            hvd.load_state(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "state"
    write_tree(path, TREE)
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=some.data())
def test_no_changed_file_is_taken_for_whole(whole, tmp_path, data):
    """Bytes changed, cut off, put in: each is told, and nothing else is ever raised."""
    start = data.draw(some.integers(0, len(whole) - 1))
    length = data.draw(some.integers(0, 20))
    put = data.draw(some.binary(max_size=20) | some.sampled_from([b"\x00" * 8, b'"', b"[" * 2000]))
    changed = whole[:start] + put + whole[start + length :]
    path = tmp_path / "state"
    path.write_bytes(changed)
    try:
        found = tree.mapped(read_tree(path)[1])
    except Damaged:
        assert changed != whole
    else:
        # Spaces, and the names of what is no hvdx file, are all that can differ.
        assert changed == whole or same(found, TREE) or File(path).about is None


@settings(max_examples=150, deadline=None)
@given(some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=5),
    lambda inner: some.lists(inner, max_size=3)
    | some.dictionaries(some.sampled_from(["dict", "list", "items", "tensor", "form", "x"]), inner),
))  # fmt: skip
def test_outlines_may_be_anything(outline):
    try:
        tree.built(outline, {}.__getitem__)
    except ValueError as error:
        assert str(error)


# --- many


def test_the_last_few_are_kept_in_the_order_of_saving(tmp_path):
    checkpoints = saved(tmp_path / "saved", 5, 10, 15, 20, keep=2)
    assert sorted(each.name for each in checkpoints.folder.iterdir()) == [
        "step-00000015", "step-00000020",
    ]  # fmt: skip
    assert saved(tmp_path / "saved", 3, keep=2).latest() == 3  # begun anew: 20 is older now
    part = Part()
    assert hvd.Checkpoints(tmp_path / "saved").restore(20, part=part) == 20
    assert same(part.state, {"step": 20, "values": np.full(1000, 20)})
    checkpoints = saved(tmp_path / "saved", 20, keep=2)  # in the place of the one that there is
    assert [m.step for _, m in Folder(checkpoints.folder).found()] == [20, 3]
    assert len(list(Folder(checkpoints.folder).of(20).iterdir())) == 2


def test_nothing_saved_is_no_error(tmp_path):
    checkpoints = hvd.Checkpoints(tmp_path / "saved")
    assert checkpoints.restore(part=Part()) is None and checkpoints.latest() is None
    assert not (tmp_path / "saved").exists()
    for step, told in ((-1, "step=-1"), (True, "step=True"), (1.0, "step=1.0")):
        with pytest.raises(CheckpointError, match=f"{told}: give a number from 0"):
            checkpoints.save(step, part=Part())
    with pytest.raises(CheckpointError, match="nothing is given to be saved"):
        checkpoints.save(1)
    with pytest.raises(CheckpointError, match="part= is a int: give models, optimizers"):
        checkpoints.save(1, part=3)
    with pytest.raises(ValueError, match="keep=0"):
        hvd.Checkpoints(tmp_path, keep=0)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def foreign(path):
    """Another whole file, with a manifest that tells its size and checksum."""
    manifest = Manifest.read(path.parent)
    written = files.write(path, {"x": tree.stored(np.ones(3))}, {})
    manifest.files[0].update(written._asdict())
    manifest.write(path.parent)


def escaping(path):
    manifest = Manifest.read(path.parent)
    manifest.files[0]["name"] = "../../secret.safetensors"
    manifest.write(path.parent)


@pytest.mark.parametrize(
    ("target", "damage_it", "told"),
    [
        ("rank", cut, r"rank-00000\.\w+\.safetensors: it has \d+ bytes and should have \d+"),
        ("rank", flip, r"rank-00000\.\w+\.safetensors: its checksum does not fit"),
        ("rank", Path.unlink, r"rank-00000\.\w+\.safetensors: No such file"),
        ("rank", foreign, "it has other tensors than the manifest says"),
        ("rank", escaping, r"manifest.json: '../../secret.safetensors' is no file of a rank"),
        ("manifest", flip, "manifest.json: "),
        ("manifest", cut, "manifest.json: "),
        ("manifest", lambda path: path.write_text("[]"), "manifest.json: its checksum"),
    ],
)
def test_what_is_damaged_is_named_and_the_one_before_is_taken(tmp_path, target, damage_it, told):
    checkpoints = saved(tmp_path, 1, 2)
    (path,) = (each for each in Folder(tmp_path).of(2).iterdir() if each.name.startswith(target))
    damage_it(path)
    part = Part()
    with pytest.warns(UserWarning, match=told):
        assert checkpoints.restore(part=part) == 1
    assert part.state["step"] == 1
    with pytest.raises(CheckpointError, match=told):
        checkpoints.restore(2, part=part)
    saved(tmp_path, 2)  # and it can be saved again
    assert checkpoints.restore(part=part) == 2
    for path in Folder(tmp_path).of(2), Folder(tmp_path).of(1):
        cut(next(each for each in path.iterdir() if each.name != MANIFEST))
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000002.*00001"),
    ):
        checkpoints.restore(part=part)


def test_without_a_manifest_there_is_no_checkpoint(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    (Folder(tmp_path).of(2) / MANIFEST).unlink()
    (tmp_path / "notes").write_text("not ours")
    part = Part()
    assert checkpoints.restore(part=part) == 1
    saved(tmp_path, 3)  # clears away what is left of it
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "notes", "step-00000001", "step-00000003",
    ]  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=some.data())
def test_manifests_may_be_anything(tmp_path, data):
    """With a checksum that fits: a manifest is damaged, or as it should be."""
    shutil.rmtree(tmp_path)
    saved(tmp_path, 1)
    place = Folder(tmp_path).of(1)
    told = json.loads((place / MANIFEST).read_text())
    del told["checksum"]
    spoil = some.none() | some.integers() | some.text(max_size=3) | some.lists(some.integers())
    at = data.draw(some.sampled_from([told, told["files"][0]]))
    key = data.draw(some.sampled_from(sorted(at)))
    at[key] = data.draw(spoil | some.dictionaries(some.text(max_size=2), spoil, max_size=2))
    files.write_json(place / MANIFEST, told)
    ((_, found),) = Folder(tmp_path).found()
    if isinstance(found, Manifest):
        damage(place, found)
    else:
        assert isinstance(found, Damaged) and MANIFEST in str(found)


def test_the_guide_reads_a_model_without_hvdx(tmp_path, monkeypatch):
    guide = Path(__file__).parents[2] / "docs" / "checkpoints.md"
    script = guide.read_text().split("```python\n")[-1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    model = {"layer.weight": np.ones((2, 3)), "layer.bias": np.zeros(2, np.float32)}
    with hvd.Checkpoints("saved", random=False) as checkpoints:
        checkpoints.save(1, model=Part(**model), told={"x": np.ones(1)})
    found = {}
    exec(script, found)
    assert same(dict(sorted(found["model"].items())), dict(sorted(model.items())))
    told = dict(found["manifest"])
    text = json.dumps({k: v for k, v in told.items() if k != "checksum"}, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == told["checksum"]


# --- a disk that fails


def test_a_full_disk_leaves_the_last_checkpoint_and_no_files(tmp_path):
    """A real one, of 1 MB, where that may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        checkpoints = hvd.Checkpoints(disk / "saved", random=False)
        checkpoints.save(1, part=Part(values=np.ones(50_000)))
        checkpoints.save(2, part=Part(values=np.ones(100_000)))
        with pytest.raises(CheckpointError, match=r"step 2 cannot be saved .*No space left"):
            checkpoints.wait()
        assert [each.name for each in checkpoints.folder.iterdir()] == ["step-00000001"]
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            write_tree(disk / "state", {"x": np.ones(100_000)})
        assert not (disk / "state.partial").exists()
        assert checkpoints.latest() == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = hvd.Checkpoints(tmp_path / "file" / "saved")
    with pytest.raises(CheckpointError, match=r"step 1 cannot be saved .*Not a directory"):
        checkpoints.save(1, part=Part())


def test_a_failure_that_nobody_asked_for_is_printed_at_the_end(tmp_path):
    """And the last save of a script is finished without wait()."""
    script = """
        import resource, sys
        import numpy as np
        import hvdx as hvd
        checkpoints = hvd.Checkpoints(sys.argv[1], random=False)
        checkpoints.save(1, part={"x": np.ones(10_000)})
        if len(sys.argv) > 2:
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            checkpoints.save(2, part={"x": np.ones(10_000)})
    """
    run = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "saved")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert hvd.Checkpoints(tmp_path / "saved").latest() == 1
    done = subprocess.run([*run, "2"], capture_output=True, text=True, timeout=120)
    assert "step 2 cannot be saved" in done.stderr and "File too large" in done.stderr
    assert [each.name for each in (tmp_path / "saved").iterdir()] == ["step-00000001"]
