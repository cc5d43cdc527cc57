"""The rig of the benchmarks: hosts on slow links, on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rig

pytest.importorskip("horovod")
torch = pytest.importorskip("torch")

BENCHMARKS = Path(rig.__file__).parent
WIDTH = 1024
#: Trains a layer on one bit an element and prints what host 0 sent, in bytes a step.
TRAIN = f"""
import torch
import hvdx as hvd
from compression import sent

torch.set_num_threads(1)
hvd.init(framework="torch")
layer = torch.nn.Linear({WIDTH}, {WIDTH}, bias=False)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(layer.parameters(), lr=0.1), layer, compression=hvd.Compression.onebit()
)
data = torch.randn(8, {WIDTH})

def steps(count):
    for _ in range(count):
        optimizer.zero_grad()
        layer(data).square().mean().backward()
        optimizer.step()
    hvd.barrier()

steps(2)
before = sent()
steps(20)
if hvd.rank() == 0:
    print("sent", (sent() - before) / 20)
hvd.shutdown()
"""
#: Prints how long what does not add up takes to cross a link of 100 Mbit/s, in line times.
EXCHANGE = """
import time
import torch
import hvdx as hvd

hvd.init(framework="torch")
mine = torch.arange(2_000_000 * hvd.size()).to(torch.uint8)
line = 2_000_000 * 8 / 100e6

def turns(exchange):
    for _ in range(9):
        hvd.barrier()
        start = time.perf_counter()
        exchange()
        yield (time.perf_counter() - start) / line

for exchange in (
    lambda: hvd.alltoall(mine, name="a"), lambda: hvd.allgather(mine[:2_000_000], name="g")
):
    took = min(turns(exchange))  # the one that a busy machine disturbed least
    if hvd.rank() == 0:
        print(took)
hvd.shutdown()
"""


@pytest.fixture
def net():
    """Two hosts at 100 Mbit/s."""
    reason = rig.missing()
    if reason:
        pytest.skip(f"no rig here: {reason}")
    with rig.network(2, megabits=100) as made:
        yield made


def test_one_bit_an_element_travels(net, tmp_path, capfd):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    # Horovod's ranks talk every cycle, a thousand times a second, if not told otherwise.
    quiet = {"HOROVOD_CYCLE_TIME": "20", "OMP_NUM_THREADS": "1"}
    environ = {"PYTHONPATH": str(BENCHMARKS), **quiet}
    assert rig.run(net, [sys.executable, str(script)], environ) == 0
    sent = float(capfd.readouterr().out.split("sent")[1])
    right = WIDTH * WIDTH * (1 / 8 + 4 / 1024)  # signs, and a scale for each 1024
    # Headers take 5 %, agreements and acknowledgements some kilobytes.
    assert right < sent < 1.08 * right + 10_000
    assert net.sent(0) > 20 * sent  # the switch counts alike


def test_both_directions_of_a_link_are_used_at_once(net, tmp_path, capfd):
    """As Gloo is published they take turns: a sender must be told, behind the other's data."""
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    assert rig.run(net, [sys.executable, str(script)], {"OMP_NUM_THREADS": "1"}) == 0
    alltoall, allgather = map(float, capfd.readouterr().out.split())
    assert 0.9 < alltoall < 1.4
    assert 0.9 < allgather < 1.4


def test_what_a_killed_run_left_is_removed():
    reason = rig.missing()
    if reason:
        pytest.skip(f"no rig here: {reason}")
    make = "import rig, os; rig.Network(2, 100); os._exit(0)"
    subprocess.run([sys.executable, "-c", make], cwd=BENCHMARKS, check=True)
    assert _spaces()
    with rig.network(2):
        pass
    assert not _spaces()


def _spaces() -> list[str]:
    listed = rig._run("ip", "netns", "list").splitlines()
    mine = [line.split()[0] for line in listed if line.startswith(rig.PREFIX)]
    return [name for name in mine if not Path(f"/proc/{name.split('-')[1]}").exists()]
