"""PowerSGD: send two thin factors of each gradient matrix (Vogels et al., NeurIPS 2019).

Factors lie on their side, as (rank, n): with them a large matrix is read in the order in which
it lies in memory, which is many times quicker.

Error feedback is built in. Kept is what a rank's own part lacks, not what the mean lacks, which
would let residuals drift apart without bound; the own part itself is never multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hvdx.comm import Allreduce, Work
from hvdx.compression.base import Compressor, Reduced, Spec, name_hash, none
from hvdx.compression.feedback import Feedback
from hvdx.compression.updates import Messenger
from hvdx.ops import Ops

_INFINITE = 0x7F800000  # bits of infinity in a float32; NaN lie above


def power_sgd(rank: int, seed: int = 0) -> Compressor:
    """Approximate each gradient matrix M by P Qᵀ of ``rank`` columns, by one power iteration.

    P is an orthonormal basis of the mean of M Q; Q, the mean of Mᵀ P, is where the next step
    starts (warm start). Both are averages of what ranks contribute, so that Horovod's allreduce
    serves. Parameters for which the factors are not under half as large travel raw.

    Args:
        rank: columns of the factors.
        seed: of the first Q, equal on all ranks.
    """

    def first(ops: Ops, spec: Spec) -> Any:
        return _random(ops, spec, seed, (rank, matrix_shape(spec.shape)[1]))

    def approximate(ops: Ops, matrix: Any, last: Any) -> Work[_Factors]:
        p = yield Allreduce(ops.matmul(ops.orthonormal(last), matrix, transposed=True), "p")
        p = ops.orthonormal(p)
        own = ops.matmul(p, matrix)
        q = yield Allreduce(own, "q")
        good = _healthy(ops, q)
        kept = ops.either(good, lambda: _renewed(ops, q), lambda: last)
        return _Factors(p, q, p, own, good, kept)

    return _compressor(f"powersgd(rank={rank})", rank, first, approximate)


class Turn(NamedTuple):
    """State of :func:`alternating_power_sgd` beside the residual."""

    factor: Any  # (rank, longer side) float32: the last mean, with zeros behind
    side: Any  # int32: 0 if that has a number for each column of the matrix, 1 if for each row


def alternating_power_sgd(rank: int, seed: int = 0) -> Compressor:
    """Improve P in one step and Q in the next, so that a step has one allreduce, not two.

    With an orthonormal basis Q of the last step's factor, M is approximated by (M Q) Qᵀ, and
    the mean of M Q is the next step's P; then by P (Pᵀ M), and so on (the Power-SGD authors'
    code; Zhang et al., ACP-SGD, ICDCS 2023). Factors travel as (rank, longer side) numbers, so
    that requests are the same in every step.

    Args:
        rank: columns of the factors.
        seed: of the first Q, equal on all ranks.
    """

    def first(ops: Ops, spec: Spec) -> Turn:
        rows, columns = matrix_shape(spec.shape)
        factor = _random(ops, spec, seed, (rank, columns))
        return Turn(_padded(ops, factor, max(rows, columns)), ops.constant(0, "int32"))

    def approximate(ops: Ops, matrix: Any, last: Turn) -> Work[_Factors]:
        rows, columns = matrix.shape
        longer = max(rows, columns)

        def side(by_column: Callable[[], Any], by_row: Callable[[], Any]) -> Any:
            return ops.either(last.side == 0, by_column, by_row)

        basis = side(
            lambda: _padded(ops, ops.orthonormal(last.factor[:, :columns]), longer),
            lambda: _padded(ops, ops.orthonormal(last.factor[:, :rows]), longer),
        )
        own = side(
            lambda: _padded(ops, ops.matmul(basis[:, :columns], matrix, transposed=True), longer),
            lambda: _padded(ops, ops.matmul(basis[:, :rows], matrix), longer),
        )
        mean = yield Allreduce(own, "factor")
        good = _healthy(ops, mean)

        def factors(given: Any) -> tuple[Any, Any]:
            left = side(lambda: given[:, :rows], lambda: basis[:, :rows])
            return left, side(lambda: basis[:, :columns], lambda: given[:, :columns])

        kept = Turn(
            ops.either(good, lambda: _renewed(ops, mean), lambda: last.factor),
            ops.either(good, lambda: 1 - last.side, lambda: last.side),
        )
        return _Factors(*factors(mean), *factors(own), good, kept)

    return _compressor(f"powersgd(rank={rank}, alternating=True)", rank, first, approximate)


class _Factors(NamedTuple):
    """What a step has found: the mean is leftᵀ right, this rank's part own_leftᵀ own_right."""

    left: Any
    right: Any
    own_left: Any
    own_right: Any
    good: Any  # boolean, equal on all ranks: nothing is infinite or NaN
    kept: Any  # where the next step starts


def _compressor(
    name: str,
    rank: int,
    first: Callable[[Ops, Spec], Any],
    approximate: Callable[[Ops, Any, Any], Work[_Factors]],
) -> Compressor:
    def init(ops: Ops, spec: Spec) -> Feedback | None:
        if not worthwhile(*matrix_shape(spec.shape), rank):
            return None
        return Feedback(ops.zeros(spec.shape, "float32"), first(ops, spec))

    def reduce(ops: Ops, grad: Any, state: Any) -> Work[Reduced]:
        shape = matrix_shape(tuple(grad.shape))
        if not worthwhile(*shape, rank):
            return (yield from none.reduce(ops, grad, state))
        owed = ops.cast(grad, "float32") + state.residual
        found = yield from approximate(ops, ops.reshape(owed, shape), state.inner)
        left = ops.minus_outer(owed, found.own_left, found.own_right)
        residual = ops.either(found.good, lambda: left, lambda: state.residual)
        mean = ops.outer(found.left, found.right, grad)
        return Reduced(mean, None, Feedback(residual, found.kept))

    return Compressor(name, init, reduce, stateful=True, updates=low_rank(rank))


def low_rank(rank: int, seed: int = 0) -> Messenger:
    """Return the messenger that sends two factors of its owner's part of the matrix.

    One power iteration on the owner's rows, of which the first and the last may be incomplete,
    from where the last one ended; nobody else takes part in it.
    """

    def frame(spec: Spec, start: int, stop: int) -> tuple[int, int, int]:
        columns = matrix_shape(spec.shape)[1]
        first = start // columns
        return -(-stop // columns) - first, columns, start - first * columns

    def size(spec: Spec, start: int, stop: int) -> int | None:
        rows, columns, _ = frame(spec, start, stop)
        return 4 * rank * (rows + columns) if worthwhile(rows, columns, rank) else None

    def first(ops: Ops, spec: Spec) -> Any:
        return _random(ops, spec, seed, (rank, matrix_shape(spec.shape)[1]))

    def write(ops: Ops, change: Any, spec: Spec, start: int, last: Any) -> tuple[Any, Any]:
        length = change.shape[0]
        rows, columns, before = frame(spec, start, start + length)
        around = [ops.zeros((n,), "float32") for n in (before, rows * columns - before - length)]
        matrix = ops.reshape(ops.concat([around[0], change, around[1]]), (rows, columns))
        p = ops.orthonormal(ops.matmul(ops.orthonormal(last), matrix, transposed=True))
        q = ops.matmul(p, matrix)
        kept = ops.either(_healthy(ops, q), lambda: _renewed(ops, q), lambda: last)
        return ops.to_bytes(ops.concat([ops.reshape(p, (-1,)), ops.reshape(q, (-1,))])), kept

    def read(ops: Ops, data: Any, spec: Spec, start: int, stop: int) -> Any:
        rows, columns, before = frame(spec, start, stop)
        factors = ops.from_bytes(data, "float32")
        p = ops.reshape(factors[: rank * rows], (rank, rows))
        q = ops.reshape(factors[rank * rows :], (rank, columns))
        matrix = ops.outer(p, q, ops.zeros((rows, columns), "float32"))
        return ops.reshape(matrix, (-1,))[before : before + stop - start]

    return Messenger(f"powersgd(rank={rank})", size, first, write, read)


def _random(ops: Ops, spec: Spec, seed: int, shape: tuple[int, int]) -> Any:
    import numpy as np

    random = np.random.Generator(np.random.Philox(name_hash(seed, spec.name)))
    return ops.constant(random.normal(size=shape), "float32")


def _padded(ops: Ops, factor: Any, length: int) -> Any:
    rank, own = factor.shape
    if own == length:
        return factor
    return ops.concat([factor, ops.zeros((rank, length - own), "float32")], axis=1)


def _healthy(ops: Ops, factor: Any) -> Any:
    return ops.max(ops.max(ops.abs_bits(factor))) < _INFINITE


def _renewed(ops: Ops, factor: Any) -> Any:
    """Replace rows of zeros by random ones.

    Zeros would become the first unit vectors, and a gradient that has nothing there, as of rows
    that no batch ever meets, would never be sent again.
    """
    top = ops.max(ops.abs_bits(factor))

    def redrawn() -> Any:
        fresh = ops.noise(ops.constant(1, "int32"), factor)
        return ops.where((top == 0)[:, None], fresh, factor)

    return ops.either(ops.max(-top) < 0, lambda: factor, redrawn)


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
