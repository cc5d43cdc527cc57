"""Horovod's worker of the tf.data service: ``python -m hvdx.tensorflow.data.compute_worker``."""

import runpy

from horovod.tensorflow.data.compute_worker import main

__all__ = ["main"]

if __name__ == "__main__":
    runpy.run_module("horovod.tensorflow.data.compute_worker", run_name="__main__", alter_sys=True)
