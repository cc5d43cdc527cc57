"""Wrong use ends with one clear error on every rank, soon, and the job can go on."""

from __future__ import annotations

import pytest
import torch

import hvdx as hvd

pytestmark = pytest.mark.ranks(2)


@pytest.fixture(autouse=True)
def _the_job_goes_on():
    yield
    total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="alive")
    assert total.item() == hvd.size()


def other() -> int:
    return int(hvd.rank() == 1)


@pytest.mark.ranks(2, 4)
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


@pytest.mark.ranks(2, 4)
def test_different_roots():
    with pytest.raises(hvd.MismatchError, match=r"broadcast.*root rank 1"):
        hvd.broadcast(torch.ones(2), root_rank=other(), name="roots")


def test_groups_of_different_shapes():
    with pytest.raises(hvd.MismatchError, match="grouped_allreduce"):
        hvd.grouped_allreduce([torch.ones(1), torch.ones(2 + other())], name="groups")


def test_different_models_are_not_broadcast():
    model = torch.nn.Linear(3, 4 + other())
    with pytest.raises(hvd.MismatchError, match=r"rank 0: 'weight' float32 \(4, 3\)"):
        hvd.broadcast_parameters(model)


@pytest.mark.ranks(2, 4)
def test_different_models_are_not_trained():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2 + other()))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(
        hvd.MismatchError, match=r"1\.bias: float32 \(2,\).*1\.bias: float32 \(3,\)"
    ):
        model(torch.ones(1, 3)).sum().backward()
    assert optimizer.communication_seconds == 0


def test_another_wire_format_is_not_spoken(monkeypatch):
    """Ranks of two releases: they would read each other's bytes as other numbers."""
    wrapper = "hvdx.integrations.pytorch_optimizer_wrapper"
    if other():
        monkeypatch.setattr(f"{wrapper}.FORMAT", 1000)
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hvd.DistributedOptimizer(optimizer, model, compression=hvd.Compression.int8)
    with pytest.raises(hvd.MismatchError, match=r"int8.*wire format 1\).*rank 1: .*format 1000\)"):
        model(torch.ones(1, 3)).sum().backward()


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


def face():
    import hvdx.torch

    return hvdx.torch


STARTS = {
    "allreduce_async": lambda name: face().allreduce_async(torch.ones(2), name=name),
    "allreduce_async_": lambda name: face().allreduce_async_(torch.ones(2), name=name),
    "allgather_async": lambda name: face().allgather_async(torch.ones(2), name=name),
    "broadcast_async": lambda name: face().broadcast_async(torch.ones(2), 0, name=name),
    "alltoall_async": lambda name: face().alltoall_async(torch.ones(hvd.size()), name=name),
    "reducescatter_async": lambda name: face().reducescatter_async(torch.ones(4), name=name),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_name_that_is_under_way(start):
    # Rank 0's cannot end before the others start theirs; then the others'.
    begin = STARTS[start]
    told = rf"rank {hvd.rank()}: {start.rstrip('_').removesuffix('_async')} of tensor 'twice': .*"
    if hvd.rank() == 0:
        first = begin("twice")
        with pytest.raises(ValueError, match=told + "same name"):
            begin("twice")
    hvd.barrier()
    if hvd.rank() > 0:
        first = begin("twice")
    face().synchronize(first)


def test_different_shapes_and_dtypes_behind_handles():
    for tensors in (
        [torch.ones(2 + other())],
        [torch.ones(2, dtype=torch.int32 if other() else torch.float32)],
        [torch.ones([2] * (1 + other()))],
        [torch.ones(1), torch.ones(2 + other()).bfloat16()],
    ):
        handle = face().grouped_allreduce_async_(tensors, name="late")
        with pytest.raises(hvd.MismatchError, match=r"'late'.*rank 0: .*rank 1: "):
            face().synchronize(handle)


@pytest.mark.parametrize(
    ("call", "given", "told"),
    [
        ("allgather", lambda: torch.ones(2, 3 + other()), r"allgather.*\(2, 3\).*\(2, 4\)"),
        ("allgather", lambda: torch.ones([2] * (1 + other())), r"allgather.*\(2,\).*\(2, 2\)"),
        ("alltoall", lambda: torch.ones(hvd.size(), 1 + other()), "alltoall"),
        ("reducescatter", lambda: torch.ones(4 + other()), "reducescatter"),
        (
            "allgather",
            lambda: torch.ones(2, dtype=torch.bool if other() else torch.int64),
            "rank 0: .*int64.*rank 1: .*bool",
        ),
    ],
    ids=["columns", "dimensions", "rows", "lengths", "dtypes"],
)
def test_what_does_not_fit_together(call, given, told):
    with pytest.raises(hvd.MismatchError, match=told):
        getattr(hvd, call)(given(), name=f"unfit.{call}")


def test_different_operators_and_factors():
    with pytest.raises(hvd.MismatchError, match=r"allreduce.*reduction operation"):
        hvd.allreduce(torch.ones(2), op=hvd.Max if other() else hvd.Min, name="operators")
    with pytest.raises(hvd.MismatchError, match=r"allreduce.*prescale"):
        hvd.allreduce(torch.ones(2), prescale_factor=1.0 + other(), name="factors")


@pytest.mark.ranks(2, 4)
def test_roots_outside_the_job():
    for root in (hvd.size(), -1):
        with pytest.raises(ValueError, match=rf"rank {hvd.rank()}: broadcast .*root rank {root}"):
            hvd.broadcast(torch.ones(2), root)


@pytest.mark.ranks(2, 4)
def test_splits_that_do_not_fit():
    whole = torch.ones(hvd.size())
    for splits, told in (
        ([2] * hvd.size(), "Sum of splits"),
        ([1] * (hvd.size() + 1), "Number of entries"),
        (torch.ones(hvd.size()), "whole numbers of rows.*not float32"),
        (torch.ones(2, hvd.size(), dtype=torch.int32), "1D"),
    ):
        with pytest.raises(ValueError, match=f"(?s)rank {hvd.rank()}: .*{told}"):
            hvd.alltoall(whole, splits)
    with pytest.raises(ValueError, match=f"rank {hvd.rank()}: alltoall of a scalar"):
        hvd.alltoall(torch.tensor(1.0))  # Horovod crashes
    with pytest.raises(ValueError, match="not an even multiple"):
        hvd.alltoall(torch.ones(hvd.size() + 1))


def test_empty_groups():
    for name in ("allreduce", "allgather", "reducescatter", "allreduce_"):
        with pytest.raises(ValueError, match="at least one tensor"):
            getattr(face(), f"grouped_{name}")([])
    for name in ("allreduce_async", "allgather_async", "reducescatter_async", "allreduce_async_"):
        with pytest.raises(ValueError, match="at least one tensor"):
            getattr(face(), f"grouped_{name}")([])


@pytest.mark.ranks(2, 4)
def test_scattering_what_cannot_be():
    with pytest.raises(ValueError, match=r"hvd\.Average or hvd\.Sum, not Max"):
        hvd.reducescatter(torch.ones(4), op=hvd.Max)
    with pytest.raises(ValueError, match=r"hvd\.Average or hvd\.Sum, not Min"):
        face().grouped_reducescatter_async([torch.ones(4)], op=hvd.Min)
    with pytest.raises(ValueError, match=rf"rank {hvd.rank()}: reducescatter .*scalar"):
        hvd.reducescatter(torch.tensor(1.0))


def test_things_that_are_no_dense_tensor():
    import numpy as np

    with pytest.raises(TypeError, match=r"torch\.Tensor is needed here, not ndarray"):
        face().allreduce_async(np.ones(2))
    with pytest.raises(ValueError, match="sparse_allreduce_async"):
        hvd.allreduce(torch.ones(2).to_sparse())


@pytest.mark.ranks(2, 4)
def test_process_sets_that_are_none():
    with pytest.raises(ValueError, match=r"ProcessSet\(\[0\]\) is not registered"):
        hvd.allreduce(torch.ones(1), process_set=hvd.ProcessSet([0]))
    with pytest.raises(TypeError, match=r"process_set=\[0\] is no hvd\.ProcessSet"):
        face().allgather_async(torch.ones(1), process_set=[0])
    assert not hvd.remove_process_set(hvd.ProcessSet([0]))
    assert not face().remove_process_set(hvd.global_process_set)


@pytest.mark.parametrize("call", ["allgather", "broadcast", "alltoall", "reducescatter"])
def test_operations_that_do_not_work_while_a_rank_has_joined(call):
    if hvd.rank() > 0:
        options = {"root_rank": 1} if call == "broadcast" else {}
        with pytest.raises(
            RuntimeError, match=f"{call} of tensor 'alone'.*not supported with Join"
        ):
            getattr(hvd, call)(torch.ones(hvd.size()), name="alone", **options)
    assert face().join() in range(hvd.size())


def test_lbfgs_is_not_broadcast():
    with pytest.raises(ValueError, match="LBFGS"):
        hvd.broadcast_optimizer_state(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))]))


def test_optimizers_of_other_parameters_are_not_broadcast():
    layer = torch.nn.Linear(2, 2 + other())
    with pytest.raises(hvd.MismatchError, match=r"optimizer.*\(2, 2\).*\(3, 2\)"):
        hvd.broadcast_optimizer_state(torch.optim.Adam(layer.parameters()))


def test_what_holds_no_parameters():
    with pytest.raises(TypeError, match="no framework"):
        hvd.broadcast_parameters({"text": "only"})
