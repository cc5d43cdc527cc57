"""What the network and the methods cost, measured by ranks together: all get the same numbers."""

from __future__ import annotations

import pytest
import tensorflow as tf

import hvdx as hvd
from hvdx import link, world
from hvdx.compression import Compression, Spec
from hvdx.compression.auto import survey
from hvdx.compression.methods import candidates

pytestmark = pytest.mark.ranks(2)
frameworks = pytest.mark.parametrize("framework", ["torch", "tensorflow"])


@frameworks
def test_the_network(framework):
    network = link.measure(world.core(framework), seconds=0.2)
    assert network.ranks == hvd.size()
    assert list(network.lines) == list(link.KINDS)
    # An operation goes through at least one cycle of Horovod's; no memory copies a TB/s.
    assert all(line.alpha > 1e-5 and line.beta > 1e-12 for line in network.lines.values())
    assert hvd.allgather_object(network) == [network] * hvd.size()


@pytest.mark.ranks(2, 4)
@frameworks
def test_between_some_ranks(framework, process_set):
    if process_set.included():
        known = world.own_set(framework, process_set)
        network = link.measure(world.core(framework), known, seconds=0.05)
        assert network.ranks == len(process_set.ranks)
        told = hvd.allgather_object(network, process_set=process_set, framework=framework)
        assert told == [network] * network.ranks


@frameworks
def test_the_methods(framework):
    specs = [Spec("weight", (96, 128), "float32", hvd.size()), Spec("bias", (8,), "float32", 1)]
    methods = candidates(["fp16", "int8", "onebit", "topk", "randomk", "powersgd"])
    found = survey(world.core(framework), methods, specs)
    assert {name for name, _ in found} == set(methods)
    assert all(made.seconds > 0 and made.messages for made in found.values())
    assert hvd.allgather_object(found) == [found] * hvd.size()


@frameworks
def test_the_plan(framework, capfd):
    specs = [Spec(str(n), (128, 256), "float32", hvd.size()) for n in range(3)]
    prepare = Compression.auto("bold", seconds=0.05).prepare
    chosen = prepare(world.core(framework), specs, None)
    assert len(set(hvd.allgather_object(repr(chosen)))) == 1
    printed = capfd.readouterr().err
    assert ("Compression.auto measured" in printed) == (hvd.rank() == 0)


def test_the_plan_while_a_graph_is_traced():
    specs = [Spec("weight", (128, 256), "float32", hvd.size())]
    prepare = Compression.auto(methods=["int8"], seconds=0.05, verbose=False).prepare
    chosen = []

    @tf.function(autograph=False)
    def traced(x):
        chosen.append(prepare(world.core("tensorflow"), specs, None))
        return x + 1

    assert float(traced(tf.constant(1.0))) == 2
    assert len(set(hvd.allgather_object(repr(chosen)))) == 1
