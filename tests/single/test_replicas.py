"""Names of parameters, without other ranks."""

from __future__ import annotations

import numpy as np
import pytest

from hvdx.replicas import _unique


def test_two_variables_of_one_name_are_both_kept():
    # Keras allows layers of one name: a list of their variables lost all but the last of each
    # path, so that the others were never broadcast.
    assert _unique([("a", 1), ("b", 2), ("a", 3), ("a", 4)]) == {"a": 1, "b": 2, "a#1": 3, "a#2": 4}


def test_pairs_of_one_name_are_both_found():
    torch = pytest.importorskip("torch")
    import hvdx as hvd
    from hvdx.replicas import named_tensors

    hvd.init(framework="torch")
    same = [("w", torch.zeros(2)), ("w", torch.ones(2))]
    _, tensors = named_tensors(same)
    assert [np.asarray(t).tolist() for t in tensors.values()] == [[0, 0], [1, 1]]
