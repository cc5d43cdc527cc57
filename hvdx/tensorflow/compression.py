"""Compression as ``horovod.tensorflow.compression`` names it."""

from __future__ import annotations

from horovod.tensorflow.compression import Compressor, FP16Compressor, NoneCompressor

from hvdx.compression import Compression

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]
