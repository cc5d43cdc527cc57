"""PowerSGD: send two thin factors of each gradient matrix (Vogels et al., NeurIPS 2019)."""

from __future__ import annotations

import math
from typing import Any

from hvdx.comm import Allreduce, Work
from hvdx.compression.base import Compressor, Reduced, Spec, name_hash, none
from hvdx.ops import Ops


def power_sgd(rank: int, seed: int = 0) -> Compressor:
    """Approximate each gradient matrix M by P Qᵀ of ``rank`` columns, by one power iteration.

    P is an orthonormal basis of the mean of M Q; Q, the mean of Mᵀ P, is where the next step
    starts (warm start). Both are averages of what ranks contribute, so that Horovod's allreduce
    serves, and any rank's own part is P (Mᵀ P)ᵀ: error feedback subtracts that, not the mean.
    Parameters for which the factors are not under half as large travel raw.

    Args:
        rank: columns of the factors.
        seed: of the first Q, equal on all ranks.
    """

    def init(ops: Ops, spec: Spec) -> Any:
        rows, columns = matrix_shape(spec.shape)
        if not worthwhile(rows, columns, rank):
            return None
        import numpy as np

        random = np.random.Generator(np.random.Philox(name_hash(seed, spec.name)))
        return ops.constant(random.normal(size=(columns, rank)), "float32")

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        shape, dtype = tuple(grad.shape), ops.dtype(grad)
        rows, columns = matrix_shape(shape)
        if not worthwhile(rows, columns, rank):
            return (yield from none.reduce(ops, grad, state))
        matrix = ops.reshape(ops.cast(grad, "float32"), (rows, columns))
        p = yield Allreduce(ops.matmul(matrix, ops.orthonormal(state)), "p")
        p = ops.orthonormal(p)
        part = ops.matmul(ops.transpose(matrix), p)
        q = yield Allreduce(part, "q")

        def expand(factor: Any) -> Any:
            whole = ops.matmul(p, ops.transpose(factor))
            return ops.cast(ops.reshape(whole, shape), dtype)

        # A NaN in the factor would stay there for ever.
        return Reduced(expand(q), expand(part), ops.where(ops.finite(q), q, state))

    return Compressor(f"powersgd(rank={rank})", init, reduce, stateful=True)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """View a parameter as the matrix with the fewest rows plus columns.

    PyTorch keeps outputs first, Keras last; either way they come apart from the rest.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    first = shape[0], math.prod(shape[1:])
    last = math.prod(shape[:-1]), shape[-1]
    return min(first, last, key=sum)


def worthwhile(rows: int, columns: int, rank: int) -> bool:
    """Tell whether the factors are less than half of the matrix."""
    return 2 * rank * (rows + columns) < rows * columns and rank <= min(rows, columns)
