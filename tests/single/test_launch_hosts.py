"""Hosts, slots, and which rank runs where."""

from __future__ import annotations

import pytest

pytest.importorskip("horovod")

from hvdx.errors import LaunchError
from hvdx.launch.hosts import Host, assign, parse_hosts, read_hostfile


def test_hosts_with_slots_and_users():
    assert parse_hosts("h1:2,me@h-2.example:4") == [
        Host("h1", "h1", 2),
        Host("me@h-2.example", "h-2.example", 4),
    ]


@pytest.mark.parametrize(
    "entry", ["h1", "h1:", "h1:x", "h1:-1", ":2", "-oProxyCommand=evil:1", "h 1:1", "h1;id:1", ""]
)
def test_an_odd_host_is_named(entry):
    # The name becomes an argument of ssh: nothing that ssh or a shell could take for more.
    with pytest.raises(LaunchError, match="is not of the form name:slots") as error:
        parse_hosts(f"ok:1,{entry}")
    assert repr(entry) in str(error.value)


def test_a_host_listed_twice_is_told():
    with pytest.raises(LaunchError, match="'h1' is listed twice"):
        parse_hosts("h1:1,h2:1,h1:1")


def test_hostfile(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# our hosts\nh1 slots=2\n\nh2   slots=4  # the big one\n")
    assert read_hostfile(str(file)) == parse_hosts("h1:2,h2:4")


@pytest.mark.parametrize(
    ("text", "message"),
    [("h1\n", "line 1: 'h1'"), ("a slots=1\nh1 2\n", "line 2"), ("# none\n", "lists no host")],
)
def test_an_odd_hostfile_is_told(tmp_path, text, message):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(LaunchError, match=message):
        read_hostfile(str(file))


def test_a_missing_hostfile_is_told():
    with pytest.raises(LaunchError, match="'/nowhere/hosts': No such file"):
        read_hostfile("/nowhere/hosts")


def test_ranks_fill_hosts_in_order():
    places = assign(parse_hosts("a:2,b:3"), 4)
    assert [
        (p.host.name, p.local_rank, p.local_size, p.cross_rank, p.cross_size) for p in places
    ] == [("a", 0, 2, 0, 2), ("a", 1, 2, 0, 2), ("b", 0, 2, 1, 2), ("b", 1, 2, 1, 2)]


def test_np_is_kept_where_there_are_more_slots():
    # horovodrun -np 2 -H a:4 starts four ranks.
    places = assign(parse_hosts("a:4"), 2)
    assert [(p.rank, p.size, p.local_size) for p in places] == [(0, 2, 2), (1, 2, 2)]


def test_too_few_slots_name_np_hosts_slots_and_remedy():
    with pytest.raises(LaunchError, match=r"-np 4 .* h1:1,h2:2 has slots \(3\).*-H name:slots"):
        assign(parse_hosts("h1:1,h2:2"), 4)


def test_a_place_as_environment():
    assert assign(parse_hosts("me@h1:1"), 1)[0].environment() == {
        "HOROVOD_HOSTNAME": "h1",
        "HOROVOD_RANK": "0",
        "HOROVOD_SIZE": "1",
        "HOROVOD_LOCAL_RANK": "0",
        "HOROVOD_LOCAL_SIZE": "1",
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
    }
