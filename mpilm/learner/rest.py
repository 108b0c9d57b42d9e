"""What a module holds outside theta: buffers and frozen parameters, by name.

    float buffers        averaged over ranks for the final model: running means
    all else             rank 0's: counters, flags, frozen parameters

To be sent they are packed into two vectors that any `Comm` takes: the float buffers as
float64, which holds each of them exactly, all else as bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpilm.errors import CheckpointError, ModelError
from mpilm.vectors import to_array

# Types that numpy and a state file know; any other is stored as bytes.
STORABLE = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64),
)


class ModuleRest:
    """The tensors of a module that are not in theta.

    Their names are those that there are when it is made. What has such a name may be
    replaced by assignment, or be None for a while.

    Args:
        module: its trainable parameters are in theta already.
        flat: ids of the Parameters that are.
        device: of the module.
    """

    def __init__(self, module: nn.Module, flat: set[int], device: torch.device) -> None:
        self.device = device
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._buffers: set[str] = set()
        self._transient: set[str] = set()  # not in torch's state_dict
        for prefix, owner in module.named_modules():
            start = f"{prefix}." if prefix else ""
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) not in flat:
                    self._places[start + key] = (owner._parameters, key)
            for key in owner._buffers:
                self._places[start + key] = (owner._buffers, key)
                self._buffers.add(start + key)
                if key in owner._non_persistent_buffers_set:
                    self._transient.add(start + key)

    def __len__(self) -> int:
        return len(self._places)

    def tensors(self, *, plain: bool = True) -> dict[str, Tensor]:
        """Return what is there now, by name.

        Args:
            plain: whether all must be arrays.

        Raises:
            ModelError: a tensor that must be, and is not (sparse, quantised).
        """
        found = {}
        for name, (owner, key) in self._places.items():
            tensor = owner.get(key)
            if tensor is None:
                continue
            if plain and (tensor.layout != torch.strided or tensor.is_quantized):
                raise ModelError(
                    f"buffer {name} ({tensor.layout}, {tensor.dtype}) cannot be sent or"
                    " stored: make it dense, or an attribute that is no buffer"
                )
            found[name] = tensor.detach()
        return found

    def entries(self) -> dict[str, str]:
        """Return type and shape of every tensor, as text, by name."""
        return {
            name: f"{tensor.dtype} {tuple(tensor.shape)}"
            for name, tensor in self.tensors().items()
        }

    # to be sent
    def pack(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Return copies of the tensors `names`, laid end to end.

        Returns:
            (n,) float64, those that are averaged; (m,) uint8, the others.
        """
        tensors = self.tensors()
        averaged = [torch.zeros(0, dtype=torch.float64, device=self.device)]
        copied = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        for name in names:
            tensor = tensors[name].to(self.device)
            if self._is_averaged(name, tensor):
                averaged.append(real(tensor).double().reshape(-1))
            else:
                copied.append(as_bytes(tensor))
        return torch.cat(averaged), torch.cat(copied)

    def unpack_(self, names: Iterable[str], averaged: Tensor, copied: Tensor) -> None:
        """Set the tensors `names` to what `pack` returned, or to the mean of that."""
        tensors, first, second = self.tensors(), 0, 0
        for name in names:
            tensor = tensors[name]
            if self._is_averaged(name, tensor):
                end = first + real(tensor).numel()
                values = averaged[first:end].view(real(tensor).shape)
                if tensor.is_complex():
                    values = torch.view_as_complex(values)
                first = end
            else:
                end = second + tensor.numel() * tensor.element_size()
                values = from_bytes(copied[second:end], tensor)
                second = end
            self._set(name, values)

    def _is_averaged(self, name: str, tensor: Tensor) -> bool:
        is_float = tensor.is_floating_point() or tensor.is_complex()
        return is_float and name in self._buffers

    def _set(self, name: str, values: Tensor) -> None:
        owner, key = self._places[name]
        tensor = owner[key].detach()
        try:
            tensor.copy_(values)
        except RuntimeError:  # expanded, or made in inference mode
            owner[key] = values.to(tensor.device, tensor.dtype, copy=True)

    # to come back to
    def copy(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """Return a copy of every tensor, by name; without `frozen` of buffers only."""
        return {
            name: tensor.clone()
            for name, tensor in self.tensors(plain=False).items()
            if frozen or name in self._buffers
        }

    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """Set the tensors to what `copy` returned."""
        for name, values in kept.items():
            self._set(name, values)

    # to be stored
    def state(self, kept: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the frozen parameters and the persistent buffers as arrays.

        Args:
            kept: what `copy` returned; None: as they are now.
        """
        tensors = self.tensors() if kept is None else kept
        return {
            name: stored(tensor)
            for name, tensor in tensors.items()
            if name not in self._transient
        }

    def read(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what `state` was given.

        Raises:
            CheckpointError: it is of another model.
        """
        tensors = self.tensors()
        here = {name for name in tensors if name not in self._transient}
        for name in sorted(here ^ state.keys()):
            where = "the checkpoint" if name in here else "this model"
            raise CheckpointError(f"{where} has no {name}: it is of another model")
        return {name: restored(state[name], tensors[name], name) for name in here}


def real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the content of a tensor, (number of bytes,) uint8."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def from_bytes(content: Tensor, like: Tensor) -> Tensor:
    """Return what `as_bytes` was given; it was of the type and shape of `like`."""
    return content.clone().view(like.dtype).view(like.shape)  # clone: aligned


def stored(tensor: Tensor) -> Any:
    """Return a tensor as an array that a state file holds, as `to_array` does."""
    tensor = tensor.detach()
    return to_array(tensor if tensor.dtype in STORABLE else as_bytes(tensor))


def restored(array: Any, like: Tensor, name: str) -> Tensor:
    """Return what `stored` was given; it was of the type and shape of `like`.

    Raises:
        CheckpointError: it was not.
    """
    values = torch.tensor(np.asarray(array))
    if like.dtype in STORABLE:
        fits = values.dtype == like.dtype and values.shape == like.shape
    else:
        fits = values.dtype == torch.uint8 and values.numel() == like.nbytes
    if not fits:
        raise CheckpointError(
            f"{name}: {values.dtype} {tuple(values.shape)} in the checkpoint, here"
            f" {like.dtype} {tuple(like.shape)}"
        )
    return values if like.dtype in STORABLE else from_bytes(values, like)


def stored_parts(parts: Iterable[Tensor]) -> dict[str, Any]:
    """Return tensors of any type and shape as entries "0", "1", ...

    A type that is not storable goes as float32, which holds it, with its name.
    """
    state: dict[str, Any] = {}
    for index, part in enumerate(parts):
        if part.dtype in STORABLE:
            state[f"{index}"] = stored(part)
        else:
            dtype = str(part.dtype).removeprefix("torch.")
            state |= {f"{index}": stored(part.float()), f"{index}.type": dtype}
    return state


def restored_parts(state: Mapping[str, Any]) -> list[Tensor]:
    """Return what `stored_parts` was given."""
    parts = []
    for name in sorted((name for name in state if name.isdecimal()), key=int):
        part = torch.tensor(np.asarray(state[name]))
        dtype = state.get(f"{name}.type")
        parts.append(part.to(getattr(torch, dtype)) if dtype else part)
    return parts
