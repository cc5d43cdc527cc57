"""``hvdx run --restart``: a job that fails begins again on the slots that are left.

For what cannot go on in the same processes: a pipeline whose stage is gone, a script without an
elastic state. The script starts from its checkpoint; on fewer ranks a pipeline is planned anew.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from hvdx.errors import LaunchError
from hvdx.launch.arguments import Arguments, Elastic
from hvdx.launch.hosts import Host, assign
from hvdx.launch.job import Job, hosts_of
from hvdx.launch.processes import Ended, Failure
from hvdx.launch.remote import survey
from hvdx.launch.slots import LOOK_SECONDS, Discovery, Slot, Slots

SSH_FAILED = 255


def run(asked: Arguments) -> Ended:
    """Run the job, again and again, until it ends well or cannot go on; return its last end.

    Raises:
        LaunchError: it could not be started.
    """
    options, elastic = asked.horovod, asked.elastic
    assert elastic is not None
    script = options.host_discovery_script
    discovery = Discovery(script, options.slots, lambda hosts: None) if script else None
    slots = Slots(discovery.look() if discovery else hosts_of(options), elastic.cooldown)
    taken, again = slots.usable()[: elastic.first], 0
    if len(taken) < elastic.first:
        assign(slots.hosts, elastic.first)  # says so
    while True:
        hosts = [
            host._replace(slots=count)
            for host in slots.hosts
            if (count := sum(slot.host == host.name for slot in taken))
        ]
        folder = options.output_filename
        if folder and again:
            folder = os.path.join(folder, f"restart.{again}")
        own = [{"HVDX_RESTARTS": str(again), "HVDX_HOST_SLOT": str(slot.number)} for slot in taken]
        ended = Job(asked, survey(hosts, options)).run(assign(hosts, len(taken)), folder, own)
        if ended.signal is not None or not ended.failures:
            return ended
        lost = _lost(ended.failures)
        told = " and ".join(map(str, lost))
        if elastic.resets is not None and again >= elastic.resets:
            _say(f"{told}; the job has begun again {again} times (--reset-limit)")
            return ended
        absent = _absent(hosts, options)
        for failure in lost[1:] if absent else lost:  # the first then fails for want of that host
            if failure.host not in absent:
                slots.ban(taken[failure.rank])
        just_asked = {host.name: absent.get(host.name) for host in hosts}
        taken = _wait(slots, discovery, elastic, options, just_asked)[: elastic.most]
        if len(taken) < elastic.least:
            _say(f"{told}; fewer slots are left than --min-np {elastic.least}")
            return ended
        again += 1
        _say(f"{told}; the job begins again, time {again}, on {len(taken)} ranks")


def _absent(hosts: list[Host], options: argparse.Namespace) -> dict[str, str]:
    """Ask hosts whether they are there; return why not, by name of those that are not."""

    def ask(host: Host) -> str | None:
        try:
            survey([host], options)
        except LaunchError as error:
            return str(error)
        return None

    if not hosts:
        return {}
    with ThreadPoolExecutor(max_workers=min(len(hosts), 32)) as pool:
        answers = pool.map(ask, hosts)
        return {host.name: why for host, why in zip(hosts, answers, strict=True) if why}


def _lost(failures: list[Failure]) -> list[Failure]:
    """Return the failures that have caused the end; others fail because those are gone."""
    gone = (-signal.SIGKILL, 128 + signal.SIGKILL, SSH_FAILED)
    return [each for each in failures if each is failures[0] or each.code in gone]


def _wait(
    slots: Slots,
    discovery: Discovery | None,
    elastic: Elastic,
    options: argparse.Namespace,
    just_asked: dict[str, str | None],
) -> list[Slot]:
    """Return the slots there are, once these are enough; fewer if that takes too long.

    Hosts that do not answer are waited for, too: a link may come back. Those ``just_asked``, by
    name, with why they are absent if they are, are not asked again at once: that can take long.
    """
    until = time.monotonic() + elastic.timeout
    told: set[str] = set()
    while True:
        if discovery is not None:
            try:
                slots.relist(discovery.look())
            except LaunchError as error:
                _say(str(error))
        absent = _absent([host for host in slots.hosts if host.name not in just_asked], options)
        absent |= {h.name: why for h in slots.hosts if (why := just_asked.get(h.name))}
        just_asked = {}
        for name, why in absent.items():
            if name not in told:
                told.add(name)
                _say(f"left out for now: {why}".rstrip("."))
        usable = [slot for slot in slots.usable() if slot.host not in absent]
        hope = discovery or slots.may_grow() or absent
        if len(usable) >= elastic.least or time.monotonic() > until or not hope:
            return usable
        time.sleep(LOOK_SECONDS)


def _say(text: str) -> None:
    print(f"hvdx run: {text}.", file=sys.stderr, flush=True)
