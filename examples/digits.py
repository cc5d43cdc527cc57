"""Handwritten digits for the examples: 1,797 real images that scikit-learn ships."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from sklearn.datasets import load_digits

Part: TypeAlias = tuple[np.ndarray, np.ndarray]


def load_shard(rank: int, size: int, seed: int = 0) -> tuple[Part, Part]:
    """Return this rank's share of the training images, and the whole test set.

    All ranks shuffle alike (``seed``), keep one fifth for the test, and deal the rest out;
    the few images that do not divide by ``size`` are left out, so that every rank makes the
    same number of steps.

    Returns:
        Two pairs of images, float32 (n, 8, 8, 1) in [0, 1], and labels, int64 (n,).
    """
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., np.newaxis]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = np.split(order, [len(order) // 5])
    train = train[: len(train) // size * size][rank::size]
    return (images[train], labels[train]), (images[test], labels[test])
