"""``hvdx run``: from the command line to running ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from signal import Signals

from hvdx.launch import hosts as _hosts
from hvdx.launch.arguments import Arguments, parse
from hvdx.launch.job import Job, hosts_of
from hvdx.launch.processes import Ended
from hvdx.launch.remote import survey
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
    grace_seconds()  # a wrong one shall be told now
    if asked.elastic is not None:
        from hvdx.launch import elastic, restarts

        return _told(restarts.run(asked) if asked.restart else elastic.run(asked))
    places = _hosts.assign(hosts_of(options), options.num_proc)
    job = Job(asked, survey(dict.fromkeys(place.host for place in places), options))
    return _told(job.run(places, options.output_filename))


def _told(ended: Ended) -> int:
    """Say how a job has ended; return the exit status."""
    if ended.signal is not None:
        print(f"hvdx run: {Signals(ended.signal).name} ended the job.", file=sys.stderr)
        return 128 + ended.signal
    if not ended.failures:
        return int(ended.gave_up)
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
