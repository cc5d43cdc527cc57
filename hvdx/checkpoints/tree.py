"""State as nested dictionaries, told apart into JSON and tensors, and put together again.

A *tree* is what ``state_dict()`` of most objects returns: dictionaries, lists and tuples of
numbers, strings, None and tensors. :func:`flat` makes of it an *outline*, which is plain JSON, and
named tensors, which are bytes with a type and a shape; :func:`built` undoes that. Nothing else is
ever saved, so nothing that is read can be code.

    {"steps": 3, "betas": (0.9, 0.99), 7: tensor}
    {"items": [["steps", 3], ["betas", {"tuple": [0.9, 0.99]}], [7, {"tensor": "part/7"}]]}
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hvdx.errors import CheckpointError
from hvdx.frameworks import kind_of

Tree: TypeAlias = Any

#: Types of elements: NumPy's names, and the codes and bytes that ``safetensors`` files have.
CODES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "complex64": ("C64", 8),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1),
    "uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2), "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}  # fmt: skip
TYPES = {code: name for name, (code, _) in CODES.items()}


class Stored(NamedTuple):
    """A tensor of no framework: what lies in a file."""

    dtype: str
    """A key of :data:`CODES`."""
    shape: tuple[int, ...]
    data: Any
    """A buffer: elements in row-major order, little-endian."""
    form: str = "array"
    """What it was, and is to become: ``"torch"``, or a NumPy ``"array"``."""

    @property
    def nbytes(self) -> int:
        """Its length by type and shape."""
        return math.prod(self.shape) * CODES[self.dtype][1]

    def told(self) -> str:
        """Describe it, for messages."""
        return f"{self.dtype} {self.shape}"


def stored(value: Any) -> Stored | None:
    """Return a copy of a tensor, array or variable in host memory; None if it is none.

    Raises:
        TypeError: files know no such type of elements.
    """
    library = kind_of(type(value))
    if library == "torch":
        module = importlib.import_module("hvdx.integrations.pytorch_checkpoint")
        return module.stored(value)  # type: ignore[no-any-return]
    if library == "tensorflow" and hasattr(value, "numpy"):
        value = np.asarray(value.numpy())
    elif library == "keras" and hasattr(value, "assign"):
        value = importlib.import_module("hvdx.integrations.keras3_checkpoint").array(value)
    if not isinstance(value, np.ndarray):
        return None
    if value.dtype.name not in CODES:
        raise TypeError(f"an array of {value.dtype.name} cannot be saved")
    data = np.array(value.astype(value.dtype.newbyteorder("<"), copy=False), order="C", copy=True)
    return Stored(value.dtype.name, value.shape, data.reshape(-1).view(np.uint8).data)


def tensor(value: Stored) -> Any:
    """Return a copy of what was stored, as what it was; PyTorch's as arrays where there is none."""
    if value.form == "torch" and importlib.util.find_spec("torch") is not None:
        return importlib.import_module("hvdx.integrations.pytorch_checkpoint").tensor(value)
    return array(value)


def array(value: Stored) -> np.ndarray:
    """Return a copy of what was stored as an array of NumPy.

    Raises:
        CheckpointError: NumPy needs the package ``ml_dtypes`` for such elements.
    """
    try:
        kind = np.dtype(value.dtype)
    except TypeError:
        try:
            kind = np.dtype(getattr(importlib.import_module("ml_dtypes"), value.dtype))
        except ImportError:
            raise CheckpointError(
                f"NumPy has no {value.dtype}: install ml_dtypes to read it as an array"
            ) from None
    made = np.empty(value.shape, kind)
    made.reshape(-1).view(np.uint8)[:] = np.frombuffer(value.data, np.uint8) if made.size else 0
    return made


def wide(value: Stored) -> np.ndarray:
    """Return what was stored as an array that NumPy calculates with: bfloat16 as float32."""
    if value.dtype != "bfloat16":
        return array(value)
    halves = array(value._replace(dtype="uint16"))
    return (halves.astype(np.uint32) << 16).view(np.float32)


def narrow(value: np.ndarray, like: Stored) -> Any:
    """Return an array as what ``like`` was, in its type."""
    if like.form == "torch":
        module = importlib.import_module("hvdx.integrations.pytorch_checkpoint")
        return module.narrow(value, like.dtype)
    return value.astype(array(like._replace(shape=(0,), data=b"")).dtype)


def mapped(tree: Tree, change: Callable[[Stored], Any] = tensor) -> Tree:
    """Copy a tree with every :class:`Stored` in it changed."""
    if isinstance(tree, Stored):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, change) for value in tree)
    return tree


def merged(trees: list[Tree]) -> Tree:
    """Return one dictionary of what several hold, and they of theirs; the first to know counts."""
    if not all(isinstance(tree, dict) for tree in trees):
        return trees[0]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return {key: merged([tree[key] for tree in trees if key in tree]) for key in keys}


def flat(tree: Tree, name: str) -> tuple[Any, dict[str, Stored]]:
    """Take a tree apart.

    Args:
        tree: see above. Tensors are copied to host memory.
        name: what tensors' names begin with.

    Returns:
        The outline, and tensors by name.

    Raises:
        TypeError: it holds something else; the message says where.
    """
    tensors: dict[str, Stored] = {}
    return _outline(tree, name, tensors), tensors


def _outline(value: Any, path: str, tensors: dict[str, Stored]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, Stored):
        return _put(value, path, tensors)
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_outline(each, f"{path}/{i}", tensors) for i, each in enumerate(value)]}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"{path} has the key {key!r}: only strings and numbers are saved")
        entries = [(k, _outline(each, f"{path}/{k}", tensors)) for k, each in value.items()]
        if all(isinstance(key, str) for key in value):
            return {"dict": dict(entries)}
        return {"items": [list(entry) for entry in entries]}
    try:
        found = stored(value)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from None
    if found is None:
        raise TypeError(
            f"{path} is a {type(value).__name__}: checkpoints hold numbers, strings, tensors, and "
            "lists and dictionaries of them"
        )
    return _put(found, path, tensors)


def _put(value: Stored, path: str, tensors: dict[str, Stored]) -> dict[str, str]:
    name, copy = path, 0
    while name in tensors:  # keys may hold slashes
        copy += 1
        name = f"{path}#{copy}"
    tensors[name] = value
    return {"tensor": name, "form": value.form}


def built(outline: Any, find: Callable[[str], Stored]) -> Tree:
    """Put a tree together, with :class:`Stored` for its tensors.

    Args:
        outline: as of :func:`flat`, from a file that may be anything.
        find: returns a tensor by name; raises KeyError.

    Raises:
        ValueError: it is no outline.
    """
    if outline is None or isinstance(outline, (bool, int, float, str)):
        return outline
    if isinstance(outline, dict):
        if outline.keys() == {"tensor", "form"} and outline["form"] in ("torch", "array"):
            try:
                return find(outline["tensor"])._replace(form=outline["form"])
            except (KeyError, TypeError):
                raise ValueError(f"it lacks tensor {outline['tensor']!r}") from None
        if len(outline) == 1:
            ((kind, content),) = outline.items()
            if kind == "dict" and isinstance(content, dict):
                return {key: built(each, find) for key, each in content.items()}
            if kind in ("list", "tuple") and isinstance(content, list):
                made = [built(each, find) for each in content]
                return tuple(made) if kind == "tuple" else made
            if kind == "items" and isinstance(content, list) and all(map(_is_item, content)):
                return {key: built(each, find) for key, each in content}
    raise ValueError(f"{str(outline)[:60]!r} is no part of an outline")


def _is_item(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], (str, int))
