"""Files that are whole or not there: ``safetensors`` with checksums, and JSON.

A ``safetensors`` file is the length of its header, 8 bytes; the header, JSON that says of each
tensor its type, shape and place; and the tensors' bytes. It holds no code. Of its free text,
``__metadata__``, hvdx uses one entry, also JSON: what is no tensor.

Files are written beside their place, forced to the disk, and put into it by a rename, so that
whoever looks sees the old one or the new one, whatever has died when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hvdx.checkpoints.tree import CODES, TYPES, Stored, Tree, built, flat
from hvdx.errors import CheckpointError

PARTIAL = ".partial"  # what a file's name ends with until it is whole
_ABOUT = "hvdx"  # the entry of __metadata__
_LONGEST = 100_000_000  # bytes of a header, as safetensors' own limit
_CHUNK = 8 << 20
FORMAT = 1


class Written(NamedTuple):
    """What a file was when it was written."""

    bytes: int
    sha256: str


class Damaged(ValueError):
    """A file is not what was written."""


@contextlib.contextmanager
def beside(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` once it is whole and on the disk.

    Raises:
        OSError: it cannot be written. Nothing is left of it then, and ``path`` is as before.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        force(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def force(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, tensors: Mapping[str, Stored], about: Any) -> Written:
    """Write a ``safetensors`` file.

    Args:
        path: where to.
        tensors: by name.
        about: goes with them; anything that JSON knows.

    Raises:
        OSError: it cannot be written; see :func:`beside`.
    """
    # As safetensors itself does: wide elements first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda entry: (-CODES[entry[1].dtype][1], entry[0]))
    header: dict[str, Any] = {"__metadata__": {_ABOUT: json.dumps(about)}}
    place = 0
    for name, each in ordered:
        end = place + each.nbytes
        code = CODES[each.dtype][0]
        header[name] = {"dtype": code, "shape": list(each.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    whole, size = hashlib.sha256(), 0
    with beside(path) as file:
        for piece in (len(text).to_bytes(8, "little"), text, *(each.data for _, each in ordered)):
            file.write(piece)
            whole.update(piece)
            size += len(piece)
    return Written(size, whole.hexdigest())


def digest(path: Path) -> Written:
    """Return what a file is now."""
    whole, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            whole.update(piece)
            size += len(piece)
    return Written(size, whole.hexdigest())


class File:
    """A ``safetensors`` file that is read where it lies, as far as it is looked at.

    Args:
        path: of the file.

    Attributes:
        tensors: by name, with views of the file.
        about: what went with them; None if the file is not hvdx's.

    Raises:
        Damaged: it is none.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: Any = None
        try:
            self._check(path)
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = memoryview(self._map)
            self.tensors = dict(self._entries())
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{path}: {error}") from None

    def _check(self, path: Path) -> None:
        """Have safetensors itself look at the header, which it does without trusting it."""
        from safetensors import SafetensorError, safe_open

        with path.open("rb") as file:
            start = file.read(8)
        if start[:4] == b"PK\x03\x04":
            raise ValueError(
                "it is a zip archive, as torch.save and numpy.savez write them: hvdx reads "
                "safetensors files"
            )
        if int.from_bytes(start, "little") > _LONGEST:
            raise ValueError("it does not begin as a safetensors file does")
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(f"it is no whole safetensors file ({error})") from None

    def _entries(self) -> Iterator[tuple[str, Stored]]:
        length = int.from_bytes(self._data[:8], "little")
        header = json.loads(self._data[8 : 8 + length].tobytes())
        told = header.pop("__metadata__", {}).get(_ABOUT)
        self.about = None if told is None else json.loads(told)
        data = self._data[8 + length :]
        for name, entry in header.items():
            dtype = TYPES.get(entry["dtype"])
            if dtype is None:
                raise ValueError(f"tensor {name!r} has elements of type {entry['dtype']}")
            start, end = entry["data_offsets"]
            found = Stored(dtype, tuple(entry["shape"]), data[start:end])
            if not 0 <= start <= end <= len(data) or end - start != found.nbytes:
                raise ValueError(f"tensor {name!r} lies outside of the file")
            yield name, found

    def tree(self, outline: Any) -> Tree:
        """Put together what lies here; see :func:`hvdx.checkpoints.tree.built`.

        Raises:
            Damaged: something is missing.
        """
        try:
            return built(outline, self.tensors.__getitem__)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{self.path}: {error}") from None


def write_json(path: Path, told: dict[str, Any]) -> None:
    """Write a dictionary as JSON, with a checksum of its own in it."""
    with beside(path) as file:
        file.write(json.dumps({**told, "checksum": _print(told)}).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Raises:
        Damaged: it is something else.
        OSError: it cannot be read.
    """
    try:
        told = json.loads(path.read_bytes())
        if not isinstance(told, dict) or told.pop("checksum", None) != _print(told):
            raise ValueError("its checksum does not fit")
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: {error}") from None
    return told


def _print(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


# One file for all: what pipe.save() writes.


def write_tree(path: Path, tree: dict[str, Any]) -> None:
    """Write a tree to one file, with a checksum of its tensors and outline.

    Raises:
        OSError: it cannot be written.
        TypeError: the tree holds something that cannot be saved.
    """
    outlines, tensors = {}, {}
    for part, each in tree.items():
        outlines[part], own = flat(each, part)
        tensors.update(own)
    told = {"format": FORMAT, "tree": outlines}
    write(path, tensors, {**told, "sha256": _sum(told, tensors)})


def read_tree(path: Path) -> tuple[bool, Tree]:
    """Read what :func:`write_tree` wrote, or tensors that anybody has written.

    Returns:
        Whether it is hvdx's, and the tree, of :class:`Stored`; or, if it is not, tensors by name.

    Raises:
        Damaged: it is neither, or its checksum does not fit.
        OSError: it cannot be read.
    """
    file = File(path)
    if file.about is None:
        return False, {name: each._replace(form="torch") for name, each in file.tensors.items()}
    about = file.about
    if not isinstance(about, dict) or about.get("format") != FORMAT or "tree" not in about:
        raise Damaged(f"{path}: it has a format that this version of hvdx does not know")
    if about.pop("sha256", None) != _sum(about, file.tensors):
        raise Damaged(f"{path}: its checksum does not fit, it was changed since it was written")
    return True, file.tree({"dict": about["tree"]})


def _sum(told: Any, tensors: Mapping[str, Stored]) -> str:
    whole = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        each = tensors[name]
        whole.update(f"{name} {each.dtype} {each.shape}".encode())
        whole.update(each.data)
    return whole.hexdigest()


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what lies in a file that ``pipe.save`` has written, or in any ``safetensors`` file.

    Args:
        path: of the file.

    Returns:
        Nested dictionaries. ``"model"`` is what ``model.load_state_dict`` takes; for a Keras
        model, arrays by path of the variable.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    from hvdx.checkpoints.tree import mapped

    try:
        tree: dict[str, Any] = mapped(read_tree(Path(path))[1])
    except (OSError, Damaged) as error:
        raise CheckpointError(f"{os.fspath(path)!r} cannot be read: {error}") from None
    return tree
