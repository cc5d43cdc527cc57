"""Names of parameters, without other ranks."""

from __future__ import annotations

from hvdx.replicas import _unique


def test_two_variables_of_one_name_are_both_kept():
    # Keras allows layers of one name: a list of their variables lost all but the last of each
    # path, so that the others were never broadcast.
    assert _unique([("a", 1), ("b", 2), ("a", 3), ("a", 4)]) == {"a": 1, "b": 2, "a#1": 3, "a#2": 4}
