"""One rank: model, minibatches, optimiser, and the flat theta and grad.

Knows nothing of other ranks. A strategy speaks to it in the terms of its equations:

    theta, grad       (P,) float32, contiguous; torch's parameters are views of them
    gradient(ready)   next minibatch: grad <- d loss / d theta
    update()          theta <- theta - lr * P(grad), P by the torch optimiser
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpilm.errors import CheckpointError
from mpilm.learner.malloc import keep_freed_memory
from mpilm.learner.minibatch import Parts, moved, samples_of
from mpilm.learner.optimizer import THETA, LearnerOptimizer
from mpilm.learner.parameters import FlatParameters, require_ready, require_scalar
from mpilm.learner.random_state import RandomState
from mpilm.learner.rest import ModuleRest, restored_parts, stored, stored_parts
from mpilm.storage.saved import nested, under

T = TypeVar("T")
Notify = Callable[[Any], None]
Compute = Callable[[Callable[[Notify], Any], Notify | None], Any]


def run_now(work: Callable[[Notify], T], ready: Notify | None = None) -> T:
    """Return `work(notify)`, as `World.compute` does, without a world."""
    return work(ready if ready is not None else _ignore)


def _ignore(part: Any) -> None:
    pass


def keep_lr() -> None:
    """Leave the learning rate as it is: what `refresh` does until a trainer sets it."""


class Sums(NamedTuple):
    """What a model made of some minibatches.

    nll          negative log-likelihood of the targets, nats
    num_targets  how many there were
    errors       targets that were not the likeliest class; NaN: not measured
    """

    nll: float
    num_targets: int
    errors: float


class Learner:
    """What `mpilm.strategies.base.Learner` asks for, with torch.

    Args:
        model: any module with float32 parameters; it is moved to `device`.
        batches: `.next()` gives minibatches, see minibatch.py; several that make one
            step come as `Parts`. None: only to evaluate. With `state()` and
            `load_state` its place is in the learner's state.
        optimizer: from a list of parameters to a torch optimiser.
        loss: from (model, minibatch) to the mean loss; `model.loss(minibatch)` if not
            given. Its arrays come as tensors on `device`. A pair is the loss, and how
            many of the samples were guessed wrong.
        num_samples: from a minibatch to its samples; `samples_of` if not given.
        compute: runs the work, `World.compute` under a world.
        device: "cpu", "cuda:0", ...
        seed: of dropout; give each rank another.
        flat: whether the optimiser gets theta as one parameter (its update is then
            one fused operation) or the model's own parameters. None: as its groups and
            its kind demand, see optimizer.py; it is made twice then.

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
        device: str | torch.device = "cpu",
        seed: int = 0,
        flat: bool | None = None,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        require_ready(model)
        self.model = model.to(self.device)
        self.batches = batches
        self.samples = 0
        self.refresh: Callable[[], None] = keep_lr
        self._parameters = FlatParameters(self.model, self.device)
        self.layout = self._parameters.layout
        self.theta = self._parameters.theta
        self.grad = self._parameters.grad
        self._loss = loss or (lambda model, batch: model.loss(batch))
        self._samples_of = num_samples or samples_of
        self._compute: Compute = compute or run_now
        self._random = RandomState(seed, self.device)
        slots = self._parameters.slots
        self.rest = ModuleRest(model, {id(s.parameter) for s in slots}, self.device)
        own = {slot.segment.name: slot.parameter for slot in slots}
        self._optimizer = LearnerOptimizer(optimizer, own, self.theta, flat)

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
        drawn = self.batches.next()  # may wait for a lease
        parts = drawn if isinstance(drawn, Parts) else [drawn]
        counts = [int(self._samples_of(part)) for part in parts]

        def work(notify: Notify) -> float | Tensor:
            return self._differentiate(parts, counts, notify, scale)

        loss = self._compute(work, ready)
        self.refresh()
        return loss

    def _differentiate(
        self, parts: list[Any], counts: list[int], notify: Notify, scale: float
    ) -> float | Tensor:
        """Set `grad` at the mean loss of `parts`, each counted by its samples."""
        self._parameters.check()
        self._random.put_in_place()
        total, last = sum(counts), len(parts) - 1
        mean: float | Tensor = 0.0
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            share = count / max(total, 1) if last else 1.0
            loss, _ = self._losses(self._to_device(part))
            final = notify if number == last else _ignore
            self._parameters.backward(loss, final, scale * share, add=number > 0)
            found = loss.detach() if loss.is_cuda else loss.item()
            mean = mean + share * found if last else found
        self.samples += total
        return mean

    def _losses(self, batch: Any) -> tuple[Tensor, Any]:
        """Return the mean loss of a minibatch, and its wrong guesses (None: unknown).

        Raises:
            ModelError: it is something else.
        """
        found = self._loss(self.model, batch)
        return found if isinstance(found, tuple) and len(found) == 2 else (found, None)

    def update(self) -> None:
        """Take one step of the optimiser: theta <- theta - lr * P(grad)."""
        self.refresh()
        self._parameters.attach_grad()
        if THETA in self._optimizer.parameters:
            self._optimizer.parameters[THETA].grad = self.grad
        self._optimizer.step()

    @property
    def is_plain_sgd(self) -> bool:
        """Whether `update` is theta <- theta - lr * grad and nothing else.

        Hooks of the optimiser (clipping) are something else.
        """
        return self._optimizer.is_plain_sgd

    def moments(self) -> dict[str, Tensor]:
        """Return the optimiser's state vectors (momentum, ...), 1-D, by name.

        They are its own memory: what changes them changes the optimiser.
        """
        return self._optimizer.moments()

    def reset_moments(self) -> None:
        """Let the optimiser begin anew: moments, and the counters that go with them."""
        self._optimizer.reset()

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
    def evaluate(self, batches: Iterable[Any]) -> Sums:
        """Return what the model makes of `batches`, summed.

        The sums are of `model.nll(minibatch)`, 0-d float64, or a pair with the number
        of wrong guesses; where a model has none, the mean loss times `num_samples`.
        Training goes on afterwards as if nothing had been: modes, buffers and carried
        state are put back, and no random numbers drawn.
        """
        self._parameters.check()
        modes = [(module, module.training) for module in self.model.modules()]
        carried, buffers = self._carried(), self.rest.copy(frozen=False)
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        errors: Any = None
        count = 0
        self.model.eval()
        self._load_carried(())
        try:
            for batch in batches:
                num_samples = int(self._samples_of(batch))
                found, wrong = self._nll(self._to_device(batch), num_samples)
                if wrong is not None:
                    errors = wrong + (0 if errors is None else errors)
                nll += found
                count += num_samples
        finally:
            for module, training in modes:
                module.training = training
            self._load_carried(carried)
            self.rest.put_back(buffers)
        return Sums(nll.item(), count, math.nan if errors is None else float(errors))

    def _nll(self, batch: Any, num_samples: int) -> tuple[Any, Any]:
        nll = getattr(self.model, "nll", None)
        if nll is not None:
            found = nll(batch)
            return found if isinstance(found, tuple) else (found, None)
        loss, wrong = self._losses(batch)
        require_scalar(loss)
        return loss.double() * num_samples, wrong

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

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on, to the bit: name -> value.

        theta, samples; optimizer/settings, optimizer/PARAMETER/KEY; random/DEVICE;
        carried/N; model/NAME for buffers and frozen parameters; batches/NAME.
        """
        self._parameters.check()
        state = {"theta": stored(self.theta), "samples": self.samples}
        state |= nested("optimizer", self._optimizer.state())
        state |= nested("carried", stored_parts(self._carried()))
        state |= nested("model", self.rest.state())
        if hasattr(self.batches, "state"):
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
        place = under("batches", state)
        load_place = getattr(self.batches, "load_state", None)
        if place and self.batches is not None and load_place is None:
            raise CheckpointError(
                "batches: the checkpoint has their place in the data, but they have no"
                " load_state"
            )
        self.load_theta(state["theta"])  # all was looked at: nothing changed so far
        self.samples = int(state["samples"])
        self._optimizer.load_state(optimizer, settings=settings)
        self.rest.put_back(rest)
        parts = restored_parts(under("carried", state))
        self._load_carried(tuple(self._tensor(part) for part in parts))
        if place and load_place is not None:
            load_place(place)
        self._random.load_state(state)

    def _carried(self) -> tuple[Tensor, ...]:
        carried = getattr(self.model, "carried", None)
        return tuple(carried()) if carried else ()

    def _load_carried(self, parts: tuple[Tensor, ...]) -> None:
        load = getattr(self.model, "load_carried", None)
        if load:
            load(parts)

    def _to_device(self, batch: Any) -> Any:
        """Return a minibatch with its arrays as tensors on the device."""
        return moved(batch, self._tensor, self.device)

    def _tensor(self, value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor
