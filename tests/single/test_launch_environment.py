"""Who started this process: what each launcher tells, and what contradicts itself.

Jobs of several ranks meet at a real rendezvous: each test runs one thread per rank.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvdx.errors import LaunchError
from hvdx.launch import environment
from hvdx.launch.environment import cross, prepare
from hvdx.launch.launchers import recognise


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """No rank of this process has reported yet; servers end with the test."""
    monkeypatch.setattr("hvdx.launch.client._reported", False)
    monkeypatch.setattr(environment, "_served", served := [])
    yield
    for server in served:
        server.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def torchrun(rank, size, local_rank, local_size, group, port=29500):
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT"]
    numbers = dict(
        zip(names, map(str, (rank, size, local_rank, local_size, group, port)), strict=True)
    )
    return {**numbers, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "job"}


def srun(rank, size, local_rank, node, nodes="127.0.0.[1-2]", counts="2,1", job="7"):
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(size),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_NODEID": str(node),
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_TASKS_PER_NODE": counts,
    }


def mpirun(rank, size, local_rank, local_size):
    numbers = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {"PMIX_NAMESPACE": "n"} | {f"OMPI_COMM_WORLD_{k}": str(v) for k, v in numbers.items()}


def prepare_all(environs):
    """Prepare every rank at once, as processes would."""
    with ThreadPoolExecutor(len(environs)) as pool:
        return list(pool.map(prepare, environs))


def test_a_lone_process_is_a_job_of_one():
    environ = {"HOME": "/"}
    launch = prepare(environ)
    assert (launch.launcher, launch.rank, launch.size) == ("none", 0, 1)
    assert environ == {"HOME": "/", "HOROVOD_GLOO_IFACE": "lo"}


def test_what_hvdx_run_set_is_left_alone():
    environ = {f"HOROVOD_{name}": "1" for name in ("RANK", "LOCAL_RANK", "CROSS_RANK")}
    environ |= {"HOROVOD_SIZE": "4", "HOROVOD_LOCAL_SIZE": "2", "HOROVOD_CROSS_SIZE": "2"}
    environ |= {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "a:1/t", "RANK": "9", "WORLD_SIZE": "99"}
    before = dict(environ)
    assert prepare(environ) == ("horovodrun", 1, 4, 1, 2, 1, 2)
    assert prepare(environ | {"HVDX_RENDEZVOUS": "closes"}).launcher == "hvdx run"
    assert environ == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"HOROVOD_RANK": "4"}, "HOROVOD_RANK='4' must be a number from 0 to 3"),
        ({"HOROVOD_RANK": "x"}, "HOROVOD_RANK='x'"),
        ({"HOROVOD_SIZE": "0"}, "HOROVOD_SIZE='0'"),
        ({"HOROVOD_LOCAL_SIZE": "9"}, "HOROVOD_LOCAL_SIZE='9'"),
        ({"HOROVOD_CROSS_RANK": None}, "HOROVOD_CROSS_RANK is not set"),
        ({"HOROVOD_GLOO_RENDEZVOUS_ADDR": None}, "HOROVOD_GLOO_RENDEZVOUS_ADDR is not set"),
    ],
)
def test_a_broken_horovod_environment_names_the_variable(change, message):
    environ = {f"HOROVOD_{name}": "0" for name in ("RANK", "LOCAL_RANK", "CROSS_RANK")}
    environ |= {"HOROVOD_SIZE": "4", "HOROVOD_LOCAL_SIZE": "2", "HOROVOD_CROSS_SIZE": "2"}
    environ |= {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "a:1/t", **change}
    with pytest.raises(LaunchError, match=message):
        prepare({name: value for name, value in environ.items() if value is not None})


def test_torchrun_on_one_machine_stays_on_loopback():
    port = free_port()
    environs = [torchrun(rank, 2, rank, 2, 0, port) for rank in range(2)]
    launches = prepare_all(environs)
    assert launches == [("torchrun", 0, 2, 0, 2, 0, 1), ("torchrun", 1, 2, 1, 2, 0, 1)]
    address = environs[0]["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    assert address == environs[1]["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    assert address.startswith("127.0.0.1:")
    assert environs[1]["HOROVOD_GLOO_IFACE"] == "lo"
    assert environs[1]["HOROVOD_CONTROLLER"] == "gloo"


def test_torchrun_does_not_tell_unequal_machines_so_the_ranks_tell_each_other():
    # Machines with 1 and 3 ranks, numbered by torchrun in an order of its own.
    shape = [(0, 0, 1, 1), (1, 0, 3, 0), (2, 1, 3, 0), (3, 2, 3, 0)]
    port = free_port()
    environs = [torchrun(r, 4, local, many, group, port) for r, local, many, group in shape]
    for environ in environs:
        environ["HVDX_RENDEZVOUS_ADDR"] = socket_address()
    launches = prepare_all(environs)
    assert [launch[3:] for launch in launches] == [
        (0, 1, 0, 2),
        (0, 3, 1, 2),
        (1, 3, 0, 1),
        (2, 3, 0, 1),
    ]
    hosts = [environ["HOROVOD_HOSTNAME"] for environ in environs]
    assert len(set(hosts)) == 2 and len(set(hosts[1:])) == 1


def socket_address() -> str:
    """An address of this machine that is not loopback, else skip."""
    from hvdx.launch import network

    others = [a for a in network.addresses() if not a.startswith("127.")]
    if not others:
        pytest.skip("this machine has no network interface besides loopback")
    return others[0]


def test_ranks_that_disagree_about_a_machine_are_told():
    port = free_port()
    environs = [torchrun(0, 2, 0, 1, 0, port), torchrun(1, 2, 0, 1, 0, port)]  # same GROUP_RANK
    for environ in environs:
        environ["HVDX_RENDEZVOUS_ADDR"] = socket_address()
    with pytest.raises(LaunchError, match=r"says that 1 ranks run on this machine, but 2"):
        prepare_all(environs)


@pytest.mark.parametrize(
    ("counts", "index", "local_rank", "expected"),
    [
        ([2, 2], 1, 1, (1, 2)),
        ([1, 3, 2], 1, 0, (1, 3)),
        ([1, 3, 2], 1, 1, (0, 2)),
        ([1, 3, 2], 2, 1, (1, 2)),
        ([1, 3, 2], 1, 2, (0, 1)),
    ],
)
def test_cross_ranks_count_only_machines_that_have_the_local_rank(
    counts, index, local_rank, expected
):
    assert cross(counts, index, local_rank) == expected


@pytest.mark.parametrize("counts", [[1], [2, 2], [1, 3, 2], [4, 1, 1, 4]])
def test_cross_ranks_are_horovods(counts):
    hosts = pytest.importorskip("horovod.runner.common.util.hosts")
    infos = [hosts.HostInfo(f"h{n}", count) for n, count in enumerate(counts)]
    for slot in hosts.get_host_assignments(infos, sum(counts)):
        index = int(slot.hostname[1:])
        assert cross(counts, index, slot.local_rank) == (slot.cross_rank, slot.cross_size)


def test_srun_with_unequal_nodes():
    port = str(free_port())
    shape = [(0, 0, 0), (1, 1, 0), (2, 0, 1)]
    environs = [
        srun(r, 3, local, node) | {"HVDX_RENDEZVOUS_PORT": port} for r, local, node in shape
    ]
    launches = prepare_all(environs)
    assert [launch[1:] for launch in launches] == [
        (0, 3, 0, 2, 0, 2),
        (1, 3, 1, 2, 0, 1),
        (2, 3, 0, 1, 1, 2),
    ]
    assert [e["HOROVOD_HOSTNAME"] for e in environs] == ["127.0.0.1", "127.0.0.1", "127.0.0.2"]


def test_srun_with_cyclic_ranks():
    # --distribution=cyclic: ranks 0 and 2 on the first node.
    environ = srun(2, 3, 1, 0)
    job = recognise(environ, mpi_built=False)
    assert (job.rank, job.local_rank, job.local_size, job.machine) == (2, 1, 2, "127.0.0.1")


def test_a_step_on_part_of_the_allocation_counts_as_the_job():
    environ = srun(0, 8, 0, 0, nodes="n[1-4]", counts="2(x4)")
    environ |= {"SLURM_STEP_NODELIST": "n3", "SLURM_STEP_TASKS_PER_NODE": "2"}
    job = recognise(environ | {"SLURM_STEP_NUM_TASKS": "2"}, mpi_built=False)
    assert (job.size, job.local_size, job.server, job.hosts) == (2, 2, "n3", ("n3",))


def test_a_batch_script_without_srun_is_a_lone_process():
    environ = srun(0, 4, 0, 0)
    del environ["SLURM_STEP_ID"]
    assert recognise(environ, mpi_built=False) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID='3' must be a number from 0 to 2"),
        ({"SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, "SLURM_LOCALID='1'"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID='2'"),
        ({"SLURM_NTASKS": "9"}, r"contradict.*has 2 with 3 tasks, SLURM_NTASKS is 9"),
        ({"SLURM_JOB_NODELIST": "n1"}, "SLURM_JOB_NODELIST='n1' has 1 nodes"),
        ({"SLURM_JOB_NODELIST": "n["}, r"SLURM_JOB_NODELIST='n\['"),
        ({"SLURM_TASKS_PER_NODE": "2(x"}, r"SLURM_TASKS_PER_NODE='2\(x'"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
        ({"HVDX_RENDEZVOUS_PORT": "http"}, "HVDX_RENDEZVOUS_PORT='http'"),
    ],
)
def test_a_broken_slurm_environment_names_the_variable(change, message):
    with pytest.raises(LaunchError, match=message):
        recognise(srun(0, 3, 0, 0) | change, mpi_built=False)


def test_mpirun_is_left_to_mpi_where_horovod_has_it():
    environ = mpirun(1, 2, 1, 2)
    before = set(environ)
    assert prepare(environ, mpi_built=True).launcher == "mpirun"
    assert set(environ) - before == {"HOROVOD_GLOO_IFACE"}


def test_mpirun_without_mpi_in_horovod():
    port = str(free_port())
    environs = [mpirun(r, 2, r, 2) | {"HVDX_RENDEZVOUS_PORT": port} for r in range(2)]
    assert prepare_all(environs) == [("mpirun", 0, 2, 0, 2, 0, 1), ("mpirun", 1, 2, 1, 2, 0, 1)]


def test_mpirun_on_several_machines_needs_to_be_told_where_rank_0_is():
    with pytest.raises(LaunchError, match="-x HVDX_RENDEZVOUS_ADDR"):
        prepare(mpirun(0, 4, 0, 2))


def test_torchrun_under_srun_is_torchrun():
    environ = srun(0, 3, 0, 0) | torchrun(1, 2, 1, 2, 0)
    assert recognise(environ, mpi_built=False).launcher == "torchrun"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": None}, "torchrun started this process, but LOCAL_RANK is not set"),
        ({"RANK": "2"}, "RANK='2' must be a number from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE='3'"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1'"),
    ],
)
def test_a_broken_torchrun_environment_names_the_variable(change, message):
    environ = torchrun(0, 2, 0, 2, 0) | change
    with pytest.raises(LaunchError, match=message):
        recognise({k: v for k, v in environ.items() if v is not None}, mpi_built=False)


def test_kubernetes_pods():
    port = str(free_port())
    common = {"HVDX_SIZE": "3", "HVDX_RENDEZVOUS_ADDR": socket_address()}
    common |= {"HVDX_RENDEZVOUS_PORT": port, "HVDX_JOB_TOKEN": "secret"}
    environs = [common | {"JOB_COMPLETION_INDEX": str(rank)} for rank in range(3)]
    launches = prepare_all(environs)
    assert [launch[1:] for launch in launches] == [(r, 3, 0, 1, r, 3) for r in range(3)]
    assert "secret" not in environs[0]["HOROVOD_GLOO_RENDEZVOUS_ADDR"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX='3' must be a number from 0 to 2"),
        ({"JOB_COMPLETION_INDEX": None}, "JOB_COMPLETION_INDEX is not set"),
        ({"HVDX_RENDEZVOUS_ADDR": None}, "HVDX_RENDEZVOUS_ADDR is not"),
        ({"HVDX_SIZE": "many"}, "HVDX_SIZE='many'"),
    ],
)
def test_a_broken_kubernetes_environment_names_the_variable(change, message):
    environ = {"HVDX_SIZE": "3", "JOB_COMPLETION_INDEX": "0", "HVDX_RENDEZVOUS_ADDR": "a"} | change
    with pytest.raises(LaunchError, match=message):
        recognise({k: v for k, v in environ.items() if v is not None}, mpi_built=False)


def test_the_next_port_serves_where_the_first_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        taken = squatter.getsockname()[1]
        environs = [torchrun(rank, 2, rank, 2, 0, taken - 1) for rank in range(2)]
        prepare_all(environs)
        assert environs[1]["HOROVOD_GLOO_RENDEZVOUS_PORT"] != str(taken)


def test_a_taken_port_that_was_asked_for_is_told():
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        taken = str(squatter.getsockname()[1])
        environ = torchrun(0, 2, 0, 2, 0) | {"HVDX_RENDEZVOUS_PORT": taken}
        with pytest.raises(LaunchError, match=rf"127\.0\.0\.1:{taken}.*HVDX_RENDEZVOUS_PORT"):
            prepare(environ)


def test_with_a_secret_no_other_port_is_tried():
    # Else who sits on the first port would be shown the token.
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        environ = torchrun(0, 2, 0, 2, 0, squatter.getsockname()[1] - 1)
        with pytest.raises(LaunchError, match="in use"):
            prepare(environ | {"HVDX_JOB_TOKEN": "secret"})


def test_a_rank_that_waits_in_vain_says_for_whom():
    environ = torchrun(1, 2, 1, 2, 0, free_port()) | {"HOROVOD_START_TIMEOUT": "1"}
    with pytest.raises(LaunchError, match=r"rank 1, started by torchrun: .*Is rank 0 running"):
        prepare(environ)


def test_other_tokens_do_not_meet():
    port = free_port()
    prepare(torchrun(0, 2, 0, 2, 0, port) | {"HVDX_JOB_TOKEN": "one"})
    other = torchrun(1, 2, 1, 2, 0, port) | {"HVDX_JOB_TOKEN": "two", "HOROVOD_START_TIMEOUT": "1"}
    with pytest.raises(LaunchError, match="HVDX_JOB_TOKEN must agree"):
        prepare(other)


def test_an_interface_that_the_user_chose_stays():
    port = free_port()
    environs = [torchrun(r, 2, r, 2, 0, port) | {"HOROVOD_GLOO_IFACE": "eth7"} for r in range(2)]
    prepare_all(environs)
    assert {environ["HOROVOD_GLOO_IFACE"] for environ in environs} == {"eth7"}


def test_kept_open_on_request():
    port = free_port()
    environs = [torchrun(r, 2, r, 2, 0, port) | {"HVDX_KEEP_RENDEZVOUS": "1"} for r in range(2)]
    prepare_all(environs)
    assert {environ["HVDX_RENDEZVOUS"] for environ in environs} == {"stays"}
