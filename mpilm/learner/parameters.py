"""A torch module's parameters as views of one vector, and their gradients of another.

    theta   [ embedding.weight | lstm.weight_ih_l0 | ... | softmax.bias ]
    grad    [        ...       |        ...        |     |     ...      ]

The module keeps its Parameter objects; only their memory is another. So everything that
changes theta in place (optimiser, Allreduce, averaging) changes the module, and a
backward pass writes into grad.

The order is that of `named_parameters()`, but within an nn.LSTM (RNN, GRU) all weights
come before all biases: so cuDNN lays them out. It wants its weights in one chunk at the
very start of a storage, else it copies them in every step. So on a GPU the parameters
of such a module are views of a tensor of theta's memory whose storage begins at the
chunk (`storage_at_start`). The order is the same on every device: a model trained on a
GPU is read on a CPU, and ranks with and without one can train together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.errors import MpilmError
from mpilm.learner.flat import Layout, Segment


class ModelError(MpilmError):
    """A module's parameters cannot be, or no longer are, views of one vector."""


@dataclass(frozen=True)
class Slot:
    """One parameter: where it hangs in the module and where it lies."""

    segment: Segment
    owner: nn.Module
    key: str
    parameter: nn.Parameter
    grad: Tensor  # view of the flat gradient in the parameter's shape
    address: int  # of its first element


class FlatParameters:
    """Lays the trainable parameters of `module` into one vector each, `theta`, `grad`.

    Tied parameters (one Parameter in several places) have one segment, named after the
    first place. Frozen parameters stay where they are.

    Args:
        module: parameters are float32 and all on `device`.

    theta   (P,) float32, the module's parameters are views of it
    grad    (P,) float32, their .grad are views of it
    layout  names, places, components

    Raises:
        ModelError: no trainable parameters, not float32, or overlapping memory.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        places = _places(module)
        self.layout = Layout(tuple(segment for segment, *_ in places))
        self.theta = torch.zeros(self.layout.size, device=device)
        self.grad = torch.zeros_like(self.theta)
        self.slots = [self._slot(segment, owner, key) for segment, owner, key in places]
        self._move_in()
        self._notify: Callable[[slice], Any] | None = None
        self._scale = 1.0
        self._pending: set[str] = set()
        for slot in self.slots:
            slot.parameter.register_hook(self._hook(slot))

    def _slot(self, segment: Segment, owner: nn.Module, key: str) -> Slot:
        parameter = owner.get_parameter(key)
        address = self.theta[segment.start :].data_ptr()
        grad = self.grad[segment.slice].view(segment.shape)
        return Slot(segment, owner, key, parameter, grad, address)

    @torch.no_grad()
    def _move_in(self) -> None:
        """Copy every parameter into theta and make it a view of it."""
        by_owner: dict[nn.Module, list[Slot]] = {}
        for slot in self.slots:
            by_owner.setdefault(slot.owner, []).append(slot)
        for owner, slots in by_owner.items():
            first = slots[0].segment.start
            chunk = self.theta[first : slots[-1].segment.stop]
            if isinstance(owner, nn.RNNBase) and chunk.is_cuda and is_aligned(chunk):
                chunk = storage_at_start(chunk)
            for slot in slots:
                start = slot.segment.start - first
                view = chunk[start : start + slot.segment.size]
                view = view.view(slot.segment.shape)
                slot.parameter.data = view.copy_(slot.parameter)

    def check(self) -> None:
        """Raise unless the module's parameters still are views of theta.

        Raises:
            ModelError: the module was moved, converted or given other parameters.
        """
        for slot in self.slots:
            parameter = slot.owner._parameters.get(slot.key)
            if parameter is not slot.parameter or parameter.data_ptr() != slot.address:
                raise ModelError(
                    f"parameter {slot.segment.name} left the learner's vector: make the"
                    " Learner after model.to(), flatten_parameters() and"
                    " load_state_dict(assign=True)"
                )

    def backward(
        self, loss: Tensor, notify: Callable[[slice], Any], scale: float = 1.0
    ) -> None:
        """Set `grad` to the gradient of `loss` times `scale`.

        torch would add each gradient to what is there, after zeroing it: two passes
        over memory more than the copy that the hooks make.

        Args:
            notify: called with each segment's slice once, when its gradient is final;
                at the end for parameters that the loss does not depend on.
        """
        self.attach_grad()
        self._notify, self._scale = notify, scale
        self._pending = {slot.segment.name for slot in self.slots}
        try:
            parameters = [slot.parameter for slot in self.slots]
            torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            self._notify = None
        for slot in self.slots:
            if slot.segment.name in self._pending:
                slot.grad.zero_()
                notify(slot.segment.slice)

    def attach_grad(self) -> None:
        """Make every .grad a view of `grad` again (zero_grad may have dropped it)."""
        for slot in self.slots:
            slot.parameter.grad = slot.grad

    def _hook(self, slot: Slot) -> Callable[[Tensor], Tensor | None]:
        def gradient_is_final(grad: Tensor) -> Tensor | None:
            if self._notify is None:  # somebody else's backward pass
                return None
            dense = grad.to_dense() if grad.is_sparse else grad
            if self._scale == 1.0:
                slot.grad.copy_(dense)
            else:
                torch.mul(dense, self._scale, out=slot.grad)
            self._pending.discard(slot.segment.name)
            self._notify(slot.segment.slice)
            return grad.new_zeros(()).expand_as(grad)  # frees it: nobody needs it more

        return gradient_is_final


def storage_at_start(vector: Tensor) -> Tensor:
    """Return a tensor of the same memory whose storage begins at `vector[0]`.

    A slice shares the storage of what it was cut from, and cuDNN's weights must begin
    where a storage begins (try_get_weight_buf in torch's cudnn/RNN.cpp). A round trip
    through DLPack gives the same memory a storage object of its own.
    """
    return torch.from_dlpack(vector.detach())


def is_aligned(vector: Tensor) -> bool:
    """Return whether `vector` begins where a GPU can load 16 bytes at once.

    Kernels may take it for granted. (It does not where the embedding before an LSTM
    has a number of elements that is no multiple of 4; then cuDNN copies its weights.)
    """
    return vector.data_ptr() % 16 == 0


def _places(module: nn.Module) -> list[tuple[Segment, nn.Module, str]]:
    """Return segment, owner and key of every trainable parameter, in their order."""
    places: list[tuple[Segment, nn.Module, str]] = []
    addresses: dict[int, str] = {}
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
            _require_plain(name, parameter, addresses)
            component = component_of(owner, prefix, key)
            segment = Segment(name, start, tuple(parameter.shape), component)
            places.append((segment, owner, key))
            start = segment.stop
    if not places:
        raise ModelError("the model has no trainable parameters")
    return places


def _require_plain(
    name: str, parameter: nn.Parameter, addresses: dict[int, str]
) -> None:
    """Note the parameter's address in `addresses`.

    Raises:
        ModelError: it is not float32, or two Parameters share its memory.
    """
    if parameter.dtype != torch.float32:
        raise ModelError(
            f"parameter {name} is {parameter.dtype}; a Learner trains float32"
        )
    other = addresses.setdefault(parameter.data_ptr(), name)
    if other != name and parameter.numel():
        raise ModelError(
            f"parameters {other} and {name} share memory without being one Parameter;"
            " tie them by assigning the Parameter itself"
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
