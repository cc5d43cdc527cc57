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
assert (mine.ranks, mine.size()) == ([0, 3], 2)
assert mine.included() == (hvd.rank() in (0, 3))
if mine.included():
    assert mine.rank() == hvd.rank() // 3
    total = hvd.allreduce(torch.tensor([1.0 + hvd.rank()]), op=hvd.Sum, process_set=mine)
    assert total.tolist() == [5.0]
    assert hvdx.torch.allgather_object(hvd.rank(), process_set=mine) == [0, 3]
else:
    try:
        mine.rank()
    except ValueError as error:
        assert f"rank {hvd.rank()} is not part of ProcessSet([0, 3])" in str(error)
try:
    hvd.allreduce(tf.ones([1]), process_set=mine)
except ValueError as error:
    assert "belongs to Horovod's core for torch; the one for tensorflow does not" in str(error)
else:
    raise SystemExit("TensorFlow's core took a set of torch's")
try:
    hvdx.torch.add_process_set([0, 3])
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
"""

#: Hosts of two ranks; expected is what NumPy makes of their means.
HOSTS = """
import numpy as np
from hvdx.comm import in_step
from hvdx.compression import Spec
from hvdx.ops import NumpyOps

import hvdx.tensorflow

method, shape, numpy = hvd.Compression.int4(), (24, 36), NumpyOps()
compression = hvd.Compression.hierarchical(method, local_size=2)
given = [np.random.default_rng(step).integers(-64, 64, (4, *shape)).astype("f4") for step in (0, 1)]
expected, states = [], [method.init(numpy, Spec("w", shape, "float32", 2))] * 2
for grads in given:
    own = grads.reshape(2, 2, *shape).mean(1)
    results = in_step([method.reduce(numpy, g, s) for g, s in zip(own, states)])
    states = [result.state for result in results]
    expected.append(results[0].mean)

one_host = hvd.Compression.hierarchical(method, local_size=4)  # sends all that is owed

def wrapped(weight, compression):
    optimizer = torch.optim.SGD([weight], lr=1.0)
    return hvd.DistributedOptimizer(optimizer, [("w", weight)], compression=compression)

weight = torch.nn.Parameter(torch.zeros(shape))
optimizer = wrapped(weight, compression)
for grads, mean in zip(given, expected):
    optimizer.zero_grad()
    (weight * torch.tensor(grads[hvd.rank()])).sum().backward()
    assert weight.grad.numpy().tobytes() == mean.tobytes()
    optimizer.step()
(owed,) = optimizer.compression_state()["parameters"]["w"].values()
assert owed.numpy().tobytes() == states[hvd.rank() // 2].residual.tobytes()
whole = optimizer.portable_compression_state()["parameters"]["w"]["residual"]
np.testing.assert_allclose(whole, (states[0].residual + states[1].residual) / 2, atol=1e-6)
other = wrapped(weight, one_host)
other.load_compression_state(optimizer.compression_state())
other.zero_grad()
(weight * 0.0).sum().backward()
np.testing.assert_allclose(weight.grad.numpy(), whole, atol=1e-6)

variable = tf.Variable(tf.zeros(shape))

def distributed(tape, compression):
    return hvdx.tensorflow.DistributedGradientTape(tape, compression=compression)

def gradient(x, compression):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(variable * x)
    return distributed(tape, compression).gradient(loss, [variable])[0]

traced = tf.function(lambda x: gradient(x, compression))
for grads, mean in zip(given, expected):
    assert traced(tf.constant(grads[hvd.rank()])).numpy().tobytes() == mean.tobytes()
state = distributed(tf.GradientTape(), compression).compression_state([variable])
distributed(tf.GradientTape(), one_host).load_compression_state(state, [variable])
np.testing.assert_allclose(gradient(tf.zeros(shape), one_host), whole, atol=1e-6)

wrong = hvd.Compression.hierarchical(method, local_size=1 + hvd.rank() % 2 * 2)
try:
    gradient(tf.zeros(shape), wrong)
except ValueError as error:
    assert "ranks tell others (rank 0: 1, rank 1: 3, rank 2: 1, rank 3: 3)" in str(error), error
else:
    raise SystemExit("ranks had hosts of different sizes")

hvd.barrier()
print("done", flush=True)
"""


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow")
def test_sets_added_later(tmp_path):
    """Also those that compression between hosts makes for itself."""
    script = tmp_path / "train.py"
    script.write_text(RANK + HOSTS)
    job = run(*HVDX_RUN, "-np", "4", "--", sys.executable, str(script), timeout=300)
    assert job.stdout.count("done") == 4, job.stdout + job.stderr
