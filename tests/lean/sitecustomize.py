"""Keras without what no test of hvdx uses: `make test` puts this on the path of all it starts.

Wherever scikit-learn and matplotlib are installed, ``import keras`` imports them, for wrappers and
plots, which takes long. With torch as its backend, ``set_random_seed`` and ``save``
import all of TensorFlow, to seed it and to ask whether an object is of its types. Keras works
without them: for it, and for nobody else, they are not installed. A run starts Keras a hundred
times and more.
"""

import os
import sys


class Leave:
    """Comes before the other finders, and tells Keras that there is no such module."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("matplotlib", "sklearn") or (
            name == "tensorflow" and os.environ.get("KERAS_BACKEND") == "torch"
        ):
            frame = sys._getframe(1)
            while frame and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame and frame.f_globals.get("__name__", "").startswith("keras."):
                raise ModuleNotFoundError(f"{name} is left out by {__file__}", name=name)


sys.meta_path.insert(0, Leave)
