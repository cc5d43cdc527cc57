"""``horovod.torch.functions``'s names, through the torch core."""

import functools

from hvdx import replicas
from hvdx.replicas import broadcast_optimizer_state, broadcast_parameters

__all__ = [
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
]

allgather_object = functools.partial(replicas.allgather_object, framework="torch")
broadcast_object = functools.partial(replicas.broadcast_object, framework="torch")
