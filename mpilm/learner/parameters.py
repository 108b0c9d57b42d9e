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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mpilm.errors import ModelError
from mpilm.learner.flat import Layout, Segment

NO_GRADIENT = (
    "the loss depends on no parameter of the model: was it detached, computed under"
    " no_grad, or by another model?"
)
REMEDY = "do that before the Learner is made, or make a new Learner afterwards"


class Structure:
    """What a module consists of: children, and parameters that are not in theta.

    Looked at before every step, so it compares as little as it can: some 20 us for
    150 modules.

    Args:
        flat: ids of the Parameters in theta, which are looked at elsewhere.
    """

    def __init__(self, module: nn.Module, flat: set[int]) -> None:
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._frozen: list[tuple[dict[str, Any], str, nn.Parameter, str]] = []
        for prefix, owner in module.named_modules():
            self._sizes.append((owner._parameters, len(owner._parameters)))
            if owner._modules:
                self._children.append((owner._modules, dict(owner._modules)))
            else:
                self._sizes.append((owner._modules, 0))
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) not in flat:
                    name = f"{prefix}.{key}" if prefix else key
                    self._frozen.append((owner._parameters, key, parameter, name))

    def is_as_it_was(self) -> bool:
        """Return whether everything is the same object."""
        for own, size in self._sizes:
            if len(own) != size:
                return False
        for own, before in self._children:
            if own != before:
                return False
        return all(own.get(key) is p for own, key, p, _ in self._frozen)

    def thawed(self) -> str | None:
        """Return the name of a parameter that was frozen, and is not any more."""
        for _, _, parameter, name in self._frozen:
            if parameter.requires_grad and parameter.numel():
                return name
        return None


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
    first place. Frozen parameters, and those without elements, stay where they are.

    Args:
        module: parameters are float32 and all on `device`.

    theta   (P,) float32, the module's parameters are views of it
    grad    (P,) float32, their .grad are views of it
    layout  names, places, components

    Raises:
        ModelError: no trainable parameters, not float32, or overlapping memory.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        places = _places(module)
        self.layout = Layout(tuple(segment for segment, *_ in places))
        self.theta = torch.zeros(self.layout.size, device=device)
        self.grad = torch.zeros_like(self.theta)
        self.slots = [self._slot(segment, owner, key) for segment, owner, key in places]
        self._move_in()
        self._notify: Callable[[slice], Any] | None = None
        self._scale, self._add = 1.0, False
        self._pending: set[str] = set()
        for slot in self.slots:
            slot.parameter.register_hook(self._hook(slot))
        self._flat = {id(slot.parameter) for slot in self.slots}
        self._structure = Structure(module, self._flat)

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
        """Raise unless the module's trainable parameters are the views of theta.

        Raises:
            ModelError: the module was moved, converted, frozen, or given other
                parameters.
        """
        for slot in self.slots:
            parameter = slot.owner._parameters.get(slot.key)
            if parameter is not slot.parameter or parameter.data_ptr() != slot.address:
                raise ModelError(
                    f"parameter {slot.segment.name} left the learner's vector: make the"
                    " Learner after model.to(), flatten_parameters() and"
                    " load_state_dict(assign=True), and one Learner of a model"
                )
            if not parameter.requires_grad:
                raise ModelError(
                    f"parameter {slot.segment.name} was frozen (requires_grad = False)"
                    f" under the Learner: {REMEDY}"
                )
        if not self._structure.is_as_it_was():
            self._require_same_parameters()
            self._structure = Structure(self.module, self._flat)
        name = self._structure.thawed()
        if name is not None:
            raise ModelError(
                f"parameter {name} was made trainable (requires_grad = True) under the"
                f" Learner: {REMEDY}"
            )

    def _require_same_parameters(self) -> None:
        """Raise unless what the module consists of now has the same parameters."""
        flat = {id(slot.parameter): slot.segment.name for slot in self.slots}
        for name, parameter in self.module.named_parameters():
            is_flat = flat.pop(id(parameter), None) is not None
            if parameter.requires_grad and parameter.numel() and not is_flat:
                raise ModelError(
                    f"parameter {name} was added under the Learner: {REMEDY}"
                )
        for name in flat.values():
            raise ModelError(
                f"parameter {name} was removed under the Learner: {REMEDY}"
            )

    def backward(
        self,
        loss: Tensor,
        notify: Callable[[slice], Any],
        scale: float = 1.0,
        *,
        add: bool = False,
    ) -> None:
        """Set `grad` to the gradient of `loss` times `scale`, or add that to it.

        torch would add each gradient to what is there, after zeroing it: two passes
        over memory more than the copy that the hooks make.

        Args:
            notify: called with each segment's slice once, when its gradient is final;
                at the end for parameters that the loss does not depend on.

        Raises:
            ModelError: it is no scalar, or depends on no parameter.
        """
        require_scalar(loss)
        if not loss.requires_grad:
            raise ModelError(NO_GRADIENT)
        self.attach_grad()
        self._notify, self._scale, self._add = notify, scale, add
        self._pending = {slot.segment.name for slot in self.slots}
        try:
            parameters = [slot.parameter for slot in self.slots]
            torch.autograd.grad(loss, parameters, allow_unused=True)
        except RuntimeError:
            self.check()  # frozen while the loss was computed
            raise
        finally:
            self._notify = None
        if len(self._pending) == len(self.slots):
            raise ModelError(NO_GRADIENT)
        for slot in self.slots:
            if slot.segment.name in self._pending:
                if not add:
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
            if self._add:
                slot.grad.add_(dense, alpha=self._scale)
            elif self._scale == 1.0:
                slot.grad.copy_(dense)
            else:
                torch.mul(dense, self._scale, out=slot.grad)
            self._pending.discard(slot.segment.name)
            self._notify(slot.segment.slice)
            if grad.is_sparse:
                return None
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


def require_scalar(loss: Any) -> None:
    """Raise unless `loss` is a scalar.

    Raises:
        ModelError: one line that says what it is instead.
    """
    if not isinstance(loss, Tensor):
        raise ModelError(f"the loss is of type {type(loss).__name__}, not a tensor")
    if loss.numel() != 1:
        raise ModelError(
            f"the loss has shape {tuple(loss.shape)}: a Learner takes the mean over the"
            " minibatch, a scalar"
        )


def _places(module: nn.Module) -> list[tuple[Segment, nn.Module, str]]:
    """Return segment, owner and key of every trainable parameter, in their order.

    Raises:
        ModelError: there is none, or one that cannot be laid into theta.
    """
    places: list[tuple[Segment, nn.Module, str]] = []
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
            component = component_of(owner, prefix, key)
            segment = Segment(name, start, tuple(parameter.shape), component)
            places.append((segment, owner, key))
            start = segment.stop
    if not places:
        raise ModelError("the model has no trainable parameters")
    _require_apart(module, {id(owner._parameters[key]) for _, owner, key in places})
    return places


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
