"""Adasum between ranks that live in one process."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod")

from hvdx.comm import in_step, through  # noqa: E402
from hvdx.integrations.pytorch_optimizer_adasum import adasum  # noqa: E402


def tensor(array):
    return torch.from_numpy(np.array(array))


def reference(vectors):
    """Combine one tensor's vectors in one process."""
    while len(vectors) > 1:
        met = []
        for a, b in zip(vectors[::2], vectors[1::2], strict=False):
            ab, aa, bb = a @ b, a @ a, b @ b
            met.append((1 - ab / (2 * aa) if aa else 1) * a + (1 - ab / (2 * bb) if bb else 1) * b)
        vectors = met + vectors[2 * len(met) :]
    return vectors[0]


def combined(flats, sizes, wire=None):
    ranks = len(flats)
    works = [adasum(flat.clone(), sizes, rank, ranks, wire) for rank, flat in enumerate(flats)]
    return in_step([through(work, make=tensor) for work in works])


@pytest.mark.parametrize("ranks", range(1, 8))
@pytest.mark.parametrize("sizes", [[1], [7, 1, 12], [3, 0, 2], [40, 40]], ids=str)
def test_each_tensor_is_combined_on_its_own(ranks, sizes):
    # However the slices of ranks cut the tensors; a rank may have an empty slice.
    torch.manual_seed(ranks)
    flats = [torch.randn(sum(sizes), dtype=torch.float64) for _ in range(ranks)]
    parts = zip(*(flat.split(sizes) for flat in flats), strict=True)
    expected = torch.cat([reference(list(part)) for part in parts])
    results = combined(flats, sizes)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_equal_vectors_are_averaged_and_orthogonal_ones_summed(ranks):
    equal = torch.ones(5)
    for result in combined([equal] * ranks, [5]):
        torch.testing.assert_close(result, equal)
    for result in combined([*torch.eye(ranks)], [ranks]):
        torch.testing.assert_close(result, torch.ones(ranks))


def test_zeros_change_nothing():
    some = torch.tensor([1.0, -2.0, 3.0])
    for result in combined([torch.zeros(3), some, torch.zeros(3)], [2, 1]):
        assert torch.equal(result, some)


def test_elements_may_travel_in_half_the_bits():
    torch.manual_seed(1)
    flats = [torch.randn(9) for _ in range(3)]
    exact, rounded = combined(flats, [4, 5]), combined(flats, [4, 5], torch.float16)
    assert rounded[0].dtype == torch.float32
    torch.testing.assert_close(rounded[0], exact[0], rtol=1e-2, atol=1e-2)
    assert not torch.equal(rounded[0], exact[0])
