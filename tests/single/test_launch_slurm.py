"""Slurm's shorthands."""

from __future__ import annotations

import pytest

from hvdx.errors import LaunchError
from hvdx.launch.slurm import expand_counts, expand_nodes


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("node[01-03,07]", "node01 node02 node03 node07"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("a[1-2],login,b[3]", "a1 a2 login b3"),
        ("r[1-2]n[1-2]-ib", "r1n1-ib r1n2-ib r2n1-ib r2n2-ib"),
        ("gpu-a100.example", "gpu-a100.example"),
    ],
)
def test_nodes(text, nodes):
    assert expand_nodes(text) == nodes.split()


@pytest.mark.parametrize(
    ("text", "counts"),
    [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2,3", [1, 2, 3]), ("8(x1)", [8])],
)
def test_counts(text, counts):
    assert expand_counts(text) == counts


@pytest.mark.parametrize(
    "text", ["", "n[", "n]", "n[1-", "n[a-b]", "n[3-1]", "n[0-999999999]", ","]
)
def test_odd_nodes_are_told(text):
    with pytest.raises(LaunchError, match="SLURM_JOB_NODELIST=") as error:
        expand_nodes(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["", "x", "2(x)", "2x3", "2(x3", "-1", "2(x999999999)"])
def test_odd_counts_are_told(text):
    with pytest.raises(LaunchError, match="SLURM_TASKS_PER_NODE=") as error:
        expand_counts(text)
    assert repr(text) in str(error.value)
