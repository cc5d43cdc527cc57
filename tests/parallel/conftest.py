"""What all parallel tests share: a running Horovod, and an end for all when one rank fails."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

FRAMEWORKS = {"torch": "torch", "tensorflow": "tensorflow", "both": ("torch", "tensorflow")}

PROCESS_SETS = [list(range(int(os.environ["HOROVOD_SIZE"]) - 1))]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ranks(number, ...): on these numbers only, since what it shows is the same on others; "
        "a test's own mark goes before its module's",
    )
    # When another rank fails or hangs, the launcher ends this one: say where it stands.
    faulthandler.register(signal.SIGTERM, file=sys.__stderr__, all_threads=True, chain=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are marked for other numbers of ranks."""
    size = int(os.environ["HOROVOD_SIZE"])
    elsewhere = [
        item
        for item in items
        if (mark := item.get_closest_marker("ranks")) is not None and size not in mark.args
    ]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """After a failure leave at once: Horovod's own exit would wait for, and confuse, the others."""
    session = config.pluginmanager.get_plugin("session")
    status = getattr(session, "exitstatus", 0)
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status))


@pytest.fixture(scope="session")
def group(request: pytest.FixtureRequest) -> str:
    """The folder of the tests: torch, tensorflow, keras or both."""
    return request.session.items[0].path.parent.name


@pytest.fixture(scope="session", autouse=True)
def horovod(group: str, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Start Horovod once per process. Nothing stops it: the process' end does.

    A rank that has passed waits for the others: its end would abort one that still reports.
    """
    import hvdx

    framework = FRAMEWORKS.get(group) or os.environ.get("KERAS_BACKEND", "tensorflow")
    sets = [hvdx.ProcessSet(ranks) for ranks in PROCESS_SETS]
    hvdx.init(framework=framework, process_sets=sets)
    hvdx.declared_sets = sets
    yield hvdx
    if not request.session.testsfailed:
        hvdx.barrier()


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch, horovod: ModuleType) -> Callable[..., list[object]]:
    """Have networks of these megabits be measured, one after the other; the last one stays.

    None stands for the network that there is. And have ``Compression.auto`` look again however
    short the steps are. Returns a list that grows by what is measured.
    """
    from hvdx import link
    from hvdx.compression import review

    really = link.measure

    def use(*megabits: float | None) -> list[object]:
        to_come, measured = list(megabits), []

        def measure(*args: object) -> link.Link:
            now = to_come.pop(0) if len(to_come) > 1 else to_come[0]
            if now is None:
                measured.append(really(*args))
            else:
                line = link.Line(1e-4, 8e-6 / now)
                measured.append(link.Link(horovod.size(), dict.fromkeys(link.KINDS, line)))
            return measured[-1]

        monkeypatch.setattr(link, "measure", measure)
        monkeypatch.setattr(review, "_SHARE", 1e9)
        return measured

    return use


@pytest.fixture
def process_set(horovod: ModuleType) -> object:
    """All ranks but the last, for tests of a part of the job; declared at init, as all must be."""
    return horovod.declared_sets[0]


@pytest.fixture(scope="session")
def hvd(horovod: ModuleType, group: str) -> ModuleType:
    """The face under test: ``hvdx.torch``, ``hvdx.tensorflow``, ``hvdx.keras``, or hvdx itself."""
    return horovod if group == "both" else importlib.import_module(f"hvdx.{group}")
