"""``torch.autocast`` where several threads compute: taken from the caller, given to each of them.

Its state belongs to threads. In those of a pipeline there is none, in the caller's there is also
around backward and the optimizer, where it should not be: so it is set aside for a whole step, and
entered only where stages compute forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

Casts = Mapping[str, torch.dtype]  # by type of device
_KINDS = ("cpu", "cuda", "xpu")


def ambient() -> dict[str, torch.dtype]:
    """Return what the caller's contexts cast to, by type of device."""
    return {
        kind: torch.get_autocast_dtype(kind) for kind in _KINDS if torch.is_autocast_enabled(kind)
    }


def casting(casts: Casts, kind: str) -> contextlib.AbstractContextManager[None]:
    """Return a context that casts on devices of this type, without autocast's cache of leaves.

    Where a model is cut, each value that enters is a leaf: readers of it would share one cast, and
    add up their gradients in bfloat16, but without the cut in float32.
    """
    if kind not in casts:
        return contextlib.nullcontext()
    return torch.autocast(kind, casts[kind], cache_enabled=False)


@contextlib.contextmanager
def set_aside() -> Iterator[dict[str, torch.dtype]]:
    """Leave the caller's contexts for a while; yield what they cast to."""
    casts = ambient()
    with contextlib.ExitStack() as stack:
        for kind in casts:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield casts


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Cast as the caller's contexts do, but leave nothing in their cache."""
    casts = ambient()
    with contextlib.ExitStack() as stack:
        for kind in casts:
            stack.enter_context(casting(casts, kind))
        yield
