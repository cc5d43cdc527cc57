"""What ``hvdx.keras.load_model`` must know of Keras' files before Keras reads them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from typing import Any

from hvdx.integrations.keras_sync import RankCallback


def optimizer_class(filepath: Any) -> str | None:
    """Return the name of the optimizer's class in a ``.keras`` or ``.h5`` file, None if unknown."""
    path = os.fspath(filepath) if isinstance(filepath, (str, os.PathLike)) else None
    try:
        if path and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                told = json.loads(archive.read("config.json"))["compile_config"]["optimizer"]
        else:
            told = _of_h5(filepath)
        return str(told["class_name"])
    except (KeyError, TypeError, OSError, ValueError):  # not compiled, or for Keras to complain of
        return None


def _of_h5(filepath: Any) -> Any:
    import h5py  # type: ignore[import-untyped]

    if isinstance(filepath, h5py.Group):
        return json.loads(filepath.attrs["training_config"])["optimizer_config"]
    with h5py.File(filepath, "r") as file:
        return json.loads(file.attrs["training_config"])["optimizer_config"]


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
