"""Wrong use ends with one clear error on every rank, soon, and the job can go on."""

from __future__ import annotations

import pytest
import torch

import hvdx as hvd


@pytest.fixture(autouse=True)
def _the_job_goes_on():
    yield
    total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="alive")
    assert total.item() == hvd.size()


def other() -> int:
    return int(hvd.rank() == 1)


def test_different_shapes():
    with pytest.raises(hvd.MismatchError, match=r"'odd'.*rank 0: .*\(2,\).*rank 1: .*\(3,\)"):
        hvd.allreduce(torch.ones(2 + other()), name="odd")


def test_different_dtypes():
    dtype = torch.float64 if other() else torch.float32
    with pytest.raises(hvd.MismatchError, match=r"rank 0: .*float32.*rank 1: .*float64"):
        hvd.allreduce(torch.ones(2, dtype=dtype), name="types")


def test_different_shapes_without_a_name():
    with pytest.raises(hvd.MismatchError, match="unnamed"):
        hvd.allreduce(torch.ones(2 + other()))


def test_different_roots():
    with pytest.raises(hvd.MismatchError, match="broadcast"):
        hvd.broadcast(torch.ones(2), root_rank=other(), name="roots")


def test_groups_of_different_shapes():
    with pytest.raises(hvd.MismatchError, match="grouped_allreduce"):
        hvd.grouped_allreduce([torch.ones(1), torch.ones(2 + other())], name="groups")


def test_different_models_are_not_broadcast():
    model = torch.nn.Linear(3, 4 + other())
    with pytest.raises(hvd.MismatchError, match=r"rank 0: 'weight' float32 \(4, 3\)"):
        hvd.broadcast_parameters(model)


def test_different_models_are_not_trained():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2 + other()))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(
        hvd.MismatchError, match=r"1\.bias: float32 \(2,\).*1\.bias: float32 \(3,\)"
    ):
        model(torch.ones(1, 3)).sum().backward()
    assert optimizer.communication_seconds == 0


def test_different_optimizers_are_not_trained():
    model = torch.nn.Linear(2, 2)
    kind = torch.optim.Adam if other() else torch.optim.SGD
    hvd.DistributedOptimizer(kind(model.parameters(), 0.1), model)
    with pytest.raises(hvd.MismatchError, match=r"rank 0: .*SGD.*rank 1: .*Adam"):
        model(torch.ones(1, 2)).sum().backward()


def test_mixed_frameworks_in_one_call():
    import numpy as np

    with pytest.raises(TypeError, match="numpy and torch"):
        hvd.grouped_allreduce([torch.ones(1), np.ones(1)])


def test_objects_of_no_framework():
    with pytest.raises(TypeError, match=r"no framework for builtins\.str"):
        hvd.allreduce("text")


def test_unknown_operator():
    with pytest.raises(ValueError, match=r"op=17.*hvd\.Average"):
        hvd.allreduce(torch.ones(1), op=17)


def test_operator_and_average():
    with pytest.raises(ValueError, match="not both"):
        hvd.allreduce(torch.ones(1), op=hvd.Sum, average=True)


@pytest.mark.parametrize("wrong", ["zip", 16, object()])
def test_unknown_compression(wrong):
    with pytest.raises(ValueError, match=r"unknown compression=.*hvd\.Compression\.fp16"):
        hvd.allreduce(torch.ones(1), compression=wrong)
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="unknown compression="):
        hvd.DistributedOptimizer(torch.optim.SGD([parameter], 0.1), compression=wrong)


def test_what_cannot_be_reduced_says_what_to_do():
    with pytest.raises(ValueError, match="bool to uint8"):
        hvd.allreduce(torch.ones(2, dtype=torch.bool))


def test_tensorflow_is_not_running():
    with pytest.raises(hvd.NotInitializedError, match=r"framework=\('torch', 'tensorflow'\)"):
        hvd.world.core("tensorflow")


def test_wrapping_twice():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    hvd.DistributedOptimizer(optimizer)
    with pytest.raises(TypeError, match="already"):
        hvd.DistributedOptimizer(optimizer)


def test_wrapping_what_horovod_has_wrapped():
    import horovod.torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    theirs = horovod.torch.DistributedOptimizer(optimizer)
    with pytest.raises(TypeError, match=r"horovod\.torch\.DistributedOptimizer already"):
        hvd.DistributedOptimizer(theirs)


def test_wrapping_what_is_no_optimizer():
    with pytest.raises(TypeError, match="no optimizer"):
        hvd.DistributedOptimizer(torch.nn.Linear(1, 1).parameters())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backward_passes_per_step": 0}, "backward_passes_per_step=0"),
        ({"op": hvd.Max}, "op=Max"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"named_parameters": [torch.ones(1)]}, "not parameters()"),
        ({"named_parameters": []}, "not in named_parameters"),
    ],
)
def test_wrong_options(options, told):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(ValueError) as error:
        hvd.DistributedOptimizer(optimizer, **options)
    assert told in str(error.value)


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="LBFGS"):
        hvd.DistributedOptimizer(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))]))
