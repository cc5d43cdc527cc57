"""The command line of ``hvdx run``: horovodrun's, read by Horovod's own parser, and our flags."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hvdx.errors import HorovodMissingError, LaunchError

KEEP = "--keep-rendezvous"
RESTART = "--restart"
OWN = (KEEP, RESTART)

HELP = """\
hvdx run: start a Horovod job, with horovodrun's flags and without its open ports.

  hvdx run -np 4 -- python train.py                      on this machine
  hvdx run -np 4 -H h1:2,h2:2 -- python train.py         on two hosts, over ssh
  hvdx run -np 4 -H h1:2,h2:2 --network-interfaces eth0 -- python train.py
  hvdx run -np 4 --min-np 2 -- python train.py           elastic: ranks may fail and join
  hvdx run -np 4 --min-np 2 --restart -- python train.py a failed job begins again on what is left

hvdx's own flags:
  --keep-rendezvous     keep the rendezvous open, under its token, until the job ends, for
                        scripts that call init() again or add process sets later
  --restart             when a rank fails, end all and start the script again on the slots that
                        are left, if these are --min-np or more (default: -np); at most
                        --reset-limit times

All other flags are horovodrun's:

"""
#: What makes a job elastic, by the name that Horovod's parser gives it.
ELASTIC = {
    "host_discovery_script": "--host-discovery-script",
    "min_num_proc": "--min-np",
    "max_num_proc": "--max-np",
    "slots": "--slots-per-host",
    "elastic_timeout": "--elastic-timeout",
    "reset_limit": "--reset-limit",
    "cooldown_range": "--blacklist-cooldown-range",
}
ELASTIC_SECONDS = 600


class Arguments(NamedTuple):
    """What the command line asks for."""

    horovod: argparse.Namespace  # what Horovod's parser made of it
    plain: list[str]  # the command line without hvdx's own flags
    command: list[str]
    keep_rendezvous: bool
    restart: bool = False

    @property
    def elastic(self) -> Elastic | None:
        """What is asked of an elastic job or one that restarts; None for any other."""
        options = self.horovod
        if not self.restart and all(getattr(options, name) is None for name in ELASTIC):
            return None
        seconds = os.environ.get("HOROVOD_ELASTIC_TIMEOUT", ELASTIC_SECONDS)
        least, most = options.min_num_proc, options.max_num_proc
        if most is None and self.restart:
            most = options.num_proc
        return Elastic(
            options.num_proc if least is None else least,
            options.num_proc,
            most,
            options.elastic_timeout or int(seconds),
            options.reset_limit,
            tuple(options.cooldown_range) if options.cooldown_range else None,
        )


class Elastic(NamedTuple):
    """How many ranks a job may have, and how long it waits for them."""

    least: int
    first: int  # to begin with
    most: int | None
    timeout: float
    resets: int | None
    cooldown: tuple[int, int] | None  # seconds for which a slot is not used after a failure


def parse(arguments: Sequence[str]) -> Arguments:
    """Read the arguments of ``hvdx run``.

    Raises:
        LaunchError: they make no sense.
        HorovodMissingError: Horovod is not installed.
        SystemExit: they asked for help, version or build, which is printed by now.
    """
    flags = [argument for argument in arguments if argument not in OWN]
    parsed = _parse_as_horovodrun(flags)
    # Horovod's parser leaves the command, the tail, untouched. Our flag counts only before it.
    left = len(parsed.command)
    start = len(arguments)
    while left:
        start -= 1
        left -= arguments[start] not in OWN
    command = list(arguments[start:])
    if command[:1] == ["--"]:
        del command[0]
    if not command:
        raise LaunchError("no command to run: `hvdx run -np 2 -- python train.py`")
    if parsed.num_proc is None or parsed.num_proc < 1:
        raise LaunchError(f"-np is {parsed.num_proc}: it must be 1 or more")
    own = [a for a in arguments[:start] if a in OWN]
    plain = [a for a in arguments[:start] if a not in OWN] + command
    asked = Arguments(parsed, plain, command, KEEP in own, RESTART in own)
    _check(asked)
    return asked


def _check(asked: Arguments) -> None:
    """Raise unless numbers of ranks go together."""
    elastic = asked.elastic
    if elastic is None:
        return
    if not 1 <= elastic.least <= elastic.first <= (elastic.most or elastic.first):
        raise LaunchError(
            f"--min-np {elastic.least}, -np {elastic.first} and --max-np {elastic.most} must not "
            "decrease in this order, and begin at 1 or more"
        )
    low, high = elastic.cooldown or (1, 1)
    if not 1 <= low <= high:
        raise LaunchError(
            f"--blacklist-cooldown-range {low} {high}: give two numbers of seconds, from 1 on, "
            "the lower first"
        )
    if asked.horovod.use_mpi or asked.horovod.use_jsrun:
        raise LaunchError("elastic jobs and --restart need Gloo: leave --mpi and --jsrun out")


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
