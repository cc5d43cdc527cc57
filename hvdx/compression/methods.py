"""``hvd.Compression``: every method by its name, with the wrappers it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdx.compression import codecs
from hvdx.compression.base import CompressionError, Compressor, fp16, from_horovod, none
from hvdx.compression.exchange import exchange
from hvdx.compression.feedback import error_feedback, min_size
from hvdx.compression.local import Local, diloco, local_sgd
from hvdx.compression.powersgd import power_sgd
from hvdx.compression.sparse import deep_gradient_compression, random_k, top_k

_SMALL = 1024  # parameters of fewer elements travel raw where each is compressed alone


class Compression:
    """The compressors of hvdx, by name: ``compression=hvd.Compression.powersgd(rank=4)``.

    A method that takes options may be given without calling it, for its defaults. Gradients
    are compressed in float32. Infinities and NaN reach all ranks, and leave error feedback as
    it was.

    - ``none``: the gradient as it is.
    - ``fp16``: float16 on the wire. Divides before it sums and saturates at ±60000, where
      Horovod's sums first and turns one large value into inf.
    - ``bf16``: bfloat16 on the wire, summed in float32.
    """

    none = none
    fp16 = fp16
    bf16 = exchange(codecs.bfloat16())

    @staticmethod
    def int8(feedback: bool = False) -> Compressor:
        """8 bits an element and a power-of-two scale for every 256.

        Args:
            feedback: send later what rounding lost; seldom needed with 8 bits.
        """
        return _quantised(codecs.integers(8, 256), feedback)

    @staticmethod
    def int4(feedback: bool = True) -> Compressor:
        """4 bits an element and a power-of-two scale for every 128, with error feedback."""
        return _quantised(codecs.integers(4, 128), feedback)

    @staticmethod
    def onebit(feedback: bool = True) -> Compressor:
        """Signs, and the mean magnitude of every 1024 elements, with error feedback.

        Args:
            feedback: without it training stalls; for experiments.
        """
        return _quantised(codecs.signs(1024), feedback)

    @staticmethod
    def topk(density: float = 0.01, min_elements: int = _SMALL) -> Compressor:
        """The largest ``density`` of each parameter's elements, with error feedback.

        Args:
            density: share of the elements, above 0 and at most 1.
            min_elements: smaller parameters, and vectors, travel raw.
        """
        _check_density("topk", density)
        return min_size(min_elements, error_feedback(top_k(density)))

    @staticmethod
    def dgc(
        density: float = 0.001,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        min_elements: int = _SMALL,
    ) -> Compressor:
        """Deep gradient compression: top-k of momentum. The optimizer's momentum must be off.

        Args:
            density: share of the elements sent, above 0 and at most 1.
            momentum: applied before the choice, from 0 to below 1. Parameters that travel raw
                get none: keep ``min_elements`` low.
            warmup_steps: steps over which the density falls from 25 % to ``density``.
            min_elements: smaller parameters, and vectors, travel raw.
        """
        _check_density("dgc", density)
        if not 0 <= momentum < 1:
            raise CompressionError(
                f"Compression.dgc(momentum={momentum!r}): momentum must be 0 or more and below 1"
            )
        if warmup_steps < 0:
            raise CompressionError(
                f"Compression.dgc(warmup_steps={warmup_steps!r}): it must be 0 or more"
            )
        return min_size(min_elements, deep_gradient_compression(density, momentum, warmup_steps))

    @staticmethod
    def randomk(density: float = 0.01, min_elements: int = _SMALL, seed: int = 0) -> Compressor:
        """A random ``density`` of the elements, equal on all ranks, with error feedback.

        Args:
            density: share of the elements, above 0 and at most 1.
            min_elements: smaller parameters, and vectors, travel raw.
            seed: of the choice, equal on all ranks.
        """
        _check_density("randomk", density)
        return min_size(min_elements, error_feedback(random_k(density, seed)))

    @staticmethod
    def powersgd(rank: int = 4, min_elements: int = _SMALL, seed: int = 0) -> Compressor:
        """Two factors of ``rank`` columns of each parameter's matrix, with error feedback.

        Args:
            rank: at least 1. Parameters that it would not halve travel raw.
            min_elements: smaller parameters, and vectors, travel raw.
            seed: of the first factors, equal on all ranks.
        """
        if not isinstance(rank, int) or rank < 1:
            raise CompressionError(f"Compression.powersgd(rank={rank!r}): rank must be 1 or more")
        return min_size(min_elements, error_feedback(power_sgd(rank, seed)))

    @staticmethod
    def local_sgd(steps: int = 8) -> Local:
        """Each rank trains alone for ``steps`` steps; then parameters are averaged.

        Args:
            steps: from 1, where plain SGD does as if gradients were averaged.
        """
        return local_sgd(steps)

    @staticmethod
    def diloco(
        steps: int = 32,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        compression: Any = None,
    ) -> Local:
        """Each rank trains alone for ``steps`` steps; an outer optimizer applies the changes.

        Their mean over the ranks is the gradient of SGD with Nesterov momentum. Inner
        optimizers, usually AdamW, keep their state to themselves.

        Args:
            steps: from 1.
            outer_lr: above 0; 1 without momentum averages parameters.
            outer_momentum: 0 or more and below 1.
            compression: of the changes: any method but ``dgc``; ``int8`` by default.
        """
        inner = as_compressor(Compression.int8 if compression is None else compression)
        return diloco(steps, outer_lr, outer_momentum, inner)


def _quantised(codec: codecs.Codec, feedback: bool) -> Compressor:
    compressor = exchange(codec, owner_feedback=feedback)
    if feedback:
        compressor = error_feedback(compressor)
    return compressor._replace(name=f"{codec.name}(feedback={feedback})")


def _check_density(method: str, density: float) -> None:
    if not 0 < density <= 1:
        raise CompressionError(
            f"Compression.{method}(density={density!r}): density must be above 0 and at most 1"
        )


_METHODS: list[Callable[..., Any]] = [
    getattr(Compression, name)
    for name, kind in vars(Compression).items()
    if isinstance(kind, staticmethod)
]


def as_local(value: Any) -> Local | None:
    """Return the way of training alone that is meant by ``value``, None if it means another."""
    if value in (Compression.local_sgd, Compression.diloco):
        value = value()
    return value if isinstance(value, Local) else None


def as_compressor(value: Any) -> Compressor:
    """Return the compressor meant by ``value``: one of ours, or a Horovod ``Compressor`` class.

    Raises:
        CompressionError: it is neither; the message lists what there is.
    """
    if isinstance(value, Compressor):
        return value
    if (local := as_local(value)) is not None:
        raise CompressionError(
            f"compression={local} is a way of training, and no way to average one tensor: give it "
            "to hvd.DistributedOptimizer alone, not to an operation, a tape or another method"
        )
    if value in _METHODS:
        return value()  # type: ignore[no-any-return]
    if value is None or getattr(value, "__name__", "") == "NoneCompressor":
        return none
    if callable(getattr(value, "compress", None)) and callable(getattr(value, "decompress", None)):
        return from_horovod(value)
    known = ", ".join(f"hvd.Compression.{n}" for n in vars(Compression) if not n.startswith("_"))
    raise CompressionError(
        f"unknown compression={value!r}; use one of {known}, or a class with static "
        "compress(tensor) -> (tensor, context) and decompress(tensor, context)"
    )
