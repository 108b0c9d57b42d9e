"""Where a run goes on from: a checkpoint, and what is different since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from mpilm.errors import CheckpointError, DataError
from mpilm.storage.merged import Merged
from mpilm.storage.saved import State, under
from mpilm.strategies.rest import merge_rest
from mpilm.train.changes import Change
from mpilm.train.metrics import Totals
from mpilm.world.base import World

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


BEGUN = ("learner", "strategy")  # parts that take over what was merged

# sections of the configuration that a part's state depends on, if of another name
SETTINGS_OF = {"learner": ("optim", "model"), "best": ("schedule",)}

# of a rank's totals, what is a sum over ranks
ADDED = ["bytes_sent", "bytes_received", "messages"]
ADDED += ["loss_sum", "loss_count", "skipped"]


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
    merged   what the ranks have left, if they were not as many; `own` is made of it
    """

    own: State
    step: int
    samples: int
    changes: list[Change]
    is_end: bool
    merged: Merged | None = None

    def begin_(self, learner: Learner, world: World) -> None:
        """Give a learner the mean model, before `Strategy.start`, if there is one.

        Raises:
            CheckpointError, DataError: it does not fit; on all ranks.

        Communicates: collective, a small allgather and what `merge_rest` does.
        """
        if self.merged is None:
            return
        with world.all_or_none():
            learner.take_over(self.merged.under("learner"), world.rank, world.size)
        merge_rest(world.comm, learner, learner.theta)

    def restore_(self, parts: Mapping[str, Stateful]) -> Totals:
        """Let the parts take up their states; return the totals.

        Raises:
            CheckpointError: one does not fit.
        """
        for name, part in parts.items():
            if self.merged is not None and name in BEGUN:
                continue
            state = under(name, self.own)
            with self.blaming_changes(name):
                if name == "learner":
                    # its optimiser's settings are the configuration's
                    cast("Learner", part).load_state(state, settings=False)
                else:
                    part.load_state(state)
        totals = under("totals", self.own)
        if self.merged is not None:
            of = [under("totals", state) for state in self.merged.held.values()]
            totals |= {name: sum(each[name] for each in of) for name in ADDED}
        return Totals(**totals)

    @contextmanager
    def blaming_changes(self, part: str) -> Iterator[None]:
        """Name the settings that were changed where a part refuses its state.

        Raises:
            MpilmError: as it was raised, behind these settings.
        """
        try:
            yield
        except (CheckpointError, DataError) as error:
            is_place = isinstance(error, DataError)  # of the learner's data
            of = ("data",) if is_place else SETTINGS_OF.get(part, (part,))
            changes = [c for c in self.changes if c.key.partition(".")[0] in of]
            if not changes:
                raise
            said = ", ".join(
                f"{c.key} was {c.shown[0]}, is {c.shown[1]}" for c in changes
            )
            raise type(error)(f"{said}: {error}", everywhere=error.everywhere) from None

    def lines(self) -> Iterator[str]:
        """Yield what a person wants to know of it."""
        yield f"resumed at step {self.step:,}, {self.samples:,} samples"
        if self.merged is not None:
            yield (
                f"ranks: {self.merged.size} until now; all go on from the mean of their"
                " models, and the data is split anew"
            )
        for change in self.changes:
            yield f"changed: {change}"
