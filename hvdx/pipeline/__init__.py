"""Model-parallel stages: cut a model, place the pieces, run them micro-batch by micro-batch.

Framework-free. What depends on PyTorch or Keras stands behind the protocol
:class:`hvdx.pipeline.run.Stage`; how tensors travel, behind :class:`hvdx.pipeline.channel.Channel`.
"""
