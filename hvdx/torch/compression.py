"""``horovod.torch.compression``'s names: hvdx's compressors, and Horovod's class to inherit."""

from horovod.torch.compression import Compressor, FP16Compressor, NoneCompressor

from hvdx.compression import Compression

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]
