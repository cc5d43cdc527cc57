"""hvdx.build.edits: the table, and that text it does not know stops it."""

import pytest

from hvdx.build import edits
from hvdx.build.edits import EDITS, Edit, apply, chosen
from hvdx.errors import InstallError


def a_tree(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_replaces_and_fills_in_the_standard(tmp_path):
    tree = a_tree(tmp_path, {"CMakeLists.txt": "a\nset(CMAKE_CXX_STANDARD 14)\nb\n"})
    apply(tree, [EDITS[0]], standard=20)
    assert (tree / "CMakeLists.txt").read_text() == "a\nset(CMAKE_CXX_STANDARD 20)\nb\n"


def test_two_edits_of_one_file_both_stay(tmp_path):
    tree = a_tree(tmp_path, {"f": "one two"})
    apply(tree, [Edit("f", "one", "1", "x"), Edit("f", "two", "2", "x")], standard=17)
    assert (tree / "f").read_text() == "1 2"


@pytest.mark.parametrize("text", ["nothing of the kind", "find find"])
def test_unknown_text_fails_loudly_and_writes_nothing(tmp_path, text):
    tree = a_tree(tmp_path, {"a": "good", "b": text})
    wanted = [Edit("a", "good", "better", "x"), Edit("b", "find", "found", "the reason")]
    times = text.count("find")
    with pytest.raises(InstallError, match=f"b: expected 1 times, found {times}.*the reason"):
        apply(tree, wanted, standard=20)
    assert (tree / "a").read_text() == "good"


def test_a_second_run_over_the_same_tree_fails(tmp_path):
    tree = a_tree(tmp_path, {"CMakeLists.txt": "set(CMAKE_CXX_STANDARD 14)"})
    apply(tree, [EDITS[0]], standard=20)
    with pytest.raises(InstallError, match="edited already"):
        apply(tree, [EDITS[0]], standard=20)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InstallError, match=r"has no CMakeLists\.txt"):
        apply(tmp_path, [EDITS[0]], standard=20)


@pytest.mark.parametrize(
    ("frameworks", "absent"), [({"torch"}, "tensorflow"), ({"tensorflow"}, "torch")]
)
def test_only_the_frameworks_present_are_edited(frameworks, absent):
    files = [edit.file for edit in chosen(frameworks)]
    assert not [file for file in files if f"/{absent}/" in file]
    assert "horovod/common/gloo/gloo_context.cc" in files


def test_the_digest_follows_the_table(monkeypatch):
    before = edits.digest()
    monkeypatch.setattr(edits, "EDITS", (*EDITS, Edit("f", "a", "b", "x")))
    assert edits.digest() != before
