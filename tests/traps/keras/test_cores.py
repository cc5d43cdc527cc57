"""Two cores in one process, torch's and TensorFlow's: each keeps its own process sets.

The tests follow each other, and this file comes first: TensorFlow's core shall not run yet.
"""

from __future__ import annotations

import importlib

import keras
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("once is enough", allow_module_level=True)

import torch

trap = pytest.mark.trap


@pytest.fixture(scope="module")
def torch_sets(face, library):
    process_set = importlib.import_module(f"{library}.torch").ProcessSet
    sets = [process_set([0])]
    face("torch", sets)
    return sets


@pytest.fixture(scope="module")
def torch_face(torch_sets, face):
    return face("torch")


@pytest.fixture(scope="module")
def tensorflow_face(torch_sets, face, library):
    process_set = importlib.import_module(f"{library}.tensorflow").ProcessSet
    return face("tensorflow", [process_set([1]), process_set([0])])


@trap(15, ValueError, "Horovod has not been initialized")
def test_importing_one_face_leaves_the_other_alone(torch_face, library):
    # Keras does it on its torch backend: Horovod's Keras modules import TensorFlow's.
    importlib.import_module(f"{library}.tensorflow")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch_face.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0), named_parameters=[("alone", parameter)]
    )
    (parameter * (torch_face.rank() + 1.0)).sum().backward()
    optimizer.step()
    assert parameter.item() == -1.5
    assert torch_face.global_process_set.size() == 2


@trap(15, AssertionError, r"== \[0, None\]")
def test_a_set_is_asked_of_its_own_core(torch_sets, tensorflow_face, everyone):
    # It is the first of torch's; the first of TensorFlow's is rank 1's.
    (first,) = torch_sets
    found = None
    if first.included():
        try:
            found = first.rank()
        except ValueError as error:
            found = str(error)
    assert everyone(found) == [0, None]


@trap(15, ValueError, "Attempted to add a duplicate process set")
def test_a_set_is_added_to_the_core_that_is_asked(torch_face, tensorflow_face):
    # TensorFlow's core, started last, has a set of rank 1 already; torch's has none.
    added = torch_face.add_process_set([1])
    if added.included():
        alone = torch_face.allreduce(torch.ones(1), op=torch_face.Sum, process_set=added)
        assert alone.item() == 1.0
    assert torch_face.remove_process_set(added)


@trap(15, AssertionError, "Rank 0 is not a member of the provided process set")
def test_a_set_of_the_other_core_is_refused(torch_sets, tensorflow_face, everyone):
    import tensorflow as tf

    told = None
    if tensorflow_face.rank() == 0:
        with pytest.raises(Exception) as error:
            tensorflow_face.allreduce(tf.ones(1), name="foreign", process_set=torch_sets[0])
        told = str(error.value)
    told, _ = everyone(told)
    for part in ("torch", "tensorflow"):
        assert part in told.lower(), told
