"""Process sets added while the job runs belong to the core they were added to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import HVDX_RUN, run

pytest.importorskip("horovod")

#: TensorFlow's core is the last one to start: the one that Horovod's own functions ask.
RANK = """
import tensorflow as tf
import torch
import hvdx as hvd
import hvdx.torch

hvd.init(framework=("torch", "tensorflow"), process_sets="dynamic")
mine = hvdx.torch.add_process_set([hvd.size() - 1, 0])
assert (mine.ranks, mine.size()) == ([0, 2], 2)
assert mine.included() == (hvd.rank() != 1)
if mine.included():
    assert mine.rank() == hvd.rank() // 2
    total = hvd.allreduce(torch.tensor([1.0 + hvd.rank()]), op=hvd.Sum, process_set=mine)
    assert total.tolist() == [4.0]
    assert hvdx.torch.allgather_object(hvd.rank(), process_set=mine) == [0, 2]
else:
    try:
        mine.rank()
    except ValueError as error:
        assert "rank 1 is not part of ProcessSet([0, 2])" in str(error)
try:
    hvd.allreduce(tf.ones([1]), process_set=mine)
except ValueError as error:
    assert "belongs to Horovod's core for torch; the one for tensorflow does not" in str(error)
else:
    raise SystemExit("TensorFlow's core took a set of torch's")
try:
    hvdx.torch.add_process_set([0, 2])
except ValueError as error:
    assert "duplicate" in str(error)
else:
    raise SystemExit("the same ranks formed two sets")
assert hvdx.torch.remove_process_set(mine)
assert mine.process_set_id is None and mine.size() is None
assert not hvdx.torch.remove_process_set(mine)

both = hvd.add_process_set([0, 1])  # every running core
if both.included():
    for tensor in (torch.tensor([hvd.rank()]), tf.constant([hvd.rank()])):
        assert [int(each) for each in hvd.allgather(tensor, process_set=both)] == [0, 1]
assert hvd.remove_process_set(both)
hvd.barrier()
print("done", flush=True)
"""


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow")
def test_sets_added_later(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(RANK)
    job = run(*HVDX_RUN, "-np", "3", "--", sys.executable, str(script))
    assert job.stdout.count("done") == 3, job.stdout + job.stderr
