"""Start jobs (``hvdx run``) and find out who started this process (``hvdx.init()``).

``run_command`` is the command line; the others serve ``hvdx.init()``. Each loads its module when
asked for, so that a rank does not load the launcher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdx.launch.client import check_as_first, is_over, news, report_up
    from hvdx.launch.command import run_command
    from hvdx.launch.environment import Launch, prepare

__all__ = ["Launch", "check_as_first", "is_over", "news", "prepare", "report_up", "run_command"]

_HOME = {
    "Launch": "environment",
    "check_as_first": "client",
    "is_over": "client",
    "news": "client",
    "prepare": "environment",
    "report_up": "client",
    "run_command": "command",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
