"""Where a module's parameters go in the flat vector, and which cannot go there."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpilm.errors import ModelError
from mpilm.learner.flat import Segment

ParameterPlace = tuple[Segment, nn.Module, str]  # with its owner and its name there


def places_of(module: nn.Module, *, sparse: bool) -> list[ParameterPlace]:
    """Return segment, owner and key of every trainable parameter, in their order.

    Args:
        sparse: whether there may be row tables.

    Raises:
        ModelError: there is none, or one that cannot be laid into theta.
    """
    places: list[ParameterPlace] = []
    done: set[int] = set()  # ids of Parameters
    start = 0
    for prefix, owner in module.named_modules():
        own = dict(owner.named_parameters(recurse=False))
        keys = list(own)
        if isinstance(owner, nn.RNNBase):  # a stable sort: weights, then biases
            keys.sort(key=lambda key: key.startswith("bias"))
        for key in keys:
            parameter = own[key]
            if not parameter.requires_grad or id(parameter) in done:
                continue
            done.add(id(parameter))
            name = f"{prefix}.{key}" if prefix else key
            _require_plain(name, parameter)
            if not parameter.numel():
                continue
            is_table = sparse and bool(getattr(owner, "sparse", False))
            component = component_of(owner, prefix, key)
            segment = Segment(name, start, tuple(parameter.shape), component, is_table)
            places.append((segment, owner, key))
            start = segment.stop
    if not places:
        raise ModelError("the model has no trainable parameters")
    if sparse:
        places = _tables_last(places)
    _require_apart(module, {id(owner._parameters[key]) for _, owner, key in places})
    return places


def _tables_last(places: list[ParameterPlace]) -> list[ParameterPlace]:
    """Return the places with all row tables behind the others.

    Raises:
        ModelError: there are no row tables.
    """
    ordered = sorted(places, key=lambda place: place[0].is_table)
    if not ordered[-1][0].is_table:
        raise ModelError(
            "sparse = True: no module of the model has sparse gradients, as"
            " nn.Embedding(sparse=True) has"
        )
    moved, start = [], 0
    for segment, owner, key in ordered:
        segment = replace(segment, start=start)
        moved.append((segment, owner, key))
        start = segment.stop
    return moved


def require_ready(module: nn.Module) -> None:
    """Raise unless all parameters and buffers of `module` have their memory.

    Raises:
        ModelError: one is lazy, or on the device "meta".
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{name} has no shape yet: let the model see a minibatch before the"
                " Learner is made"
            )
        if tensor.is_meta:
            raise ModelError(f"{name} has no memory yet (device meta)")


def _require_plain(name: str, parameter: nn.Parameter) -> None:
    """Raise unless a parameter is one that theta can hold.

    Raises:
        ModelError: it is not float32.
    """
    if parameter.dtype != torch.float32:
        raise ModelError(
            f"parameter {name} is {parameter.dtype}; a Learner trains float32:"
            " model.float() before; torch.autocast computes in bfloat16 all the same"
        )


def _require_apart(module: nn.Module, flat: set[int]) -> None:
    """Raise unless no other tensor of the module shares memory with a trained one.

    In theta each would have its own. (Parts of which one has gaps are not looked at:
    the columns of a matrix may lie between those of another.)

    Args:
        flat: ids of the Parameters that will be in theta.

    Raises:
        ModelError: two do.
    """
    found = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.layout == torch.strided and tensor.is_contiguous() and tensor.numel():
            start = tensor.data_ptr()
            found.append((start, start + tensor.nbytes, name, id(tensor) in flat))
    found.sort()
    for (_, stop, first, one), (start, _, second, other) in pairwise(found):
        if start < stop and (one or other):
            raise ModelError(
                f"{first} and {second} share memory without being one Parameter; tie"
                " them by assigning the Parameter itself"
            )


def component_of(owner: nn.Module, prefix: str, key: str) -> str:
    """Return the component of parameter `key` of the module at `prefix`.

    A layer of an nn.LSTM (RNN, GRU), else the model's top-level part, with its number
    where that is a list.

    >>> component_of(nn.LSTM(1, 1), "lstm", "weight_hh_l1_reverse")
    'lstm.l1'
    >>> component_of(nn.Linear(1, 1), "blocks.3.out", "bias")
    'blocks.3'
    """
    layer = re.search(r"_(l\d+)(_reverse)?$", key)
    if isinstance(owner, nn.RNNBase) and layer:
        return f"{prefix}.{layer[1]}" if prefix else layer[1]
    top = re.match(r"[^.]+(\.\d+)?", prefix)
    return top[0] if top else key
