"""Operators by name and number, and Horovod's older spelling."""

from __future__ import annotations

import numpy as np
import pytest

from hvdx.reduce_op import ReduceOp


@pytest.mark.parametrize(
    ("op", "average", "expected"),
    [
        (None, None, ReduceOp.Average),
        (None, True, ReduceOp.Average),
        (None, False, ReduceOp.Sum),
        (0, None, ReduceOp.Average),
        (3, None, ReduceOp.Min),
        (np.int64(4), None, ReduceOp.Max),
        (ReduceOp.Product, None, ReduceOp.Product),
    ],
)
def test_what_is_meant(op, average, expected):
    assert ReduceOp.of(op, average) is expected


@pytest.mark.parametrize("op", [6, -1, 17, "sum", 1.5, object()])
def test_what_is_no_operator(op):
    with pytest.raises(ValueError) as error:
        ReduceOp.of(op)
    for told in (repr(op), "hvd.Average", "hvd.Product"):
        assert told in str(error.value)


@pytest.mark.parametrize("average", [True, False])
def test_op_and_average_are_too_much(average):
    with pytest.raises(ValueError, match="not both"):
        ReduceOp.of(ReduceOp.Sum, average)


def test_numbers_are_horovods():
    mpi_ops = pytest.importorskip("horovod.torch.mpi_ops")
    for op in ReduceOp:
        assert getattr(mpi_ops, op.name) == op
