"""A job of ``hvdx run``: what its ranks are started with, and one run of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from hvdx.launch.arguments import Arguments
from hvdx.launch.hosts import Host, Place, parse_hosts, read_hostfile
from hvdx.launch.processes import Ended, Start, run_ranks
from hvdx.launch.remote import Site, Survey
from hvdx.launch.rendezvous import Rendezvous, stays_open
from hvdx.launch.shell import local_script, remote_script
from hvdx.preemption import grace_seconds


class Job:
    """Starts ranks of one command line.

    Args:
        asked: the command line.
        found: how to reach the hosts.
    """

    def __init__(self, asked: Arguments, found: Survey) -> None:
        self.asked = asked
        self.found = found
        self.sites: dict[str, Site] = dict(found.sites)
        self.environ = _environment(asked.horovod)

    def say(self, text: str) -> None:
        """Print what only those want to know who ask for it."""
        if self.asked.horovod.verbose:
            print(f"hvdx run: {text}", file=sys.stderr)

    def rendezvous(self, size: int, **options: object) -> Rendezvous:
        """Open a rendezvous where the job's hosts reach it."""
        admitted = {self.found.address}.union(*(site.addresses for site in self.sites.values()))
        rendezvous = Rendezvous(
            size,
            address=self.found.address,
            admitted=admitted,
            **options,  # type: ignore[arg-type]
        ).start()
        self.say(
            f"the rendezvous listens on {self.found.address}:{rendezvous.port} "
            f"and admits {', '.join(sorted(admitted))}"
        )
        return rendezvous

    def start(self, number: int, host: str, variables: Mapping[str, str]) -> Start:
        """Return how to start a rank on ``host``; ``number`` is what its output is marked with."""
        site = self.sites[host]
        own = {
            **self.environ,
            **variables,
            "HOROVOD_GLOO_IFACE": site.interfaces[0],
            "NCCL_SOCKET_IFNAME": ",".join(site.interfaces),
        }
        command = self.asked.command
        if site.ssh is None:
            return Start(number, host, ["sh", "-s"], local_script(command), own)
        script = remote_script(command, _exportable(own), os.getcwd())
        return Start(number, host, site.ssh, script, None)

    def run(
        self, places: Sequence[Place], folder: str | None, more: Sequence[Mapping[str, str]] = ()
    ) -> Ended:
        """Run the ranks to their end; when one fails, end the others.

        Args:
            places: of the ranks.
            folder: for their output, too.
            more: variables for each of them.
        """
        self.say(f"the job talks over {self.found.reason}")
        stays = self.asked.keep_rendezvous or stays_open(self.environ)
        rendezvous = self.rendezvous(len(places), stays=stays)
        common = rendezvous.environment()
        starts = [
            self.start(place.rank, place.host.name, {**common, **place.environment(), **own})
            for place, own in zip(places, more or [{}] * len(places), strict=True)
        ]
        timestamps = self.asked.horovod.prefix_output_with_timestamp
        try:
            return run_ranks(starts, folder=folder, timestamps=timestamps, grace=grace_seconds())
        finally:
            rendezvous.close()


def hosts_of(options: argparse.Namespace) -> list[Host]:
    """Return the hosts that the command line names; this machine if it names none."""
    if options.hosts:
        return parse_hosts(options.hosts)
    if options.hostfile:
        return read_hostfile(options.hostfile)
    return [Host("localhost", "localhost", options.max_num_proc or options.num_proc)]


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
