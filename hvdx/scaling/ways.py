"""Ways of training on many ranks, as text.

ring                     every rank's gradients, averaged by a ring allreduce
hierarchical             within hosts first, then between them
powersgd=4               compressed: fp16, bf16, int8, int4, onebit, topk=0.01, dgc=0.001,
                         randomk=0.01
hierarchical+powersgd=4  both: compressed within hosts, too, and only allreduces have a hierarchy;
                         ``Compression.hierarchical`` is not predicted
diloco=32, local_sgd=8   averaged once in so many steps
servers, servers=1       parameter servers: all ranks, or so many
stages=4                 pipelines of so many stages, replicated over the ranks; with a method,
stages=4+int8            which averages each stage's gradients over its replicas
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from hvdx.compression.base import CompressionError, Compressor, none
from hvdx.compression.local import Local
from hvdx.compression.methods import Compression, as_compressor
from hvdx.errors import PlanError
from hvdx.scaling.outline import Outline

_PLAIN = "fp16", "bf16", "int8", "int4", "onebit"
_OPTIONS = {
    "topk": "0.01", "dgc": "0.001", "randomk": "0.01", "powersgd": "4",
    "local_sgd": "8", "diloco": "32",
}  # fmt: skip
METHODS = (*_PLAIN, *_OPTIONS)
USUAL = (
    "ring", "hierarchical", "fp16", "int8", "onebit", "topk=0.01", "powersgd=4",
    "hierarchical+powersgd=4", "diloco=32", "servers", "servers=1", "stages=4", "stages=4+int8",
)  # fmt: skip


class Way(NamedTuple):
    """How ranks are kept in step.

    Attributes:
        text: as it was told.
        method: its name in a profile's ``codecs``; ``"none"`` for none.
        compressor: what averages gradients, or parameters where ``every`` is above 1.
        every: steps from one exchange to the next.
        local: how ranks train alone between.
        hierarchical: whether allreduces are.
        servers: None: no servers; 0: all ranks; else how many.
        stages: of a pipeline.
    """

    text: str
    method: str = "none"
    compressor: Compressor = none
    every: int = 1
    local: Local | None = None
    hierarchical: bool = False
    servers: int | None = None
    stages: int = 1


def read_way(text: str) -> Way:
    """Read one.

    Raises:
        PlanError: there is no such way, or its parts do not go together.
    """
    way = Way(text)
    for part in text.split("+"):
        name, _, told = part.strip().partition("=")
        if name == "ring" and not told:
            continue
        if name == "hierarchical" and not told:
            way = way._replace(hierarchical=True)
        elif name == "servers":
            way = way._replace(servers=_whole(part, told) if told else 0)
        elif name == "stages":
            way = way._replace(stages=_whole(part, told))
        elif name in METHODS:
            if way.compressor is not none:
                raise PlanError(f"way {text!r}: name one method")
            way = _with_method(way, name, told)
        else:
            names = "ring, hierarchical, servers[=K], stages=S"
            raise PlanError(
                f"way {text!r}: no {part.strip()!r}; use {names}, {', '.join(METHODS)}, joined by +"
            )
    if way.servers is not None and (way.hierarchical or way.stages > 1 or way.method != "none"):
        raise PlanError(f"way {text!r}: servers are predicted alone, without methods and stages")
    if way.stages > 1 and way.every > 1:
        raise PlanError(f"way {text!r}: stages do not train alone for some steps")
    return way


def _whole(part: str, told: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", told):
        name = part.strip().partition("=")[0]
        raise PlanError(f"way {part.strip()!r}: give a whole number from 1, such as {name}=4")
    return int(told)


def _with_method(way: Way, name: str, told: str) -> Way:
    if name in _PLAIN and told:
        raise PlanError(f"way {way.text!r}: {name} takes no number")
    told = told or _OPTIONS.get(name, "")
    make: Any = getattr(Compression, name)
    try:
        made = make(int(told) if told.isdigit() else float(told)) if told else make
    except (CompressionError, ValueError) as error:
        why = error if isinstance(error, CompressionError) else f"{told!r} is no number"
        raise PlanError(f"way {way.text!r}: {why}") from None
    if isinstance(made, Local):
        outer = made.outer(lambda spec: Outline(spec.shape, spec.dtype))
        return way._replace(method=name, compressor=outer, every=made.steps, local=made)
    method = f"{name}={told}" if told else name
    return way._replace(method=method, compressor=as_compressor(made))
