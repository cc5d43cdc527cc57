"""The command line of ``hvdx run``: horovodrun's, read by Horovod's own parser, and our flags."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hvdx.errors import HorovodMissingError, LaunchError

KEEP = "--keep-rendezvous"

HELP = """\
hvdx run: start a Horovod job, with horovodrun's flags and without its open ports.

  hvdx run -np 4 -- python train.py                      on this machine
  hvdx run -np 4 -H h1:2,h2:2 -- python train.py         on two hosts, over ssh
  hvdx run -np 4 -H h1:2,h2:2 --network-interfaces eth0 -- python train.py

hvdx's own flags:
  --keep-rendezvous     keep the rendezvous open, under its token, until the job ends, for
                        scripts that call init() again or add process sets later

All other flags are horovodrun's:

"""
ELASTIC = {
    "host_discovery_script": "--host-discovery-script",
    "min_num_proc": "--min-np",
    "max_num_proc": "--max-np",
    "slots": "--slots-per-host",
    "elastic_timeout": "--elastic-timeout",
    "reset_limit": "--reset-limit",
    "cooldown_range": "--blacklist-cooldown-range",
}


class Arguments(NamedTuple):
    """What the command line asks for."""

    horovod: argparse.Namespace  # what Horovod's parser made of it
    plain: list[str]  # the command line without hvdx's own flags
    command: list[str]
    keep_rendezvous: bool


def parse(arguments: Sequence[str]) -> Arguments:
    """Read the arguments of ``hvdx run``.

    Raises:
        LaunchError: they make no sense.
        HorovodMissingError: Horovod is not installed.
        SystemExit: they asked for help, version or build, which is printed by now.
    """
    flags = [argument for argument in arguments if argument != KEEP]
    parsed = _parse_as_horovodrun(flags)
    # Horovod's parser leaves the command, the tail, untouched. Our flag counts only before it.
    left = len(parsed.command)
    start = len(arguments)
    while left:
        start -= 1
        left -= arguments[start] != KEEP
    command = list(arguments[start:])
    if command[:1] == ["--"]:
        del command[0]
    elastic = [flag for name, flag in ELASTIC.items() if getattr(parsed, name) is not None]
    if elastic:
        raise LaunchError(
            f"{elastic[0]} asks for elastic training, which hvdx run does not do yet: Horovod's "
            "elastic mode needs a port that anyone on the network may write pickles to. On a "
            "network you trust, use `horovodrun` with the same flags; see docs/launching.md."
        )
    if not command:
        raise LaunchError("no command to run: `hvdx run -np 2 -- python train.py`")
    if parsed.num_proc is None or parsed.num_proc < 1:
        raise LaunchError(f"-np is {parsed.num_proc}: it must be 1 or more")
    plain = [a for a in arguments[:start] if a != KEEP] + command
    return Arguments(parsed, plain, command, KEEP in arguments[:start])


def _parse_as_horovodrun(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what Horovod's parser makes of ``arguments``."""
    try:
        from horovod.runner.launch import parse_args
    except ImportError as error:
        raise HorovodMissingError(
            f"Horovod is not installed here ({error}): build it with `hvdx install`."
        ) from None
    if set(arguments[:1]) & {"-h", "--help"}:
        print(HELP, end="")
    if not arguments:
        raise LaunchError(
            "no command to run: `hvdx run -np 2 -- python train.py`. "
            "`hvdx run --help` lists the flags."
        )
    complaint = io.StringIO()
    try:
        with _command_line(arguments), contextlib.redirect_stderr(complaint):
            namespace: argparse.Namespace = parse_args()
    except SystemExit as exit:
        if not exit.code:
            raise
        message = complaint.getvalue().rpartition(" error: ")[2].strip()
        hint = "" if "--" in arguments else " Put `--` before your command if the flag is its own."
        raise LaunchError(f"{message}. `hvdx run --help` lists the flags.{hint}") from None
    except (ValueError, OSError) as error:  # a value out of range, no such --config-file
        raise LaunchError(str(error)) from None
    except Exception as error:
        if not any(each.startswith("--config-file") for each in arguments):
            raise
        raise LaunchError(
            f"--config-file: not what Horovod can read ({type(error).__name__}: {error}). It is a "
            "YAML file of sections and values, such as `params: {fusion_threshold_mb: 32}`"
        ) from None
    return namespace


@contextlib.contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Put ``arguments`` where Horovod's parser looks for them: it takes none."""
    before = sys.argv
    sys.argv = ["hvdx run", *arguments]
    try:
        yield
    finally:
        sys.argv = before
