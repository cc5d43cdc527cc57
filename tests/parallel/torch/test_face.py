"""``hvdx.torch`` has what ``horovod.torch`` has, under the same names and arguments."""

from __future__ import annotations

import importlib
import inspect

import horovod.torch as plain
import pytest

import hvdx.torch as hvd

SUBMODULES = ["mpi_ops", "functions", "compression", "optimizer", "sync_batch_norm"]

pytestmark = pytest.mark.ranks(2)


def public(module) -> list[str]:
    """Name what ``module`` offers, without modules, and what helps to make it."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "") != "horovod.common.util"
    ]


def test_every_name_is_there():
    for name in public(plain):
        assert getattr(hvd, name) is not None, name
    assert hvd.is_homogeneous()


def test_a_star_import_brings_them_all():
    scope: dict = {}
    exec("from hvdx.torch import *", scope)
    assert not [name for name in public(plain) if name not in scope]


@pytest.mark.parametrize("name", SUBMODULES)
def test_submodules(name):
    theirs = importlib.import_module(f"horovod.torch.{name}")
    ours = importlib.import_module(f"hvdx.torch.{name}")
    for each in public(theirs):
        made_here = getattr(getattr(theirs, each), "__module__", "") == theirs.__name__
        if name != "mpi_ops" and not made_here:
            continue  # what it imports for its own use
        if each in dir(plain):
            assert getattr(ours, each) is getattr(hvd, each), each
        assert getattr(ours, each) is not None


def test_every_argument_is_taken_in_the_same_place():
    compared = []
    for name in public(plain):
        theirs, ours = getattr(plain, name), getattr(hvd, name)
        if ours is theirs or not callable(theirs):
            continue
        try:
            expected = inspect.signature(theirs).parameters
        except ValueError:  # built in
            continue
        if list(expected) == ["args", "kwargs"]:
            continue
        given = inspect.signature(ours).parameters
        positional = [p for p in given.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional][: len(expected)] == list(expected), name
        for parameter, wanted in zip(positional, expected.values(), strict=False):
            if wanted.default is inspect.Parameter.empty:
                continue
            plainly = wanted.default in (None, 0, 1, 1.0, -1) and name != "DistributedOptimizer"
            if plainly and not inspect.isclass(wanted.default) and parameter.name != "op":
                assert parameter.default == wanted.default, (name, parameter)
            assert parameter.default is not inspect.Parameter.empty, (name, parameter)
        compared.append(name)
    assert {"allreduce", "sparse_allreduce_async", "SyncBatchNorm", "broadcast_object"} <= set(
        compared
    )
    assert len(compared) > 30
