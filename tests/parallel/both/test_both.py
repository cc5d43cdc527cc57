"""Both frameworks in one process: each tensor travels through its own core."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import torch

import hvdx as hvd


def test_each_framework_uses_its_core():
    expected = [(hvd.size() - 1) / 2] * 3
    assert hvd.allreduce(torch.full((3,), float(hvd.rank()))).tolist() == expected
    assert hvd.allreduce(tf.fill([3], float(hvd.rank()))).numpy().tolist() == expected
    assert hvd.allreduce(np.full(3, float(hvd.rank()))).tolist() == expected


def test_replicas_of_both():
    net = torch.nn.Linear(2, 2)
    variable = tf.Variable(tf.fill([3], float(hvd.rank())))
    hvd.broadcast_parameters(net)
    hvd.broadcast_parameters([variable], root_rank=1)
    assert variable.numpy().tolist() == [1.0] * 3
    hashes = hvd.allgather_object((hvd.parameter_hash(net), hvd.parameter_hash([variable])))
    assert len(set(hashes)) == 1
