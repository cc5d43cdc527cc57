"""The rendezvous server over real sockets: who gets in, what it answers, when it closes."""

from __future__ import annotations

import http.client
import socket
import threading

import pytest

import hvdx.launch.client
from hvdx.errors import LaunchError, MismatchError
from hvdx.launch.client import ask, check_as_first, check_open, report_up
from hvdx.launch.rendezvous import HEAD_BYTES, MAX_UNFINISHED, Rendezvous


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """No rank of this process has reported yet."""
    monkeypatch.setattr("hvdx.launch.client._reported", False)
    monkeypatch.setattr("hvdx.launch.client._compared", False)


@pytest.fixture
def rendezvous():
    server = Rendezvous(2).start()
    yield server
    server.close()


def path(server: Rendezvous, scope: str = "global", key: str = "0", token: str | None = None):
    return f"/{server.token if token is None else token}:{server.port}/{scope}/{key}"


def request(server: Rendezvous, verb: str, where: str, body: bytes = b""):
    """Return status, headers and body of one request."""
    connection = http.client.HTTPConnection(server.address, server.port, timeout=5)
    connection.request(verb, where, body)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def raw(server: Rendezvous, data: bytes, *, finish: bool = True) -> bytes:
    """Return what the server answers to exactly these bytes."""
    answer = b""
    with socket.create_connection((server.address, server.port), timeout=8) as connection:
        try:
            connection.sendall(data)
            if finish:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(4096):
                answer += chunk
        except OSError as error:  # the server hung up, even before all was sent
            assert not isinstance(error, TimeoutError), "the server neither answers nor hangs up"
    return answer


def test_a_value_travels_from_rank_to_rank(rendezvous):
    assert request(rendezvous, "GET", path(rendezvous))[0] == 404
    assert request(rendezvous, "PUT", path(rendezvous), b"\0address")[0] == 200
    status, headers, body = request(rendezvous, "GET", path(rendezvous))
    # Horovod's client looks for exactly this spelling.
    assert (status, headers, body) == (200, {"Content-Length": "8"}, b"\0address")
    assert request(rendezvous, "DELETE", path(rendezvous))[0] == 200
    assert request(rendezvous, "GET", path(rendezvous))[0] == 404


def test_it_listens_on_loopback_only(rendezvous):
    assert rendezvous.address == "127.0.0.1"


@pytest.mark.parametrize("token", ["", "wrong", "x" * 32])
def test_a_stranger_changes_nothing_and_learns_nothing(rendezvous, token):
    request(rendezvous, "PUT", path(rendezvous), b"address")
    answers = set()
    for verb in ("GET", "PUT", "DELETE", "HEAD", "POST", "OPTIONS", "NONSENSE"):
        for where in (path(rendezvous, token=token), "/", "/global/0", "/etc/passwd", "*"):
            body = b"evil" if verb == "PUT" else b""
            status, headers, answer = request(rendezvous, verb, where, body)
            answers.add((status, tuple(headers.items()), answer))
    assert answers == {(404, (("Content-Length", "0"),), b"")}
    assert request(rendezvous, "GET", path(rendezvous))[2] == b"address"


def test_with_the_token_only_three_verbs_serve(rendezvous):
    for verb in ("HEAD", "POST", "OPTIONS", "CONNECT"):
        assert request(rendezvous, verb, path(rendezvous))[0] == 405


def test_odd_and_oversized_requests_are_refused_and_the_next_is_served(rendezvous):
    good = path(rendezvous)
    start = f"PUT {good} HTTP/1.1\r\n".encode()
    for data in (
        b"\r\n\r\n",
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * HEAD_BYTES,
        b"GET /" + b"a" * 2 * HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
        start + b"Content-Length: 1000000000000\r\n\r\n",
        start + b"Content-Length: 99999999\r\n\r\nx",
        start + b"Content-Length: -1\r\n\r\n",
        start + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
        start + b"Content-Length: 5\r\n\r\nx",  # cut off
        start.replace(b"1.1", b"1.0") + b"Content-Length: 1\r\n\r\nx",
        start.replace(b"global", b"\xff\xfe") + b"Content-Length: 1\r\n\r\nx",
    ):
        assert b" 200 " not in raw(rendezvous, data)
    assert request(rendezvous, "GET", good)[0] == 404  # none of it was stored
    assert request(rendezvous, "PUT", good, b"address")[0] == 200


def test_a_crowd_of_slow_strangers_does_not_keep_a_rank_out(rendezvous):
    crowd = []
    try:
        for _ in range(2 * MAX_UNFINISHED):
            connection = socket.create_connection((rendezvous.address, rendezvous.port))
            connection.sendall(b"GET /")  # and never the rest
            crowd.append(connection)
        assert request(rendezvous, "PUT", path(rendezvous), b"address")[0] == 200
        assert request(rendezvous, "GET", path(rendezvous))[2] == b"address"
    finally:
        for connection in crowd:
            connection.close()


def test_a_slow_request_is_dropped(rendezvous, monkeypatch):
    monkeypatch.setattr("hvdx.launch.rendezvous.REQUEST_SECONDS", 0.2)
    assert raw(rendezvous, b"GET /", finish=False) == b""  # returns: the server hung up


def test_an_address_that_is_not_of_the_job_gets_no_answer_even_with_the_token():
    server = Rendezvous(2, admitted={"127.0.0.2"}).start()
    try:
        line = f"GET {path(server)} HTTP/1.1\r\n\r\n".encode()
        assert raw(server, line) == b""
        with socket.create_connection(
            (server.address, server.port), source_address=("127.0.0.2", 0)
        ) as admitted:
            admitted.sendall(line)
            assert admitted.recv(100).startswith(b"HTTP/1.1 404 ")
    finally:
        server.close()


def test_it_closes_when_all_ranks_are_up(rendezvous):
    first, second = ({**rendezvous.environment(), "HOROVOD_RANK": rank} for rank in "01")
    report_up(first)
    report_up(first)  # twice the same rank is not two ranks
    assert not rendezvous.closed.is_set()
    report_up(second)
    assert rendezvous.closed.wait(5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((rendezvous.address, rendezvous.port))


def test_it_does_not_count_ranks_that_do_not_exist(rendezvous):
    for rank in ("2", "99", "-1", "x"):
        request(rendezvous, "PUT", path(rendezvous, "hvdx", f"up_{rank}"), b"1")
    report_up({**rendezvous.environment(), "HOROVOD_RANK": "0"})
    assert not rendezvous.closed.is_set()


def test_it_stays_if_asked():
    server = Rendezvous(1, stays=True).start()
    try:
        environ = {**server.environment(), "HOROVOD_RANK": "0"}
        report_up(environ)
        assert not server.closed.is_set()
        assert ask(environ, "PUT", "more", b"1") is not None
        check_open(environ)
    finally:
        server.close()
    assert server.closed.is_set()


def test_ranks_that_add_process_sets_later_do_not_close_it(rendezvous):
    for rank in "01":
        extra = {"HOROVOD_RANK": rank, "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
        report_up({**rendezvous.environment(), **extra})
    assert not rendezvous.closed.is_set()


def test_a_second_init_after_closing_is_told_why(rendezvous):
    environ = {**rendezvous.environment(), "HOROVOD_RANK": "1"}
    report_up(environ)
    with pytest.raises(LaunchError, match=r"rank 1: .*--keep-rendezvous"):
        check_open(environ)


@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_has_something_else_than_rank_0_is_told(rendezvous, monkeypatch, late):
    def compare(rank: str, own: str) -> None:
        monkeypatch.setattr("hvdx.launch.client._compared", False)
        environ = {**rendezvous.environment(), "HOROVOD_RANK": rank}
        check_as_first("sets", own, "the process sets", environ)

    first = threading.Timer(0.2 if late else 0, compare, ("0", "[[0, 1]]"))
    first.start()
    if not late:
        first.join()
    compare("1", "[[0, 1]]")
    with pytest.raises(MismatchError, match=r"sets: rank 0 has \[\[0, 1\]\], rank 1 has none"):
        compare("1", "none")
    compare("0", "x" * 100_000)  # more than a value may have
    compare("1", "x" * 100_000)
    with pytest.raises(MismatchError, match="sha256"):
        compare("1", "x" * 100_001)
    first.join()


def test_ranks_compare_once_and_only_where_hvdx_serves():
    check_as_first("sets", "none", "the process sets", {})
    nobody = {
        "HVDX_RENDEZVOUS": "closes",
        "HOROVOD_RANK": "1",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1:1/t",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "1",
    }
    check_as_first("sets", "none", "the process sets", nobody)  # Horovod will say so
    assert hvdx.launch.client._compared


def test_report_up_outside_hvdx_does_nothing():
    report_up({})
    report_up({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_RANK": "0"})


def test_the_wrong_token_is_told(rendezvous):
    wrong = rendezvous.environment()["HOROVOD_GLOO_RENDEZVOUS_ADDR"][:-1] + "!"
    environ = {**rendezvous.environment(), "HOROVOD_GLOO_RENDEZVOUS_ADDR": wrong}
    with pytest.raises(LaunchError, match=r"127\.0\.0\.1:\d+ does not know this job's token"):
        report_up(environ)


def test_a_taken_port_is_told(rendezvous):
    with pytest.raises(LaunchError, match=rf"127\.0\.0\.1:{rendezvous.port}.*in use"):
        Rendezvous(2, port=rendezvous.port)


def test_tokens_are_drawn_anew():
    servers = [Rendezvous(1).start() for _ in range(3)]
    assert len({server.token for server in servers}) == 3
    assert all(len(server.token) >= 32 for server in servers)
    for server in servers:
        server.close()


def test_many_ranks_at_once(rendezvous):
    statuses = []

    def rank(number: int) -> None:
        where = path(rendezvous, key=str(number))
        for _ in range(20):
            statuses.append(request(rendezvous, "PUT", where, b"x" * 500)[0])
            statuses.append(request(rendezvous, "GET", where)[0])

    threads = [threading.Thread(target=rank, args=[n]) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 16 * 40
