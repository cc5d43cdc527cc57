"""A folder of checkpoints: which there are, which are whole, and which have to go.

    saved/
      step-00000200/
        manifest.json                        written last: without it there is no checkpoint
        rank-00000.5f3c09ab.safetensors      one per rank, called after the attempt to save
        rank-00001.5f3c09ab.safetensors
      step-00000300/
        rank-00001.77e01c2d.safetensors      what was left of a job that was killed
        rank-00001.77e01c2d.json             what the manifest was to say of this file

Any number of processes may read while one job writes.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hvdx.checkpoints.files import FORMAT, PARTIAL, Damaged, File, digest, read_json, write_json
from hvdx.checkpoints.tree import CODES, Tree, merged

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,18})")
_OURS = re.compile(r"rank-\d{5,}\.([0-9a-f]{8})\.(safetensors|json)(\.partial)?")
_FILE = re.compile(r"rank-\d{5,}\.[0-9a-f]{8}\.safetensors")


def file_name(rank: int, attempt: str, kind: str = "safetensors") -> str:
    """Return what a rank's file is called."""
    return f"rank-{rank:05}.{attempt}.{kind}"


class Manifest(NamedTuple):
    """What a checkpoint consists of."""

    step: int
    number: int  # how many were saved before it into this folder, by anybody
    ranks: int
    parts: dict[str, str]  # name: kind
    about: dict[str, Any]  # what parts tell of themselves, by name
    files: list[dict[str, Any]]  # by rank: name, bytes, sha256, shared and own parts, tensors

    def write(self, folder: Path) -> None:
        """Make a checkpoint of the files in ``folder``."""
        write_json(folder / MANIFEST, {"format": FORMAT, **self._asdict()})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            Damaged: it is something else; the message says what is wrong.
            OSError: there is none.
        """
        path = folder / MANIFEST
        told = read_json(path)
        if told.pop("format", None) != FORMAT:
            raise Damaged(f"{path}: it has a format that this version of hvdx does not know")
        try:
            found = cls(**told)
            found._check()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Damaged(f"{path}: {error}") from None
        return found

    def _check(self) -> None:
        if any(type(each) is not int or each < 0 for each in (self.step, self.number, self.ranks)):
            raise ValueError("step, number and ranks are no numbers")
        if not isinstance(self.parts, dict) or not isinstance(self.about, dict):
            raise ValueError("parts are no dictionary")
        if len(self.files) != self.ranks or not self.ranks:
            raise ValueError(f"{len(self.files)} files are no {self.ranks} ranks'")
        for file in self.files:
            if not _FILE.fullmatch(file["name"]):
                raise ValueError(f"{file['name']!r} is no file of a rank")
            lists = all(isinstance(file[key], list) for key in ("shared", "own"))
            if type(file["bytes"]) is not int or not lists:
                raise ValueError(f"what it says of {file['name']!r} makes no sense")
            if any(dtype not in CODES for dtype, _ in file["tensors"].values()):
                raise ValueError(f"tensors of {file['name']!r} have unknown types")


class Folder:
    """A folder of checkpoints.

    Args:
        path: where it is, or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.path / f"step-{step:08}"

    def found(self) -> list[tuple[Path, Manifest | Damaged]]:
        """Return all checkpoints, what cannot be read first, then the last that was saved."""
        known: list[tuple[Path, Manifest | Damaged]] = []
        for place in self._places():
            with contextlib.suppress(OSError):  # it has not been finished, or is gone by now
                try:
                    known.append((place, Manifest.read(place)))
                except Damaged as error:
                    known.append((place, error))
        return sorted(known, key=lambda each: _age(each[1]))

    def _places(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        named = (each for each in self.path.iterdir() if _STEP.fullmatch(each.name))
        return sorted(named, reverse=True)

    def begin(self, step: int) -> tuple[str, int]:
        """Make room for a checkpoint, and clear away what dead jobs have left.

        Returns:
            A name for the attempt, and the checkpoint's number.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.of(step).mkdir(parents=True, exist_ok=True)
        self.sweep()
        numbers = [each.number for _, each in self.found() if isinstance(each, Manifest)]
        return secrets.token_hex(4), max(numbers, default=-1) + 1

    def sweep(self) -> None:
        """Remove files of ours that no manifest knows, while none is being written."""
        for place in self._places():
            try:
                known = {file["name"] for file in Manifest.read(place).files}
            except FileNotFoundError:
                known = set()
            except (OSError, Damaged):
                continue
            for file in place.iterdir():
                left = _OURS.fullmatch(file.name) or file.name == MANIFEST + PARTIAL
                if left and file.name not in known:
                    file.unlink(missing_ok=True)

    def undo(self, step: int, attempt: str) -> None:
        """Remove what an attempt to save has written."""
        place = self.of(step)
        with contextlib.suppress(OSError):
            for file in place.iterdir():
                named = _OURS.fullmatch(file.name)
                if named and named[1] == attempt:
                    file.unlink(missing_ok=True)
            place.rmdir()  # unless there is an older checkpoint of that step

    def keep(self, count: int) -> None:
        """Remove all but the last ``count`` checkpoints, and what was never finished."""
        self.sweep()
        found = sorted(self.found(), key=lambda each: isinstance(each[1], Damaged))
        for place, _ in found[count:]:
            (place / MANIFEST).unlink(missing_ok=True)  # first, so that no half of it counts
            shutil.rmtree(place, ignore_errors=True)
        for place in self._places():
            with contextlib.suppress(OSError):
                place.rmdir()  # if it is empty


def _age(told: Manifest | Damaged) -> int:
    return -told.number if isinstance(told, Manifest) else -sys.maxsize


def damage(place: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> list[str]:
    """Say what is wrong with every ``shares``-th file of a checkpoint, from number ``share`` on."""
    problems = []
    for entry in manifest.files[share::shares]:
        path = place / entry["name"]
        try:
            _check_file(path, entry)
        except Damaged as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    return problems


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise Damaged(f"{path}: it has {size} bytes and should have {entry['bytes']}")
    if digest(path).sha256 != entry["sha256"]:
        raise Damaged(f"{path}: its checksum does not fit, it was changed since it was written")
    there = {name: [each.dtype, list(each.shape)] for name, each in File(path).tensors.items()}
    if there != entry["tensors"]:
        raise Damaged(f"{path}: it has other tensors than the manifest says")


class SavedPart:
    """What a checkpoint holds of a part; see :class:`hvdx.checkpoints.parts.Saved`.

    Args:
        place: of the checkpoint.
        manifest: of it.
        part: its name.
        opened: files that are open, by rank; shared with other parts.
    """

    def __init__(self, place: Path, manifest: Manifest, part: str, opened: dict[int, File]) -> None:
        self._place, self._manifest, self._part, self._opened = place, manifest, part, opened
        self.kind, self.ranks = manifest.parts[part], manifest.ranks

    def _file(self, rank: int) -> File:
        if rank not in self._opened:
            self._opened[rank] = File(self._place / self._manifest.files[rank]["name"])
        return self._opened[rank]

    def _tree(self, rank: int, kind: str) -> Tree:
        file = self._file(rank)
        try:
            return file.tree(file.about[kind][self._part])
        except (KeyError, TypeError):
            raise Damaged(f"{file.path}: it lacks the {kind} state of {self._part!r}") from None

    def _holders(self, kind: str) -> Sequence[int]:
        return [rank for rank, file in enumerate(self._manifest.files) if self._part in file[kind]]

    @cached_property
    def shared(self) -> Tree:
        """The tree that all ranks shared, of all files that have a share of it."""
        return merged([self._tree(rank, "shared") for rank in self._holders("shared")] or [{}])

    def own(self, rank: int) -> Tree:
        """Return the tree of a rank of the job that has saved it; None if it had none."""
        return self._tree(rank, "own") if rank in self._holders("own") else None
