"""Gradient compression, written once for all frameworks."""

from hvdx.compression.base import (
    Compression,
    CompressionError,
    Compressor,
    Reduced,
    Spec,
    as_compressor,
    fp16,
    from_horovod,
    none,
)

__all__ = [
    "Compression",
    "CompressionError",
    "Compressor",
    "Reduced",
    "Spec",
    "as_compressor",
    "fp16",
    "from_horovod",
    "none",
]
