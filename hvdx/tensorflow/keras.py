"""Drop-in face: ``import hvdx.tensorflow.keras as hvd`` for ``horovod.tensorflow.keras``.

The same as :mod:`hvdx.keras`, for Keras 3 on the TensorFlow backend.
"""

from __future__ import annotations

from typing import Any

import hvdx.keras as _face
from hvdx.keras import *  # noqa: F403
from hvdx.keras import __all__ as __all__


def __getattr__(name: str) -> Any:
    return getattr(_face, name)
