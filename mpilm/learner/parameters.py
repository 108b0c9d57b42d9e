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
chunk (`storage_at_start`). Row tables, if they are asked for, come after all else. The
order is the same on every device: a model trained on a
GPU is read on a CPU, and ranks with and without one can train together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.errors import ModelError
from mpilm.learner.flat import Layout, Rows, Segment
from mpilm.learner.places import places_of

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
    grad: Tensor | None  # view of the flat gradient in its shape; None: a row table
    address: int  # of its first element


class FlatParameters:
    """Lays the trainable parameters of `module` into one vector each, `theta`, `grad`.

    Tied parameters (one Parameter in several places) have one segment, named after the
    first place. Frozen parameters, and those without elements, stay where they are.

    Args:
        module: parameters are float32 and all on `device`.
        sparse: whether what has sparse gradients (nn.Embedding(sparse=True) and any
            other module with an attribute `sparse` that is true) becomes row tables.
            Else their gradients are made dense.

    theta   (P,) float32, the module's parameters are views of it
    grad    (P,) float32, their .grad are views of it; without the row tables
    rows    the gradients of the row tables, by name
    layout  names, places, components

    Raises:
        ModelError: no trainable parameters, not float32, or overlapping memory.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, *, sparse: bool = False
    ) -> None:
        self.module = module
        places = places_of(module, sparse=sparse)
        self.layout = Layout(tuple(segment for segment, *_ in places))
        self.theta = torch.zeros(self.layout.size, device=device)
        self.grad = torch.zeros_like(self.theta[: self.layout.num_dense])
        self.rows: dict[str, Rows] = {}
        self.slots = [self._slot(segment, owner, key) for segment, owner, key in places]
        self._move_in()
        self._notify: Callable[[slice], Any] | None = None
        self._scale, self._add = 1.0, False
        self._nothing = self.grad.new_zeros(())
        # one kernel instead of one each; a CPU copies them while they are in its cache
        self.takes_all_at_once = self.grad.is_cuda
        self._pending: set[str] = set()
        for slot in self.slots:
            slot.parameter.register_hook(self._hook(slot))
        self._flat = {id(slot.parameter) for slot in self.slots}
        self._structure = Structure(module, self._flat)

    def _slot(self, segment: Segment, owner: nn.Module, key: str) -> Slot:
        parameter = owner.get_parameter(key)
        address = self.theta[segment.start :].data_ptr()
        grad = None
        if not segment.is_table:
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
        notify: Callable[[slice], Any] | None,
        scale: float = 1.0,
        *,
        add: bool = False,
    ) -> None:
        """Set `grad` and `rows` to the gradient of `loss` times `scale`, or add it.

        torch would add each gradient to what is there, after zeroing it: two passes
        over memory more than the copy that the hooks make.

        Args:
            notify: called with each segment's slice once, when its gradient is final;
                at the end for parameters that the loss does not depend on. Not for row
                tables. None: nobody waits for them; on a GPU they are then copied all
                at once at the end, by one kernel.

        Raises:
            ModelError: it is no scalar, or depends on no parameter.
        """
        require_scalar(loss)
        if not loss.requires_grad:
            raise ModelError(NO_GRADIENT)
        self.attach_grad()
        at_once = notify is None and self.takes_all_at_once
        self._notify = None if at_once else notify or no_notice
        self._scale, self._add = scale, add
        self._pending = {slot.segment.name for slot in self.slots}
        try:
            parameters = [slot.parameter for slot in self.slots]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        except RuntimeError:
            self.check()  # frozen while the loss was computed
            raise
        finally:
            self._notify = None
        if at_once:
            self._take_all(found)
        if len(self._pending) == len(self.slots):
            raise ModelError(NO_GRADIENT)
        for slot in self.slots:
            if slot.segment.name not in self._pending:
                continue
            if slot.grad is None:
                if not add:
                    self.rows[slot.segment.name] = no_rows(slot.parameter)
                continue
            if not add:
                slot.grad.zero_()
            if notify is not None:
                notify(slot.segment.slice)

    def _take_all(self, found: Sequence[Tensor | None]) -> None:
        """Take gradients up together; what stays in `_pending` had none."""
        places, values = [], []
        for slot, grad in zip(self.slots, found, strict=True):
            if grad is None:
                continue
            self._pending.discard(slot.segment.name)
            if slot.grad is None:
                self._take_rows(slot, grad)
            else:
                places.append(slot.grad)
                values.append(grad.to_dense() if grad.is_sparse else grad)
        if not places:
            return
        if self._add:
            torch._foreach_add_(places, values, alpha=self._scale)
            return
        torch._foreach_copy_(places, values)
        if self._scale != 1.0:
            torch._foreach_mul_(places, self._scale)

    def _take_rows(self, slot: Slot, grad: Tensor) -> None:
        rows = rows_of(grad, slot.segment, self._scale)
        if self._add:
            rows = sum_of(slot.parameter, self.rows[slot.segment.name], rows)
        self.rows[slot.segment.name] = rows

    def attach_grad(self) -> None:
        """Make every .grad a view of `grad` again (zero_grad may have dropped it)."""
        for slot in self.slots:
            slot.parameter.grad = slot.grad

    def _hook(self, slot: Slot) -> Callable[[Tensor], Tensor | None]:
        def gradient_is_final(grad: Tensor) -> Tensor | None:
            if self._notify is None:  # somebody else's backward pass
                return None
            if slot.grad is None:
                self._take_rows(slot, grad)
                self._pending.discard(slot.segment.name)
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
            return self._nothing.expand_as(grad)  # frees it: nobody needs it more

        return gradient_is_final


def no_notice(part: Any) -> None:
    """Take note of a part that is ready where nobody waits for it: do nothing."""


def rows_of(grad: Tensor, segment: Segment, scale: float) -> Rows:
    """Return a sparse gradient, times `scale`, as rows.

    Raises:
        ModelError: it is dense.
    """
    if not grad.is_sparse:
        raise ModelError(
            f"parameter {segment.name}: its module says sparse = True, but the loss has"
            " a dense gradient; make the Learner with sparse = False"
        )
    found = grad.coalesce()
    values = found.values().view(-1, segment.row_width)
    return Rows(found.indices()[0], values if scale == 1.0 else values * scale)


def no_rows(table: Tensor) -> Rows:
    """Return the gradient of a row table of which nothing was read."""
    values = table.new_zeros(0, table[:1].numel())
    return Rows(values.new_zeros(0, dtype=torch.int64), values)


def sum_of(table: Tensor, *rows: Rows) -> Rows:
    """Return the sum of gradients of one row table."""
    ids = torch.cat([part.ids for part in rows])
    values = torch.cat([part.values for part in rows])
    shape = (len(table), values.shape[1])
    total = torch.sparse_coo_tensor(ids[None], values, shape, check_invariants=False)
    total = total.coalesce()
    return Rows(total.indices()[0], total.values())


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
