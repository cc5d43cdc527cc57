"""Callbacks that write files, on rank 0 alone: the best model, and checkpoints to resume from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from hvdx import world
from hvdx.integrations.keras3 import AveragingOptimizer, averaging
from hvdx.integrations.keras3_state import brought_together
from hvdx.integrations.keras_sync import RankCallback
from hvdx.replicas import allgather_object, broadcast_object, broadcast_parameters


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Save the model whenever ``monitor`` is better than ever, on rank 0.

    List it after :class:`MetricAverageCallback`, or rank 0 judges by its own data.

    Args:
        monitor: name of the metric.
        verbose: 1 prints what is saved.
        mode: ``auto``, ``min`` or ``max``.
        save_freq: ``epoch``, or a number of batches.
        filepath: where to; may also be set as an attribute before training, as in Horovod.
            As for ``keras.callbacks.ModelCheckpoint``: it may hold ``{epoch}``.
        save_weights_only: write a ``.weights.h5`` file instead of a whole ``.keras`` one.

    Raises:
        ValueError: when training begins, if there is no ``filepath``; see Keras' class too.

    Example:
        >>> hvd.callbacks.BestModelCheckpoint("val_loss", filepath="best.keras")
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        mode: str = "auto",
        save_freq: Any = "epoch",
        filepath: Any = None,
        save_weights_only: bool = False,
    ) -> None:
        super().__init__(
            filepath or ("_.weights.h5" if save_weights_only else "_.keras"),
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        if filepath is None:
            self.filepath = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Check that there is a path."""
        if not self.filepath:
            raise ValueError("BestModelCheckpoint has no filepath: give filepath='best.keras'")
        self.filepath = os.fspath(self.filepath)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save on rank 0, if ``save_freq`` says so."""
        if world.rank() == 0:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save on rank 0."""
        if world.rank() == 0:
            super().on_epoch_end(epoch, logs)


class CheckpointCallback(RankCallback):
    """Write checkpoints on rank 0, and go on from the last one when the job starts again.

    A checkpoint is one ``.keras`` file, which plain Keras loads like any other, with what else
    training needs in it: the epoch, the state of ``callbacks``, what compression keeps on every
    rank (``compression_state()``), and every rank's random numbers (Python's, NumPy's, torch's,
    and those of layers such as ``Dropout``). It appears under its
    name only when it is whole and on disk. Files that are damaged even so are passed over, with
    a warning, for the one before.

    ``fit`` then begins with the epoch after the checkpoint's, on all ranks with rank 0's weights
    (the running statistics of ``BatchNormalization`` too) and optimizer state, and counts
    ``epochs`` from the job's first start. Any number of ranks may go on; those that are new
    start with random numbers of their own, and what compression owes is shared out anew. On the
    TensorFlow backend ``fit(shuffle=True)`` shuffles arrays by a generator that cannot be saved:
    give a ``tf.data.Dataset`` for the same order as without interruption.

    List it last, so that it saves what the other callbacks have decided after an epoch.

    Args:
        directory: where to; only rank 0 must see it. Made if there is none.
        every: epochs between checkpoints.
        keep: how many to keep.
        callbacks: whose state to save and restore, such as ``EarlyStopping``; the list given
            to ``fit``, for instance. What they hold in numbers, strings and arrays counts.
        resume: False: begin anew, and only write.

    Raises:
        ValueError: an argument is of no use; when training begins: the model is not built, the
            checkpoint is of another model or optimizer, or ranks train layers of their own.
        OSError: rank 0 cannot write (raised on every rank).

    Example:
        >>> callbacks = [keras.callbacks.ReduceLROnPlateau()]
        >>> callbacks.append(hvd.callbacks.CheckpointCallback("checkpoints", callbacks=callbacks))
        >>> model.fit(data, epochs=90, callbacks=callbacks)
    """

    def __init__(
        self,
        directory: Any,
        every: int = 1,
        keep: int = 3,
        callbacks: Iterable[Any] = (),
        resume: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("every", every), ("keep", keep)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"CheckpointCallback({name}={value!r}): give a number from 1")
        self.directory = Path(directory)
        self.every = every
        self.keep = keep
        self.resume = resume
        self._callbacks = callbacks
        self._found: dict[str, Any] | None = None
        self._fresh: list[dict[str, str]] | None = None
        self._compression: list[dict[str, Any]] | None = None  # of each rank; rank 0 loads them

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Load the last checkpoint on rank 0 and give its content to all."""
        optimizer = averaging(self.model.optimizer)
        if optimizer is not None and optimizer._averager.local:
            raise ValueError(
                "CheckpointCallback saves rank 0's variables, but this optimizer has local ones, "
                "which differ between ranks; save those on each rank by other means"
            )
        self._fresh = None
        if self.resume:
            self.resume = False  # a second fit goes on with what the first has left
            self._found = _from_root(self._load, "load a checkpoint")
            if self._found is not None:
                _build(self.model)
                broadcast_parameters(self.model)
                if optimizer is None:
                    broadcast_parameters(self.model.optimizer)
                else:
                    broadcast_parameters(optimizer.without_parts(self.model.optimizer.variables))
                    optimizer.hand_out_parts()
                _hand_out(self._compression, optimizer)
                self._compression = None
                self.model._initial_epoch = self._found["epoch"]

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Restore what other callbacks have reset when training began."""
        if self._fresh is None:
            self._fresh = [_prints(_state(callback)) for callback in self._others()]
        if self._found is not None:
            self._restore(self._found)
            self._found = None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, if it is time; all ranks wait, and hear if that fails."""
        if (epoch + 1) % self.every == 0 or epoch + 1 == (self.params or {}).get("epochs"):
            optimizer = averaging(self.model.optimizer)
            if optimizer is not None:
                optimizer.settle()
            told = {
                "format": 1,
                "epoch": epoch + 1,
                "random": allgather_object(_random_state(self.model)),
                "compression": _collected(optimizer),
            }
            _from_root(lambda: self._write(told), "write a checkpoint")

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Let another ``fit`` begin where it wants to."""
        self.model._initial_epoch = None

    def _others(self) -> list[Any]:
        return [callback for callback in self._callbacks if callback is not self]

    def _files(self) -> list[Path]:
        """Return all checkpoints, the newest last."""
        return sorted(self.directory.glob("checkpoint-*.keras"))

    def _load(self) -> dict[str, Any] | None:
        for old in self.directory.glob(".checkpoint-*"):
            old.unlink()  # left by a job that was ended while it wrote
        for path in reversed(self._files()):
            try:
                told = _read(path)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                warnings.warn(f"{path} is damaged and passed over: {error}", stacklevel=2)
                continue
            _build(self.model)
            with warnings.catch_warnings():
                # Keras only warns where the optimizer does not fit, and goes on without.
                warnings.filterwarnings("error", "Skipping variable loading")
                try:
                    self.model.load_weights(path)
                except (ValueError, UserWarning) as error:
                    raise ValueError(f"{path} does not fit this training: {error}") from None
            self._compression = told.pop("compression", None)
            return told
        return None

    def _write(self, told: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        files = self._files()
        number = int(files[-1].stem.partition("-")[2]) + 1 if files else 1
        path = self.directory / f"checkpoint-{number:06}.keras"
        fresh = self._fresh or []
        changed = [
            {"class": type(callback).__name__, "state": _changed(_state(callback), prints)}
            for callback, prints in zip(self._others(), fresh, strict=True)
        ]
        unfinished = path.with_name(f".{path.name}")
        _save(self.model, unfinished)
        with zipfile.ZipFile(unfinished, "a") as archive:
            _write_told(archive, {**told, "callbacks": changed})
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        for old in self._files()[: -self.keep]:
            old.unlink()

    def _restore(self, told: dict[str, Any]) -> None:
        others = self._others()
        kinds, saved = ([type(c).__name__ for c in others], [t["class"] for t in told["callbacks"]])
        if kinds != saved:
            warnings.warn(
                f"the checkpoint holds the state of callbacks {saved}, but these are {kinds}; "
                "those at other places start anew",
                stacklevel=2,
            )
        for callback, kind, entry in zip(others, kinds, told["callbacks"]):  # noqa: B905
            if kind == entry["class"]:
                vars(callback).update(entry["state"])
        if world.rank() < len(told["random"]):
            _set_random_state(self.model, told["random"][world.rank()])


def _collected(optimizer: AveragingOptimizer | None) -> list[dict[str, Any]] | None:
    """Return on rank 0 what compression keeps on each rank; one travels after the other."""
    if optimizer is None or not optimizer._averager.remembers:
        return None
    own = optimizer.compression_state()
    everyone = []
    for rank in range(world.size()):
        state = broadcast_object(own if rank == world.rank() else None, rank)
        if world.rank() == 0:
            everyone.append(state)
    return everyone


def _hand_out(saved: list[dict[str, Any]] | None, optimizer: AveragingOptimizer | None) -> None:
    """Give each rank what rank 0 has loaded: its own, or with other ranks what is portable."""
    told = broadcast_object((saved[0]["compressor"], len(saved)) if saved else None)
    if told is None:
        return
    now = "none" if optimizer is None else optimizer._averager.options.compressor.name
    if optimizer is None or now != told[0]:
        warnings.warn(
            f"the checkpoint is of compression={told[0]}, and this training has {now}: what was "
            "owed to training is lost",
            stacklevel=3,
        )
    elif told[1] != world.size():
        portable = _from_root(lambda: brought_together(saved or []), "share out what is owed")
        optimizer.load_compression_state(portable)
    else:
        for rank in range(world.size()):
            state = broadcast_object(saved and saved[rank])
            if rank == world.rank():
                optimizer.load_compression_state(state)


def _from_root(work: Any, purpose: str) -> Any:
    """Return on every rank what ``work`` returns on rank 0, or raise on every rank as it does."""
    result: Any = None
    failed: tuple[str, str] | None = None
    if world.rank() == 0:
        try:
            result = work()
        except Exception as error:
            kind = next((k for k in _KINDS if issubclass(type(error), _KINDS[k])), "RuntimeError")
            failed = kind, f"rank 0 cannot {purpose}: {error or type(error).__name__}"
    result, failed = broadcast_object((result, failed))
    if failed is not None:
        raise _KINDS[failed[0]](failed[1])
    return result


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (OSError, ValueError, RuntimeError)
}


def _build(model: Any) -> None:
    if not all(layer.built for layer in model._flatten_layers()):
        raise ValueError(
            f"model {model.name!r} has no weights yet to load a checkpoint into: give it an Input, "
            "or call it on a batch before fit"
        )
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _save(model: Any, path: Path) -> None:
    """Write a ``.keras`` file; for a model that Keras cannot describe, its weights alone."""
    try:
        model.save(path)
    except OSError:
        raise
    except Exception as error:  # whatever the get_config() of a user's layer raises
        weights = path.with_name(path.name + ".weights.h5")
        try:
            model.save_weights(weights)
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(weights, "model.weights.h5")
        finally:
            weights.unlink(missing_ok=True)
        warnings.warn(
            f"checkpoints hold no description of model {model.name!r}, so that only "
            f"CheckpointCallback can load them: {error}",
            stacklevel=2,
        )


# What a checkpoint tells lies in the file as JSON, its arrays beside it as bytes.


def _write_told(archive: zipfile.ZipFile, told: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_plain(told, arrays))
    content = io.BytesIO()
    flat: dict[str, Any] = {k: np.frombuffer(a.tobytes(), np.uint8) for k, a in arrays.items()}
    np.savez(content, **flat)
    archive.writestr("hvdx.npz", content.getvalue())
    archive.writestr("hvdx.json", text)


def _read(path: Path) -> dict[str, Any]:
    """Return what a whole checkpoint tells.

    Raises:
        ValueError, KeyError, OSError, zipfile.BadZipFile: it is damaged, or of another kind.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} in it does not fit its checksum")
        arrays = np.load(io.BytesIO(archive.read("hvdx.npz")), allow_pickle=False)
        told: dict[str, Any] = _lively(json.loads(archive.read("hvdx.json")), arrays)
    if told["format"] != 1:
        raise ValueError(f"it has format {told['format']}, which this version does not know")
    return told


def _plain(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return ``value`` as JSON can hold it; TypeError if it is no number, string or array."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name, "dtype": value.dtype.name, "shape": list(value.shape)}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_plain(each, arrays) for each in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(each, arrays) for key, each in value.items()}}
    raise TypeError(f"{type(value).__name__} is not saved")


def _lively(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Undo :func:`_plain`."""
    if not isinstance(value, dict):
        return value
    if "array" in value:
        flat = np.frombuffer(arrays[value["array"]].tobytes(), np.dtype(value["dtype"]))
        return flat.reshape(value["shape"]).copy()
    if "dict" in value:
        return {key: _lively(each, arrays) for key, each in value["dict"].items()}
    ((kind, content),) = value.items()
    several = [_lively(each, arrays) for each in content]
    return tuple(several) if kind == "tuple" else several


def _state(callback: Any) -> dict[str, Any]:
    """Return the attributes of a callback that a file can hold."""
    found = {}
    for name, value in vars(callback).items():
        if name not in ("params", "model", "_model"):
            with contextlib.suppress(TypeError):
                _plain(value, {})
                found[name] = value
    return found


def _prints(state: dict[str, Any]) -> dict[str, str]:
    return {name: _print(value) for name, value in state.items()}


def _print(value: Any) -> str:
    arrays: dict[str, np.ndarray] = {}
    whole = hashlib.sha256(json.dumps(_plain(value, arrays)).encode())
    for array in arrays.values():
        whole.update(array.tobytes())
    return whole.hexdigest()


def _changed(state: dict[str, Any], before: dict[str, str]) -> dict[str, Any]:
    """Leave out what training has not changed: options, which the next start may set anew."""
    return {name: value for name, value in state.items() if before.get(name) != _print(value)}


def _random_state(model: Any) -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "layers": {name: keras.ops.convert_to_numpy(v.value) for name, v in _seeds(model)},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = torch.get_rng_state().numpy()
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state().cpu().numpy()
    return state


def _set_random_state(model: Any, state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    for name, variable in _seeds(model):
        if name in state["layers"]:
            variable.assign(state["layers"][name])
    torch = sys.modules.get("torch")
    if torch is not None and "torch" in state:
        torch.set_rng_state(torch.from_numpy(state["torch"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.from_numpy(state["cuda"]))


def _seeds(model: Any) -> Iterator[tuple[str, Any]]:
    """Return the random states of layers, by their places: names need not be unique."""
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    for place, variable in enumerate(states):
        yield str(place), variable
