"""A torch optimiser over theta, or over the model's own parameters.

    one vector   the update is one fused operation; for optimisers of which every
                 element has the same settings and looks at no other
    parameters   for groups with settings of their own (weight decay of matrices only),
                 and for optimisers that look at shapes or norms (Adafactor, Muon, LAMB)

Which of the two: what the given function makes of the model's own parameters decides.
If that is one group of all of them in one of torch's elementwise optimisers, it is
called once more with the vector.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from mpilm.errors import CheckpointError, ModelError
from mpilm.learner.rest import stored

Make = Callable[[list[nn.Parameter]], optim.Optimizer]

# Of these a state of zeros is that before the first step.
ZEROED: tuple[type, ...] = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.RAdam),
    *(optim.RMSprop, optim.Adadelta, optim.Adagrad),
)
ELEMENTWISE: tuple[type, ...] = (*ZEROED, optim.NAdam, optim.ASGD, optim.Rprop)
# keys of a group that say how it is computed, not what
NOT_SETTINGS = ("params", "param_names", "foreach", "fused", "capturable")
THETA = "theta"


class LearnerOptimizer:
    """The optimiser of a learner, its moments, settings and state.

    Args:
        make: from a list of parameters to a torch optimiser.
        own: the model's trainable parameters by name, views of theta.
        theta: (P,), without row tables
        flat: whether it gets theta as one parameter; None: see above.

    torch       the optimiser
    parameters  what it was given, by name; "theta" if that is theta

    Raises:
        ModelError: it needs a closure or sparse gradients, or holds parameters that
            the model does not have.
    """

    def __init__(
        self,
        make: Make,
        own: dict[str, nn.Parameter],
        theta: Tensor,
        flat: bool | None,
    ) -> None:
        self.parameters = own
        if not callable(make):
            raise ModelError(
                f"optimizer: of type {type(make).__name__}: give a function from"
                " parameters to a torch optimiser, or the class of one"
            )
        if not flat:
            self.torch = make(list(own.values()))
        if flat or (flat is None and is_elementwise(self.torch, own)):
            vector = {THETA: nn.Parameter(theta)}
            found = make(list(vector.values()))
            if flat or is_elementwise(found, vector):  # it may know the model itself
                self.parameters, self.torch = vector, found
        self._require_usable()
        groups = self.torch.param_groups
        self._sizes = [len(group["params"]) for group in groups]
        rates = [float(group["lr"]) for group in groups]
        self._reference = next((n for n, rate in enumerate(rates) if rate), 0)
        self._ratios = [
            rate / rates[self._reference] if any(rates) else 1.0 for rate in rates
        ]
        self._first = {
            name: {key: first_value(value) for key, value in state.items()}
            for name, state in self._states()
            if isinstance(state, dict)
        }

    def _require_usable(self) -> None:
        kind = type(self.torch).__name__
        if not hasattr(self.torch, "param_groups"):
            raise ModelError(f"the optimizer function returned no optimiser but {kind}")
        step = getattr(self.torch, "step", None)
        closure = step and inspect.signature(step).parameters.get("closure")
        if closure and closure.default is inspect.Parameter.empty:
            raise ModelError(
                f"optimiser {kind} computes gradients itself, several in a step: a"
                " Learner needs one that takes the gradient it is given (SGD, AdamW)"
            )
        if isinstance(self.torch, optim.SparseAdam):
            raise ModelError("optimiser SparseAdam: the gradient here is dense")
        if any("lr" not in group for group in self.torch.param_groups):
            raise ModelError(f"optimiser {kind}: a group has no learning rate lr")
        own = {id(parameter) for parameter in self.parameters.values()}
        held = [p for group in self.torch.param_groups for p in group["params"]]
        foreign = [
            p for p in held if id(p) not in own and p.requires_grad and p.numel()
        ]
        if foreign:
            raise ModelError(
                f"optimiser {kind}: {len(foreign)} of its parameters are not among"
                " those that the optimizer function was given"
            )
        if THETA in self.parameters and len(self.torch.param_groups) > 1:
            raise ModelError(
                f"optimiser {kind}: it has groups, but with flat = True there is one"
                " parameter: leave flat out"
            )

    def step(self, more: Sequence[Tensor] = ()) -> None:
        """Take one step; every parameter's .grad is set.

        Args:
            more: gradients that are not this optimiser's, but in the norm that a hook
                may clip: it finds them as `row_gradients`.

        Raises:
            ModelError: the groups are others than at first.
        """
        self._require_same_groups()
        if more:
            setattr(self.torch, "row_gradients", more)  # noqa: B010  no field of torch's
        self.torch.step()

    def _require_same_groups(self) -> None:
        if [len(group["params"]) for group in self.torch.param_groups] != self._sizes:
            raise ModelError(
                "the optimiser's parameter groups were changed under the Learner: make"
                " them in the function that it is given, or make a new Learner"
            )

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step is theta <- theta - lr * grad, no more, of all of theta."""
        optimizer: Any = self.torch
        groups = optimizer.param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
        extras = ("momentum", "weight_decay", "maximize")
        return (
            type(optimizer) is optim.SGD
            and not optimizer._optimizer_step_pre_hooks
            and not optimizer._optimizer_step_post_hooks
            and not any(group[key] for group in groups for key in extras)
            and all(group["lr"] == groups[0]["lr"] for group in groups)
            and all(id(parameter) in held for parameter in self.parameters.values())
        )

    def _states(self) -> Iterator[tuple[str, Any]]:
        """Yield (parameter, state) where the optimiser keeps one."""
        for name, parameter in self.parameters.items():
            state = self.torch.state.get(parameter)
            if state is not None:
                yield name, state

    # learning rate
    @property
    def lr(self) -> float:
        """Learning rate of the first group that had one above 0."""
        return float(self.torch.param_groups[self._reference]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self._require_same_groups()
        for group, ratio in zip(self.torch.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(ratio * value)
            else:
                group["lr"] = ratio * value

    # moments
    def moments(self) -> dict[str, Tensor]:
        """Return the state vectors that have a value for each parameter, 1-D."""
        found: dict[str, Tensor] = {}
        for name, state in self._states():
            shape = self.parameters[name].shape
            for key, value in state.items():
                if key != "step" and is_moment(value, shape):
                    entry = key if name == THETA else f"{key}/{name}"
                    found[entry] = value.view(-1)
        return found

    def reset(self) -> None:
        """Put the state back to what it was before the first step, counters as well.

        A state that is a view of something else (NgSgd: its Fisher matrices) stays.
        """
        for name, state in self._states():
            if not isinstance(state, dict):
                continue
            first = self._first.get(name, {})
            for key in list(state):
                if key in first:
                    state[key] = reset_value(state[key], first[key])
                elif self._starts_at_zero(state[key]):
                    state[key] = reset_value(state[key], 0)
                else:
                    del state[key]

    def _starts_at_zero(self, value: Any) -> bool:
        plain = not any(group.get("dampening") for group in self.torch.param_groups)
        is_number = isinstance(value, Tensor | int | float)
        return plain and is_number and type(self.torch) in ZEROED

    # state
    def state(self) -> dict[str, Any]:
        """Return settings and state: "settings", a JSON text; INDEX/KEY.

        Raises:
            CheckpointError: a setting that is no number, text or list of those.
        """
        self._require_same_groups()
        about = {
            **self._kind(),
            "lr_ratios": self._ratios,
            "groups": [
                {k: encoded(v, k) for k, v in group.items() if k not in NOT_SETTINGS}
                for group in self.torch.param_groups
            ],
        }
        found: dict[str, Any] = {"settings": json.dumps(about)}
        for index, parameter in enumerate(self.parameters.values()):
            for key, value in self.torch.state.get(parameter, {}).items():
                if value is not None:
                    is_tensor = isinstance(value, Tensor)
                    found[f"{index}/{key}"] = stored(value) if is_tensor else value
        return found

    def _kind(self) -> dict[str, Any]:
        """Return what must be the same for a state to fit."""
        numbers = {id(p): n for n, p in enumerate(self.parameters.values())}
        return {
            "optimizer": type(self.torch).__name__,
            "parameters": {n: list(p.shape) for n, p in self.parameters.items()},
            "members": [
                [numbers[id(p)] for p in group["params"] if id(p) in numbers]
                for group in self.torch.param_groups
            ],
        }

    def read(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return what `load_state` takes up of what `state` returned.

        Raises:
            CheckpointError: it is the state of another optimiser.
        """
        try:
            about: dict[str, Any] = json.loads(state["settings"])
        except (KeyError, ValueError, TypeError):
            raise CheckpointError(
                "optimiser: the checkpoint has no settings of one"
            ) from None
        for key, here in self._kind().items():
            if about.get(key) != here:
                raise CheckpointError(
                    f"optimiser: {key} {brief(about.get(key))} in the checkpoint, here"
                    f" {brief(here)}: resume with the optimiser it was made with"
                )
        found: dict[int, dict[str, Any]] = {}
        for path, value in state.items():
            if path == "settings":
                continue
            index, key = path.split("/", 1)
            is_array = isinstance(value, np.ndarray | np.generic)
            found.setdefault(int(index), {})[key] = (
                torch.tensor(value) if is_array else value
            )
        return {**about, "state": found}

    def load_state(self, found: dict[str, Any], *, settings: bool = True) -> None:
        """Take up what `read` returned.

        Args:
            settings: whether the groups' settings are taken up as well.
        """
        groups = self.torch.state_dict()["param_groups"]
        # torch counts parameters through its groups, which may be in another order
        held = [p for group in self.torch.param_groups for p in group["params"]]
        places = {id(parameter): place for place, parameter in enumerate(held)}
        own = [id(parameter) for parameter in self.parameters.values()]
        state = {places[own[n]]: value for n, value in found["state"].items()}
        self.torch.load_state_dict({"state": state, "param_groups": groups})
        if settings:
            self._ratios = found["lr_ratios"]
            for group, kept in zip(
                self.torch.param_groups, found["groups"], strict=True
            ):
                for key, value in kept.items():
                    group[key] = decoded(value, group.get(key))


def is_elementwise(optimizer: Any, parameters: dict[str, nn.Parameter]) -> bool:
    """Return whether all elements of all `parameters` are treated alike."""
    groups: Any = getattr(optimizer, "param_groups", ())
    if type(optimizer) not in ELEMENTWISE or len(groups) != 1:
        return False
    return set(map(id, groups[0]["params"])) == set(map(id, parameters.values()))


def is_moment(value: Any, shape: torch.Size) -> bool:
    """Return whether a state entry has a real number for each element."""
    is_tensor = isinstance(value, Tensor) and value.shape == shape
    return is_tensor and value.is_floating_point()


def first_value(value: Any) -> Any:
    """Return what can bring a state entry back: one number if it is full of one."""
    if not isinstance(value, Tensor):
        return value
    is_even = value.numel() and bool((value == value.reshape(-1)[0]).all())
    return value.reshape(-1)[0].item() if is_even else value.clone()


def reset_value(value: Any, first: Any) -> Any:
    """Return a state entry set to `first`, in place if it is a tensor."""
    if not isinstance(value, Tensor):
        return first
    return value.copy_(first) if isinstance(first, Tensor) else value.fill_(first)


def encoded(value: Any, key: str) -> Any:
    """Return a setting as JSON can hold it, to the bit.

    >>> encoded((0.9, 0.999), "betas"), encoded(torch.tensor(0.5), "lr")
    ([0.9, 0.999], {'tensor': 'float32', 'value': 0.5})
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": dtype, "value": value.tolist()}
    if isinstance(value, tuple | list):
        return [encoded(part, key) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"optimiser: {key} = {value!r} cannot be stored")


def decoded(value: Any, here: Any) -> Any:
    """Return what `encoded` was given.

    Args:
        here: what the setting is now: a tensor is overwritten, a tuple stays one.
    """
    if isinstance(value, dict):
        tensor = torch.tensor(value["value"], dtype=getattr(torch, value["tensor"]))
        return here.copy_(tensor) if isinstance(here, Tensor) else tensor
    if isinstance(value, list):
        parts = here if isinstance(here, tuple | list) else [None] * len(value)
        found = [decoded(*pair) for pair in zip(value, parts, strict=True)]
        return tuple(found) if isinstance(here, tuple) else found
    return value


def brief(value: Any) -> str:
    """Return a short text for a value in a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
