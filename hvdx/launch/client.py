"""A rank's side of the rendezvous, for hvdx's own few keys."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, MutableMapping
from hashlib import sha256

from hvdx.errors import LaunchError, MismatchError
from hvdx.launch.rendezvous import OWN_SCOPE, REQUEST_SECONDS, stays_open

_MAX_TOLD = 800  # characters that ranks compare: the rendezvous takes small values only
_FIRST_SECONDS = 30.0  # for rank 0 to come, as long as Horovod waits by default


def ask(environ: Mapping[str, str], verb: str, key: str, body: bytes = b"") -> bytes | None:
    """Send one request about hvdx's ``key``; return the value, None if there is none.

    Raises:
        OSError: nobody listens, or not any more.
        LaunchError: the rendezvous refuses.
    """
    from http.client import HTTPConnection, HTTPException

    address = environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    port = environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    place, _, token = address.partition("/")
    connection = HTTPConnection(place, timeout=REQUEST_SECONDS)
    try:
        path = f"/{token}:{port}/{OWN_SCOPE}/{key}"
        connection.request(verb, path, body, {"Content-Length": str(len(body))})
        response = connection.getresponse()
        value = response.read()
    except HTTPException as error:
        raise LaunchError(f"{place} does not answer as a rendezvous does: {error!r}") from None
    finally:
        connection.close()
    if response.status == 404:
        return None
    if response.status != 200:
        raise LaunchError(f"the rendezvous at {place} refused {verb} {key}: {response.status}")
    return value


POLL_SECONDS = 0.05

_reported = _compared = False
_silent_since: float | None = None  # the launcher of an elastic job does not answer


def check_as_first(
    key: str, own: str, subject: str, environ: Mapping[str, str] | None = None
) -> None:
    """Compare what this rank has with rank 0, once, before Horovod starts.

    Where ranks start it differently, one of them fails and the others wait for it. Does nothing
    where hvdx does not serve the rendezvous, nor in elastic jobs, whose rank 0 may have compared
    long ago; gives up where rank 0 does not come.

    Args:
        key: of the rendezvous.
        own: what this rank has.
        subject: what that is, for the message: ``"process sets"``.
        environ: the process' own by default.

    Raises:
        MismatchError: rank 0 has something else.
    """
    global _compared
    environ = os.environ if environ is None else environ
    if "HVDX_RENDEZVOUS" not in environ or "HVDX_WORKER" in environ or _compared:
        return
    _compared = True
    if len(own) > _MAX_TOLD:
        own = f"{own[:_MAX_TOLD]}... (sha256 {sha256(own.encode()).hexdigest()[:16]})"
    rank = environ.get("HOROVOD_RANK", "0")
    with contextlib.suppress(OSError):  # Horovod itself finds nobody there and says so
        if rank == "0":
            ask(environ, "PUT", key, own.encode())
            return
        until, pause = time.monotonic() + _FIRST_SECONDS, 0.02
        while (first := ask(environ, "GET", key)) is None:
            if time.monotonic() > until:
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if first.decode(errors="replace") != own:
            raise MismatchError(
                f"ranks disagree about {subject}: rank 0 has {first.decode(errors='replace')}, "
                f"rank {rank} has {own}; give all ranks the same, in the same order"
            )


def report_up(environ: Mapping[str, str] | None = None) -> None:
    """Tell the rendezvous that this rank has initialised every core and process set it declared.

    When all ranks have, the rendezvous closes its port. Does nothing where hvdx does not serve
    the rendezvous (under ``horovodrun``, under MPI, in a single process), nor where process sets
    may be added later, which needs the port.
    """
    global _reported
    environ = os.environ if environ is None else environ
    if "HVDX_RENDEZVOUS" not in environ or stays_open(environ):
        return
    rank = environ.get("HOROVOD_RANK", "0")
    try:
        accepted = ask(environ, "PUT", f"up_{rank}", b"1")
    except OSError as error:
        if _reported:  # up again, after all were up once and the port was closed
            return
        raise LaunchError(
            f"rank {rank}: the rendezvous at {_place(environ)} is gone ({error}): "
            "did the launcher end?"
        ) from None
    if accepted is None:
        raise LaunchError(
            f"rank {rank}: the rendezvous at {_place(environ)} does not know this job's token"
        )
    _reported = True


def check_open(environ: Mapping[str, str]) -> None:
    """Raise if this process was up before and the rendezvous has closed since.

    Raises:
        LaunchError: a second ``init`` came after the port was closed.
    """
    if _reported and environ.get("HVDX_RENDEZVOUS") == "closes":
        rank = environ.get("HOROVOD_RANK", "0")
        raise LaunchError(
            f"rank {rank}: init() was called again, but the rendezvous closed when all ranks were "
            "up. Declare all frameworks and process sets in the first init(), or keep it open: "
            "`hvdx run --keep-rendezvous` (under other launchers HVDX_KEEP_RENDEZVOUS=1)."
        )


def take_place(environ: MutableMapping[str, str]) -> None:
    """Wait until the launcher of an elastic job gives this process a rank in its next world.

    Sets the variables that Horovod reads.

    Raises:
        LaunchError: the launcher is gone, or has given this process up.
    """
    number, world = environ["HVDX_WORKER"], environ.get("HVDX_WORLD", "0")
    try:
        ask(environ, "PUT", f"ask_{number}", world.encode())
        while True:
            told = ask(environ, "GET", f"place_{number}")
            place = json.loads(told) if told else {"world": 0}
            if place["world"] > int(world):
                break
            time.sleep(POLL_SECONDS)
    except OSError as error:
        raise LaunchError(
            f"process {number} of the job: the rendezvous at {_place(environ)} is gone ({error}): "
            "did the launcher end?"
        ) from None
    environ["HVDX_WORLD"] = str(place.pop("world"))
    if not place:
        raise LaunchError(
            f"process {number} of the job: the launcher has given it up, for the connection to "
            "this host was lost; others go on"
        )
    environ.update({f"HOROVOD_{name.upper()}": str(value) for name, value in place.items()})


def is_over(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether this rank's world, in an elastic job, has lost a rank already."""
    environ = os.environ if environ is None else environ
    try:
        return ask(environ, "GET", "over") == environ.get("HVDX_WORLD", "").encode()
    except (OSError, LaunchError):  # who asks for the next world is told
        return False


def news(environ: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """Return what the launcher of an elastic job tells of hosts, None where that is nothing.

    Returns:
        The number of the world that has to end, and whether ranks are removed (1), added (2) or
        both, as in Horovod's ``HostUpdateResult``.

    Raises:
        LaunchError: the launcher has not answered for ``HVDX_TIMEOUT`` seconds.
    """
    global _silent_since
    environ = os.environ if environ is None else environ
    try:
        told = ask(environ, "GET", "news") or b""
    except OSError as error:  # its end ends this process, too, unless the network is gone
        from hvdx.watchdog import timeout_seconds

        now, patience = time.monotonic(), timeout_seconds()
        _silent_since = _silent_since or now
        if patience and now > _silent_since + patience:
            raise LaunchError(
                f"the rendezvous at {_place(environ)} has not answered for {patience:g} s (HVDX_"
                f"TIMEOUT; {error}): the launcher is gone, or its host is cut off"
            ) from None
        return None
    _silent_since = None
    words = told.decode().split()
    if len(words) != 2 or words[0] != environ.get("HVDX_WORLD"):
        return None
    return int(words[0]), int(words[1])


def _place(environ: Mapping[str, str]) -> str:
    """Return the rendezvous' host and port, without the token."""
    return environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"].partition("/")[0]
