"""Handwritten digits as MNIST has them, without a download: those of scikit-learn, enlarged."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from sklearn.datasets import load_digits

Part: TypeAlias = tuple[np.ndarray, np.ndarray]


def load_data() -> tuple[Part, Part]:
    """Return 1,500 training and 297 test digits, as ``keras.datasets.mnist.load_data()`` would.

    Returns:
        Two pairs of images, uint8 (n, 28, 28), and labels, int64 (n,).
    """
    digits = load_digits()
    enlarged = np.kron(digits.images, np.ones((3, 3)))  # 8x8 pixels, 0 to 16, to 24x24
    framed = np.pad(enlarged, [(0, 0), (2, 2), (2, 2)])
    images = (framed * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
