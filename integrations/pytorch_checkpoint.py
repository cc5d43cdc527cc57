"""How modules, optimizers and generators of PyTorch are saved by ``hvd.Checkpoints``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hvdx import buckets
from hvdx.checkpoints.parts import (
    Crew,
    Part,
    Saved,
    compression_misfit,
    compression_state,
    differences,
)
from hvdx.checkpoints.tree import CODES, Stored, Tree, mapped
from hvdx.integrations.pytorch_collectives import dtype_name
from hvdx.integrations.pytorch_optimizer_servers import _OWED, _OWN, ServedReducer


def stored(value: Any) -> Stored | None:
    """Copy a tensor to host memory; None if ``value`` is none.

    Raises:
        TypeError: it is sparse, or its elements are of a type that files do not know.
    """
    if not isinstance(value, torch.Tensor):
        return None
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError(f"a {value.layout} tensor cannot be saved")
    if dtype_name(value.dtype) not in CODES:
        raise TypeError(f"a tensor of {dtype_name(value.dtype)} cannot be saved")
    # One copy, whatever its device and strides: training goes on while it is written.
    plain = value.detach().resolve_conj().resolve_neg()
    host = torch.empty(value.shape, dtype=value.dtype).copy_(plain)
    data = host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else b""
    return Stored(dtype_name(value.dtype), tuple(value.shape), data, "torch")


def tensor(value: Stored) -> torch.Tensor:
    """Return a copy of what was stored, on the CPU."""
    made = torch.empty(value.shape, dtype=getattr(torch, value.dtype))
    if made.numel():
        flat = made.reshape(-1).view(torch.uint8).numpy()
        flat[:] = np.frombuffer(value.data, np.uint8)
    return made


def narrow(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Return an array as a tensor of a type that NumPy may not have."""
    return torch.from_numpy(np.array(array)).to(getattr(torch, dtype))


def generators() -> dict[str, Any]:
    """Return the states of PyTorch's generators: the CPU's, and that of the GPU in use."""
    found = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_generators(states: dict[str, Any]) -> None:
    """Set them."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def part_of(value: Any) -> Part | None:
    """Return what saves a module or an optimizer; None if it is neither."""
    if isinstance(value, torch.nn.Module):
        return Module(value)
    if isinstance(value, torch.optim.Optimizer):
        return Optimizer(value)
    return None


class Module(Part):
    """A module: rank 0's ``state_dict()``, as all ranks have it."""

    kind = "model"
    others = ("pipeline",)

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        return (dict(self.value.state_dict()) if rank == 0 else None), None

    def problems(self, saved: Saved) -> list[str]:
        """See :meth:`Part.problems`."""
        return misfits(self.value, _model(saved))

    def load(self, saved: Saved, crew: Crew) -> None:
        """See :meth:`Part.load`."""
        self.value.load_state_dict(mapped(_model(saved)))


def misfits(model: torch.nn.Module, there: Tree) -> list[str]:
    """Say how a ``state_dict()`` that was saved differs from a module's."""
    here = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    return differences(
        {k: there[k] for k in there if k in here or _is_tensor(there[k])}, here, _told
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Stored)


def _model(saved: Saved) -> Tree:
    return saved.shared["model"] if saved.kind == "pipeline" else saved.shared


def _told(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


class Optimizer(Part):
    """An optimizer, wrapped or not.

    With parameter servers each rank saves what it owns; any other number of ranks, or a plain
    optimizer, gets the whole, put together from all files.
    """

    kind = "optimizer"

    @property
    def _reducer(self) -> Any:
        return getattr(self.value, "reducer", None)

    @property
    def _compressor(self) -> str:
        kept = getattr(self._reducer, "kept", None)
        return "none" if kept is None else kept._asked.name

    def _parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Return the parameters by name, in the order in which ``state_dict()`` numbers them."""
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for group, options in enumerate(self.value.param_groups):
            given = options.get("param_names")
            for place, parameter in enumerate(options["params"]):
                name = f"noname.{group}.{place}"
                if self._reducer is not None:
                    name = self._reducer.name_of(parameter, group, place)
                elif given:
                    name = given[place]
                found.setdefault(id(parameter), (name, parameter))
        return list(found.values())

    def settle(self) -> None:
        """End a round of local training, so that rank 0's parameters are those of all."""
        if hasattr(self.value, "flush"):
            self.value.flush()

    def state(self, rank: int) -> tuple[Tree, Tree]:
        """See :meth:`Part.state`."""
        told = self.value.state_dict()
        parts = getattr(self._reducer, "sharded", False)
        alone = hasattr(self.value, "flush")  # each rank's optimizer has seen its own data
        own: dict[str, Any] = {"part": told} if parts or alone else {}
        if hasattr(self.value, "compression_state") and self._compressor != "none":
            own["compression"] = self.value.compression_state()
        shared = None
        if rank == 0:
            shared = {
                "class": type(self.value).__name__,
                "parameters": [(name, tuple(p.shape)) for name, p in self._parameters()],
                "cut": self._cut() if parts else None,
            }
            if not own.get("part"):
                shared["state"] = told
        return shared, own or None

    def _cut(self) -> list[Any]:
        """Return what decides who owns which part."""
        return [self._reducer.ranks, list(self._reducer.servers), buckets.limit_bytes()]

    def problems(self, saved: Saved) -> list[str]:
        """See :meth:`Part.problems`."""
        told, here = saved.shared, self._parameters()
        found = []
        if told["class"] != type(self.value).__name__:
            found.append(f"it is of {told['class']}, but this is {type(self.value).__name__}")
        there = dict(told["parameters"])
        if len(there) != len(here):
            found.append(f"it has {len(there)} parameters, but this optimizer has {len(here)}")
        named = all("noname." not in name for name in (*there, *(name for name, _ in here)))
        pairs = zip(told["parameters"], here, strict=False)
        for place, ((name, shape), (own, parameter)) in enumerate(pairs):
            if named and name != own:
                found.append(f"parameter {place} is {name!r} in the checkpoint, but {own!r} here")
            elif tuple(shape) != tuple(parameter.shape):
                found.append(
                    f"parameter {own!r} has shape {tuple(shape)} in the checkpoint, but "
                    f"{tuple(parameter.shape)} here"
                )
        return found + compression_misfit(saved, self._compressor)

    def load(self, saved: Saved, crew: Crew) -> None:
        """See :meth:`Part.load`."""
        self.value.load_state_dict(self._given(saved, crew))
        kept = compression_state(saved, crew, self._compressor)
        if kept is not None:
            self.value.load_compression_state(kept)

    def _given(self, saved: Saved, crew: Crew) -> dict[str, Any]:
        """Return the ``state_dict()`` that this rank goes on from."""
        cut = saved.shared["cut"]
        if "state" in saved.shared:
            given = saved.shared["state"]
        elif cut is None:
            given = saved.own(crew.rank % saved.ranks)["part"]
        elif isinstance(self._reducer, ServedReducer) and cut == self._cut():
            given = saved.own(crew.rank)["part"]
        else:
            names = [name for name, _ in saved.shared["parameters"]]  # those of parts
            return self._whole([saved.own(rank)["part"] for rank in range(saved.ranks)], names)
        return mapped(given)  # type: ignore[no-any-return]

    def _whole(self, everyone: list[Tree], names: list[str]) -> dict[str, Any]:
        """Put together, on the CPU, the state that a plain optimizer would have."""
        states, owed = {}, {}
        for number, (name, (own, parameter)) in enumerate(
            zip(names, self._parameters(), strict=True)
        ):
            state: dict[str, Any] = {}
            for key, value in _everything(everyone, number, name):
                if isinstance(value, Stored) and value.shape and key not in state:
                    pieces = dict(_pieces(everyone, number, name, key))
                    if key != _OWED and sum(map(len, pieces.values())) != parameter.numel():
                        raise ValueError(f"not all parts of {key!r} of {name!r} are there")
                    state[key] = _joined(pieces, parameter, tensor(value).dtype)
                elif key not in state:
                    state[key] = mapped(value)
            if _OWED in state:
                owed[own] = state.pop(_OWED)
            if state:
                states[number] = state
        first = everyone[0]
        whole = {"state": states, "param_groups": mapped(first["param_groups"])}
        return {**whole, _OWN: {"owed": owed}} if owed else whole


def _everything(everyone: list[Tree], number: int, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what ranks have of a parameter's state."""
    for own in everyone:
        yield from own["state"].get(number, {}).items()
        if name in own.get(_OWN, {}).get("owed", {}):
            yield _OWED, own[_OWN]["owed"][name]


def _pieces(
    everyone: list[Tree], number: int, name: str, key: str
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield where each rank's part of a tensor begins, and the part."""
    for own in everyone:
        about = own.get(_OWN, {})
        if name not in about.get("parts", {}):
            continue
        held = about["owed"].get(name) if key == _OWED else own["state"].get(number, {}).get(key)
        if held is not None:
            yield about["parts"][name][0], tensor(held)


def _joined(
    pieces: dict[int, torch.Tensor], like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return a tensor of which there are parts, as they lie in memory; zeros where none is."""
    whole = torch.empty_like(like, dtype=dtype, device="cpu").detach().zero_()
    flat = whole.as_strided((whole.numel(),), (1,))
    for start, piece in pieces.items():
        flat[start : start + piece.numel()] = piece
    return whole
