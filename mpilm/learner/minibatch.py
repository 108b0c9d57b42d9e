"""Minibatches of any form: how many samples they hold, and how they reach a device.

A minibatch may be a tensor or an array; a tuple, list, named tuple, mapping or
dataclass of them, nested; a PackedSequence, whose samples are its sequences (their
lengths stay on the CPU, where torch wants them); or an object of somebody's own, which
has `.to(device)` where its tensors are to be moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from mpilm.errors import DataError

Move = Callable[[Any], Tensor]
NOT_NUMBERS = "OSUMmV"  # kinds of numpy arrays that no tensor can hold


class Repeated:
    """The minibatches of an iterable, again and again; it does not know its place.

    Raises:
        DataError: it has ended, and gives no more.
    """

    def __init__(self, given: Iterable[Any]) -> None:
        self.given = given
        self._iterator: Iterator[Any] = iter(())

    def next(self) -> Any:
        """Return the next minibatch."""
        for _ in range(2):
            for batch in self._iterator:
                return batch
            self._iterator = iter(self.given)
        kind = type(self.given).__name__
        raise DataError(f"batches: a {kind} that has ended, and gives no more")


def endless(batches: Any) -> Any:
    """Return what has a method next: as it is, or of an iterable.

    Raises:
        DataError: it is neither.
    """
    if batches is None or hasattr(batches, "next"):
        return batches
    if isinstance(batches, Iterable) and not isinstance(batches, Tensor | str | dict):
        return Repeated(batches)
    raise DataError(
        f"batches: of type {type(batches).__name__}: give an object with next(), or an"
        " iterable of minibatches"
    )


def samples_of(batch: Any) -> int:
    """Return the samples of a minibatch: `num_samples`, or else rows of a tensor.

    Those of the first one in it that has rows.

    >>> samples_of({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    3

    Raises:
        DataError: it has neither.
    """
    own = getattr(batch, "num_samples", None)
    if own is None and isinstance(batch, Mapping):
        own = batch.get("num_samples")
    if own is not None and not callable(own):
        return int(own)
    for tensor in arrays(batch):
        if isinstance(tensor, PackedSequence):
            return int(tensor.batch_sizes[0])
        if tensor.ndim:
            return len(tensor)
    raise DataError(
        f"a minibatch of type {type(batch).__name__} has no num_samples, and no tensor"
        " whose rows are samples: give the function num_samples"
    )


def arrays(batch: Any) -> Iterator[Any]:
    """Yield the tensors and arrays of a minibatch, in order, and what is packed."""
    if isinstance(batch, Tensor | np.ndarray | PackedSequence):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from arrays(part)
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from arrays(part)
    elif (own := fields_in(batch)) is not None:
        for part in own:
            if isinstance(part, Tensor | np.ndarray | Mapping | tuple | list):
                yield from arrays(part)


def fields_in(batch: Any) -> list[Any] | None:
    """Return what an object of somebody's own holds; None: it is no such object."""
    if isinstance(batch, type):
        return None
    if dataclasses.is_dataclass(batch):  # it may have no __dict__
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return list(vars(batch).values()) if hasattr(batch, "__dict__") else None


def moved(batch: Any, move: Move, device: torch.device) -> Any:
    """Return a minibatch with `move` applied to its tensors and numeric arrays.

    Of an object of somebody's own, what `.to(device)` returns, if it has that.
    """
    if isinstance(batch, Tensor):
        return move(batch)
    if isinstance(batch, np.ndarray):
        return batch if batch.dtype.kind in NOT_NUMBERS else move(batch)
    if isinstance(batch, PackedSequence):
        packed: Any = batch  # torch's annotation knows `to(dtype)` only
        return packed.to(device)
    if isinstance(batch, tuple | list):
        parts = [moved(part, move, device) for part in batch]
        if hasattr(batch, "_make"):
            return batch._make(parts)
        return type(batch)(parts) if type(batch) in {tuple, list} else batch
    if type(batch) is dict:
        return {key: moved(part, move, device) for key, part in batch.items()}
    if callable(getattr(batch, "to", None)):
        return batch if device.type == "cpu" else batch.to(device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        parts_of = {n: moved(getattr(batch, n), move, device) for n in fields}
        return dataclasses.replace(batch, **parts_of)
    if isinstance(batch, Mapping):  # of another type: it can be made of a dict, or not
        return {key: moved(part, move, device) for key, part in batch.items()}
    return batch
