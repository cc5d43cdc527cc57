"""Horovod's tf.data service, under the name that its scripts import."""

from horovod.tensorflow.data.compute_service import *  # noqa: F403
