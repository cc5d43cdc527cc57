"""The traps of plain Horovod, as tests: hvdx passes them, and plain Horovod must not.

Each test is written once, against a face. With ``--plain`` that is Horovod's own, and the test
must fail in the way that its mark says::

    @pytest.mark.trap(6, TypeError, "set_to_none")

The number is the trap's (docs/horovod-compatibility.md lists them), then come the error and what
its message says. A trap that Horovod sets at random has no error: it is left out with ``--plain``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="test Horovod itself: all must fail")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "trap(number, error, message): how plain Horovod fails")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("trap")
        assert mark is not None, f"{item.name} names no trap"
        if config.option.plain and len(mark.args) == 1:
            item.add_marker(pytest.mark.skip(reason="fails at random with plain Horovod"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """With ``--plain`` run the test to its failure, and fail if there is none, or another."""
    if not pyfuncitem.config.option.plain:
        return (yield)
    _, error, message = pyfuncitem.get_closest_marker("trap").args
    with pytest.raises(error, match=message):
        yield
    return True


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """After a failure leave at once: Horovod's own exit would wait for, and confuse, the others."""
    session = config.pluginmanager.get_plugin("session")
    if status := int(getattr(session, "exitstatus", 0)):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> str:
    return "horovod" if request.config.option.plain else "hvdx"


@pytest.fixture(scope="session")
def face(library: str) -> Callable[..., ModuleType]:
    """Import ``hvdx.NAME`` or ``horovod.NAME``, and start it."""

    def start(name: str, process_sets: Any = None) -> ModuleType:
        module = importlib.import_module(f"{library}.{name}")
        if not module.is_initialized():
            module.init(process_sets=process_sets)
            assert module.size() == 2, "the traps are set for two ranks"
        return module

    return start


@pytest.fixture(scope="session")
def hvd(face: Callable[..., ModuleType], request: pytest.FixtureRequest) -> ModuleType:
    """The face that this folder is named after."""
    return face(request.session.items[0].path.parent.name)


@pytest.fixture(scope="session")
def everyone() -> Callable[[Any], list[Any]]:
    """Return all ranks' values. The measure is Horovod's own, whichever face is measured."""

    def gather(value: Any) -> list[Any]:
        for name in ("torch", "tensorflow"):
            core = sys.modules.get(f"horovod.{name}")
            if core is not None and core.is_initialized():
                return list(core.allgather_object(value, name="everyone"))
        raise RuntimeError("no core of Horovod runs")

    return gather


@pytest.fixture(scope="session")
def assert_replicas(everyone: Callable[[Any], list[Any]]) -> Callable[..., None]:
    """Fail, on all ranks alike, where arrays are not the same on all of them."""

    def check(*arrays: Any) -> None:
        one, other = everyone([np.asarray(array) for array in arrays])
        pairs = list(zip(one, other, strict=True))
        apart = max(float(np.abs(a - b).max()) for a, b in pairs)
        assert all(np.array_equal(a, b) for a, b in pairs), f"ranks are {apart:.3g} apart"

    return check


@pytest.fixture(scope="session", autouse=True)
def _leave_together(
    everyone: Callable[[Any], list[Any]], request: pytest.FixtureRequest
) -> Iterator[None]:
    """A rank that has passed waits: its end would abort one that still reports."""
    yield
    if not request.session.testsfailed:
        everyone("done")
