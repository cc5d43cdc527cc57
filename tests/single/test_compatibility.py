"""docs/horovod-compatibility.md is true: every name of Horovod's is in hvdx as its table says."""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import compatibility
from compatibility import PAGE, Row, Section, faults, read

SECTIONS = read(PAGE.read_text())
needs_everything = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("horovod", "torch", "tensorflow", "keras")),
    reason="needs Horovod and all frameworks",
)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[str]]]:
    """The faults of the page, by module and name; found in a process of their own."""
    done = subprocess.run(
        [sys.executable, compatibility.__file__],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_everything
@pytest.mark.parametrize("face", compatibility.FACES)
def test_face(found, face):
    told = [
        f"{module}: {name}: {fault}"
        for module, names in found.items()
        for name, each in names.items()
        for fault in each
        if compatibility.face_of(module) == face
    ]
    assert not told, "\n".join(told)


@needs_everything
def test_every_section_is_of_a_module(found):
    assert {section.theirs for section in SECTIONS} <= {*found, "horovodrun"}
    assert len(found) > 25


@pytest.fixture
def flags(monkeypatch) -> dict[str, argparse.Action]:
    """Horovod's flags, taken from its parser."""
    launch = pytest.importorskip("horovod.runner.launch")
    parsers: list[argparse.ArgumentParser] = []

    def grab(parser):
        parsers.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", grab)
        launch.parse_args()
    return parsers[0]._option_string_actions


@pytest.mark.filterwarnings("ignore:Argument")  # old spellings
def test_flags(flags, tmp_path):
    """Each has a row; `hvdx run` takes it, or refuses it as the row says."""
    from hvdx.launch.arguments import parse

    (rows,) = (section.rows for section in SECTIONS if section.theirs == "horovodrun")
    assert set(rows) == set(flags)
    file = tmp_path / "file"
    file.write_text("params: {}")  # --config-file reads it
    for flag, action in flags.items():
        if action.dest == "check_build":
            continue  # would load the frameworks
        values = {int: "2", float: "0.5"}.get(action.type, str(file))
        values = action.choices[0] if action.choices else values
        words = [flag] + [values] * {None: 1, 0: 0}.get(action.nargs, action.nargs)
        line = [*words, *(() if action.dest == "num_proc" else ("-np", "2")), "--", "train"]
        if rows[flag].verdict == "refused":
            told = compatibility.refusal_faults(functools.partial(parse, line), rows[flag].note)
            assert told == [], flag
        elif action.dest in ("help", "version"):
            with pytest.raises(SystemExit):
                parse(line)
        else:
            assert parse(line).command == ["train"]


# -- the checker can fail ------------------------------------------------------------------------


def theirs_module(**names: object) -> types.ModuleType:
    """A module that might be Horovod's."""
    module = types.ModuleType("horovod.invented")
    module.__file__ = None
    for name, value in names.items():
        if hasattr(value, "__module__"):
            value.__module__ = module.__name__
        setattr(module, name, value)
    return module


def check(monkeypatch, theirs: types.ModuleType, ours: types.ModuleType, **rows: Row) -> dict:
    monkeypatch.setitem(sys.modules, "horovod.invented", theirs)
    monkeypatch.setitem(sys.modules, "hvdx.invented", ours)
    section = Section("horovod.invented", "hvdx.invented", rows)
    return compatibility.check(section, {}, lambda section, name: None)


def gather(tensor, name=None): ...


def test_a_removed_name_is_told(monkeypatch):
    ours, same = types.ModuleType("ours"), Row("same", "")
    theirs = theirs_module(gather=gather)
    told = check(monkeypatch, theirs, ours, gather=same)
    assert told["gather"][0].startswith("hvdx lacks it: AttributeError")
    ours.gather = gather
    assert check(monkeypatch, theirs, ours, gather=same) == {}


def test_a_name_without_a_row_is_told(monkeypatch):
    ours = types.ModuleType("ours")
    ours.gather = gather
    assert check(monkeypatch, theirs_module(gather=gather), ours) == {"gather": ["has no row"]}


def test_a_row_for_no_name_is_told(monkeypatch):
    told = check(monkeypatch, theirs_module(), types.ModuleType("ours"), gather=Row("same", ""))
    assert told == {"gather": ["Horovod has no such name"]}


def test_a_claim_of_better_for_horovods_own_is_told(monkeypatch):
    ours = types.ModuleType("ours")
    ours.gather = gather
    told = check(monkeypatch, theirs_module(gather=gather), ours, gather=Row("better", "faster"))
    assert told == {"gather": ["is Horovod's own, and called better"]}


def test_what_is_not_refused_is_told(monkeypatch):
    ours = types.ModuleType("ours")
    theirs = theirs_module(gather=gather)
    row = Row("refused", "`RuntimeError`: use `spread`")

    def wrong(tensor):
        raise ValueError("use spread")

    def short(tensor):
        raise RuntimeError("no")

    def right(tensor):
        raise RuntimeError("use spread instead")

    told = []
    for own in (gather, wrong, short, right):
        ours.gather = own
        told.append(check(monkeypatch, theirs, ours, gather=row).get("gather"))
    assert told == [
        ["is not refused"],
        ["raises ValueError, not RuntimeError: use spread"],
        ["does not say 'spread' but no"],
        None,
    ]


class Average(enum.IntEnum):
    one = 1


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        (lambda tensor, op=1, *, name=None: 0, []),
        (lambda tensor, op=Average.one, *, name=None, more=0, **rest: 0, []),
        (lambda tensor=0, op=1, name=None: 0, []),
        (lambda tensor, op=2, *, name=None: 0, ["has op=2, not 1"]),
        (lambda tensor, op, *, name=None: 0, ["has no default for op"]),
        (lambda tensor, op=1: 0, ["lacks the parameter name"]),
        (lambda value, op=1, *, name=None: 0, ["lacks the parameter tensor", "also needs value"]),
        (
            lambda op=1, tensor=0, *, name=None: 0,
            ["has tensor at another place", "has op at another place"],
        ),
        (lambda tensor, *, op=1, name=None: 0, ["has op at another place"]),
        (lambda tensor, op=1, *, name=None, more: 0, ["also needs more"]),
        (7, ["cannot be called: 7"]),
    ],
)
def test_signatures(ours, told):
    def theirs(tensor, op=1, *, name=None): ...

    assert faults(ours, theirs) == told


def test_forwarded_arguments_must_be_taken():
    def theirs(*args, **kwargs): ...

    assert faults(lambda: 0, theirs) == ["takes no *args", "takes no **kwargs"]
    assert faults(lambda *args, **kwargs: 0, theirs) == []


def horovods(**members: object) -> type:
    return type("Made", (), {"__module__": "horovod.invented", **members})


def test_members_of_classes():
    def step(self, closure=None): ...

    def compress(tensor): ...

    theirs = horovods(step=step, compress=staticmethod(compress), ready=property(id))

    class Right:
        ready = True

        def step(self, closure=None, more=0): ...

        @classmethod
        def compress(cls, tensor): ...

    class Wrong:
        ready = True

        def step(self): ...

        @staticmethod
        def compress(tensor, ctx): ...

    assert faults(Right, theirs) == []
    assert faults(Wrong, theirs) == ["step lacks the parameter closure", "compress also needs ctx"]
    assert compatibility.member_faults(Right(), theirs, lambda ours, theirs: False) == []
    assert faults(object, theirs)[0].startswith("lacks step")
    assert faults(lambda: 0, theirs)[0].startswith("is no class")


def test_what_a_function_returns(monkeypatch):
    def wrap(optimizer): ...

    def step(self, closure=None): ...

    theirs = theirs_module(wrap=wrap)
    monkeypatch.setitem(sys.modules, "horovod.invented", theirs)
    ours = types.ModuleType("hvdx.invented")
    ours.wrap = wrap
    monkeypatch.setitem(sys.modules, "hvdx.invented", ours)
    kind = horovods(step=step, skip=step)
    rows = {"wrap": Row("same", ""), "wrap().skip": Row("refused", "`AttributeError`: none")}

    class Made:
        def step(self): ...

        def __getattr__(self, name):
            raise AttributeError(f"none {name}")

    section = Section("horovod.invented", "hvdx.invented", rows)
    told = compatibility.check(section, {}, lambda section, name: (Made(), kind))
    assert told == {"wrap()": ["step lacks the parameter closure"]}
    del rows["wrap().skip"]
    told = compatibility.check(section, {}, lambda section, name: (Made(), kind))
    assert told["wrap()"][1].startswith("lacks skip")


def test_constructors():
    def make(self, size, eps=1e-5): ...

    class Wrong:
        def __init__(self, size, eps=1e-3): ...

    assert faults(Wrong, horovods(__init__=make)) == ["__init__ has eps=0.001, not 1e-05"]


def test_an_exception_must_catch_horovods():
    error = type("Lost", (RuntimeError,), {"__module__": "horovod.invented"})
    assert faults(error, error) == []
    assert faults(RuntimeError, error) == []
    assert faults(ValueError, error)[0].startswith("catches less")


def test_constants():
    assert faults(Average.one, 1) == []
    assert faults(2, 1) == ["is 2, not 1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("| `rank` | maybe | |", "not a row"),
        ("| `rank` | better | |", "a row needs"),
        ("| `rank` | same | |\n| `rank` | same | |", "has two rows for rank"),
    ],
)
def test_malformed_pages(line, message):
    with pytest.raises(ValueError, match=message):
        read(f"### `horovod.torch` and `hvdx.torch`\n{line}\n")
