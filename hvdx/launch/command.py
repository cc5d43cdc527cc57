"""``hvdx run``: from the command line to running ranks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from signal import Signals

from hvdx.launch import hosts as _hosts
from hvdx.launch.arguments import Arguments, parse
from hvdx.launch.processes import Start, run_ranks
from hvdx.launch.remote import survey
from hvdx.launch.rendezvous import Rendezvous, stays_open
from hvdx.launch.shell import local_script, remote_script
from hvdx.preemption import grace_seconds


def run_command(arguments: Sequence[str]) -> int:
    """Run ``hvdx run`` with ``arguments``; return its exit status.

    Raises:
        LaunchError: the job could not be started.
        HorovodMissingError: Horovod is not installed.
    """
    asked = parse(arguments)
    options = asked.horovod
    if options.use_mpi or options.use_jsrun:
        _hand_over(asked)
    say = _say if options.verbose else _say_nothing
    grace = grace_seconds()
    places = _hosts.assign(_hosts_of(options), options.num_proc)
    found = survey(dict.fromkeys(place.host for place in places), options)
    say(f"the job talks over {found.reason}")

    environ = _environment(options)
    sites = found.sites
    admitted = {found.address}.union(*(site.addresses for site in sites.values()))
    rendezvous = Rendezvous(
        len(places),
        address=found.address,
        admitted=admitted,
        stays=asked.keep_rendezvous or stays_open(environ),
    ).start()
    say(
        f"the rendezvous listens on {found.address}:{rendezvous.port} "
        f"and admits {', '.join(sorted(admitted))}"
    )
    environ.update(rendezvous.environment())

    starts = []
    for place in places:
        site = sites[place.host.name]
        own = {
            **environ,
            **place.environment(),
            "HOROVOD_GLOO_IFACE": site.interfaces[0],
            "NCCL_SOCKET_IFNAME": ",".join(site.interfaces),
        }
        if site.ssh is None:
            start = Start(
                place.rank, place.host.name, ["sh", "-s"], local_script(asked.command), own
            )
        else:
            script = remote_script(asked.command, _exportable(own), os.getcwd())
            start = Start(place.rank, place.host.name, site.ssh, script, None)
        starts.append(start)
    try:
        ended = run_ranks(
            starts,
            folder=options.output_filename,
            timestamps=options.prefix_output_with_timestamp,
            grace=grace,
        )
    finally:
        rendezvous.close()
    if ended.signal is not None:
        print(f"hvdx run: {Signals(ended.signal).name} ended the job.", file=sys.stderr)
        return 128 + ended.signal
    if not ended.failures:
        return 0
    first, *others = ended.failures
    print(f"hvdx run: {first}; the job was ended.", file=sys.stderr)
    for other in others:
        print(f"hvdx run: {other} after that.", file=sys.stderr)
    if ended.finished:  # perhaps too early: the others may have waited for them
        told = ", ".join(map(str, ended.finished))
        print(f"hvdx run: before that rank {told} had ended, with code 0.", file=sys.stderr)
    return first.status


def _hand_over(asked: Arguments) -> None:
    """Become horovodrun: MPI has its own way to start and connect ranks."""
    print("hvdx run: --mpi and --jsrun are horovodrun's own; it takes over.", file=sys.stderr)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "horovod.runner.launch", *asked.plain])


def _hosts_of(options: argparse.Namespace) -> list[_hosts.Host]:
    if options.hosts:
        return _hosts.parse_hosts(options.hosts)
    if options.hostfile:
        return _hosts.read_hostfile(options.hostfile)
    return [_hosts.Host("localhost", "localhost", options.num_proc)]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Return what every rank shares: the launcher's environment and horovodrun's variables."""
    from horovod.runner.common.util.config_parser import set_env_from_args

    environ = dict(os.environ)
    set_env_from_args(environ, options)
    environ["PYTHONUNBUFFERED"] = "1"  # else prefixed output comes late, in large pieces
    environ["HOROVOD_CONTROLLER"] = environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
    return environ


def _exportable(environ: dict[str, str]) -> dict[str, str]:
    """Return what makes sense on another host, by Horovod's own rule."""
    from horovod.runner.common.util.env import is_exportable

    return {name: value for name, value in environ.items() if is_exportable(name)}


def _say(text: str) -> None:
    print(f"hvdx run: {text}", file=sys.stderr)


def _say_nothing(text: str) -> None:
    del text
