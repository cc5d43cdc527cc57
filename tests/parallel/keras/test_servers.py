"""``sync="parameter_server"``: the same training, with the optimizer's state in parts."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdx

TWO, FOUR = pytest.mark.ranks(2), pytest.mark.ranks(4)
C = hvdx.Compression
TENSORFLOW = keras.backend.backend() == "tensorflow"
SERVERS = [None, [0], pytest.param([0, 1], marks=FOUR)]
PS = {"sync": "parameter_server"}


@pytest.mark.parametrize("servers", SERVERS)
@pytest.mark.parametrize("way", ["fit", pytest.param("eager", marks=TWO),
                                 pytest.param("graph", marks=TWO)])  # fmt: skip
def test_equals_one_process(
    hvd, way, servers, data, make_model, ways, farthest, exact, assert_equal_replicas, monkeypatch
):
    monkeypatch.setenv("HVDX_BUCKET_MB", "0.0003")  # several buckets
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.Adam(0.01), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **PS, servers=servers)
    if way == "fit":
        ways.fit(together, optimizer, batches.shard)
    else:
        ways.loop(together, optimizer, batches.shard, graph=way == "graph")
    (layout,) = optimizer._averager._layouts.values()
    assert len(layout.buckets) > 1
    assert farthest(alone, together) < exact
    assert farthest(alone, make_model("float64")) > 1e-3
    assert_equal_replicas(together)
