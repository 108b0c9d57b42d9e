"""Where a run goes on from: a checkpoint, and what is different since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from mpilm.storage.saved import State, under
from mpilm.train.changes import Change
from mpilm.train.metrics import Totals

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


class Stateful(Protocol):
    """A part of a trainer that a checkpoint holds."""

    def state(self) -> State:
        """Return what a checkpoint must hold of this rank."""

    def load_state(self, state: State) -> None:
        """Take up what `state` returned; of a part that is new here it is empty."""


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run goes on from.

    own      this rank's state
    step     minibatches of rank 0 when it was written
    samples  of all ranks when it was written
    changes  settings that the run had before, and has not now
    is_end   the run had come to its end, and nothing is changed
    """

    own: State
    step: int
    samples: int
    changes: list[Change]
    is_end: bool

    def restore_(self, parts: Mapping[str, Stateful]) -> Totals:
        """Let the parts take up their states; return the totals.

        Raises:
            CheckpointError: one does not fit.
        """
        for name, part in parts.items():
            state = under(name, self.own)
            if name == "learner":  # its optimiser's settings are the configuration's
                cast("Learner", part).load_state(state, settings=False)
            else:
                part.load_state(state)
        return Totals(**under("totals", self.own))

    def lines(self) -> Iterator[str]:
        """Yield what a person wants to know of it."""
        yield f"resumed at step {self.step:,}, {self.samples:,} samples"
        for change in self.changes:
            yield f"changed: {change}"
