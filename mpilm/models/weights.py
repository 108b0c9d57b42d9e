"""Weights of a model, or of a part of it, in a state file (docs/formats.md)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mpilm.errors import CheckpointError, DataError
from mpilm.storage.files import new_output
from mpilm.storage.state_file import read_state, write_state


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights under the names that they have in the model.

    Raises:
        DataError: the file cannot be written; an earlier one stands.
    """
    with new_output(path) as partial:
        write_state(partial, {n: w.cpu().numpy() for n, w in weights.items()})


@torch.no_grad()
def load_weights_(model: nn.Module, path: Path) -> None:
    """Set those parameters of the model that the file has.

    Raises:
        DataError: it cannot be read, or the model has no such parameter.
    """
    try:
        weights = read_state(path)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    parameters = dict(model.named_parameters())
    for name, array in weights.items():
        shape = getattr(array, "shape", None)
        if name not in parameters:
            raise DataError(f"{path}: has {name}, this model does not")
        if shape != parameters[name].shape:
            found = "x".join(map(str, shape or ()))
            wanted = "x".join(map(str, parameters[name].shape))
            raise DataError(f"{path}: {name} is {found}, this model's is {wanted}")
    for name, array in weights.items():
        parameters[name].copy_(torch.from_numpy(array))
