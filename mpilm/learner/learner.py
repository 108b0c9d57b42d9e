"""One rank: model, minibatches, optimiser, and the flat theta and grad.

Knows nothing of other ranks. A strategy speaks to it in the terms of its equations:

    theta, grad       (P,) float32, contiguous; torch's parameters are views of them
    gradient(ready)   next minibatch: grad <- d loss / d theta
    update()          theta <- theta - lr * P(grad), P by the torch optimiser

Random numbers. Dropout draws from torch's global random state, which all learners of a
process share (the virtual world runs many). Each learner has a state of its own and
puts it into place when another learner has been at work since; with one learner in the
process that never happens. So any module works, and masks depend on the learner's seed
alone. (A generator of its own for each learner would not reach nn.LSTM's dropout.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpilm.errors import CheckpointError
from mpilm.learner.malloc import keep_freed_memory
from mpilm.learner.parameters import FlatParameters

T = TypeVar("T")
Notify = Callable[[Any], None]
Compute = Callable[[Callable[[Notify], Any], Notify | None], Any]


def run_now(work: Callable[[Notify], T], ready: Notify | None = None) -> T:
    """Return `work(notify)`, as `World.compute` does, without a world."""
    return work(ready if ready is not None else _ignore)


def _ignore(part: Any) -> None:
    pass


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
        batches: `.next()` gives minibatches with `num_samples`; None: only to evaluate.
        optimizer: from a list of parameters to a torch optimiser.
        loss: from (model, minibatch) to the mean loss; `model.loss(minibatch)` if not
            given. Arrays of a named tuple come as tensors on `device`.
        compute: runs the work, `World.compute` under a world.
        device: "cpu", "cuda:0", ...
        seed: of dropout; give each rank another.
        flat: whether the optimiser gets theta as one parameter (its update is then
            one fused operation) or the model's own parameters.

    Raises:
        ModelError: the model has no float32 parameters to train.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        compute: Compute | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        flat: bool = True,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model.to(self.device)
        self.batches = batches
        self.samples = 0
        self._parameters = FlatParameters(self.model, self.device)
        self.layout = self._parameters.layout
        self.theta = self._parameters.theta
        self.grad = self._parameters.grad
        self._loss = loss or (lambda model, batch: model.loss(batch))
        self._compute: Compute = compute or run_now
        self._random = RandomState(seed, self.device)
        if flat:
            self._optimised = {"theta": nn.Parameter(self.theta)}
        else:
            slots = self._parameters.slots
            self._optimised = {slot.segment.name: slot.parameter for slot in slots}
        self.optimizer = optimizer(list(self._optimised.values()))
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._lr_ratios = [rate / rates[0] if rates[0] else 1.0 for rate in rates]

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
            ModelError: the parameters are not views of theta any more.
        """
        batch = self._to_device(self.batches.next())  # may wait for a lease

        def work(notify: Notify) -> float | Tensor:
            return self._differentiate(batch, notify, scale)

        return self._compute(work, ready)

    def _differentiate(
        self, batch: Any, notify: Notify, scale: float
    ) -> float | Tensor:
        self._parameters.check()
        self._random.put_in_place()
        loss = self._loss(self.model, batch)
        self._parameters.backward(loss, notify, scale)
        self.samples += int(batch.num_samples)
        return loss.detach() if loss.is_cuda else loss.item()

    def update(self) -> None:
        """Take one step of the optimiser: theta <- theta - lr * P(grad)."""
        self._parameters.attach_grad()
        if "theta" in self._optimised:
            self._optimised["theta"].grad = self.grad
        self.optimizer.step()

    @property
    def is_plain_sgd(self) -> bool:
        """Whether `update` is theta <- theta - lr * grad and nothing else.

        Hooks of the optimiser (clipping) are something else.
        """
        optimizer: Any = self.optimizer
        groups = optimizer.param_groups
        extras = ("momentum", "weight_decay", "maximize")
        return (
            type(optimizer) is torch.optim.SGD
            and not optimizer._optimizer_step_pre_hooks
            and not optimizer._optimizer_step_post_hooks
            and not any(group[key] for group in groups for key in extras)
            and all(group["lr"] == groups[0]["lr"] for group in groups)
        )

    def moments(self) -> dict[str, Tensor]:
        """Return the optimiser's state vectors (momentum, ...), 1-D, by name.

        They are its own memory: what changes them changes the optimiser.
        """
        found: dict[str, Tensor] = {}
        for owner, parameter in self._optimised.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    name = key if owner == "theta" else f"{key}/{owner}"
                    found[name] = value.view(-1)
        return found

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group; others keep their ratio to it."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group, ratio in zip(
            self.optimizer.param_groups, self._lr_ratios, strict=True
        ):
            group["lr"] = ratio * value

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> Sums:
        """Return what the model makes of `batches`, summed.

        The sums are of `model.nll(minibatch)`, 0-d float64, or a pair with the number
        of wrong guesses; where a model has none, the mean loss times `num_samples`.
        Training goes on afterwards as if nothing had been: modes and carried state are
        put back, and no random numbers drawn.
        """
        self._parameters.check()
        modes = [(module, module.training) for module in self.model.modules()]
        carried = self._carried()
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        errors: Any = None
        count = 0
        self.model.eval()
        self._load_carried(())
        try:
            for batch in batches:
                found = self._nll(self._to_device(batch))
                if isinstance(found, tuple):
                    errors = found[1] + (0 if errors is None else errors)
                    found = found[0]
                nll += found
                count += int(batch.num_samples)
        finally:
            for module, training in modes:
                module.training = training
            self._load_carried(carried)
        return Sums(nll.item(), count, math.nan if errors is None else float(errors))

    def _nll(self, batch: Any) -> Any:
        nll = getattr(self.model, "nll", None)
        if nll is not None:
            return nll(batch)
        return self._loss(self.model, batch).double() * int(batch.num_samples)

    def load_theta(self, theta_P: Any) -> None:
        """Set theta, from a numpy array of (P,) float32.

        Raises:
            CheckpointError: it is of another size.
        """
        if len(theta_P) != self.layout.size:
            raise CheckpointError(
                f"theta: the checkpoint has {len(theta_P)} parameters, this model"
                f" {self.layout.size}"
            )
        self.theta.copy_(torch.as_tensor(theta_P))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on, to the bit: name -> value.

        theta, samples, lr; optimizer/PARAMETER/KEY; random/DEVICE; carried/N;
        model/NAME for buffers and frozen parameters; batches/NAME.
        """
        self._parameters.check()
        state: dict[str, Any] = {
            "theta": to_numpy(self.theta),
            "samples": self.samples,
            "lr": self.lr,
        }
        for index, parameter in enumerate(self._optimised.values()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    state[f"optimizer/{index}/{key}"] = to_numpy(value)
        for index, part in enumerate(self._carried()):
            state[f"carried/{index}"] = to_numpy(part)
        for name, value in self._other_tensors().items():
            state[f"model/{name}"] = to_numpy(value)
        if self.batches is not None:
            for name, value in self.batches.state().items():
                state[f"batches/{name}"] = value
        return {**state, **self._random.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned.

        Raises:
            CheckpointError: it is the state of another model.
        """
        self.load_theta(state["theta"])
        self.samples = int(state["samples"])
        self._load_optimizer(_under("optimizer/", state))
        self.lr = float(state["lr"])
        carried = _under("carried/", state)
        order = sorted(carried, key=int)
        self._load_carried(tuple(self._tensor(carried[index]) for index in order))
        others = self._other_tensors()
        for name, value in _under("model/", state).items():
            others[name].copy_(torch.as_tensor(value))
        if self.batches is not None:
            self.batches.load_state(_under("batches/", state))
        self._random.load_state(state)

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        found: dict[int, dict[str, Any]] = {}
        for path, value in saved.items():
            index, key = path.split("/", 1)
            is_array = isinstance(value, np.ndarray | np.generic)
            found.setdefault(int(index), {})[key] = (
                torch.tensor(value) if is_array else value
            )
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": found, "param_groups": groups})

    def _other_tensors(self) -> dict[str, Tensor]:
        """Return the module's tensors that are not in theta, by name."""
        flat = {id(slot.parameter) for slot in self._parameters.slots}
        named = self.model.state_dict(keep_vars=True)
        return {
            name: value.detach()
            for name, value in named.items()
            if isinstance(value, Tensor) and id(value) not in flat
        }

    def _carried(self) -> tuple[Tensor, ...]:
        carried = getattr(self.model, "carried", None)
        return tuple(carried()) if carried else ()

    def _load_carried(self, parts: tuple[Tensor, ...]) -> None:
        load = getattr(self.model, "load_carried", None)
        if load:
            load(parts)

    def _to_device(self, batch: Any) -> Any:
        """Return a named tuple with its arrays as tensors on the device."""
        if not hasattr(batch, "_replace"):
            return batch
        arrays = {
            name: self._tensor(value)
            for name, value in batch._asdict().items()
            if isinstance(value, np.ndarray | Tensor)
        }
        return batch._replace(**arrays)

    def _tensor(self, value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


class RandomState:
    """One learner's state of torch's global random generators (CPU and its GPU)."""

    _in_place: ClassVar[RandomState | None] = None  # whose state the generators hold

    def __init__(self, seed: int, device: torch.device) -> None:
        self.gpu = device if device.type == "cuda" else None
        self._saved = [torch.Generator().manual_seed(seed).get_state()]
        if self.gpu is not None:
            generator = torch.Generator(self.gpu).manual_seed(seed)
            self._saved.append(generator.get_state())

    def put_in_place(self) -> None:
        """Let the global generators go on from this state."""
        holder = RandomState._in_place
        if holder is self:
            return
        if holder is not None:
            holder._saved = holder._read()
        self._write()
        RandomState._in_place = self

    def state(self) -> dict[str, Any]:
        """Return it: device type -> bytes."""
        if RandomState._in_place is self:
            self._saved = self._read()
            # cuDNN keeps a dropout state that cannot be read; setting the generator
            # makes it draw a new one, here as after a resume.
            self._write()
        names = ("random/cpu", "random/cuda")
        return {n: s.numpy().copy() for n, s in zip(names, self._saved, strict=False)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; a GPU the state lacks stays as it is."""
        names = ("random/cpu", "random/cuda")[: len(self._saved)]
        for index, name in enumerate(names):
            if name in state:
                self._saved[index] = torch.tensor(state[name], dtype=torch.uint8)
        if RandomState._in_place is self:
            self._write()

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.gpu is not None:
            states.append(torch.cuda.get_rng_state(self.gpu))
        return states

    def _write(self) -> None:
        torch.set_rng_state(self._saved[0])
        if self.gpu is not None:
            torch.cuda.set_rng_state(self._saved[1], self.gpu)


def to_numpy(value: Any) -> Any:
    """Return a tensor as a numpy array of its own memory; anything else as it is."""
    return value.detach().cpu().numpy().copy() if isinstance(value, Tensor) else value


def _under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of `state` whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix)
    }
