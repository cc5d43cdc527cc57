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


def test_a_set_declared_at_init_serves_both_cores(process_set):
    if process_set.included():
        members = process_set.ranks
        for tensor in (torch.tensor([float(hvd.rank())]), tf.constant([float(hvd.rank())])):
            total = hvd.allreduce(tensor, op=hvd.Sum, process_set=process_set)
            assert float(total[0]) == sum(members)
            whole = hvd.allgather(tensor, process_set=process_set)
            assert [float(each) for each in whole] == members
        for framework in ("torch", "tensorflow"):
            told = hvd.allgather_object(1, process_set=process_set, framework=framework)
            assert told == [1] * len(members)


def test_sets_of_all_ranks_know_their_core():
    import hvdx.torch

    everyone = hvdx.torch.global_process_set
    assert everyone.ranks == list(range(hvd.size()))
    assert (everyone.size(), everyone.rank()) == (hvd.size(), hvd.rank())
    assert everyone.included()
    total = hvdx.torch.allreduce_(torch.ones(1), op=hvd.Sum, process_set=everyone)
    assert total.item() == hvd.size()
    assert hvd.global_process_set is everyone  # torch's core is the first here
