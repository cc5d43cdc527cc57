"""What ``hvdx.keras.load_model`` does about Keras' files before and after Keras reads them."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from hvdx.integrations.keras_sync import RankCallback


def optimizer_class(filepath: Any) -> str | None:
    """Return the name of the optimizer's class in a ``.keras`` or ``.h5`` file, None if unknown."""
    try:
        if _is_zip(filepath):
            with zipfile.ZipFile(filepath) as archive:
                told = json.loads(archive.read("config.json"))["compile_config"]["optimizer"]
        else:
            with _h5(filepath) as file:
                told = json.loads(file.attrs["training_config"])["optimizer_config"]
        return str(told["class_name"])
    except (KeyError, TypeError, OSError, ValueError):  # not compiled, or for Keras to complain of
        return None


def restore_optimizer(filepath: Any, model: Any) -> None:
    """Give a model of an ``.h5`` file its optimizer's state.

    Keras builds the optimizer for the variables of the model without those of its layers: for
    none, mostly. The state in the file is lost then, and the first step an error.
    """
    if _is_zip(filepath) or not model.trainable_variables:
        return
    from keras.src.legacy.saving.legacy_h5_format import load_optimizer_weights_from_hdf5_group

    with _h5(filepath) as file:
        if "optimizer_weights" not in file:
            return
        weights = [stored[()] for stored in load_optimizer_weights_from_hdf5_group(file)]
    if len(model.optimizer.variables) < len(weights):
        kind: Any = type(model.optimizer)
        model.optimizer = kind.from_config(model.optimizer.get_config())
        model.optimizer.build(model.trainable_variables)
        model.optimizer.set_weights(weights)


def class_of(make: Callable[..., Any]) -> type:
    """Return a class whose instances ``make(**config)`` makes: Keras 3 wants a class."""

    class Made:
        @classmethod
        def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
            return make(**config)

    return Made


def leave_xla_out(model: Any) -> None:
    """Turn XLA off in a model whose file says that it was on."""
    RankCallback().set_model(model)


def _is_zip(filepath: Any) -> bool:
    return isinstance(filepath, (str, os.PathLike)) and zipfile.is_zipfile(filepath)


@contextlib.contextmanager
def _h5(filepath: Any) -> Iterator[Any]:
    """Open an ``.h5`` file, or take one that is open."""
    import h5py  # type: ignore[import-untyped]

    if isinstance(filepath, h5py.Group):
        yield filepath
    else:
        with h5py.File(filepath, "r") as file:
            yield file
