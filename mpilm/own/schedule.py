"""A torch scheduler in the place of a schedule of section [schedule].

It steps after each step of the optimiser, at the end of each epoch of this rank, or
(ReduceLROnPlateau) at each validation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mpilm.errors import CheckpointError, ModelError
from mpilm.learner.optimizer import NOT_SETTINGS, decoded, encoded
from mpilm.optim.configs import ConstantConfig
from mpilm.optim.schedules import Schedule

PER = ("step", "epoch")


class TorchSchedule(Schedule):
    """What the trainer asks a schedule, answered by a torch scheduler.

    Args:
        scheduler: of `optimizer`.
        per: "step" or "epoch".
        epoch: returns the epochs that this rank has begun.

    hooks  in the optimiser, to be removed after training: it may be trained with again

    Raises:
        CheckpointError: its state is more than numbers and texts.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizer: Optimizer,
        *,
        per: str,
        epoch: Callable[[], int],
    ) -> None:
        super().__init__(ConstantConfig(), lr=1.0, samples=1)
        self.scheduler, self.optimizer = scheduler, optimizer
        self._epoch, self._seen = epoch, 0
        self._first = self._settings()
        self.by_validation = isinstance(scheduler, ReduceLROnPlateau)
        self.hooks: list[Any] = []
        self.state()  # what cannot be stored is refused before training
        if not self.by_validation:
            step = self._after_epoch if per == "epoch" else self._after_step
            self.hooks.append(optimizer.register_step_post_hook(step))

    def _after_step(self, *_: Any) -> None:
        try:
            self.scheduler.step()
        except ValueError as error:  # OneCycleLR beyond its last step
            name = type(self.scheduler).__name__
            raise ModelError(
                f"scheduler {name}: {error} (it counts this rank's own)"
            ) from error

    def _after_epoch(self, *_: Any) -> None:
        while self._seen < self._epoch():
            self._seen += 1
            self._after_step()

    def observe(self, loss: float, accuracy: float = 0.0) -> bool:
        if self.by_validation:
            self.scheduler.step(loss)
        return True

    def _settings(self) -> list[dict[str, Any]]:
        """Return the settings of the optimiser's groups."""
        return [
            {k: encoded(v, k) for k, v in group.items() if k not in NOT_SETTINGS}
            for group in self.optimizer.param_groups
        ]

    def state(self) -> dict[str, Any]:
        """Return its state, and the settings that it has changed, as JSON.

        Raises:
            CheckpointError: its state is more than numbers and texts.
        """
        changed = [
            {k: v for k, v in now.items() if v != before.get(k)}
            for now, before in zip(self._settings(), self._first, strict=True)
        ]
        try:
            own = as_pairs(self.scheduler.state_dict())
        except CheckpointError as error:
            name = type(self.scheduler).__name__
            raise CheckpointError(f"scheduler {name}: {error}") from None
        return {
            "torch": json.dumps({"own": own, "groups": changed}),
            "seen": self._seen,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; of another kind of schedule nothing."""
        if "torch" not in state:
            return
        kept = json.loads(state["torch"])
        own = from_pairs(kept["own"], self.scheduler.state_dict())
        self.scheduler.load_state_dict(own)
        self._seen = int(state["seen"])
        groups = self.optimizer.param_groups
        for group, changed in zip(groups, kept["groups"], strict=True):
            for key, value in changed.items():
                group[key] = decoded(value, group.get(key))


def as_pairs(value: Any) -> Any:
    """Return a scheduler's state as JSON can hold it; keys may be numbers.

    >>> as_pairs({"milestones": Counter({30: 1})})
    {'items': [['milestones', {'items': [[30, 1]]}]]}

    Raises:
        CheckpointError: it is more than numbers and texts.
    """
    if isinstance(value, Mapping):
        return {
            "items": [[as_pairs(key), as_pairs(part)] for key, part in value.items()]
        }
    if isinstance(value, tuple | list):
        return [as_pairs(part) for part in value]
    return encoded(value, "a value of its state_dict")


def from_pairs(value: Any, here: Any) -> Any:
    """Return what `as_pairs` was given.

    Args:
        here: what is there now: a tuple stays one, and so does a Counter.
    """
    if isinstance(value, dict) and "items" in value:
        known = here if isinstance(here, Mapping) else {}
        found = {key: from_pairs(part, known.get(key)) for key, part in value["items"]}
        return Counter(found) if isinstance(here, Counter) else found
    if isinstance(value, list):
        parts = here if isinstance(here, tuple | list) else ()
        known = dict(enumerate(parts))
        whole = [from_pairs(part, known.get(n)) for n, part in enumerate(value)]
        return tuple(whole) if isinstance(here, tuple) else whole
    return value if is_older(value) else decoded(value, None)


def is_older(value: Any) -> bool:
    """Return whether it is a mapping as it was stored before `as_pairs`."""
    return isinstance(value, dict) and "tensor" not in value


def scheduler_of(given: Any, optimizer: Optimizer) -> Any:
    """Return a torch scheduler: as it is, or made by a function of the optimiser.

    A class is such a function.

    Raises:
        ModelError: it is none, or of another optimiser.
    """
    made = given
    if isinstance(given, type) or not hasattr(given, "step"):
        if not callable(given):
            raise ModelError(
                f"scheduler: of type {type(given).__name__}: give a torch scheduler, or"
                " a function from the optimiser to one"
            )
        try:
            made = given(optimizer)
        except (TypeError, ValueError) as error:
            name = getattr(given, "__name__", type(given).__name__)
            raise ModelError(f"scheduler {name}: {error}") from error
    if not hasattr(made, "step") or not hasattr(made, "state_dict"):
        raise ModelError(f"scheduler: a {type(made).__name__} is no torch scheduler")
    of = getattr(made, "optimizer", optimizer)
    if of is not optimizer:
        raise ModelError(
            "scheduler: is of another optimiser than the one that is trained with: give"
            " both, or a function from the optimiser to the scheduler"
        )
    return made


def optimizer_maker(given: Any, settings: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the function from parameters to an optimiser that a Learner takes.

    Args:
        given: a torch optimiser, its class, or that function.
        settings: for a class or function.

    Raises:
        ModelError: it is neither, or refuses the settings.
    """
    if isinstance(given, Optimizer):
        if settings:
            raise ModelError(
                "optimizer_settings: the optimiser is made already; give its class"
            )
        return lambda parameters: given
    if not callable(given):
        raise ModelError(
            f"optimizer: of type {type(given).__name__}: give a torch optimiser, its"
            " class, or a function from parameters to one"
        )

    def make(parameters: Any) -> Any:
        try:
            return given(parameters, **settings)
        except (TypeError, ValueError) as error:
            name = getattr(given, "__name__", type(given).__name__)
            raise ModelError(f"optimizer {name}: {error}") from error

    return make
