"""Compare hvdx with Horovod, name by name, by the tables of docs/horovod-compatibility.md.

The page is the declaration, Horovod's modules are what it is held to. A section compares a pair of
modules; its heading names them::

    ### `horovod.torch` and `hvdx.torch`

    | name | | how, or why not |
    | --- | --- | --- |
    | `rank` `size` | same | |
    | `allreduce` | better | takes bfloat16 |
    | `run` | refused | `AttributeError`: start it with `hvdx run` |

``DistributedOptimizer().step`` is a method of what ``DistributedOptimizer`` returns. A refused
name raises the error that its row names, and the message has all other words in backticks.

Run as a script, this prints the faults of all sections as JSON: frameworks, and a started
Horovod, stay out of the test's process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import json
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "horovod-compatibility.md"
VERDICTS = ("same", "better", "refused")

#: Horovod's packages that scripts import. Their modules have the rows of the package too.
FACES = (
    "horovod",
    "horovod.torch",
    "horovod.tensorflow",
    "horovod.tensorflow.keras",
    "horovod.keras",
    "horovod.common",
)
#: Modules that are no scripts' business, and why.
NOT_MODULES = {
    "horovod.torch.mpi_lib_v2": "the C++ library",
    "horovod.tensorflow.mpi_lib": "the C++ library",
    "horovod.tensorflow.data.compute_worker": "a program, not a module to import",
}
#: Public by spelling only: names that Horovod's modules import for their own use.
NOT_NAMES = {
    "HorovodBasics": "the C++ library's functions, of which the faces' are made",
    "MPI": "stands for mpi4py's in annotations",
    "TYPE_CHECKING": "typing's",
    "check_extension": "looks for the C++ library while Horovod is imported",
    "check_installed_version": "likewise",
    "find_duplicates": "a part of the optimizer's constructor",
    "get_average_backwards_compatibility_fun": "makes handle_average_backwards_compatibility",
    "get_version_mismatch_message": "a text of HorovodVersionMismatchError",
    "get_ext_suffix": "a part of the C++ library's file name",
    "get_extension_full_path": "likewise",
    "hvd": "horovod.tensorflow, as its own modules import it",
    "split_list": "cuts a list into parts, for Horovod's own use",
    "is_version_greater_equal_than": "asks for TensorFlow's version",
    "runner": "the launcher: its flags have a table of their own",
    "mpi_lib": "the C++ library",
    "mpi_lib_v2": "the C++ library",
}


class Row(NamedTuple):
    verdict: str
    note: str


class Section(NamedTuple):
    theirs: str  # Horovod's module
    ours: str
    rows: dict[str, Row]


# -- the page ------------------------------------------------------------------------------------


def read(page: str) -> list[Section]:
    """Return the sections of the page.

    Raises:
        ValueError: a row is malformed, or a name has two; the message shows the line.
    """
    sections: list[Section] = []
    for line in page.splitlines():
        if heading := re.match(r"#+ `(horovod[\w.]*)` and `(hvdx[\w. ]*)`$", line):
            sections.append(Section(heading[1], heading[2], {}))
        elif line.startswith("| `"):
            for name, row in _row(line):
                if name in sections[-1].rows:
                    raise ValueError(f"{sections[-1].theirs} has two rows for {name}")
                sections[-1].rows[name] = row
    return sections


def _row(line: str) -> Iterator[tuple[str, Row]]:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) != 3 or cells[1] not in VERDICTS:
        raise ValueError(f"not a row of name, {'/'.join(VERDICTS)}, note: {line}")
    names = re.findall(r"`([\w.()-]+)`", cells[0])
    if not names or (cells[1] != "same" and not cells[2]):
        raise ValueError(f"a row needs names, and all but 'same' a note: {line}")
    for name in names:
        yield name, Row(cells[1], cells[2])


# -- what Horovod has ----------------------------------------------------------------------------


def modules(face: str) -> list[str]:
    """Return the public modules of a face, itself first, without those of a face inside it."""
    if face == "horovod":  # its other packages are faces, or out of scope
        return [face]
    package = importlib.import_module(face)
    inside = [each.name for each in pkgutil.walk_packages(package.__path__, f"{face}.")]
    others = [each for each in FACES if each.startswith(f"{face}.")]
    return [
        name
        for name in [face, *inside]
        if name not in NOT_MODULES and "._" not in name and not name.startswith(tuple(others))
    ]


def public(module: types.ModuleType) -> dict[str, Any]:
    """Return a module's public names, by ``__all__``, or else all of Horovod's own.

    Those that a module inside a face has from its siblings do not count.
    """
    whole = module.__name__ in FACES or hasattr(module, "__all__")
    borrowed = set() if whole else _from_siblings(module)
    found = {}
    for name in getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        own = home(value).partition(".")[0] == "horovod" or isinstance(value, (bool, int, str))
        if isinstance(value, types.ModuleType):
            own = own and hasattr(module, "__path__")
        if own and not name.startswith("_") and name not in NOT_NAMES and name not in borrowed:
            found[name] = value
    return found


def _from_siblings(module: types.ModuleType) -> set[str]:
    """Return what a module imports from other modules, its own and Horovod's common ones aside."""
    ours = (f"{module.__name__}.", "horovod.common.")
    source = Path(module.__file__).read_text() if module.__file__ else ""
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and not f"{node.module}.".startswith(ours)
        for alias in node.names
    }


def home(value: Any) -> str:
    """Return the module that a value was made in."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", None) or type(value).__module__)


def own_members(kind: type) -> list[str]:
    """Return what Horovod, not a base class of a framework's, gives a class in public."""
    found: dict[str, None] = {}
    for base in filter(_horovods, kind.__mro__):
        found.update(dict.fromkeys(vars(base)))
    return [name for name in found if not name.startswith("_") and name not in NOT_NAMES]


def _horovods(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "horovod"


# -- comparing -----------------------------------------------------------------------------------


def faults(ours: Any, theirs: Any, alike: Callable[[Any, Any], bool] | None = None) -> list[str]:
    """Say in what ``ours`` cannot stand for ``theirs``; an empty list if it can.

    Args:
        ours: hvdx's object.
        theirs: Horovod's, of the same name.
        alike: whether two defaults, ours and theirs, mean the same though they differ.
    """
    alike = alike or (lambda ours, theirs: False)
    if isinstance(theirs, types.ModuleType):
        return [] if isinstance(ours, types.ModuleType) else [f"is no module but {ours!r}"]
    if isinstance(theirs, type):
        return _class_faults(ours, theirs, alike)
    if callable(theirs):
        return _call_faults(ours, theirs, alike)
    if isinstance(theirs, (bool, int, float, str)):
        return [] if ours == theirs else [f"is {ours!r}, not {theirs!r}"]
    return member_faults(ours, type(theirs), alike)


def _class_faults(ours: Any, theirs: type, alike: Callable[[Any, Any], bool]) -> list[str]:
    if not isinstance(ours, type):
        return [f"is no class but {ours!r}"]
    found = []
    if issubclass(theirs, BaseException) and not issubclass(theirs, ours):
        found.append("catches less: Horovod's exception is no instance of it")
    if any("__init__" in vars(base) for base in filter(_horovods, theirs.__mro__)):
        found += [f"__init__ {fault}" for fault in _call_faults(ours, theirs, alike)]
    return found + member_faults(ours, theirs, alike)


def member_faults(ours: Any, theirs: type, alike: Callable[[Any, Any], bool]) -> list[str]:
    """Compare what Horovod gave its class ``theirs`` with a class, or an instance, of ours."""
    found = []
    for name in own_members(theirs):
        try:
            own = getattr(ours, name)
        except Exception as error:
            found.append(f"lacks {name}: {type(error).__name__}: {error}")
            continue
        wanted = inspect.getattr_static(theirs, name)
        if isinstance(wanted, property):
            continue
        if isinstance(wanted, type):
            found += [f"{name} {fault}" for fault in member_faults(own, wanted, alike)]
            continue
        if callable(wanted) or isinstance(wanted, (staticmethod, classmethod)):
            unbound = isinstance(ours, type) and _is_method(inspect.getattr_static(ours, name))
            pair = (_parameters(own)[unbound:], _declared(theirs, name))
            found += [f"{name} {fault}" for fault in _parameter_faults(*pair, alike)]
    return found


def _is_method(attribute: Any) -> bool:
    return inspect.isfunction(attribute)  # neither static nor of the class


def _declared(kind: type, name: str) -> list[inspect.Parameter]:
    """Return a method's parameters; those of the method that it overrides if it only hands on."""
    for base in kind.__mro__:
        if name in vars(base):
            attribute = vars(base)[name]
            parameters = _parameters(getattr(base, name))[_is_method(attribute) :]
            if any(p.kind not in _ANY for p in parameters) or not parameters:
                break
    return parameters


def _call_faults(ours: Any, theirs: Any, alike: Callable[[Any, Any], bool]) -> list[str]:
    if not callable(ours):
        return [f"cannot be called: {ours!r}"]
    return _parameter_faults(_parameters(ours), _parameters(theirs), alike)


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _parameter_faults(
    ours: list[inspect.Parameter],
    theirs: list[inspect.Parameter],
    alike: Callable[[Any, Any], bool],
) -> list[str]:
    """Say which calls that ``theirs`` takes ``ours`` does not, or takes to mean something else."""
    found = []
    own = {parameter.name: parameter for parameter in ours}
    order = [parameter.name for parameter in ours if parameter.kind in _BY_PLACE]
    kinds = {parameter.kind for parameter in ours}
    for place, wanted in enumerate(theirs):
        if wanted.kind in _ANY:
            if wanted.kind not in kinds:
                found.append(f"takes no {wanted}")
        elif wanted.name not in own:
            found.append(f"lacks the parameter {wanted.name}")
        else:
            found += _default_faults(own[wanted.name], wanted, alike)
            if wanted.kind in _BY_PLACE and order[place : place + 1] != [wanted.name]:
                found.append(f"has {wanted.name} at another place")
    known = {parameter.name for parameter in theirs}
    for extra in ours:
        needed = extra.default is extra.empty and extra.kind not in _ANY
        if extra.name not in known and needed:
            found.append(f"also needs {extra.name}")
    return found


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _default_faults(
    own: inspect.Parameter, wanted: inspect.Parameter, alike: Callable[[Any, Any], bool]
) -> list[str]:
    if wanted.default is wanted.empty:
        return []
    if own.default is own.empty:
        return [f"has no default for {own.name}"]
    if own.default is wanted.default or alike(own.default, wanted.default):
        return []
    with contextlib.suppress(Exception):
        if bool(own.default == wanted.default):
            return []
    return [f"has {own.name}={own.default!r}, not {wanted.default!r}"]


# -- a section -----------------------------------------------------------------------------------


def check(section: Section, inherited: dict[str, Row], samples: Any) -> dict[str, list[str]]:
    """Compare a section's modules by its rows; return faults by name.

    Args:
        section: what the page says.
        inherited: rows of the sections of the enclosing packages: a name that has one there, as
            most of ``horovod.torch.mpi_ops`` have, needs no other.
        samples: ``samples(module, name)`` returns what a function of this name returns, a pair of
            ours and a class of theirs, or None; see ``DistributedOptimizer().step`` above.
    """
    theirs, ours = map(importlib.import_module, (section.theirs, section.ours))
    wanted = public(theirs)
    found: dict[str, list[str]] = {}
    for name, value in wanted.items():
        row = section.rows.get(name) or inherited.get(name)
        if row is None:
            found[name] = ["has no row"]
        elif row.verdict != "refused":
            found[name] = _compare(ours, name, value, row)
            if not found[name] and (sample := samples(section, name)):
                found.update(_returned(section, f"{name}()", *sample))
    for name, row in section.rows.items():
        if row.verdict == "refused" and "()" not in name:
            found[name] = refusal_faults(functools.partial(getattr, ours, name), row.note)
        elif name not in wanted and "()" not in name:
            found[name] = _compare_extra(ours, name, row)
    return {name: told for name, told in found.items() if told}


def _compare(ours: Any, name: str, theirs: Any, row: Row) -> list[str]:
    try:
        if isinstance(theirs, types.ModuleType):
            importlib.import_module(f"{ours.__name__}.{name}")
        own = getattr(ours, name)
    except Exception as error:
        return [f"hvdx lacks it: {type(error).__name__}: {error}"]
    if row.verdict == "better" and own is theirs and not isinstance(own, types.ModuleType):
        return ["is Horovod's own, and called better"]
    return faults(own, _forwarded(name, theirs), same_default)


def _compare_extra(ours: Any, name: str, row: Row) -> list[str]:
    """A row for what Horovod's module lacks, on these versions: hvdx must have it."""
    if row.verdict == "same":
        return ["Horovod has no such name"]
    try:
        getattr(ours, name)
    except Exception as error:
        return [f"hvdx lacks it: {type(error).__name__}: {error}"]
    return []


def _returned(section: Section, prefix: str, ours: Any, theirs: type) -> dict[str, list[str]]:
    """Compare what a function returns: instance of ours, class of theirs."""
    refused = {
        name.removeprefix(f"{prefix}."): row.note
        for name, row in section.rows.items()
        if name.startswith(f"{prefix}.") and row.verdict == "refused"
    }
    found = {}
    for name, note in refused.items():
        found[f"{prefix}.{name}"] = refusal_faults(functools.partial(getattr, ours, name), note)
    told = member_faults(ours, theirs, same_default)
    pattern = re.compile(rf"(lacks )?({'|'.join(map(re.escape, refused))})\b")
    found[prefix] = [fault for fault in told if not (refused and pattern.match(fault))]
    return found


def _forwarded(name: str, theirs: Any) -> Any:
    """Return what Horovod's ``init(*args, **kwargs)`` and its like hand their arguments to."""
    if name not in ("init", "shutdown"):
        return theirs
    from horovod.common.basics import HorovodBasics

    return functools.partial(getattr(HorovodBasics, name), None)


def same_default(ours: Any, theirs: Any) -> bool:
    """Return whether a default of ours means what Horovod's does."""
    from horovod.common.process_sets import ProcessSet

    from hvdx.compression import Compression

    if isinstance(theirs, ProcessSet):  # only ever the global one
        return ours is None
    return getattr(theirs, "__name__", "") == "NoneCompressor" and ours is Compression.none


def refusal_faults(get: Callable[[], Any], note: str) -> list[str]:
    """Get a refused name, and call it if there is one: the error must be what the note says."""
    kind, *words = re.findall(r"`([^`]+)`", note)
    try:
        refused = get()
        needed = [p for p in _parameters(refused) if p.default is p.empty]
        refused(*[0 for p in needed if p.kind in _BY_PLACE])
    except Exception as error:
        if type(error).__name__ != kind:
            return [f"raises {type(error).__name__}, not {kind}: {error}"]
        return [f"does not say {word!r} but {error}" for word in words if word not in str(error)]
    return ["is not refused"]


# -- what functions return -----------------------------------------------------------------------


def samples(section: Section, name: str) -> tuple[Any, type] | None:
    """Make what ``name`` of hvdx's module returns, and find Horovod's class for it."""
    make = _SAMPLES.get((section.theirs, name))
    return make(importlib.import_module(section.ours)) if make else None


def _torch_optimizer(hvd: Any) -> tuple[Any, type]:
    import horovod.torch.optimizer
    import torch

    parameter = torch.nn.Parameter(torch.zeros(2))
    made = hvd.DistributedOptimizer(torch.optim.SGD([parameter], 0.1), [("p", parameter)])
    return made, horovod.torch.optimizer._DistributedOptimizer


def _tape(hvd: Any) -> tuple[Any, type]:
    import horovod.tensorflow
    import tensorflow as tf

    kind = horovod.tensorflow._DistributedGradientTape
    return hvd.DistributedGradientTape(tf.GradientTape()), kind


def _partial_tape(hvd: Any) -> tuple[Any, type]:
    import horovod.tensorflow
    import tensorflow as tf

    made = hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[])
    return made, horovod.tensorflow._DistributedGradientTape


def _keras_optimizer(hvd: Any) -> tuple[Any, type]:
    import horovod.keras
    import keras

    theirs = horovod.keras.DistributedOptimizer(keras.optimizers.SGD(0.1))
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), type(theirs)


_SAMPLES: dict[tuple[str, str], Callable[[Any], tuple[Any, type]]] = {
    ("horovod.torch", "DistributedOptimizer"): _torch_optimizer,
    ("horovod.tensorflow", "DistributedGradientTape"): _tape,
    ("horovod.tensorflow", "PartialDistributedGradientTape"): _partial_tape,
    ("horovod.tensorflow", "DistributedOptimizer"): _keras_optimizer,
    ("horovod.keras", "DistributedOptimizer"): _keras_optimizer,
    ("horovod.tensorflow.keras", "DistributedOptimizer"): _keras_optimizer,
}


# -- all of it -----------------------------------------------------------------------------------


def check_all(sections: list[Section]) -> dict[str, dict[str, list[str]]]:
    """Compare all modules; return faults by Horovod's module and name.

    A module without a section has no names but those of its face.
    """
    for face in FACES:
        importlib.import_module(face)
    by_module = {section.theirs: section for section in sections}
    found: dict[str, dict[str, list[str]]] = {}
    for face in FACES:
        rows = by_module[face].rows
        for module in modules(face):
            part = module.removeprefix(face).split(".")[1:2]
            if part and part[0] in rows and rows[part[0]].verdict == "refused":
                continue
            unsaid = Section(module, by_module[face].ours + module.removeprefix(face), {})
            section = by_module.get(module, unsaid)
            try:
                found[module] = check(section, {} if module == face else rows, samples)
            except Exception as error:
                found[module] = {"": [f"{type(error).__name__}: {error}"]}
    return found


def face_of(module: str) -> str:
    """Return the innermost face that a module belongs to."""
    return max((face for face in FACES if f"{module}.".startswith(f"{face}.")), key=len)


def main() -> None:
    """Print the faults of the page, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=PAGE)
    page = parser.parse_args().page.read_text()
    with contextlib.redirect_stdout(sys.stderr):
        import hvdx

        hvdx.init(framework=("torch", "tensorflow"))
        found = check_all(read(page))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
