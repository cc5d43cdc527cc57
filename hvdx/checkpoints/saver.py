"""``hvd.Checkpoints``: all ranks save and restore together, and hear of each other's failures.

    save(step)                      thread                               next save(), or wait()
    [1] wait for the last one       [4] each rank writes its file,       [7] all ranks tell how it
    [2] settle, copy the state          then what the manifest is        went; if one has failed,
    [3] ranks compare, rank 0           to say of it (a small file)      rank 0 gives up and clears
        names the attempt           [5] rank 0 waits for all of these    away, and all raise
                                    [6] and writes the manifest:
                                        now there is a checkpoint

Between [4] and [6] ranks meet in the folder and not through Horovod: training uses that meanwhile,
and a job that is killed after [6] has lost nothing, also if it never came to [7].
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from hvdx import watchdog, world
from hvdx.agreement import next_name
from hvdx.checkpoints.files import Damaged, File, read_json, write, write_json
from hvdx.checkpoints.folder import Folder, Manifest, SavedPart, damage, file_name
from hvdx.checkpoints.parts import Generators, Part, part_of
from hvdx.checkpoints.tree import Stored, flat
from hvdx.errors import CheckpointError

_PATIENCE = 3600.0  # seconds for which ranks wait for each other's disks
_GRACE = 15.0  # seconds in which a file that another rank has written must become visible
_RANDOM = "random"
_jobs = itertools.count()
_job = next(_jobs)


def _another_job() -> None:
    global _job
    _job = next(_jobs)


world.on_change(_another_job)


class _Ranks:
    """The ranks of the running job; only this process where there is none."""

    def __init__(self) -> None:
        several = world.is_initialized() and world.size() > 1
        self.rank, self.size = (world.rank(), world.size()) if several else (0, 1)

    def everyone(self, value: Any) -> list[Any]:
        """Return all ranks' values."""
        if self.size == 1:
            return [value]
        return world.core().allgather_object(value, next_name("checkpoint"), None)

    def first(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank."""
        if self.size == 1:
            return value
        return world.core().broadcast_object(value, 0, next_name("checkpoint"), None)

    def alike(self, what: str, work: Callable[[], Any]) -> Any:
        """Return what ``work`` does, or raise on every rank what one of them raises.

        Raises:
            CheckpointError: another rank has failed, or this one.
        """
        result, problem, cause = None, "", None
        try:
            result = work()
        except Exception as error:
            problem, cause = str(error) or type(error).__name__, error
            if not isinstance(error, (OSError, ValueError, TypeError)):
                problem = f"{type(error).__name__}: {error}"
        told = spelt(self.everyone(problem))
        if told:
            raise CheckpointError(f"{what}: {told}") from cause
        return result


def spelt(problems: list[str]) -> str:
    """Say once what several ranks have found, and by which rank if not by all."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem:
            ranks.setdefault(problem, []).append(rank)
    return "; ".join(
        problem if len(own) == len(problems) else f"rank {', '.join(map(str, own))}: {problem}"
        for problem, own in ranks.items()
    )


class Checkpoints:
    """A folder of checkpoints of this job, of which the last few are kept.

    A checkpoint counts once it is whole, on the disk, with checksums; whatever is killed when, or
    fails, the one before it stays. Each rank writes a file of its own: what all have alike is in
    rank 0's, what each has for itself in its own (parts of an optimizer under
    ``sync="parameter_server"``, stages of a pipeline, what compression owes, random numbers). So
    all ranks must see the folder, as on a shared file system. Files are ``safetensors`` and JSON:
    reading them runs no code.

    Objects are given by name, the same names to :meth:`save` and :meth:`restore`: models,
    optimizers (wrapped or not) and pipelines of PyTorch and Keras; anything with ``state_dict`` and
    ``load_state_dict``, such as learning rate schedules, samplers and ``GradScaler``; dictionaries
    of numbers, strings and arrays, which are filled in place. Of these two, and of models, rank
    0's is saved, and all ranks get it.

    A job of any number of ranks restores what one of another number has saved. On as many ranks,
    training goes on to the last bit.

    All methods are collective: every rank calls them.

    Args:
        folder: where; made if there is none.
        keep: how many checkpoints to keep.
        asynchronous: ``save`` copies the state and returns, a thread writes. A second ``save``
            waits for the first. What fails is raised by the next ``save`` or ``wait``.
        random: save and restore the random number generators of Python, NumPy and PyTorch.

    Raises:
        ValueError: ``keep`` is no number from 1.

    Example:
        >>> checkpoints = hvd.Checkpoints("saved")
        >>> training = {"model": model, "optimizer": optimizer, "sampler": sampler}
        >>> for step in range(checkpoints.restore(**training) or 0, steps):
        ...     train(step)
        ...     if (step + 1) % 100 == 0:
        ...         checkpoints.save(step + 1, **training)
        >>> checkpoints.wait()
    """

    def __init__(
        self, folder: Any, keep: int = 3, *, asynchronous: bool = True, random: bool = True
    ) -> None:
        if type(keep) is not int or keep < 1:
            raise ValueError(f"Checkpoints(keep={keep!r}): give a number from 1")
        self._folder = Folder(Path(folder))
        self.keep = keep
        self.asynchronous = asynchronous
        self._random = random
        self._writing: _Writing | None = None

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self._folder.path

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is None:  # else other ranks may be anywhere
            self.wait()

    # -- saving

    def save(self, step: int, /, **parts: Any) -> None:
        """Save ``parts`` as the checkpoint of ``step``, in the place of one that there is.

        Args:
            step: how many have been trained, from 0; equal on all ranks.
            **parts: the objects, by name.

        Raises:
            CheckpointError: the last one could not be written, or this one cannot, on any rank;
                the message says which and why. Older checkpoints are as they were.
        """
        self.wait()
        ranks = _Ranks()
        what = f"step {step} cannot be saved to {str(self.folder)!r}"
        made = ranks.alike(what, lambda: self._parts(step, parts))
        everyone = ranks.everyone((step, {name: part.kind for name, part in made.items()}))
        if any(each != everyone[0] for each in everyone):
            each = ", ".join(f"rank {r}: {s}, {list(k)}" for r, (s, k) in enumerate(everyone))
            raise CheckpointError(f"ranks save different steps or parts ({each})")
        for part in made.values():
            part.settle()
        snapshot = ranks.alike(what, lambda: _Snapshot.of(made, ranks.rank))
        told = ranks.first(self._begin(step) if ranks.rank == 0 else None)
        if isinstance(told, str):
            raise CheckpointError(f"{what}: rank 0: {told}")
        attempt, number = told
        self._writing = _Writing(self._folder, step, attempt, number, self.keep, ranks, snapshot)
        if not self.asynchronous:
            self.wait()

    def _parts(self, step: int, given: Mapping[str, Any]) -> dict[str, Part]:
        if type(step) is not int or step < 0:
            raise ValueError(f"step={step!r}: give a number from 0")
        if not given:
            raise ValueError("nothing is given to be saved: save(step, model=model, ...)")
        return self._made(given)

    def _made(self, given: Mapping[str, Any]) -> dict[str, Part]:
        if _RANDOM in given:
            raise ValueError(f"{_RANDOM!r} is what generators are called; give another name")
        made = {name: part_of(name, value) for name, value in given.items()}
        return {**made, _RANDOM: Generators()} if self._random else made

    def _prepared(self, given: Mapping[str, Any]) -> dict[str, Part]:
        made = self._made(given)
        for part in made.values():
            part.prepare()
        return made

    def _begin(self, step: int) -> tuple[str, int] | str:
        try:
            return self._folder.begin(step)
        except OSError as error:
            return str(error)

    def wait(self) -> None:
        """Return once the last :meth:`save` is on the disk.

        Raises:
            CheckpointError: it could not be written, on any rank.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    # -- restoring

    def latest(self) -> int | None:
        """Return the step of the last checkpoint that is whole; None if there is none.

        Reads all of it to make sure.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        self.wait()
        chosen = self._chosen(_Ranks(), None)
        return None if chosen is None else chosen[1].step

    def restore(self, step: int | None = None, /, **parts: Any) -> int | None:
        """Give ``parts`` the state that they had when the last checkpoint was saved.

        Where its files are damaged, the one before is taken, with a warning that names them. All
        ranks take the same. Parts that are saved and not asked for are left alone.

        Args:
            step: take the checkpoint of this one, and no other.
            **parts: the objects, by the names by which they were saved.

        Returns:
            The step; None if there is no checkpoint, and nothing has changed.

        Raises:
            CheckpointError: all checkpoints are damaged, or that of ``step`` is or is not there; a
                part has not been saved, or is of another model. All that differs is listed, and
                nothing has changed then.
        """
        self.wait()
        ranks = _Ranks()
        chosen = self._chosen(ranks, step)
        if chosen is None:
            return None
        place, manifest = chosen
        what = f"the checkpoint {str(place)!r}"
        given = ranks.alike(what, lambda: self._prepared(parts))
        if _RANDOM not in manifest.parts:
            given.pop(_RANDOM, None)
        opened: dict[int, File] = {}
        saved = {
            name: SavedPart(place, manifest, name, opened)
            for name in given
            if name in manifest.parts
        }
        ranks.alike(f"{what} does not fit", lambda: _check(given, saved, manifest))
        for name, part in given.items():
            with watchdog.patience(_PATIENCE):
                ranks.alike(f"{what}: {name}", functools.partial(part.load, saved[name], ranks))
        return manifest.step

    def _chosen(self, ranks: _Ranks, step: int | None) -> tuple[Path, Manifest] | None:
        """Return the checkpoint that all ranks take."""
        found = ranks.first(self._told() if ranks.rank == 0 else None)
        if isinstance(found, str):
            raise CheckpointError(f"{str(self.folder)!r} cannot be read: {found}")
        problems = []
        if step is not None:
            found = [each for each in found if each[0] == self._folder.of(step)]
            if not found:
                raise CheckpointError(f"there is no checkpoint of step {step} in {self.folder}")
        for place, manifest in found:
            if isinstance(manifest, Manifest):
                with watchdog.patience(_PATIENCE):
                    own = damage(place, manifest, ranks.rank, ranks.size)
                told = [each for rank in ranks.everyone(own) for each in rank]
                if not told:
                    return place, manifest
            else:
                told = [str(manifest)]
            problems += told
            if ranks.rank == 0 and step is None:
                warnings.warn(
                    f"a checkpoint is damaged and passed over: {'; '.join(told)}", stacklevel=3
                )
        if problems:
            raise CheckpointError(f"no checkpoint is whole: {'; '.join(problems)}")
        return None

    def _told(self) -> list[tuple[Path, Manifest | Damaged]] | str:
        try:
            return self._folder.found()
        except OSError as error:
            return str(error)


def _check(given: Mapping[str, Part], saved: Mapping[str, SavedPart], manifest: Manifest) -> None:
    """Raise ValueError, with all that does not fit."""
    problems = []
    for name, part in given.items():
        if name not in saved:
            known = ", ".join(sorted(set(manifest.parts) - {_RANDOM}))
            problems.append(f"it has no part {name!r}; there are {known}")
        elif saved[name].kind not in (part.kind, *part.others):
            problems.append(f"{name!r} is a {saved[name].kind} there, and a {part.kind} here")
        else:
            problems += [f"{name}: {each}" for each in part.problems(saved[name])]
    if problems:
        raise ValueError("; ".join(problems))


class _Snapshot(NamedTuple):
    """What this rank writes: a copy of the state."""

    kinds: dict[str, str]  # of the parts
    about: dict[str, Any]  # what the manifest tells of them
    outlines: dict[str, dict[str, Any]]  # "shared" and "own", by part
    tensors: dict[str, Stored]

    @classmethod
    def of(cls, parts: Mapping[str, Part], rank: int) -> _Snapshot:
        outlines: dict[str, dict[str, Any]] = {"shared": {}, "own": {}}
        tensors: dict[str, Stored] = {}
        for name, part in parts.items():
            for kind, tree in zip(outlines, part.state(rank), strict=True):
                if tree is not None:
                    prefix = name if kind == "shared" else f"own/{name}"
                    outlines[kind][name], found = flat(tree, prefix)
                    tensors.update(found)
        about = {name: told for name, part in parts.items() if (told := part.about()) is not None}
        return cls({name: part.kind for name, part in parts.items()}, about, outlines, tensors)


class _Writing:
    """A checkpoint on its way to the disk."""

    def __init__(
        self,
        folder: Folder,
        step: int,
        attempt: str,
        number: int,
        keep: int,
        ranks: _Ranks,
        snapshot: _Snapshot,
    ) -> None:
        self._folder, self._place = folder, folder.of(step)
        self._step, self._attempt, self._number, self._keep = step, attempt, number, keep
        self._ranks, self._snapshot = ranks, snapshot
        self._job = _job
        self._wrote = threading.Event()  # this rank's file is there, or will never be
        self._all_wrote = threading.Event()  # so are all ranks', as they have told
        self._given_up = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="hvdx checkpoint")
        self._thread.start()
        atexit.register(self._tell)

    # -- in the thread

    def _run(self) -> None:
        try:
            self._write()
            self._wrote.set()
            if self._ranks.rank == 0:
                self._commit()
        except Exception as error:
            self._problem = str(error) or type(error).__name__
            if not isinstance(error, OSError):
                self._problem += "\n" + traceback.format_exc()
            self._clear_own()
        finally:
            self._wrote.set()

    def _clear_own(self) -> None:
        """Remove this rank's files; others may still be writing theirs, into the same folder."""
        if self._ranks.size == 1:
            self._folder.undo(self._step, self._attempt)
        for kind in ("safetensors", "json"):
            with contextlib.suppress(OSError):
                self._name(self._ranks.rank, kind).unlink()

    def _tell(self) -> None:
        """Print what has failed, since nobody has asked before the end of the process."""
        if self._problem:
            print(f"{self._what}: {self._problem}", file=sys.stderr, flush=True)

    @property
    def _what(self) -> str:
        return f"step {self._step} cannot be saved to {str(self._folder.path)!r}"

    def _name(self, rank: int, kind: str = "safetensors") -> Path:
        return self._place / file_name(rank, self._attempt, kind)

    def _write(self) -> None:
        """Write this rank's file, and beside it what the manifest is to say of it."""
        rank, snapshot = self._ranks.rank, self._snapshot
        path = self._name(rank)
        self._place.mkdir(parents=True, exist_ok=True)  # shared file systems may be late
        written = write(path, snapshot.tensors, snapshot.outlines)
        told = {
            "name": path.name,
            **written._asdict(),
            **{kind: list(parts) for kind, parts in snapshot.outlines.items()},
            "tensors": {n: [each.dtype, list(each.shape)] for n, each in snapshot.tensors.items()},
        }
        self._snapshot = snapshot._replace(tensors={})  # memory
        write_json(self._name(rank, "json"), told)

    def _commit(self) -> None:
        """Wait for all ranks' files, and write the manifest."""
        files = [self._awaited(rank) for rank in range(self._ranks.size)]
        kinds, about = self._snapshot.kinds, self._snapshot.about
        ranks = self._ranks.size
        Manifest(self._step, self._number, ranks, kinds, about, files).write(self._place)
        with contextlib.suppress(OSError):  # there is a checkpoint; tidying up can wait
            self._folder.keep(self._keep)

    def _awaited(self, rank: int) -> dict[str, Any]:
        path, pause, limit = self._name(rank, "json"), 0.005, float("inf")
        while True:
            with contextlib.suppress(FileNotFoundError):
                return read_json(path)
            if self._given_up.is_set():
                raise OSError(f"rank {rank} has not written its file")
            orphaned = not threading.main_thread().is_alive()
            if limit == float("inf") and (orphaned or self._all_wrote.is_set()):
                limit = time.monotonic() + _GRACE
            if time.monotonic() > limit:
                raise OSError(
                    f"rank 0 does not see {path}, which rank {rank} "
                    f"{'was to write' if orphaned else 'has written'}: all ranks must see the "
                    "same folder, on a shared file system"
                )
            time.sleep(pause)
            pause = min(0.25, pause * 1.5)

    # -- in the main thread

    def finish(self) -> None:
        """Wait, and raise on every rank what has failed on one; a collective call."""
        atexit.unregister(self._tell)
        if self._job != _job:  # ranks have changed since: those that are new know nothing of it
            self._given_up.set()
            self._thread.join()
            return
        with watchdog.patience(_PATIENCE):
            self._wrote.wait()
        problems = self._ranks.everyone(self._problem)
        (self._given_up if any(problems) else self._all_wrote).set()
        with watchdog.patience(_PATIENCE):
            self._thread.join()
        committed = self._ranks.first("" if any(problems) else self._problem)
        told = spelt(problems) or (committed and f"rank 0: {committed}")
        if told:
            self._folder.undo(self._step, self._attempt)  # no rank writes any more
            raise CheckpointError(f"{self._what}: {told}")
