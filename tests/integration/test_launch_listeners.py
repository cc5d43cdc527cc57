"""Who can reach a job: where it listens from start to end, and what a stranger can do there."""

from __future__ import annotations

import http.client
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import (
    HOROVODRUN,
    HVDX_RUN,
    SECONDS,
    Gate,
    Watch,
    listening,
    start,
    sums,
    train,
    tree,
)

pytest.importorskip("horovod")


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def held_before_init(folder: Path, launcher, *flags: str):
    """Start two ranks, the second of which waits before init; return job and gate."""
    gate = Gate(folder)
    before = f"if os.environ['HOROVOD_RANK'] == '1':\n    {gate.code}"
    return start(*launcher, *flags, "-np", "2", *train(folder, before=before)), gate


def finish(job, gate: Gate) -> None:
    """Let the held rank go on; the job must do its work."""
    gate.open()
    out, said = job.communicate(timeout=SECONDS)
    assert (job.returncode, sorted(out.splitlines())) == (0, sums(2)), said


def rank_zero_waits(seen: set[tuple[str, int]]) -> bool:
    """The rendezvous listens, and Gloo in rank 0, which waits for rank 1."""
    return len(seen) >= 2


def test_the_watch_can_fail(tmp_path):
    # Stock horovodrun listens on every interface, even if all ranks are here.
    job, gate = held_before_init(tmp_path, HOROVODRUN)
    seen = Watch(job.pid).wait(rank_zero_waits)
    finish(job, gate)
    assert "0.0.0.0" in {address for address, _ in seen}


def test_the_port_is_closed_once_all_ranks_are_up(tmp_path):
    gate = Gate(tmp_path)
    after = f"print('up', flush=True)\nif hvd.rank() == 1:\n    {gate.code}"
    job = start(*HVDX_RUN, "-np", "2", *train(tmp_path, after=after))
    watch = Watch(job.pid)
    assert {job.stdout.readline()[3:] for _ in range(2)} == {"<stdout>:up\n"}
    assert watch.wait(bool)  # Gloo's port is open for moments only here
    # Both have reported. The answer comes before the closing, by moments.
    while listening(process.pid for process in tree(job.pid)):
        assert job.poll() is None
    for address, port in watch.seen:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=5)
    gate.open()
    out, said = job.communicate(timeout=SECONDS)
    assert (job.returncode, sorted(out.splitlines())) == (0, sums(2)), said


def test_kept_open_it_still_wants_the_token(tmp_path):
    gate = Gate(tmp_path)
    after = f"print('up', flush=True)\nif hvd.rank() == 1:\n    {gate.code}"
    job = start(*HVDX_RUN, "--keep-rendezvous", "-np", "2", *train(tmp_path, after=after))
    assert {job.stdout.readline()[3:] for _ in range(2)} == {"<stdout>:up\n"}
    (address, port), *more = listening(process.pid for process in tree(job.pid))
    assert not more
    answers = {ask(address, port, verb, "/global/0") for verb in VERBS}
    gate.open()
    out, said = job.communicate(timeout=SECONDS)
    assert (job.returncode, sorted(out.splitlines())) == (0, sums(2)), said
    assert answers == {(404, (("Content-Length", "0"),), b"")}


VERBS = ("GET", "PUT", "DELETE", "HEAD", "POST")


def ask(address: str, port: int, verb: str, path: str):
    """Return status, headers and body."""
    connection = http.client.HTTPConnection(address, port, timeout=10)
    connection.request(verb, path, b"evil" if verb in ("PUT", "POST") else b"")
    answer = connection.getresponse()
    found = answer.status, tuple(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_a_job_listens_on_loopback_only_where_strangers_change_and_learn_nothing(tmp_path):
    job, gate = held_before_init(tmp_path, HVDX_RUN)
    watch = Watch(job.pid)
    (address, port), *_ = watch.wait(lambda seen: len(seen) == 1)  # the rendezvous comes first
    watch.wait(rank_zero_waits)
    paths = ["/global/0", "/global/rank_0", "/hvdx/up_0", "/hvdx/up_1", "/", "/local_localhost/0"]
    paths += [f"{prefix}{path}" for prefix in (f"/:{port}", f"/guess:{port}") for path in paths[:4]]
    answers = {ask(address, port, verb, path) for verb in VERBS for path in paths}
    assert answers == {(404, (("Content-Length", "0"),), b"")}
    finish(job, gate)
    assert watch.rounds > 10
    assert {address for address, _ in watch.seen if not is_loopback(address)} == set()


def test_floods_slow_and_malformed_requests_do_not_disturb_the_job(tmp_path):
    job, gate = held_before_init(tmp_path, HVDX_RUN)
    watch = Watch(job.pid)
    ((address, port),) = watch.wait(lambda seen: len(seen) == 1)
    requests = [
        b"GET /",  # and never the rest
        b"PUT /global/0 HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 100_000,
        b"PUT /global/0 HTTP/1.1\r\nContent-Length: nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GET /" + b"a" * 100_000,
        b"",
    ]
    over = threading.Event()
    sent = []

    def disturb() -> None:
        held = []
        while not over.is_set():
            for data in requests:
                try:
                    connection = socket.create_connection((address, port), timeout=1)
                    held.append(connection)
                    connection.sendall(data)
                    sent.append(data)
                except OSError:  # dropped, or the port is closed by now
                    pass
            for connection in held[:-300]:
                connection.close()
            del held[:-300]

    strangers = [threading.Thread(target=disturb) for _ in range(2)]
    for stranger in strangers:
        stranger.start()
    try:
        watch.wait(rank_zero_waits)
        finish(job, gate)
    finally:
        over.set()
        for stranger in strangers:
            stranger.join()
    assert len(sent) > 100


PIPELINE = """
nn = torch.nn
net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(4, 4)
sgd = lambda params: torch.optim.SGD(params, 0.1)
pipe = hvd.Pipeline(net, x, nn.functional.mse_loss, sgd, stages=2, micro_batches=2)
pipe.step(x, x)
print("up", os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], flush=True)
{gate}
pipe.close()
"""


def test_a_pipeline_on_one_machine_listens_on_no_network_and_tells_no_secret(tmp_path):
    gates = [Gate(tmp_path, f"gate{rank}") for rank in range(2)]
    after = PIPELINE.format(gate=f"open({str(tmp_path / 'gate')!r} + str(hvd.rank())).read()")
    job = start(*HVDX_RUN, "--verbose", "-np", "2", *train(tmp_path, after=after))
    watch = Watch(job.pid)
    up = [job.stdout.readline().split() for _ in range(2)]
    assert {line[0][3:] for line in up} == {"<stdout>:up"}
    token = up[0][1].partition("/")[2]
    until = time.monotonic() + SECONDS  # the rendezvous closes moments after the last has come
    while listening(process.pid for process in tree(job.pid)):
        assert time.monotonic() < until
    processes = tree(job.pid)
    commands = [" ".join(process.cmdline()) for process in processes]
    modes = {os.stat(f"/proc/{p.pid}/environ").st_mode & 0o777 for p in processes}
    for gate in gates:
        gate.open()
    out, said = job.communicate(timeout=SECONDS)
    assert (job.returncode, sorted(out.splitlines())) == (0, sums(2)), said
    assert {address for address, _ in watch.seen if not is_loopback(address)} == set()
    assert "the rendezvous listens on 127.0.0.1" in said
    assert len(token) >= 32 and not any(token in text for text in (said, *commands))
    assert modes == {0o400}  # the environment, which has it, is for the user alone
