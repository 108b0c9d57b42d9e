"""One rank: model, minibatches, optimiser, and the flat theta and grad.

Knows nothing of other ranks. A strategy speaks to it in the terms of its equations:

    theta, grad       (P,) float32, contiguous; torch's parameters are views of them
    rows              of row tables, the gradient instead of grad: see row_optimizer.py
    gradient(ready)   next minibatch: grad <- d loss / d theta
    update()          theta <- theta - lr * P(grad), P by the torch optimiser
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpilm.errors import CheckpointError, ModelError
from mpilm.learner.evaluation import Sums, carried_by, carry, evaluating, sum_up
from mpilm.learner.finite_check import FiniteCheck
from mpilm.learner.flat import Rows, Segment
from mpilm.learner.malloc import keep_freed_memory
from mpilm.learner.minibatch import endless, moved
from mpilm.learner.objective import Objective
from mpilm.learner.optimizer import THETA, LearnerOptimizer
from mpilm.learner.parameters import FlatParameters, no_notice
from mpilm.learner.parts import Parts
from mpilm.learner.places import require_ready
from mpilm.learner.random_state import RandomState
from mpilm.learner.rest import ModuleRest, restored_parts, stored, stored_parts
from mpilm.learner.row_optimizer import RowOptimizer, make_row_optimizer
from mpilm.learner.spent import Spent
from mpilm.storage.merged import Merged
from mpilm.storage.saved import nested, under

T = TypeVar("T")
Notify = Callable[[Any], None]
Compute = Callable[[Callable[[Notify], Any], Notify | None], Any]


def run_now(work: Callable[[Notify], T], ready: Notify | None = None) -> T:
    """Return `work(notify)`, as `World.compute` does, without a world."""
    return work(ready if ready is not None else no_notice)


def keep_lr() -> None:
    """Leave the learning rate as it is: what `refresh` does until a trainer sets it."""


class Learner:
    """What `mpilm.strategies.base.Learner` asks for, with torch.

    Args:
        model: any module with float32 parameters; it is moved to `device`.
        batches: `.next()` gives minibatches, see minibatch.py; several that make one
            step come as `Parts`. An iterable (a DataLoader) is gone through again and
            again. None: only to evaluate. With `state()` and
            `load_state` its place is in the learner's state.
        optimizer: from a list of parameters to a torch optimiser.
        loss: from (model, minibatch) to the mean loss; `model.loss(minibatch)` if not
            given. Its arrays come as tensors on `device`. A pair is the loss, and how
            many of the samples were guessed wrong.
        num_samples: from a minibatch to its samples; `samples_of` if not given.
        compute: runs the work, `World.compute` under a world.
        clock: seconds, for `spent`; the world's under a world.
        device: "cpu", "cuda:0", ...
        seed: of dropout; give each rank another.
        flat: whether the optimiser gets theta as one parameter (its update is then
            one fused operation) or the model's own parameters. None: as its groups and
            its kind demand, see optimizer.py; it is made twice then.
        sparse: whether gradients of modules with an attribute `sparse` that is true are
            kept as rows, and the optimiser (SGD or AdamW) updates these rows only.
            `grad` has no place for them then. If rows move without a gradient too
            (momentum, weight decay), `model.rows_read(minibatch)` must say which ones
            are read.

    rows     gradients of the row tables by segment: ids and values, see `Rows`
    compute  runs the work of a gradient
    spent    where the time of its gradients went
    used     samples until the last `update`
    skipped  whether the last `update` did nothing, as its gradient was not finite. On a
             GPU: the last one of which that is known, see `settle`
    checked  how many did so, see finite_check.py
    refresh  called when a gradient is complete and before an update: the trainer sets
             `lr` there to what it is now (a slow rank's minibatch may have taken long)

    Raises:
        ModelError: the model has no float32 parameters to train, or the optimiser is
            none that a Learner can use.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        num_samples: Callable[[Any], int] | None = None,
        compute: Compute | None = None,
        clock: Callable[[], float] = time.perf_counter,
        device: str | torch.device = "cpu",
        seed: int = 0,
        flat: bool | None = None,
        sparse: bool = False,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        elif self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # DLPack and cuDNN's dropout go by it
        require_ready(model)
        self.model = model.to(self.device)
        self.batches = endless(batches)
        self.samples = self.used = 0
        self.spent = Spent()
        self._clock = clock
        self.refresh: Callable[[], None] = keep_lr
        self._parameters = FlatParameters(self.model, self.device, sparse=sparse)
        self.layout = self._parameters.layout
        self.grad = self._parameters.grad
        self._objective = Objective(model, loss, num_samples)
        self.compute: Compute = compute or run_now
        self._random = RandomState(seed, self.device)
        self._row_optimizer: RowOptimizer | None = None
        self._drawn: Any = None  # a minibatch, before its gradient
        self._read: dict[str, Tensor] | None = None  # by that minibatch
        slots = self._parameters.slots
        self.rest = ModuleRest(model, {id(s.parameter) for s in slots}, self.device)
        own = {s.segment.name: s.parameter for s in slots if not s.segment.is_table}
        dense = self.theta[: self.layout.num_dense]
        self._optimizer = LearnerOptimizer(optimizer, own, dense, flat)
        tables = {s.name: self._table(s) for s in self.layout.tables}
        if tables and self.optimizer.param_groups:  # none: only to evaluate
            self._row_optimizer = make_row_optimizer(self.optimizer, tables)
            if not self._row_optimizer.rests and not hasattr(model, "rows_read"):
                raise ModelError(
                    "sparse = True with momentum or weight decay, or AdamW: the model"
                    " needs a method rows_read(minibatch), row table -> ids"
                )
        self.checked = FiniteCheck(
            self.optimizer,
            self.device,
            waits=self.device.type != "cuda",
            on_bad=lambda: carry(model, ()),  # it may be what is not finite
        )

    def _table(self, segment: Segment) -> Tensor:
        return self.theta[segment.slice].view(-1, segment.row_width)

    @property
    def theta(self) -> Tensor:
        """The model, (P,) float32; rows that an update left for later are up to date.

        With momentum or weight decay over row tables that is a pass over them. What is
        assigned to it is copied into it.
        """
        if self._row_optimizer is not None:
            self._row_optimizer.catch_up()
        return self._parameters.theta

    @theta.setter
    def theta(self, values: Any) -> None:
        if values is not self._parameters.theta:  # `theta *= 2` assigns theta itself
            self.load_theta(values)

    @property
    def rows(self) -> dict[str, Rows]:
        """The gradients of the row tables, by segment; their values may be changed."""
        return self._parameters.rows

    @rows.setter
    def rows(self, rows: dict[str, Rows]) -> None:
        self._parameters.rows = rows

    @property
    def rows_rest(self) -> bool:
        """Whether an update changes no rows of row tables but those in `rows`."""
        return self._row_optimizer is None or self._row_optimizer.rests

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimiser."""
        return self._optimizer.torch

    def gradient(
        self, ready: Notify | None = None, *, scale: float = 1.0
    ) -> float | Tensor:
        """Draw the next minibatch; set `grad` at theta; return the mean loss.

        Args:
            scale: `grad` is the gradient times this.
            ready: called with each segment's slice, once, when its gradient is final.

        Returns:
            the loss: a float on the CPU; 0-d on a GPU, which is not waited for.

        Raises:
            ModelError: the parameters are not views of theta any more, or the loss is
                no scalar that depends on them.
        """
        if self._drawn is None:
            self._drawn = self._next()
        drawn, self._drawn = self._drawn, None
        parts = drawn if isinstance(drawn, Parts) else [drawn]
        counts = [self._objective.samples(part) for part in parts]

        def work(notify: Notify) -> float | Tensor:
            at_once = ready is None and self._parameters.takes_all_at_once
            final = None if at_once else notify
            return self._differentiate(parts, counts, final, scale)

        began_s, forward_s = self._clock(), self.spent.forward
        loss = self.compute(work, ready)
        forward_s = self.spent.forward - forward_s
        self.spent.backward += self._clock() - began_s - forward_s
        self.refresh()
        return loss

    def draw(self) -> dict[str, Tensor]:
        """Draw the minibatch of the next `gradient`; return the rows that it reads.

        Returns:
            row table -> ids, int64, ascending, each once.

        Raises:
            ModelError: several minibatches make one step.
        """
        drawn = self._next()
        if isinstance(drawn, Parts):
            raise ModelError(
                "the rows of several minibatches in one step cannot be told beforehand"
            )
        self._drawn = self._to_device(drawn)
        self._random.put_in_place()
        self._read = self._rows_read(self._drawn)
        return self._read

    def _next(self) -> Any:
        """Return the next minibatch; it may have to wait for a lease."""
        began_s = self._clock()
        drawn = self.batches.next()
        self.spent.data += self._clock() - began_s
        return drawn

    def _rows_read(self, batch: Any) -> dict[str, Tensor]:
        model: Any = self.model
        read: dict[str, Tensor] = model.rows_read(batch)
        return read

    def _differentiate(
        self, parts: list[Any], counts: list[int], notify: Notify | None, scale: float
    ) -> float | Tensor:
        """Set `grad` at the mean loss of `parts`, each counted by its samples."""
        self._parameters.check()
        self._random.put_in_place()
        total, last = sum(counts), len(parts) - 1
        mean: float | Tensor = 0.0
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            share = count / max(total, 1) if last else 1.0
            batch = self._to_device(part)
            if self._row_optimizer is not None and not self._row_optimizer.rests:
                read, self._read = self._read or self._rows_read(batch), None
                self._row_optimizer.bring_up(read)
            began_s = self._clock()
            loss, _ = self._objective.loss(batch)
            self.spent.forward += self._clock() - began_s
            final = notify if number == last else None
            self._parameters.backward(loss, final, scale * share, add=number > 0)
            found = loss.detach() if loss.is_cuda else loss.item()
            mean = mean + share * found if last else found
        self.samples += total
        return mean

    def update(self) -> None:
        """Take one step of the optimiser: theta <- theta - lr * P(grad).

        If the gradient is not finite, nothing changes, the optimiser's state neither,
        but for what the model carries from minibatch to minibatch: it begins anew;
        see `skipped`. So ranks with the same gradient leave out the same steps.
        """
        self.refresh()
        self.used = self.samples
        if not self.checked.passes(self._gradients):
            return
        self._parameters.attach_grad()
        if THETA in self._optimizer.parameters:
            self._optimizer.parameters[THETA].grad = self.grad
        self._optimizer.step([rows.values for rows in self.rows.values()])
        if self._row_optimizer is not None:
            self._row_optimizer.step(self.rows)

    @property
    def _gradients(self) -> list[Tensor]:
        return [self.grad, *(rows.values for rows in self.rows.values())]

    @property
    def skipped(self) -> bool:
        """Whether the last update did nothing; see above."""
        return self.checked.num_in_a_row > 0

    def settle(self) -> None:
        """Block until it is known of the last update whether it did anything."""
        self.checked.settle()

    @property
    def is_plain_sgd(self) -> bool:
        """Whether `update` is theta <- theta - lr * grad and nothing else.

        Hooks of the optimiser (clipping) are something else, and so is a gradient that
        is not finite.
        """
        plain = self._optimizer.is_plain_sgd
        return plain and self.checked.looks_good(self._gradients)

    def moments(self) -> dict[str, Tensor]:
        """Return the optimiser's state vectors (momentum, ...), 1-D, by name.

        They are its own memory: what changes them changes the optimiser.
        """
        moments = self._optimizer.moments()
        if self._row_optimizer is not None:
            moments |= self._row_optimizer.moments()
        return moments

    def reset_moments(self) -> None:
        """Let the optimiser begin anew: moments, and the counters that go with them."""
        self._optimizer.reset()
        if self._row_optimizer is not None:
            self._row_optimizer.reset()

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group that had one above 0.

        Set, the other groups keep their ratio to it.
        """
        return self._optimizer.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._optimizer.lr = value

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any], most: int | None = None) -> Sums:
        """Return what the model makes of `batches`, summed.

        Args:
            most: stop after the minibatch with which it has seen so many samples.

        The sums are of `model.nll(minibatch)`, 0-d float64, or a pair with the number
        of wrong guesses; where a model has none, or the loss was given, the mean loss
        times the samples.
        Training goes on afterwards as if nothing had been: modes, buffers and carried
        state are put back, and no random numbers drawn.
        """
        self._parameters.check()
        self.theta  # noqa: B018  it brings all rows up to date
        with evaluating(self.model, self.rest):
            return sum_up(map(self._measure, batches), most, self.device)

    def _measure(self, batch: Any) -> tuple[Tensor, Any, int]:
        """Return the nll of a minibatch, its wrong guesses or None, its samples."""
        objective = self._objective
        num_samples = objective.samples(batch)
        return *objective.nll(self._to_device(batch), num_samples), num_samples

    def load_theta(self, theta_P: Any) -> None:
        """Set theta, from a numpy array of (P,) float32.

        Raises:
            CheckpointError: it is of another size.
        """
        self._require_size(theta_P)
        self.theta.copy_(torch.as_tensor(theta_P))

    def _require_size(self, theta_P: Any) -> None:
        if len(theta_P) != self.layout.size:
            raise CheckpointError(
                f"theta: the checkpoint has {len(theta_P)} parameters, this model"
                f" {self.layout.size}"
            )

    def state(self, *, data: bool = True) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on, to the bit: name -> value.

        theta, samples; optimizer/settings, optimizer/PARAMETER/KEY; random/DEVICE;
        rows/count, rows/KEY/SEGMENT;
        carried/N; model/NAME for buffers and frozen parameters; batches/NAME.

        Args:
            data: whether with the place in the data, which all ranks may have to agree
                on.
        """
        self._parameters.check()
        self.settle()
        state = {"theta": stored(self.theta), "samples": self.samples}
        state |= nested("optimizer", self._optimizer.state())
        if self._row_optimizer is not None:
            state |= nested("rows", self._row_optimizer.state())
        state |= nested("carried", stored_parts(carried_by(self.model)))
        state |= nested("model", self.rest.state())
        if data and hasattr(self.batches, "state"):
            state |= nested("batches", self.batches.state())
        return {**state, **self._random.state()}

    def load_state(self, state: dict[str, Any], *, settings: bool = True) -> None:
        """Take up what `state` returned.

        Args:
            settings: whether the optimiser's settings (learning rates, ...) are taken
                up as well, or stay as they are here.

        Raises:
            CheckpointError: it is the state of another model, optimiser or data.
        """
        for name in ("theta", "samples"):
            if name not in state:
                raise CheckpointError(f"the state has no {name}: it is no learner's")
        self._require_size(state["theta"])
        optimizer = self._optimizer.read(under("optimizer", state))
        rest = self.rest.read(under("model", state))
        rows = under("rows", state)
        if self._row_optimizer is not None:
            rows = self._row_optimizer.read(rows)
        elif rows:
            raise CheckpointError(
                "optimiser: the checkpoint has row tables, this model has none"
            )
        place = under("batches", state)
        load_place = getattr(self.batches, "load_state", None)
        if place and self.batches is not None and load_place is None:
            raise CheckpointError(
                "batches: the checkpoint has their place in the data, but they have no"
                " load_state"
            )
        self.load_theta(state["theta"])  # all was looked at: nothing changed so far
        self.samples = self.used = int(state["samples"])
        self._optimizer.load_state(optimizer, settings=settings)
        if self._row_optimizer is not None:
            self._row_optimizer.load_state(rows)
        self.rest.put_back(rest)
        parts = restored_parts(under("carried", state))
        carry(self.model, tuple(self._tensor(part) for part in parts))
        if place and load_place is not None:
            load_place(place)
        self._random.load_state(state)

    def take_over(self, merged: Merged, rank: int, size: int) -> None:
        """Go on from what ranks of another number have left, as rank `rank` of `size`.

        Its theta is their mean, its optimiser that of one of them, its samples an equal
        share. The data is split anew: carried state begins anew. A rank that has not
        been there keeps its random numbers.

        Raises:
            CheckpointError, DataError: as `load_state`.
        """
        gone = ("carried/", "batches/", *(("random/",) if rank >= merged.size else ()))
        state = {n: v for n, v in merged.state.items() if not n.startswith(gone)}
        state["samples"] = merged.samples // size
        self.load_state(state, settings=False)
        if self.batches is not None:
            self.batches.take_over(merged.places, rank, size, merged.samples)

    def _to_device(self, batch: Any) -> Any:
        """Return a minibatch with its arrays as tensors on the device."""
        return moved(batch, self._tensor, self.device)

    def _tensor(self, value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor
