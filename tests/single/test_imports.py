"""Importing hvdx loads no framework, and only the faces and integrations/ may import one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "tensorflow", "keras", "horovod"}
LIGHT = [
    "hvdx",
    "hvdx.pipeline.plan",
    "hvdx.pipeline.run",
    "hvdx.compression",
    "hvdx.cli",
    "hvdx.launch",
    "hvdx.build",
    "hvdx.doctor",
]
ROOT = Path(__file__).resolve().parents[2]
FACES = {"common", "torch", "keras", "tensorflow"}  # folders


def loaded_by(code: str) -> set[str]:
    """Return the heavy packages present after ``code`` ran in a fresh interpreter."""
    probe = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True
    )
    return HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module):
    assert loaded_by(f"import {module}") == set()


def test_calls_before_init_are_light():
    code = "import hvdx\ntry: hvdx.rank()\nexcept ValueError: pass\nelse: raise SystemExit(1)"
    assert loaded_by(f"{code}\nhvdx.is_initialized()") == set()


def test_help_is_light():
    code = "from hvdx.cli import main\nmain(['--help'], standalone_mode=False)"
    assert loaded_by(code) == set()


def test_the_probe_can_fail():
    pytest.importorskip("torch")
    assert "torch" in loaded_by("import torch")


def test_import_is_quick():
    """Well under a second; the median of three, in processor time, since machines may be busy."""
    taken = []
    for _ in range(3):
        code = "import time; t = time.process_time(); import hvdx; print(time.process_time() - t)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        taken.append(float(done.stdout))
    assert sorted(taken)[1] < 0.5, taken


def imported_at_module_level(tree: ast.Module) -> set[str]:
    """Name the top packages that running ``tree`` imports, those under ``if`` and ``try`` too."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        waiting += ast.iter_child_nodes(node)
    return found


CORE = sorted(
    path for path in (ROOT / "hvdx").rglob("*.py")
    if path.relative_to(ROOT / "hvdx").parts[0] not in FACES
)  # fmt: skip


def test_there_is_a_core_to_look_at():
    assert {"world.py", "comm.py", "__init__.py"} <= {path.name for path in CORE}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_core_imports_no_framework(path):
    imported = imported_at_module_level(ast.parse(path.read_text()))
    assert not HEAVY & {name.partition(".")[0] for name in imported}
    assert not {name for name in imported if name.startswith("hvdx.integrations")}
    faces = tuple(f"hvdx.{face}" for face in FACES)
    assert not {name for name in imported if name.startswith(faces)}, "nothing imports a face"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch.nn", {"torch.nn"}),
        ("try:\n    from keras import ops\nexcept ImportError: pass", {"keras"}),
        ("class A:\n    import horovod", {"horovod"}),
        ("if 1:\n    import os\nelse:\n    import torch", {"os", "torch"}),
        ("def f():\n    import torch", set()),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import os", {"os"}),
    ],
)
def test_the_reader_of_imports(code, found):
    assert imported_at_module_level(ast.parse(code)) == found


def test_integrations_are_imported_by_their_full_name():
    done = subprocess.run(
        [sys.executable, "-c", "import integrations"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "'integrations' is hvdx.integrations: import that" in done.stderr


def test_an_unknown_name():
    import hvdx

    with pytest.raises(AttributeError, match="module 'hvdx' has no attribute 'nonsense'"):
        _ = hvdx.nonsense


def test_all_names_are_there():
    import hvdx

    late = {"ProcessSet", "callbacks", "global_process_set"}  # load Horovod or Keras
    assert not late & set(hvdx.__all__)
    for name in hvdx.__all__:
        assert getattr(hvdx, name) is not None
