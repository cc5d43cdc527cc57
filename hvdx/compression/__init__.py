"""Gradient compression, written once for all frameworks."""

from hvdx.compression.base import (
    FORMAT,
    CompressionError,
    Compressor,
    Reduced,
    Spec,
    fp16,
    from_horovod,
    none,
)
from hvdx.compression.feedback import after, error_feedback, min_size, momentum
from hvdx.compression.local import Local
from hvdx.compression.methods import Compression, as_compressor, as_local

__all__ = [
    "FORMAT",
    "Compression",
    "CompressionError",
    "Compressor",
    "Local",
    "Reduced",
    "Spec",
    "after",
    "as_compressor",
    "as_local",
    "error_feedback",
    "fp16",
    "from_horovod",
    "min_size",
    "momentum",
    "none",
]
