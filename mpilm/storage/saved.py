"""State as a flat dict "a/b/c" -> array or number: attributes in, attributes out.

An object names the attributes that a checkpoint must hold of it:

    saves = ("steps", "delta", "server.velocity")

`saved_state` reads them and `restore_state_` writes them back, in place where they are
vectors. `nested` and `under` put the state of a part under a prefix and take it out.

>>> class Part:
...     steps, delta = 3, np.ones(2)
>>> state = nested("part", saved_state(Part(), ("steps", "delta")))
>>> sorted(state), under("part", state)["steps"]
(['part/delta', 'part/steps'], 3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from mpilm.errors import CheckpointError
from mpilm.vectors import fill_, is_vector, to_array

State = dict[str, Any]


def nested(prefix: str, state: Mapping[str, Any]) -> State:
    """Return `state` with "prefix/" before every name."""
    return {f"{prefix}/{name}": value for name, value in state.items()}


def under(prefix: str, state: Mapping[str, Any]) -> State:
    """Return what `nested` put under `prefix`."""
    start = f"{prefix}/"
    return {
        name.removeprefix(start): value
        for name, value in state.items()
        if name.startswith(start)
    }


def saved_state(owner: Any, names: Sequence[str]) -> State:
    """Return copies of the attributes `names` of `owner`; what is None is left out.

    Args:
        names: "steps", or "server.velocity" for an attribute of an attribute: its entry
            is "server/velocity", left out where the server is None.
    """
    values = {name.replace(".", "/"): _get(owner, name) for name in names}
    return {
        name: to_array(value) if is_vector(value) else value
        for name, value in values.items()
        if value is not None
    }


def restore_state_(
    owner: Any, names: Sequence[str], state: Mapping[str, Any], what: str
) -> None:
    """Set the attributes `names` of `owner` to what `saved_state` returned.

    Vectors are overwritten in place; an attribute that is None stays so.

    Args:
        what: whose state it is, for messages: "strategy bmuf".

    Raises:
        CheckpointError: an entry is missing, of another length, or nobody's: it was
            made with other settings.
    """
    wanted = {name.replace(".", "/"): name for name in names}
    needed = {entry for entry, name in wanted.items() if _get(owner, name) is not None}
    for entry in sorted(needed ^ state.keys()):
        lacks = "lacks" if entry in needed else "has"
        raise CheckpointError(
            f"{what}: the checkpoint {lacks} {entry}: it was made with other settings;"
            " resume with those, or start a new run"
        )
    for entry in needed:
        *path, last = wanted[entry].split(".")
        part = reduce(getattr, path, owner)
        value = getattr(part, last)
        if not is_vector(value):
            setattr(part, last, type(value)(state[entry]))
        elif np.shape(value) != np.shape(state[entry]):
            raise CheckpointError(
                f"{what}: {entry} has shape {np.shape(state[entry])} in the checkpoint,"
                f" here {tuple(np.shape(value))}"
            )
        else:
            fill_(value, state[entry])


def _get(owner: Any, name: str) -> Any:
    """Return an attribute, or one of an attribute; None where that is None."""
    part = owner
    for step in name.split("."):
        part = None if part is None else getattr(part, step)
    return part
